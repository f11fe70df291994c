"""What reports say of passes, steps and models, and that their forms agree."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from support import models
from support.counted import generating, model_of

import vlmtok
from vlmtok import (
    FastV,
    Method,
    PiToMe,
    Reduction,
    Site,
    ToDRE,
    ToMe,
)
from vlmtok.cost.lines import Span
from vlmtok.errors import MissingSignal, ParameterError, PassError, VlmtokWarning

pytestmark = pytest.mark.usefixtures("counted_paths")


# ---------------------------------------------------------------------- what a report says
def _llava_report(method=None, steps=4):
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, method or FastV(keep=0.25)) as run:
        generating(model, steps, ("^3I4",))()
    return run


def test_lines_layers_steps_and_cache_of_fastv():
    report = _llava_report().report()
    assert (report.model, report.methods, report.source) == (
        "LlavaForConditionalGeneration",
        ["fastv:keep=0.25"],
        "last pass",
    )
    lengths = [
        (line.before, line.attention, line.mlp, line.visual) for line in report.layers if line.stage == "decoder"
    ]
    assert lengths[:2] == [(24, Span(24, 24), Span(24, 24), Span(16, 16))] * 2
    assert lengths[2:] == [(24, Span(12, 12), Span(12, 12), Span(4, 4))] * 14
    width, kv, d = models.LM_WIDTH, models.LM_HEADS // 2, models.LM_WIDTH // models.LM_HEADS
    token = 2 * width * width + 2 * width * kv * d + 3 * width * 2 * width
    head = width * models.VOCAB
    assert report.line("prefill").before == head + 16 * (24 * token + 2 * width * 24 * 24)
    assert report.step.before == head + 16 * (token + 2 * width * 25)
    assert report.step.after.low == head + 2 * (token + 2 * width * 25) + 14 * (token + 2 * width * 13)
    assert report.cache.before == 16 * 24 * 2 * kv * d * 4
    assert report.cache.after.low == (2 * 24 + 14 * 12) * 2 * kv * d * 4
    (site,) = report.sites
    assert (str(site.site), site.visits, site.before, site.after) == ("decoder layer 1 end", 1, 24, Span(12, 12))


def test_a_total_adds_up_all_passes_and_their_steps():
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV(keep=0.25)) as run:
        for steps, rows in ((4, ("^3I4",)), (4, ("^3I4",)), (2, ("^2I5", "^2I5"))):
            generating(model, steps, rows)()
            last = run.report()
    total = run.report(total=True)
    assert total.source == "all passes" and total.layers == [] and total.step is None and total.cache is None
    assert total.passes == {"vision": 3, "decoder": 3, "decode steps": 7}
    assert run.report().macs == last.macs and last.macs.before < total.macs.before
    assert total.line("vision").before == 4 * _llava_report().report().line("vision").before
    assert total.line("decode").after.low < total.line("decode").before


def test_a_report_is_of_the_last_prompt_with_pictures():
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        generating(model, 2, ("^3I4",))()
        seen = run.report()
        generating(model, 2, ("6",))()
        report, total = run.report(), run.report(total=True)
    assert report.problem is None and report.lines == seen.lines and report.layers == seen.layers
    assert total.line("prefill").before > seen.line("prefill").before, "all passes count the prompt without pictures"


def test_a_prompt_without_pictures_has_no_tower_pass_in_its_report():
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        generating(model, 2, ("6",))()
        report = run.report()
        generating(model, 2, ("^3I4",))()
    assert [line.name for line in report.lines] == ["prefill", "signals", "method"]
    assert report.line("prefill").before == report.line("prefill").after.low
    # A tower that ran by itself before is no part of it either.
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        model.model.get_image_features(models.Batch.of("^3I4").inputs()["pixel_values"])
        generating(model, 2, ("6",))()
        assert [line.name for line in run.report().lines] == ["prefill", "signals", "method"]
        generating(model, 2, ("^3I4",))()


def test_sites_of_all_passes_show_the_last_one():
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV(keep=4)) as run:
        generating(model, 2, ("^3I4",))()
        (first,) = run.report(total=True).sites
        generating(model, 2, ("^2I8",))()
        (last,) = run.report(total=True).sites
    assert (first.before, first.after.high, first.visits) == (24, 12, 1)
    assert (last.before, last.after.high, last.visits) == (27, 15, 2)


def test_a_compression_that_never_fired_says_so():
    model = model_of("HF LLaVA")
    run = vlmtok.compress(model, FastV())
    report = run.report()
    assert report.notes[0] == "never fired: no pass has run" and report.lines == [] and report.layers == []
    assert report.problem == report.to_dict()["problem"] == "never fired: no pass has run"
    for text in (str(report), report.to_markdown()):
        assert "error: never fired" in text and text.count("no pass has run") == 1
    assert "problem,never fired: no pass has run" in report.to_csv()
    assert "never fired" in str(report) and report.sites[0].after is None
    with torch.no_grad():
        model(**models.Batch.of("6").inputs())
    assert run.report().notes[0] == "never fired: no prompt had a picture"
    with pytest.warns(VlmtokWarning, match="no prompt had a picture"):
        run.remove()


def test_the_report_outlives_the_compression_but_not_the_model():
    import gc

    model = models.fresh("timm ViT")
    with torch.no_grad(), vlmtok.compress(model, ToMe(r=2)) as run:
        model(models.TOWERS["timm ViT"].pictures())
    assert run.report().macs.before > 0
    del model
    gc.collect()
    with pytest.raises(PassError, match="no longer exists"):
        run.report()


def test_a_compiled_tower_is_reported_by_plan_and_says_so():
    model = models.fresh("timm ViT").requires_grad_(False)
    tower = models.TOWERS["timm ViT"]
    with torch.no_grad(), vlmtok.compress(model, ToMe(r=3)) as run:
        torch.compile(model, backend="eager")(tower.pictures())
        report = run.report()
    torch._dynamo.reset()
    assert report.notes == [
        "the forward ran compiled, where no books are kept; the figures are those planned for one picture"
    ]
    with torch.no_grad(), vlmtok.compress(model, ToMe(r=3)) as run:
        tower.run(model, tower.pictures(1))
        eager = run.report()
    assert report.layers == eager.layers and report.lines == eager.lines and eager.notes == []


def test_a_pass_captured_into_a_cuda_graph_says_that_replays_are_not_seen(monkeypatch):
    model, tower = model_of("timm ViT"), models.TOWERS["timm ViT"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad(), vlmtok.compress(model, ToMe(r=3)) as run:
        tower.run(model, tower.pictures())
        report = run.report()
    assert any("captured into a CUDA graph" in note for note in report.notes)
    assert report.line("vision").after.low < report.line("vision").before


class _Blind(Method):
    """A method that looks at data, which nothing can be without."""

    def sites(self, layout):
        return [Site("vision", 1, "mid", ("keys",))]

    def reduce(self, view):
        keep = int(view.signal("keys").square().mean() * 0) + view.tokens.shape[1] // 2
        return Reduction(torch.arange(keep).expand(view.tokens.shape[0], keep))

    def count(self, counts):
        return counts.n // 2

    def __str__(self):
        return "blind"


def test_a_method_that_cannot_run_without_data_is_named():
    model, tower = model_of("timm ViT"), models.TOWERS["timm ViT"]
    with torch.no_grad(), vlmtok.compress(model, _Blind()) as run:
        tower.run(model, tower.pictures())
        report = run.report()
    assert any("_Blind does not run without data at vision layer 1 mid" in note for note in report.notes)
    assert report.line("vision").after.low < report.line("vision").before


class _Given(_Blind):
    """A method that reads a signal of the user's."""

    def sites(self, layout):
        return [Site("vision", 1, "mid", ("mine",))]

    def reduce(self, view):
        order = view.signal("mine").argsort(dim=1, stable=True)
        return Reduction(order[:, : view.tokens.shape[1] // 2])


def test_the_users_own_signals_are_named_as_not_counted():
    model, tower = model_of("timm ViT"), models.TOWERS["timm ViT"]
    signals = {"mine": lambda view: (view.tokens @ view.tokens.transpose(1, 2)).sum(-1)}
    with torch.no_grad(), vlmtok.compress(model, _Given(), signals=signals) as run:
        tower.run(model, tower.pictures())
        report = run.report()
    assert report.notes == ["the user's own signals for _Given are not counted"]
    with pytest.raises(MissingSignal):
        vlmtok.estimate(model, _Given())
    assert vlmtok.estimate(model, _Given(), signals=["mine"], batch=3).line("vision") == report.line("vision")


def test_counting_leaves_no_trace_in_the_kernel_statistics():
    model, tower = model_of("timm ViT"), models.TOWERS["timm ViT"]
    vlmtok.kernels.ran(reset=True)
    with torch.no_grad(), vlmtok.compress(model, ToMe(r=3)) as run:
        tower.run(model, tower.pictures())
        seen = vlmtok.kernels.ran()
        report = run.report()
        run.report()
    assert vlmtok.kernels.ran() == seen == report.kernels and sum(seen.values()) > 0


# ---------------------------------------------------------------------- forms
@pytest.fixture(scope="module")
def ranged():
    return vlmtok.estimate("llava-1.5-7b", [PiToMe.preset("llava"), ToDRE(keep=64)], convention="transprune")


def test_the_dict_is_plain_and_has_everything(ranged):
    made = json.loads(ranged.to_json())
    assert made == json.loads(json.dumps(ranged.to_dict()))
    assert made["macs"]["prefill"]["after"] == [ranged.line("prefill").after.low, ranged.line("prefill").after.high]
    assert made["flops"]["vision"]["before"] == 2 * made["macs"]["vision"]["before"]
    assert made["total_flops"]["before"] == 2 * made["total_macs"]["before"]
    assert made["figure"]["convention"] == "transprune" and made["figure"]["unit"] == "MACs"
    assert len(made["layers"]) == 24 + 32 and made["sites"][-1]["site"] == "decoder layer 27 end"
    assert made["methods"] == [str(PiToMe.preset("llava")), "todre:keep=64"]


def test_the_table_names_macs_and_flops_apart_and_prints_plainly(ranged):
    text = str(ranged)
    for word in ("MACs before", "MACs after", "FLOPs before", "FLOPs after", "vision tower", "projector", "prefill"):
        assert word in text
    for word in ("signals", "method itself", "one decode step", "key-value cache", "transprune convention, MACs"):
        assert word in text
    assert "vision layers 0 - 12 end" not in text and "vision layers 0 - 22 end" in text
    assert max(map(len, text.splitlines())) <= 120 and "\x1b" not in text
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True).print(ranged)
    assert "vision tower" in out.getvalue() and "\x1b" in out.getvalue()


def test_markdown_tables_are_rectangular(ranged):
    tables = [part.splitlines() for part in ranged.to_markdown().split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1
    assert "| prefill |" in ranged.to_markdown() and "- ToDRE at decoder layer 27 end depends" in ranged.to_markdown()


def test_csv_has_a_row_for_every_figure(ranged):
    rows = list(csv.DictReader(io.StringIO(ranged.to_csv())))
    cost = {(row["name"], row["unit"]): row for row in rows if row["kind"] == "cost"}
    assert float(cost["total", "FLOPs"]["before"]) == 2 * float(cost["total", "MACs"]["before"])
    assert float(cost["prefill", "MACs"]["after_low"]) < float(cost["prefill", "MACs"]["after_high"])
    assert sum(row["kind"] == "tokens" for row in rows) == 3 * (24 + 32)
    assert {row["kind"] for row in rows} == {"cost", "cache", "convention", "tokens"}


def test_a_line_that_is_not_there(ranged):
    with pytest.raises(ParameterError, match="no line 'text'; lines: vision, projector, prefill, signals, method"):
        ranged.line("text")
    with pytest.raises(ParameterError, match="no convention"):
        ranged.by("flops")
