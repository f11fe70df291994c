"""What ``vlmtok bench`` measures: one model with one method, or the standard suite of towers and language models.

A row is one stage of one case. Beside each measured speed-up stands the one that the MACs promise. Where there is no
GPU the suite gives the promise and the floor alone, marked as not measured: times of large models on a CPU say nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import timing
from ..compression import compress
from ..errors import ParameterError
from ..loading.problems import quiet
from ..timing import Progress
from .comparison import VisualTokens
from .suite_measure import Contestant, measure, measure_graphs
from .suite_models import FULL, Llava, Row, Sizes, Subject, draw, llava_config, tower_config

if TYPE_CHECKING:
    from ..loading.models import Loaded


def bench_pair(
    loaded: Loaded,
    image: Any,
    prompt: str | None,
    method: str | None = None,
    *,
    batch: int = 1,
    max_new_tokens: int = 16,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times a loaded model with one method.

    Args:
        loaded: from `vlmtok.load`.
        image: RGB.
        prompt: for models that answer in words.
        method: spec string; by default what `vlmtok.lab.compare.default_method` says.
        batch: how often the picture and its prompt stand in the batch.
        max_new_tokens: of the whole answer, always that many.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        Rows: the first token and the whole answer, tower included, and one decode step; or the tower.

    Raises:
        ParameterError: no batch.
        VlmtokError: as `vlmtok.compress`.
    """
    from .compare import default_method
    from .runners import Looker, Speaker

    chosen = method or default_method(loaded.model)
    if isinstance(batch, bool) or batch < 1:
        raise ParameterError(f"batch={batch!r}: at least 1")
    with torch.inference_mode(), quiet():
        calls: dict[str, Callable[[], object]]
        if loaded.language:
            speaker, steps = Speaker(loaded, image, prompt, max_new_tokens, batch), max_new_tokens
            calls = {"tower + prefill": lambda: speaker.generate(1)}
            if steps > 1:
                calls["tower + generate"] = lambda: speaker.generate(steps, steps)
        else:
            looker, steps = Looker(loaded, image, prompt, batch), 1
            calls = {"tower": lambda: looker.encode(looker.inputs)}
        with compress(loaded.model, chosen, trace=True) as run:
            next(iter(calls.values()))()
            tokens = VisualTokens.of(run.report(), run.trace()).bare // batch
        ends = ("tower + prefill", "tower + generate") if steps > 1 else None
        subject = Subject(loaded.name, loaded.model, calls, tokens, batch, steps, ends)
        rows = measure(subject, [Contestant(chosen)], rounds=rounds, limit=limit, progress=progress)
    return _stamped(rows, loaded.device, loaded.dtype)


def _stamped(rows: list[Row], device: torch.device | None, dtype: torch.dtype) -> list[Row]:
    where = {} if device is None else timing.environment(device)
    return [{**row, "dtype": str(dtype).removeprefix("torch."), **where} for row in rows]


def run_suite(
    device: torch.device,
    *,
    sizes: Sizes | None = None,
    rounds: int = 9,
    limit: float = 60.0,
    progress: Progress | None = None,
    lost: list[str] | None = None,
) -> list[Row]:
    """Measures the standard suite.

    Args:
        device: where.
        sizes: shapes; `FULL` unless given.
        rounds: how often each case is timed.
        limit: seconds for each group of cases that take turns, after which no further round begins.
        progress: told after each call.
        lost: gets the names of models that the memory of the GPU cannot hold, which then have no rows; None raises.

    Returns:
        The rows.

    Raises:
        torch.OutOfMemoryError: a model exceeds the memory, and `lost` is None.
    """
    sizes = sizes or FULL
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[Row] = []
    with torch.inference_mode(), quiet():
        rows += _towers(sizes, device, dtype, rounds, limit, progress, lost)
        with _if_it_fits("language model", lost):
            model = draw(llava_config(sizes), device, dtype)
            for name, visual in sizes.visual.items():
                for batch in sizes.batches:
                    with _if_it_fits(f"{name}, batch {batch}", lost):
                        llava = Llava(model, name, visual, sizes.crops[name], batch, sizes.steps)
                        contestants = [Contestant(method) for method in sizes.languages]
                        rows += measure(
                            llava.subject(), contestants, rounds=rounds, limit=limit, progress=_named(progress, name)
                        )
            with _if_it_fits("break-even", lost):
                rows += _break_even(model, sizes, rounds, limit, progress)
    return _stamped(rows, device, dtype)


@contextmanager
def _if_it_fits(name: str, lost: list[str] | None) -> Iterator[None]:
    """Goes on behind what the memory of the GPU cannot hold, and notes its name."""
    try:
        yield
    except torch.OutOfMemoryError:
        if lost is None:
            raise
        lost.append(name)
        torch.cuda.empty_cache()


def _towers(
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    limit: float,
    progress: Progress | None,
    lost: list[str] | None,
) -> list[Row]:
    model = draw(tower_config(sizes), device, dtype)
    side, patch = sizes.tower[4], sizes.tower[5]
    name = "ViT-L/14-336" if sizes is FULL else "tiny tower"
    # The same algorithms in plain torch, where there are kernels to compare them with.
    modes = ("auto", "torch") if device.type == "cuda" else ("auto",)
    contestants = [Contestant(method, mode) for method in sizes.towers for mode in modes]
    rows: list[Row] = []
    for batch in sizes.tower_batches:
        with _if_it_fits(f"{name}, batch {batch}", lost):
            pixels = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
            calls: dict[str, Callable[[], object]] = {"tower": lambda pixels=pixels: model(pixels)}  # type: ignore[misc]
            subject = Subject(name, model, calls, (side // patch) ** 2, batch)
            told = _named(progress, name)
            rows += measure(subject, contestants, rounds=rounds, limit=limit, progress=told)
            if device.type == "cuda":
                rows += measure_graphs(subject, contestants, rounds=rounds, limit=limit, progress=told)
    return rows


def _break_even(model: nn.Module, sizes: Sizes, rounds: int, limit: float, progress: Progress | None) -> list[Row]:
    """Prefill at several numbers of visual tokens: where each method begins to pay."""
    contestants = [Contestant(method) for method in sizes.languages]
    found: dict[str, list[Row]] = {}
    for visual in sizes.sweep:
        llava = Llava(model, "break-even", visual, 1, 1, 1)
        part = limit / len(sizes.sweep)
        named = _named(progress, f"break-even at {visual} tokens")
        for row in measure(llava.subject(whole=False), contestants, rounds=rounds, limit=part, progress=named):
            found.setdefault(row["method"], []).append(row)
    return [
        {
            **_without_speed(rows[-1]),
            "stage": "break-even",
            "visual_tokens": None,
            "break_even_tokens": crossing([(row["visual_tokens"], row["speedup"]) for row in rows]),
            "break_even_from": f"sweep over {', '.join(map(str, sizes.sweep))} tokens",
        }
        for rows in found.values()
    ]


def _without_speed(row: Row) -> Row:
    gone = ("mac_ratio", "speedup", "p20", "p80", "of_promise", "seconds", "seconds_bare", "kv_bytes", "kv_bytes_bare")
    return {name: None if name in gone else value for name, value in row.items()}


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Tokens from which on a method is faster than the bare model.

    Args:
        points: (tokens, speed-up), tokens ascending.

    Returns:
        The tokens, between two points by their logarithms; the first point's where it pays everywhere; None where it
        does not pay at the last.
    """
    if points[-1][1] < 1:
        return None
    for (few, below), (many, above) in reversed([*itertools.pairwise(points)]):
        if below < 1:
            share = (1 - below) / (above - below)
            return math.exp(math.log(few) + share * math.log(many / few))
    return float(points[0][0])


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, steps: progress(f"{name}: {what}", done, steps)
