"""One picture, one prompt, one method: the bare model's answer beside the compressed model's.

This is what ``vlmtok run`` does, for notebooks too:

    model = vlmtok.session.load()                                   # the checkpoint that ships with the package
    result = vlmtok.session.compare(model, "cat.jpg", "what is this?", "todre:keep=0.1")
    print(result.compressed.text, result.report); result.overlay.save("overlay.png")
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import bench, viz
from .adapters import adapter_for
from .bench import Case, Progress, Ratio
from .compression import Compression, compress
from .errors import ParameterError, PassError, VlmtokError
from .guard import guarded
from .loading import Loaded, LoadError, load, open_picture, quiet, samples, skeleton
from .method import Method, layer_of, parse_methods
from .trace import PictureTrace, Trace

if TYPE_CHECKING:
    from .report import Report

DEFAULT_METHOD = "todre:keep=0.1"
"""For models that answer in words."""
DEFAULT_TOWER_METHOD = "pitome:ratio=0.9"
"""For towers."""
DEFAULT_PROMPT = "Describe this picture."
NO_PROMPT = "{!r} is a vision tower: it takes a picture and no prompt"
TOP = 5
"""Classes that a tower's answer names."""


# ---------------------------------------------------------------------- results
@dataclass(frozen=True)
class Answer:
    """What one of the two said.

    Attributes:
        text: a language model's answer; the best class, or a description of the embedding, of a tower.
        ids: new tokens of a language model, end of sequence included.
        classes: a tower's best classes with their probabilities.
        output: a tower's output `[F]`, or the first new token's logits, on the CPU in fp32.
    """

    text: str
    ids: tuple[int, ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    output: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


@dataclass(frozen=True)
class Loyalty:
    """How far the compressed model stays with the bare one, on this input.

    Attributes:
        same: whether the answers are equal: text, best class, or a cosine of at least 0.99.
        tokens: share of the bare answer's tokens that come at the same place, or None for towers.
        divergence: KL divergence of the first new token's or the classes' distribution, in nats, or None.
        cosine: of the towers' outputs, or None.
    """

    same: bool
    tokens: float | None = None
    divergence: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of one picture: in the language model, or in a lone tower.

    Attributes:
        bare: how many there are.
        first: how many enter the first layer of the compressed model,
        last: the last one,
        mean: and a layer on average.
    """

    bare: int
    first: float
    last: float
    mean: float

    @classmethod
    def of(cls, report: Report, trace: Trace, depth: int | None = None) -> VisualTokens:
        """Reads a pass of one picture and its report.

        Args:
            report: of the pass.
            trace: of the pass.
            depth: layers of the language model, or None for a lone tower; reports do not count those of every family.
        """
        stage = "decoder" if any(line.stage == "decoder" for line in report.layers) else "vision"
        layers = [line.visual.high for line in report.layers if line.stage == stage]
        bare = sum(picture.patches for picture in trace.pictures)
        if depth is not None and stage != "decoder":
            layers = [sum(_left(picture, layer) for picture in trace.pictures) for layer in range(depth)]
            return cls(bare, layers[0], layers[-1], sum(layers) / depth)
        if not layers:
            return cls(bare, bare, bare, bare)
        # What a tower's last block leaves is handed on; a language model's answer is read off its last layer.
        last = sum(picture.kept for picture in trace.pictures) if stage == "vision" else layers[-1]
        return cls(bare, layers[0], last, sum(layers) / len(layers))


def _left(picture: PictureTrace, layer: int) -> int:
    """Tokens of a picture that enter a layer of the language model."""
    left = picture.patches
    for site, owner in picture.steps:
        if site.stage != "decoder" or layer_of(site.layer, site.point) <= layer:
            left = int(owner[owner >= 0].unique().numel())
    return left


@dataclass(frozen=True, eq=False)
class Comparison:
    """The outcome of `compare`; print it with rich, or take `to_dict`.

    Attributes:
        model: what was loaded.
        method: spec string of the methods.
        prompt: as typed; None for towers.
        bare: the answer without,
        compressed: and with the methods.
        loyalty: how close they are.
        tokens: visual tokens.
        report: tokens, MACs and cache bytes of the compressed pass, before and after.
        latency: how many times faster, by stage: ``prefill`` and ``answer``, or ``forward`` for towers.
        seconds: bare and compressed medians by stage; on a GPU only.
        overlay: the picture with what became of its patches, or None, and
        overlay_problem: why there is none.
        environment: device and versions.
    """

    model: Loaded
    method: str
    prompt: str | None
    bare: Answer
    compressed: Answer
    loyalty: Loyalty
    tokens: VisualTokens
    report: Report
    latency: dict[str, Ratio]
    seconds: dict[str, tuple[float, float]]
    overlay: Image.Image | None
    overlay_problem: str | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts; no absolute times of a CPU."""

        def side(answer: Answer) -> dict[str, Any]:
            made: dict[str, Any] = {"answer": answer.text}
            if answer.classes:
                made["classes"] = [{"label": label, "probability": share} for label, share in answer.classes]
            return made

        macs, cache, tokens = self.report.macs, self.report.cache, self.tokens
        name = "prefill_macs" if self.model.language else "macs"
        bare = {**side(self.bare), "visual_tokens": tokens.bare, name: macs.before}
        short = {**side(self.compressed), "visual_tokens": tokens.first, name: macs.after.high}
        short.update(visual_tokens_last_layer=tokens.last, visual_tokens_mean=tokens.mean)
        if cache is not None:
            bare["kv_bytes"], short["kv_bytes"] = cache.before, cache.after.high
        for stage, (before, after) in self.seconds.items():
            bare[f"{stage}_seconds"], short[f"{stage}_seconds"] = before, after
        return {
            "model": self.model.name,
            "class": type(self.model.model).__name__,
            "parameters": self.model.parameters,
            "trained": self.model.trained,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompt": self.prompt,
            "method": self.method,
            "bare": bare,
            "compressed": short,
            "loyalty": asdict(self.loyalty),
            "speedup": {stage: asdict(ratio) for stage, ratio in self.latency.items()},
            "overlay_problem": self.overlay_problem,
            "environment": self.environment,
            "report": self.report.to_dict(),
        }

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The two side by side."""
        from rich.table import Table
        from rich.text import Text

        loaded, gpu = self.model, self.environment["device_type"] != "cpu"
        dtype = str(loaded.dtype).removeprefix("torch.")
        size = f"{type(loaded.model).__name__}, {amount(loaded.parameters)} parameters"
        where = self.environment["device"] if gpu else "CPU"
        yield Text(f"{loaded.name} ({size}) on {where}, {dtype}", style="bold")
        if not loaded.trained:
            yield Text("the weights are random: what it says means nothing", style="yellow")
        if self.prompt is not None:
            yield Text(f"prompt   {self.prompt}")
        yield Text(f"method   {self.method}")
        table = Table()
        for name in ("", "bare", "compressed", ""):
            table.add_column(name, justify="left")
        for row in self._rows():
            table.add_row(*(Text(cell) for cell in row))
        yield table
        rounds = max(ratio.rounds for ratio in self.latency.values())
        how = f"median of {rounds} interleaved rounds, 20 and 80 % in brackets"
        yield Text(f"time: {how}" + ("" if gpu else "; on a CPU relative to bare, never absolute"), style="dim")
        if any(ratio.p80 < 1 for ratio in self.latency.values()):
            yield Text("slower: there are too few tokens for this method to pay here", style="dim")
        elif any(ratio.p20 < 1 for ratio in self.latency.values()):
            yield Text("the rounds differ too much to say which is faster", style="dim")
        for note in self.report.notes:
            yield Text(f"note: {note}", style="dim")

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Cells of the table."""
        tokens, macs, cache = self.tokens, self.report.macs, self.report.cache
        yield ("answer", self.bare.text, self.compressed.text, self._agreement())
        for (label, share), (other, short) in zip(self.bare.classes, self.compressed.classes):
            yield ("", f"{share:.1%} {label}", f"{short:.1%} {other}", "")
        note = f"{tokens.first / tokens.bare:.0%}" if tokens.bare else ""
        if tokens.last != tokens.first:
            note = f"{tokens.last:g} left at the end, {tokens.mean:.0f} a layer on average"
        yield ("visual tokens", str(tokens.bare), f"{tokens.first:g}", note)
        name = "prefill MACs" if self.model.language else "MACs"
        fewer = f"{macs.before / macs.after.high:.2f} x fewer" if macs.after.high else ""
        yield (name, amount(macs.before), amount(macs.after.high), fewer)
        if cache is not None and cache.before:
            saved = f"{1 - cache.after.high / cache.before:.0%} saved"
            yield ("KV cache", f"{amount(cache.before)}B", f"{amount(cache.after.high)}B", saved)
        for stage, ratio in self.latency.items():
            if stage in self.seconds:
                before, after = (f"{1000 * seconds:.2f} ms" for seconds in self.seconds[stage])
            else:
                before, after = "1.00", f"{1 / ratio.median:.2f}"
            yield (f"time, {stage}", before, after, _faster(ratio))

    def _agreement(self) -> str:
        loyalty = self.loyalty
        said = ["same" if loyalty.same else "different"]
        if loyalty.cosine is not None:
            said.append(f"cosine {loyalty.cosine:.4f}")
        if loyalty.divergence is not None:
            said.append(f"KL {loyalty.divergence:.2g}")
        return ", ".join(said)


def amount(value: float) -> str:
    """A number with three digits and a letter for its thousands."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}" if abs(value) < 1000 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g} "


def _faster(ratio: Ratio) -> str:
    spread = f"({ratio.p20:.2f} to {ratio.p80:.2f})"
    if ratio.median >= 1:
        return f"{ratio.median:.2f} x faster {spread}"
    return f"{1 / ratio.median:.2f} x slower {spread}"


# ---------------------------------------------------------------------- the work
@guarded
def compare(
    model: Loaded,
    image: Image.Image | str | os.PathLike[str],
    prompt: str | None = None,
    method: str | Method | Sequence[Method | str] | None = None,
    *,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Runs a model bare and compressed on one picture. The model is bare again afterwards.

    Args:
        model: from `load`.
        image: a PIL picture or the path of one.
        prompt: what to ask; through the processor's chat template, unless it holds the processor's own image marks.
            Towers take none.
        method: as for `vlmtok.compress`; by default what `default_method` says.
        max_new_tokens: of the answer, which is greedy.
        rounds: rounds of the measurement of latency.
        limit: seconds after which no further round begins.
        adapter: as for `vlmtok.compress`.
        progress: told what is being done.

    Returns:
        Both answers, and what was saved.

    Raises:
        LoadError: the picture cannot be read.
        ParameterError: the prompt does not fit.
        VlmtokError: the methods do not fit the model, see `vlmtok.compress`.
    """
    shown = image.convert("RGB") if isinstance(image, Image.Image) else open_picture(image)
    methods = default_method(model.model, adapter) if method is None else method
    runner: Runner = Speaker(model, shown, prompt, max_new_tokens) if model.language else Looker(model, shown, prompt)

    def compressed(trace: bool = False) -> Any:
        return compress(model.model, methods, trace=trace, adapter=adapter)

    with torch.inference_mode(), quiet():
        with compressed(trace=True) as run:
            _tell(progress, "answering, compressed", 0, 2)
            short = runner.answer()
            report = _checked(run, runner, short)
            trace = run.trace()
            names = methods if isinstance(methods, str) else "+".join(map(str, run.methods))
            overlay, problem = _overlay(shown, trace, model.processor)
        _tell(progress, "answering, bare", 1, 2)
        full = runner.answer()
        _tell(progress, "answering, bare", 2, 2)
        latency, seconds = _latency(runner, compressed, model, rounds, limit, progress)
    return Comparison(
        model=model,
        method=names,
        prompt=runner.prompt,
        bare=full,
        compressed=short,
        loyalty=runner.loyalty(full, short),
        tokens=VisualTokens.of(report, trace, _depth(model.model, adapter)),
        report=report,
        latency=latency,
        seconds=seconds,
        overlay=overlay,
        overlay_problem=problem,
        environment=bench.environment(model.device),
    )


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


@guarded
def default_method(model: nn.Module, adapter: str | None = None) -> str:
    """A method that fits a model: `DEFAULT_METHOD` where a language model can be cut, else `DEFAULT_TOWER_METHOD`.

    Args:
        model: with or without data.
        adapter: as for `vlmtok.compress`.

    Raises:
        UnsupportedModel: no adapter carries it.
    """
    stages = adapter_for(model, adapter).layout().stages
    return DEFAULT_METHOD if "decoder" in stages else DEFAULT_TOWER_METHOD


def _latency(
    runner: Runner,
    compressed: Callable[[], AbstractContextManager[Any]],
    model: Loaded,
    rounds: int,
    limit: float,
    progress: Progress | None,
) -> tuple[dict[str, Ratio], dict[str, tuple[float, float]]]:
    cases = []
    for stage, call in runner.stages().items():
        cases += [Case(f"{stage} bare", call, nullcontext), Case(f"{stage} compressed", call, compressed)]
    # Both answers have been given once: everything is warm but the hooks' first call.
    found = bench.interleave(cases, rounds=rounds, warmup=1, limit=limit, device=model.device, progress=progress)
    ratios, seconds = {}, {}
    for stage in runner.stages():
        bare, short = found[f"{stage} bare"], found[f"{stage} compressed"]
        ratios[stage] = Ratio.of(bare, short)
        if model.device.type == "cuda":
            seconds[stage] = (bare.median, short.median)
    return ratios, seconds


class Runner:
    """Something that answers, the same way each time.

    Attributes:
        prompt: as typed, or None.
    """

    prompt: str | None = None

    def answer(self) -> Answer:
        """One answer."""
        raise NotImplementedError

    def stages(self) -> dict[str, Callable[[], object]]:
        """What to time, by name."""
        raise NotImplementedError

    def doubt(self, report: Report, answer: Answer) -> str | None:
        """Why the books of one answer cannot be of it, or None."""
        return None

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """How close two answers are."""
        raise NotImplementedError


class Speaker(Runner):
    """A vision-language model: greedy answers to one prompt.

    Args:
        model: from `load`.
        image: RGB.
        prompt: as for `compare`.
        max_new_tokens: of the answer.
        batch: how often the prompt and its picture stand in the batch.
    """

    def __init__(
        self, model: Loaded, image: Image.Image, prompt: str | None, max_new_tokens: int = 32, batch: int = 1
    ) -> None:
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ParameterError(f"max_new_tokens={max_new_tokens!r}: at least 1")
        self.loaded = model
        self.prompt = DEFAULT_PROMPT if prompt is None else prompt
        self.tokens = max_new_tokens
        self.inputs = encode_prompt(model, image, self.prompt, batch)

    def generate(self, tokens: int, least: int | None = None) -> Any:
        """Runs the model: a `generate` output with the first step's logits."""
        return self.loaded.model.generate(  # type: ignore[operator]
            **self.inputs,
            max_new_tokens=tokens,
            min_new_tokens=least,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def answer(self) -> Answer:
        """The answer to the first prompt of the batch."""
        found = self.generate(self.tokens)
        # A decoder-only model gives the prompt back before its answer; an encoder-decoder does not.
        ids = found.sequences[0][-len(found.logits) :]
        text = self.loaded.processor.batch_decode([ids], skip_special_tokens=True)[0].strip()
        return Answer(text, tuple(ids.tolist()), output=found.logits[0][0].float().cpu())

    def stages(self) -> dict[str, Callable[[], object]]:
        """The first token, and the whole answer."""
        return {"prefill": lambda: self.generate(1), "answer": lambda: self.generate(self.tokens)}

    def doubt(self, report: Report, answer: Answer) -> str | None:
        """One prefill with every placeholder, and a decode step for each further token of a cached answer."""
        passes, steps = report.passes.get("decoder", 0), report.passes.get("decode steps", 0)
        if not passes:
            return None  # its language model is not cut
        if passes + steps != len(answer.ids) or (passes != 1 and steps):
            return f"an answer of {len(answer.ids)} tokens took {passes} prefills and {steps} decode steps"
        return None

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """By the text, the tokens and the first token's distribution."""
        equal = sum(a == b for a, b in zip(bare.ids, short.ids))
        return Loyalty(bare.text == short.text, equal / len(bare.ids), _divergence(bare.output, short.output))


class Looker(Runner):
    """A vision tower: classes, or an embedding.

    Args:
        model: from `load`.
        image: RGB.
        prompt: None; towers take none.
        batch: how often the picture stands in the batch.
    """

    def __init__(self, model: Loaded, image: Image.Image, prompt: str | None = None, batch: int = 1) -> None:
        if prompt is not None:
            raise ParameterError(NO_PROMPT.format(model.name))
        assert model.pixels is not None and model.encode is not None
        self.loaded = model
        self.encode = model.encode
        pixels = model.pixels(image).to(model.device, model.dtype)
        self.inputs = pixels.expand(batch, -1, -1, -1).contiguous()

    def answer(self) -> Answer:
        """Classes with names where the model has them."""
        output = self.encode(self.inputs)[0].float().cpu()
        labels = self.loaded.labels
        if labels is None:
            return Answer(f"an embedding of {output.numel()} numbers", output=output)
        shares = output.softmax(-1)
        best = shares.topk(min(TOP, len(labels))).indices.tolist()
        classes = tuple((str(labels[i]), float(shares[i])) for i in best)
        return Answer(classes[0][0], classes=classes, output=output)

    def stages(self) -> dict[str, Callable[[], object]]:
        """One forward."""
        return {"forward": lambda: self.encode(self.inputs)}

    def loyalty(self, bare: Answer, short: Answer) -> Loyalty:
        """By the best class and the cosine."""
        cosine = float(F.cosine_similarity(bare.output, short.output, dim=0))
        if not bare.classes:
            return Loyalty(cosine >= 0.99, cosine=cosine)
        return Loyalty(bare.text == short.text, None, _divergence(bare.output, short.output), cosine)


def _divergence(bare: Tensor, short: Tensor) -> float:
    """KL(bare || short) of two distributions given as logits, in nats."""
    found = F.kl_div(short.log_softmax(-1), bare.log_softmax(-1), reduction="sum", log_target=True)
    return max(0.0, float(found)) if math.isfinite(float(found)) else math.inf


# ---------------------------------------------------------------------- prompts
@guarded
def encode_prompt(model: Loaded, image: Image.Image, prompt: str, batch: int = 1) -> dict[str, Any]:
    """What `generate` takes for a picture and a prompt.

    Args:
        model: from `load`.
        image: RGB.
        prompt: a question, which the processor's chat template frames; or, with the processor's image marks in it, the
            text as the model is to see it.
        batch: how often.

    Returns:
        Tensors on the model's device.

    Raises:
        ParameterError: an empty prompt, or not one image mark for one picture.
    """
    processor = model.processor
    if not prompt.strip():
        raise ParameterError("the prompt is empty")
    marks = prompt.count(_mark(processor, prompt))
    if marks > 1:
        raise ParameterError(f"the prompt has {marks} image marks for one picture")
    if marks or not getattr(processor, "chat_template", None):
        text = prompt if marks else f"{_mark(processor)}{prompt}"
        if getattr(processor, "num_query_tokens", None):  # BLIP's processors put the marks in themselves
            text = text.replace(_mark(processor, text), "").strip()
        made = processor(images=[[image]] * batch, text=[text] * batch, return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        made = processor.apply_chat_template(
            [[{"role": "user", "content": content}]] * batch,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    made = made.to(model.device, model.dtype)  # floating tensors alone take the dtype
    return {name: value for name, value in made.items() if name != "labels"}


def _mark(processor: Any, prompt: str = "") -> str:
    """The text that stands for a picture: the processor's, or ``<image>`` where the prompt says so."""
    mark = getattr(processor, "image_token", None)
    found = mark if isinstance(mark, str) else str(getattr(mark, "content", None) or "<image>")
    return "<image>" if found not in prompt and "<image>" in prompt else found


# ---------------------------------------------------------------------- pictures
def _overlay(image: Image.Image, trace: Trace, processor: Any) -> tuple[Image.Image | None, str | None]:
    """The overlay, or why there is none: a picture that cannot be drawn is no reason to lose the figures."""
    try:
        return viz.overlay(image, joined(trace, image.size, processor), preprocess=processor), None
    except VlmtokError as problem:
        return None, str(problem)


def joined(trace: Trace, size: tuple[int, int], preprocess: Any) -> PictureTrace:
    """One picture's trace, where the model has taken its crops for pictures of their own.

    Args:
        trace: of a pass with one picture.
        size: width and height of the picture.
        preprocess: as for `vlmtok.viz.region`.

    Returns:
        All its patches, with crops as parts 1.. and the crop that shows the whole picture as part 0.
    """
    if len(trace) == 1:
        return trace[0]
    owners, parts, shapes, numbers = [], [], {}, iter(range(1, len(trace) + 1))
    first = 0
    for index, piece in enumerate(trace.pictures):
        owners.append(torch.where(piece.owner < 0, -1, piece.owner + first))
        left, top, right, bottom = viz.region(size, preprocess, index)
        whole = (right - left) * (bottom - top) > 0.9 * size[0] * size[1]
        number = 0 if whole else next(numbers)
        parts.append(torch.full((piece.patches,), number))
        if piece.grid is not None:
            shapes[number] = piece.grid
        first += piece.patches
    steps = []
    for step, (site, _) in enumerate(trace[0].steps):
        places = [piece.steps[step][1] for piece in trace.pictures]
        steps.append((site, torch.cat(places)))  # who was dropped is all that is read of them
    return PictureTrace(torch.cat(owners), tuple(steps), None, torch.cat(parts), shapes=shapes)


def _tell(progress: Progress | None, what: str, done: int, steps: int) -> None:
    if progress is not None:
        progress(what, done, steps)


__all__ = [
    "DEFAULT_METHOD",
    "DEFAULT_PROMPT",
    "DEFAULT_TOWER_METHOD",
    "Answer",
    "Comparison",
    "LoadError",
    "Loaded",
    "Looker",
    "Loyalty",
    "Runner",
    "Speaker",
    "compare",
    "default_method",
    "encode_prompt",
    "joined",
    "load",
    "open_picture",
    "parse_methods",
    "samples",
    "skeleton",
]
