"""What merging inside towers that hold all pictures in one row saves: as torch's counter counts it, and as forecast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import referee
from torch import nn

import vlmtok
from vlmtok.errors import NotCounted
from vlmtok.lab.tiny.shots import Maker, packed, rows_with_breaks

from .build import FAMILIES
from .packed_merging_by_hand import PACKED, by_hand, tome
from .pictures import pictures
from .shots import PATCH
from .test_totals import VALUES, built, check, line

METHODS = ["tome:r=3", "pitome:ratio=0.7", "crossget:rv=2", "tca:ratio=0.6", "tome:r=2+visionzip:keep=4"]


def odd(name: str, *pattern: str) -> dict[str, Any]:
    """Prompts with pictures of four units by four, three by five, and two by seven."""
    family = FAMILIES[name]

    def shot(rows: int, columns: int) -> Maker:
        if name == "mistral3":
            return rows_with_breaks(rows, columns)
        return packed(rows, columns, *((3, PATCH, PATCH) if name == "paddleocr_vl" else (VALUES,)))

    shots = {**family.shots, "O": shot(3, 5), "P": shot(2, 7)}
    return type(family)("odd", family.make, shots, types=family.types).batch(*pattern).inputs()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PACKED)
def test_the_report_says_what_torch_counts(name: str, method: str) -> None:
    """On the whole compressed call: with what deciding costs, in rows of several pictures."""
    report = check(built(name), odd(name, "2O3I2", "P4"), method)
    tower = line(report, "vision")
    assert tower is not None and tower.after.low < 0.95 * tower.before
    if "visionzip" not in method:
        assert line(report, "prefill").share.low == line(report, "projector").share.low == 1
    assert ("signals" in method or "tca" in method or "visionzip" in method) == (line(report, "signals").after.low > 0)


@pytest.mark.parametrize("name", [name for name in PACKED if FAMILIES[name].clips])
def test_clips_are_counted_whole(name: str) -> None:
    family = FAMILIES[name]
    check(built(name), family.batch(*family.clips).inputs(), "tome:r=3")


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_layers_have_the_tokens_of_the_loop(name: str) -> None:
    model: nn.Module = built(name)
    arrays = pictures(name)
    with by_hand(model, tome(3), True) as loop:
        model.model.get_image_features(**arrays, return_dict=True)
    with vlmtok.compress(model, "tome:r=3") as run:
        model.model.get_image_features(**arrays, return_dict=True)
        layers = run.report().layers
    assert [(one.attention.low, one.mlp.low) for one in layers] == loop.tokens


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_passes_that_leave_more_are_other_passes(name: str) -> None:
    """Totals keep passes apart whose pictures are cut differently; their sum is what torch counts."""
    model, inputs = built(name), odd(name, "2O3I2", "P4")
    method = vlmtok.create_method("tome", r=2)
    with referee.counter() as counter, vlmtok.kernels.use("torch"), vlmtok.compress(model, method) as run:
        for r in (2, 3, 2):
            method.r = r
            model(**inputs)
        total = run.report(total=True)
    assert 2 * total.macs.after.low == counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PACKED)
def test_an_estimate_is_the_report(name: str, method: str) -> None:
    """Of a picture of four units by four, and of a clip."""
    family, model = FAMILIES[name], built(name)
    for shot in sorted({"I", "V"} & set(family.shots)):
        prompt = family.prompt(f"4{shot}5")
        with torch.no_grad(), vlmtok.compress(model, method) as run:
            model(**family.collect(prompt).inputs())
            report = run.report(total=True)
        (picture,) = prompt.pictures
        frames = sum(count for count, _, _ in picture.shot.grids) if picture.shot.video else 1
        made = vlmtok.estimate(
            model,
            method,
            visual_tokens=len(picture.columns),
            crops=frames,
            parts=1,
            text_tokens=len(prompt.ids) - len(picture.columns),
            logits="all",
        )
        for part in ("vision", "projector", "signals", "method"):
            if frames == 1 or "visionzip" not in method:  # which parts a clip has is not told here
                assert line(made, part) == line(report, part), (shot, part)


def test_what_a_padded_tower_would_leave_is_not_forecast() -> None:
    with pytest.raises(NotCounted, match="padded"):
        vlmtok.estimate(built("lfm2_vl"), "tome:r=2", visual_tokens=16)
