"""What merging inside towers that hold all pictures in one row saves: as torch's counter counts it, and as forecast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import referee
from torch import nn

import vlmtok
from vlmtok.lab.tiny.shots import Maker, packed, rows_with_breaks

from .build import FAMILIES
from .packed_merging_by_hand import PACKED, by_hand, tome
from .pictures import pictures
from .shots import PATCH
from .test_totals import VALUES, built, check, counted, line

METHODS = ["tome:r=3", "pitome:ratio=0.7", "crossget:rv=2", "tca:ratio=0.3", "tome:r=2+visionzip:keep=4"]


FEW = ("qwen2_5_vl", "qwen3_vl", "paddleocr_vl", "mistral3")
"""Windows, readers between blocks, projections apart, and one mask of blocks."""
CASES = [(name, method) for name in PACKED for method in METHODS if name in FEW or method == METHODS[0]]


def odd(name: str, *pattern: str) -> dict[str, Any]:
    """Prompts with pictures whose sides windows do not divide."""
    family = FAMILIES[name]

    def shot(rows: int, columns: int) -> Maker:
        if name == "mistral3":
            return rows_with_breaks(min(rows, 4), min(columns, 4))
        return packed(rows, columns, *((3, PATCH, PATCH) if name == "paddleocr_vl" else (VALUES,)))

    shots = {**family.shots, "O": shot(3, 5), "P": shot(2, 7)}
    return type(family)("odd", family.make, shots, types=family.types).batch(*pattern).inputs()


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_report_says_what_torch_counts(name: str, method: str) -> None:
    """On the whole compressed call: with what deciding costs, in rows of several pictures."""
    model, inputs = built(name), odd(name, "2O3I2", "P4")
    whole, tower, projector = counted(model, inputs)
    with torch.no_grad(), vlmtok.kernels.use("torch"), vlmtok.compress(model, method) as run:
        with referee.counter() as counter:
            model(**inputs)
        report, last = run.report(total=True), run.report()
    assert last.lines == report.lines
    assert 2 * report.macs.before == whole and 2 * report.macs.after.low == counter.get_total_flops()
    booked = {one.name: one for one in report.lines}
    assert 2 * booked["vision"].before == tower and 2 * booked["projector"].before == projector
    assert booked["vision"].after.low < 0.98 * tower / 2 and booked["projector"].share.low == 1
    assert (booked["prefill"].share.low == 1) == ("visionzip" not in method)
    assert (booked["signals"].after.low > 0) == (method.startswith("tca") or "visionzip" in method)


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


@torch.no_grad()
def test_passes_that_leave_more_are_other_passes() -> None:
    """Totals keep passes apart that are alike but for what is left."""
    model, inputs = built("qwen2_5_vl"), odd("qwen2_5_vl", "2O3I2", "P4")
    method, found = vlmtok.create_method("tome", r=2), []
    with vlmtok.compress(model, method) as run:
        for r in (2, 3, 2):
            method.r = r
            model(**inputs)
            found.append(line(run.report(), "vision").after.low)
        total = line(run.report(total=True), "vision").after.low
    assert found[0] == found[2] > found[1] and total == sum(found)


@pytest.mark.parametrize(("name", "method"), CASES)
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
        text = len(prompt.ids) - len(picture.columns)
        made = vlmtok.estimate(
            model,
            method,
            visual_tokens=len(picture.columns),
            crops=frames,
            parts=1,
            text_tokens=text,
            logits="all",
        )
        for part in ("vision", "projector", "signals", "method"):
            if frames == 1 or "visionzip" not in method:  # which parts a clip has is not told here
                assert line(made, part) == line(report, part), (shot, part)


@torch.no_grad()
def test_a_reader_is_told_what_nobody_knows_yet() -> None:
    """Once for each method, in reports and forecasts; Random looks on in no tower, and says nothing."""
    model = built("qwen2_5_vl")
    for method, names in (("tome:r=1+pitome:ratio=0.9", ["tome", "pitome"]), ("random:keep=0.5", [])):
        with vlmtok.compress(model, method) as run:
            model(**odd("qwen2_5_vl", "2O3"))
            told = [run.report().notes, vlmtok.estimate(model, method, visual_tokens=16).notes]
        for notes in told:
            said = [note for note in notes if "quality on real weights is unknown" in note]
            assert [note.split()[0] for note in said] == names and all("squares of 2 x 2" in note for note in said)


@torch.no_grad()
def test_a_trace_says_what_it_leaves_out() -> None:
    """Visual tokens are as many as before; what left inside the tower is told by the report."""
    model, inputs = built("qwen2_vl"), odd("qwen2_vl", "2O3", "P4")
    with vlmtok.compress(model, "tome:r=3+divprune:keep=4", trace=True) as run:
        model(**inputs)
        trace = run.trace()
    assert [picture.kept for picture in trace] == [4, 4]
    (note,) = trace.sheet().notes
    assert "what tome joined inside the vision tower is not shown" in note
    with vlmtok.compress(model, "divprune:keep=4", trace=True) as run:
        model(**inputs)
        assert not run.trace().sheet().notes


def test_a_budget_reaches_a_tower_of_windows() -> None:
    model = built("qwen2_5_vl")
    method = vlmtok.budget("tome", model, macs=0.95, visual_tokens=16)
    found = vlmtok.estimate(model, method, visual_tokens=16).macs.share.low
    assert found == pytest.approx(0.95, abs=0.02)
