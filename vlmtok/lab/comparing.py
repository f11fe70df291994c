"""One picture and prompt in front of one model: what any number of methods are compared on."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from .. import timing
from ..adapters import adapter_for
from ..compression import Compression, compress
from ..core.method import Method
from ..core.trace import PictureTrace, Trace
from ..errors import PassError, VlmtokError, VlmtokWarning
from ..loading.models import Loaded
from ..loading.pictures import open_picture
from ..loading.problems import LoadError, line_of, quiet
from ..timing import Case, Progress, Ratio, tell
from .comparison import Comparison, VisualTokens
from .legend import legend
from .overlay import overlay as draw_overlay
from .region import region
from .runners import Answer, Looker, Runner, Speaker

if TYPE_CHECKING:
    from ..cost.report import Report


class Comparing:
    """One picture and prompt in front of one model, whose bare answer is given once.

    Args:
        model: from `load`.
        image: a PIL picture or the path of one.
        prompt: as for `compare`.
        max_new_tokens: of the answers.
        adapter: as for `vlmtok.compress`.
        progress: told what is being done.

    Raises:
        LoadError: the picture cannot be read.
        ParameterError: the prompt does not fit.
    """

    def __init__(
        self,
        model: Loaded,
        image: Image.Image | str | os.PathLike[str],
        prompt: str | None = None,
        *,
        max_new_tokens: int = 32,
        adapter: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.adapter, self.progress = model, adapter, progress
        self.image = image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image)
        self.runner: Runner
        if model.language:
            self.runner = Speaker(model, self.image, prompt, max_new_tokens)
        else:
            self.runner = Looker(model, self.image, prompt)
        self._bare: Answer | None = None

    def check(self, method: str | Method | Sequence[Method | str]) -> None:
        """Attaches methods and takes them off again.

        Raises:
            VlmtokError: they do not fit the model, see `vlmtok.compress`.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlmtokWarning)  # nothing ran, and the run itself says the rest
            self._compressed(method).remove()

    def bare(self) -> Answer:
        """The bare model's answer."""
        if self._bare is None:
            tell(self.progress, "answering, bare", 1, 2)
            with torch.inference_mode(), quiet():
                self._bare = self.runner.answer()
        return self._bare

    def with_method(
        self, method: str | Method | Sequence[Method | str], *, rounds: int = 5, limit: float = 10.0
    ) -> Comparison:
        """The model under methods beside the bare one.

        Args:
            method: as for `vlmtok.compress`.
            rounds: rounds of the measurement of latency; 0 measures none.
            limit: seconds after which no further round begins.

        Raises:
            VlmtokError: the methods do not fit the model; no site fired, or the books are not of this answer.
        """
        model, runner = self.model, self.runner
        with torch.inference_mode(), quiet():
            with self._compressed(method, trace=True) as run:
                tell(self.progress, "answering, compressed", 0, 2)
                short = self._answer_under(run)
                report = _checked(run, runner, short)
                trace = run.trace()
                names = method if isinstance(method, str) else "+".join(map(str, run.methods))
                seen, overlay, words, problem = _overlay(self.image, trace, model.processor, names)
            full = self.bare()
            tell(self.progress, "answering, bare", 2, 2)
            latency, seconds = _latency(runner, lambda: self._compressed(method), model, rounds, limit, self.progress)
        return Comparison(
            model=model,
            method=names,
            prompt=runner.prompt,
            bare=full,
            compressed=short,
            loyalty=runner.loyalty(full, short),
            tokens=VisualTokens.of(report, trace, _depth(model.model, self.adapter)),
            report=report,
            latency=latency,
            seconds=seconds,
            overlay=overlay,
            overlay_legend=words,
            overlay_problem=problem,
            image=self.image,
            trace=seen,
            environment=timing.environment(model.device),
        )

    def _answer_under(self, run: Compression) -> Answer:
        """The compressed answer; what fails where the bare model answers goes up as it is.

        Raises:
            LoadError: the bare model cannot answer either.
        """
        try:
            return self.runner.answer()
        except (MemoryError, VlmtokError, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            try:
                with run.paused():
                    self.bare()
            except Exception as own:
                size = "{} x {}".format(*self.image.size)
                raise LoadError(
                    f"{self.model.name!r} cannot answer about this picture ({size} pixels), bare as it is: "
                    f"{type(own).__name__}: {line_of(own)}"
                ) from own
            raise problem

    def _compressed(self, method: str | Method | Sequence[Method | str], trace: bool = False) -> Compression:
        return compress(self.model.model, method, trace=trace, adapter=self.adapter)


def _checked(run: Compression, runner: Runner, answer: Answer) -> Report:
    """The report of the answer, held against what was asked: figures of a pass that was not understood are none.

    Raises:
        PassError: no method was asked, or the books do not show one prefill with all pictures and a step for each
            further token.
    """
    report = run.report()
    problem = report.problem or runner.doubt(report, answer)
    if problem is not None:
        raise PassError(
            f"{' + '.join(map(str, run.methods))}: {problem}; no figures can be given. `vlmtok doctor` tells whether "
            "this version of the host library is understood"
        )
    return report


def _depth(model: nn.Module, adapter: str | None) -> int | None:
    """Layers of the language model, or None where none can be cut."""
    decoder = adapter_for(model, adapter).layout().stages.get("decoder")
    return None if decoder is None else decoder.depth


def _latency(
    runner: Runner,
    compressed: Callable[[], AbstractContextManager[Any]],
    model: Loaded,
    rounds: int,
    limit: float,
    progress: Progress | None,
) -> tuple[dict[str, Ratio], dict[str, tuple[float, float]]]:
    if not rounds:
        return {}, {}
    cases = []
    for stage, call in runner.stages().items():
        cases += [Case(f"{stage} bare", call, nullcontext), Case(f"{stage} compressed", call, compressed)]
    # Both answers have been given once: everything is warm but the hooks' first call.
    found = timing.interleave(cases, rounds=rounds, warmup=1, limit=limit, device=model.device, progress=progress)
    ratios, seconds = {}, {}
    for stage in runner.stages():
        bare, short = found[f"{stage} bare"], found[f"{stage} compressed"]
        ratios[stage] = Ratio.of(bare, short)
        if model.device.type == "cuda":
            seconds[stage] = (bare.median, short.median)
    return ratios, seconds


def _overlay(
    image: Image.Image, trace: Trace, processor: Any, title: str
) -> tuple[PictureTrace | None, Image.Image | None, str, str | None]:
    """The picture's trace, its overlay and how to read it, or why there is none: no reason to lose the figures."""
    try:
        found = joined(trace, image.size, processor)
        return found, draw_overlay(image, found, preprocess=processor, title=title), legend(found), None
    except VlmtokError as problem:
        return None, None, "", str(problem)


def joined(trace: Trace, size: tuple[int, int], preprocess: Any) -> PictureTrace:
    """One picture's trace, where the model has taken its crops for pictures of their own.

    Args:
        trace: of a pass with one picture.
        size: width and height of the picture.
        preprocess: as for `vlmtok.lab.region.region`.

    Returns:
        All its patches, with crops as parts 1.. and the crop that shows the whole picture as part 0.
    """
    if len(trace) == 1:
        return trace[0]
    owners, parts, shapes, numbers = [], [], {}, iter(range(1, len(trace) + 1))
    first = 0
    for index, piece in enumerate(trace.pictures):
        owners.append(torch.where(piece.owner < 0, -1, piece.owner + first))
        left, top, right, bottom = region(size, preprocess, index)
        whole = (right - left) * (bottom - top) > 0.9 * size[0] * size[1]
        number = 0 if whole else next(numbers)
        parts.append(torch.full((piece.patches,), number))
        if piece.grid is not None:
            shapes[number] = piece.grid
        first += piece.patches
    steps = []
    for step, (site, _) in enumerate(trace[0].steps):
        starts = itertools.accumulate((piece.patches for piece in trace.pictures), initial=0)
        held = [(piece.steps[step][1], start) for piece, start in zip(trace.pictures, starts)]
        steps.append((site, torch.cat([torch.where(owner < 0, -1, owner + start) for owner, start in held])))
    methods, tables = trace[0].methods, [piece.cached for piece in trace.pictures if piece.cached is not None]
    cached = torch.cat(tables, 1) if len(tables) == len(trace) else None
    made = PictureTrace(torch.cat(owners), tuple(steps), None, torch.cat(parts), shapes=shapes, methods=methods)
    return replace(made, cached=cached, cached_by=trace[0].cached_by)
