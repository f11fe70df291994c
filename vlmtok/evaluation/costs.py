"""What a way costs on one question: visual tokens, MACs, cache, the share of the method itself, and the time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .. import timing
from ..compression import compress
from ..cost.report import Report
from ..errors import NotCounted, ParameterError, PassError, VlmtokError
from ..forecast.budget import measure
from ..loading.models import Loaded
from ..timing import Case, Ratio
from .task import Item, Task
from .ways import Way

_PROBES = ("random", "tome:r=1")
"""Methods whose reports tell what the model costs without them."""


def cost_of(task: Task, loaded: Loaded, item: Item, way: Way) -> dict[str, float | None]:
    """What the pass with a question's pictures costs.

    Args:
        task: that asks.
        loaded: the model; for a downsampled picture the one that takes it.
        item: the question.
        way: none of whose methods are attached yet; without methods, what the model costs as it is.

    Returns:
        ``visual_tokens`` (mean over layers), ``macs`` (towers, projector, prefill, signals and the method's own), and
        ``kv_bytes``; ``pruner_share``, the part of the MACs that choosing takes. None where there is no such figure.

    Raises:
        VlmtokError: the model refuses.
    """
    if way.methods:
        with compress(loaded.model, list(way.methods)) as run, torch.inference_mode():
            task.probe(loaded, item)
            return _figures(run.report(), after=True)
    problem: VlmtokError | None = None
    for spec in _PROBES:
        try:
            with compress(loaded.model, spec) as run, torch.inference_mode():
                task.probe(loaded, item)
                return _figures(run.report(), after=False)
        except VlmtokError as refused:
            problem = refused
    assert problem is not None
    raise problem


def _figures(report: Report, after: bool) -> dict[str, float | None]:
    if report.problem is not None:
        raise PassError(f"{report.problem}; no cost can be given")

    def figure(what: str) -> float | None:
        try:
            bare, short = measure(report, what)
        except (NotCounted, ParameterError):  # not counted, or the model has no such thing
            return None
        return short if after else bare

    macs, share = figure("macs"), None
    if after and macs:
        share = sum(report.line(name).after.high for name in ("signals", "method")) / macs
    return {
        "visual_tokens": figure("layer_average_tokens"),
        "macs": macs,
        "kv_bytes": figure("kv_bytes"),
        "pruner_share": share if after else 0.0,
    }


def latency_of(task: Task, bare: Loaded, short: Loaded, item: Item, way: Way, rounds: int) -> float:
    """Times a question's pass takes bare over the time it takes this way, in turns, median of the rounds."""

    def around() -> Any:
        return compress(short.model, list(way.methods)) if way.methods else nullcontext()

    with torch.inference_mode():
        cases = [
            Case("bare", lambda: task.probe(bare, item), nullcontext),
            Case("short", lambda: task.probe(short, item), around),
        ]
        found = timing.interleave(cases, rounds=rounds, warmup=1, limit=30.0, device=bare.device)
    return Ratio.of(found["bare"], found["short"]).median
