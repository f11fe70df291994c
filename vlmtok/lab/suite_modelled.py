"""Rows of the suite by the roofline, where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..forecast.estimate import estimate, shape_of
from ..timing import Progress
from .suite_measure import PEAK, Contestant, macs_of, row_head
from .suite_models import FULL, TEXT_TOKENS, Row, llava_config, tower_config

if TYPE_CHECKING:
    from ..core.model_shape import BlockShape


def model_suite(progress: Progress | None = None) -> list[Row]:
    """The suite's rows without a measurement: what the MACs promise, and the least time that the peak rates allow.

    Returns:
        The rows, `measured` False; floors are of the GPU in `PEAK`, in bf16.
    """
    from ..loading.problems import quiet

    rows: list[Row] = []
    with quiet():
        tower = shape_of(tower_config(FULL))
        llava = shape_of(llava_config(FULL))
    assert llava.language is not None
    halved = [replace(block, kv_bytes=block.kv_bytes // 2) for block in llava.language.blocks]
    llava = replace(llava, language=replace(llava.language, blocks=tuple(halved)))
    jobs: list[Callable[[], list[Row]]] = []
    for method in FULL.towers:
        jobs += [lambda m=method, b=batch: [_modelled_tower(tower, m, b)] for batch in FULL.tower_batches]  # type: ignore
    for name, visual in FULL.visual.items():
        for method in FULL.languages:
            jobs += [
                lambda n=name, v=visual, m=method, b=batch: _modelled(llava, n, v, m, b)  # type: ignore[misc]
                for batch in FULL.batches
            ]
    for done, job in enumerate(jobs):
        if progress is not None:
            progress("counting", done, len(jobs))
        rows += job()
    return [{**row, "dtype": "bfloat16", "floor_of": PEAK.name} for row in rows]


def _modelled_tower(shape: Any, method: str, batch: int) -> Row:
    report = estimate(shape, method, batch=batch)
    row = row_head("ViT-L/14-336", "tower", Contestant(method), batch, report.layers[0].before - 1, report)
    weights = _weights(shape.vision.blocks)
    return {**row, **_promise(*macs_of(report, "tower"), weights, weights)}


def _modelled(shape: Any, name: str, visual: int, method: str, batch: int) -> list[Row]:
    lm = replace(shape, vision=None, projector=(), visual=visual)
    inside = {name: lm.layout.stages[name] for name in ("projected", "decoder", "cache")}
    lm = replace(lm, layout=replace(lm.layout, stages=inside))
    report = estimate(lm, method, batch=batch, text_tokens=(1, TEXT_TOKENS - 1), visual_tokens=visual)
    head = row_head(name, "prefill", Contestant(method), batch, visual, report)
    weights = _weights(shape.language.blocks) + 2 * shape.language.head.row
    assert report.cache is not None
    # The cache is written once in the prefill, and read once in each step.
    moved = [weights + cache for cache in (report.cache.before, report.cache.after.high)]
    stages = ("prefill", "decode")
    return [{**head, "stage": stage, **_promise(*macs_of(report, stage), *moved)} for stage in stages]


def _weights(blocks: Sequence[BlockShape]) -> int:
    """Bytes of the weights of blocks, in bf16: a MAC of a token each."""
    return 2 * sum(block.attn + block.mlp + block.beside for block in blocks)


def _promise(before: float, after: float, moved_before: float, moved_after: float) -> Row:
    """The promise of MACs, and floors: the longer of computing and of moving weights and cache."""
    sides = ((before, moved_before), (after, moved_after))
    floors = [max(2 * macs / PEAK.flops, moved / PEAK.moved) for macs, moved in sides]
    return {
        "mac_ratio": before / after,
        "speedup": None,
        "floor_seconds_bare": floors[0],
        "floor_seconds": floors[1],
        "floor_speedup": floors[0] / floors[1],
        "measured": False,
    }
