"""Totals of every family are what torch's counter counts on the whole bare model, tower included; or there is none."""

import csv
import io
import json

import pytest
import torch
from support import referee
from vlmtok.adapters import adapter_for
from vlmtok.adapters.towers.packed_rows import PACKED_ROWS

import vlmtok
from vlmtok.core.ledger import MOST_UNREAD, Ledger, StageRun
from vlmtok.cost.reports import Reports
from vlmtok.errors import NotCounted
from vlmtok.lab.tiny.shots import packed

from .build import FAMILIES, TOWER_ONLY
from .harness import batch

VALUES = 3 * 2 * 4 * 4
METHOD = "random:keep=0.5"
UNCOUNTED = (
    *("got_ocr2", "pp_chart2table", "fast_vlm", "perception_lm", "granite_docling", "ovis2", "lfm3_vl", "muse_glimmer"),
    *("muse_spark", "kimi_k25", "step3p7", "gemma4_unified", "idefics2"),
)
"""Families of whose tower nobody wrote down what it multiplies."""
COUNTED = [name for name in FAMILIES if name not in UNCOUNTED]


def built(name):
    model = {**FAMILIES, **TOWER_ONLY}[name].build("eager").requires_grad_(False)
    if name.endswith("moe") or name in ("muse_spark", "step3p7", "aria"):
        model.set_experts_implementation("eager")  # the fused one has no formula in the counter
    return model


def counted(model, inputs):
    """FLOPs of a bare call: of the whole, of the tower without the projector, of the projector."""
    adapter = adapter_for(model)
    with torch.no_grad(), referee.counter() as counter:
        model(**inputs)
    counts = {path: sum(by.values()) for path, by in counter.get_flop_counts().items()}

    def of(path):
        module = adapter.core.get_submodule(path)
        name = next(name for name, part in model.named_modules() if part is module)
        return counts.get(f"{type(model).__name__}.{name}", 0)

    spec = adapter.spec
    projector = of(spec.projector) if spec.projector else 0
    tower = of(spec.tower) - (projector if spec.projector.startswith(f"{spec.tower}.") else 0)
    return counter.get_total_flops(), tower, projector


def line(report, name):
    return next((found for found in report.lines if found.name == name), None)


def check(model, inputs, method=METHOD):
    """Holds a report to the counter, and gives it back."""
    whole, tower, projector = counted(model, inputs)
    with torch.no_grad(), vlmtok.kernels.use("torch"), vlmtok.compress(model, method) as run:
        with referee.counter() as counter:
            model(**inputs)
        report, last = run.report(total=True), run.report()
    assert last.lines == report.lines, "a picture's and a clip's pass of the tower belong to one prompt"
    assert tower and 2 * report.line("vision").before == tower
    path = adapter_for(model).spec.projector
    if method == METHOD and not any(f"{path} is not counted" in reason for reason in report.missing):
        assert 2 * report.line("projector").before == projector
    if report.missing:
        assert all("tower" not in reason for reason in report.missing) and report.total is None
        return report
    assert 2 * report.macs.before == whole and report.macs.after.fixed
    assert 2 * report.macs.after.low == counter.get_total_flops() < whole
    return report


@pytest.mark.parametrize("name", UNCOUNTED)
def test_a_tower_that_is_not_counted_leaves_no_total_and_is_named(name):
    model = built(name)
    with torch.no_grad(), vlmtok.compress(model, METHOD) as run:
        model(**batch(name).inputs())
        report = run.report()
    assert report.total is None and line(report, "vision") is None and line(report, "projector") is None
    assert any(reason.startswith("the vision tower is not counted (") for reason in report.missing)
    assert name == "kimi_k25" or report.line("prefill").before > report.line("prefill").after.low > 0


@pytest.mark.parametrize("which", ["rows", "several"])
@pytest.mark.parametrize("name", COUNTED)
def test_batches_are_counted_whole(name, which):
    check(built(name), batch(name, which).inputs())


@pytest.mark.parametrize("name", COUNTED)
def test_one_picture_is_counted_whole(name):
    family = FAMILIES[name]
    check(built(name), family.batch(family.rows[0]).inputs())


@pytest.mark.parametrize("name", [name for name in COUNTED if FAMILIES[name].clips is not None])
def test_clips_are_counted_whole(name):
    check(built(name), batch(name, "clips").inputs())


@pytest.mark.parametrize("spec", ["pitome:ratio=0.9", "pitome:ratio=0.9:prop_attn=false"])
@pytest.mark.parametrize("name", TOWER_ONLY)
def test_what_reads_a_tower_and_is_not_counted_leaves_no_total(name, spec):
    family = TOWER_ONLY[name]
    report = check(built(name), family.batch(*family.rows).inputs(), spec)
    assert [reason.split()[0] for reason in report.missing] == ["qformer", "language_projection", "language_model"]


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (5, 2), (1, 1)])
def test_windows_that_do_not_divide_a_picture(grid):
    family = FAMILIES["qwen2_5_vl"]
    odd = {**family.shots, "O": packed(*grid, VALUES)}
    prompt = type(family)("odd", family.make, odd, types=family.types).batch("2O3I2")
    check(built("qwen2_5_vl"), prompt.inputs())


# ---------------------------------------------------------------------- estimates
@pytest.mark.parametrize("name", COUNTED)
def test_an_estimate_is_the_report_of_a_run_on_the_same_grid(name):
    family, model = FAMILIES[name], built(name)
    for shot in sorted({"I", "M", "V"} & set(family.shots)):
        if name in ("gemma4", "lfm2_vl") and shot != "I":
            continue  # padded to the size of I
        if name == "llava_next_video" and shot == "V":
            continue  # pooled in front of the projector, which only a run shows
        pattern = family.rows[0].replace("I", shot)
        prompt = family.prompt(pattern)
        with torch.no_grad(), vlmtok.compress(model, METHOD) as run:
            model(**family.collect(prompt).inputs())
            report = run.report(total=True)
        (picture,) = prompt.pictures
        rows = max(found.rows for found, _ in run._attachment.ledger.totals() if found.stage == "vision")
        frames = sum(frames for frames, _, _ in picture.shot.grids) if picture.shot.video else 1
        made = vlmtok.estimate(
            model, METHOD, visual_tokens=len(picture.columns), crops=max(rows, frames), parts=1, text_tokens=9
        )
        for part in ("vision", "projector"):
            assert line(made, part) == line(report, part), (shot, part)


def test_an_estimate_of_given_grids():
    from vlmtok.cost.packed import planned
    from vlmtok.cost.planned_rows import Prompt

    family, model = FAMILIES["qwen2_5_vl"], built("qwen2_5_vl")
    shape = adapter_for(model).account()
    with torch.no_grad(), vlmtok.compress(model, METHOD) as run:
        model(**family.batch("2I3J5", "1I1J2").inputs())
        (seen,) = [found for found, _ in run._attachment.ledger.totals() if found.stage == "vision"]
    made = planned(shape.packed, shape.projector, Prompt(batch=2, pictures=2, grids=((1, 8, 8), (1, 4, 8))))
    assert made == seen and seen.grids == ((1, 8, 8), (1, 4, 8)) * 2


def test_qwen2_5_vl_7b_at_1024_visual_tokens():
    config = {
        "model_type": "qwen2_5_vl",
        "text_config": {
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
            **{"num_key_value_heads": 4, "vocab_size": 152064},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
            **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584},
        },
    }
    report = vlmtok.estimate(config, "divprune:keep=0.25", visual_tokens=1024)
    assert f"{100 * report.macs.share.low:.1f}" == "48.6"
    assert f"{100 * report.line('prefill').share.low:.1f}" == "28.7"


# ---------------------------------------------------------------------- where something is not counted
@pytest.fixture
def blind(monkeypatch):
    """A family whose tower nobody wrote a row for."""
    monkeypatch.delitem(PACKED_ROWS, "qwen2_vl_vision")
    return built("qwen2_vl")


REASON = "the vision tower is not counted (no vision tower 'qwen2_vl_vision' is carried"


def test_no_total_without_the_tower(blind):
    with torch.no_grad(), vlmtok.compress(blind, METHOD) as run:
        blind(**batch("qwen2_vl").inputs())
        report = run.report()
    assert report.total is None and len(report.missing) == 1 and report.missing[0].startswith(REASON)
    with pytest.raises(NotCounted, match="no total .* the vision tower is not counted"):
        report.macs  # noqa: B018
    with pytest.raises(NotCounted):
        report.flops  # noqa: B018
    assert "no total" in repr(report) and report.line("prefill").before > 0
    for text in (str(report), report.to_markdown(), report.to_html()):
        said = " ".join(text.replace("&#x27;", "'").split())
        assert f"total: not given, {REASON}" in said and said.count(REASON) == 1
    made = json.loads(report.to_json())
    assert made["total_macs"] is None and made["total_flops"] is None and made["missing"] == report.missing
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert not [row for row in rows if row["name"] == "total"]
    assert [row["name"] for row in rows if row["kind"] == "missing"] == [f"no total: {report.missing[0]}"]
    several = Reports((report, report))
    assert str(several).count("not given") == 3 and several.to_records()[0]["total_macs_before"] is None
    assert several.to_records()[0]["missing"] == report.missing[0]
    assert report.by("todre").before > 0, "a convention of the language model asks for no tower"
    with pytest.raises(NotCounted, match="vision tower is not counted"):
        report.by("tca")


def test_a_prompt_without_pictures_has_its_total(blind):
    with torch.no_grad(), vlmtok.compress(blind, METHOD) as run:
        inputs = FAMILIES["qwen2_vl"].batch("6").inputs()
        blind(**inputs)
        report = run.report()
    assert report.total is not None and not report.missing


def test_no_budget_of_macs_without_the_tower(blind):
    with pytest.raises(NotCounted, match="budget: .* no total to set macs to: the vision tower is not counted"):
        vlmtok.budget(METHOD, blind, macs=0.5, visual_tokens=16)
    made = vlmtok.budget(METHOD, blind, kv_bytes=0.6, visual_tokens=64)
    assert made.budget.what == "kv_bytes"
    assert vlmtok.budget(METHOD, blind, macs=0.6, convention="todre", visual_tokens=64).budget.unit == "FLOPs"


def test_a_convention_of_plain_towers_refuses_windows():
    with pytest.raises(NotCounted, match="packs pictures of any size"):
        vlmtok.estimate(built("qwen2_5_vl"), METHOD, visual_tokens=16, convention="tca")


# ---------------------------------------------------------------------- no pass waits for the device
def test_grids_are_read_when_a_report_is_asked_for():
    model = built("qwen3_vl")
    with torch.no_grad(), vlmtok.compress(model, METHOD) as run:
        inputs = batch("qwen3_vl").inputs()
        for _ in range(2):
            model(**inputs)
        last = run._attachment.ledger.last["vision"]
        assert last.told is not None and last.grids == ()
        inputs["image_grid_thw"].zero_()  # a buffer that is written again
        once, total = run.report(), run.report(total=True)
    assert last.told is None and len(last.grids) == 2
    assert total.line("vision").before == 2 * once.line("vision").before > 0


def test_closed_passes_are_read_at_last():
    ledger = Ledger()
    for _ in range(MOST_UNREAD + 5):
        ledger.begin(StageRun("vision", 1, 4, told=torch.tensor([[1, 2, 2]])))
    assert len(ledger._unread) == 3
    ((run, times),) = ledger.totals()
    assert times == MOST_UNREAD + 5 and run.grids == ((1, 2, 2),)


def test_grids_that_do_not_fit_leave_no_total():
    model = built("qwen2_vl")
    with torch.no_grad(), vlmtok.compress(model, METHOD) as run:
        model(**batch("qwen2_vl").inputs())
        run._attachment.ledger.last["vision"].told += 1
        report = run.report()
    assert report.total is None and "its grids tell of" in report.missing[0]
    assert line(report, "vision") is None


def test_every_row_of_a_tower_is_of_a_family_that_is_tested():
    kinds = {adapter_for(built(name)).core.config.vision_config.model_type for name in FAMILIES}
    assert {*PACKED_ROWS} <= kinds
