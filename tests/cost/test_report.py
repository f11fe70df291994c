"""Reports: 2 x their MACs are what torch's FlopCounterMode counts on what ran, and their forms agree."""

from __future__ import annotations

import csv
import functools
import io
import json

import pytest
import torch
from rich.console import Console
from support import models, referee
from support.hosts_of import with_cache

import vlmtok
from vlmtok import (
    AIM,
    SCOPE,
    TCA,
    AveragePool,
    CrossGET,
    DivPrune,
    FastV,
    Method,
    PiToMe,
    PruMerge,
    PyramidDrop,
    Random,
    Reduction,
    Site,
    SparseVLM,
    ToDRE,
    ToMe,
    TransPrune,
    VisionZip,
)
from vlmtok.cost.lines import Line, Span
from vlmtok.errors import MissingSignal, ParameterError, PassError, VlmtokWarning


@pytest.fixture(autouse=True)
def _counted_paths():
    """Torch definitions, and no fused fast path that the counter does not know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with vlmtok.kernels.use("torch"):
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


@functools.cache
def _model(name):
    return models.fresh(name).requires_grad_(False)


def _flops(call):
    with torch.no_grad(), referee.counter() as counter:
        call()
    return counter.get_total_flops()


def _exact(model, method, call, bare=True):
    """Runs bare and compressed, and holds the report to what was counted.

    Where the compressed model takes other steps than the bare one, `bare=False` leaves that one out.
    """
    run = vlmtok.compress(model, method)
    try:
        counted = _flops(call)
        report = run.report(total=True)
        assert 2 * report.macs.after.low == counted and report.macs.after.fixed
        assert report.flops == Line("total", "FLOPs", 2 * report.macs.before, Span(counted, counted))
        if bare:
            with run.paused():
                assert 2 * report.macs.before == _flops(call)
        return run.report()
    finally:
        run.remove()


# ---------------------------------------------------------------------- exact: towers
TOWER_METHODS = {
    "ToMe": lambda: ToMe(r=3),
    "PiToMe": lambda: PiToMe(ratio=0.8),
    "PiToMe end": lambda: PiToMe.preset("llava", ratio=0.8),
}
MORE = {
    "PiToMe DeiT": lambda: PiToMe.preset("deit", ratio=0.8),
    "CrossGET": lambda: CrossGET(rv=3),
    "CrossGET inserted": lambda: CrossGET.preset("clip", rv=3, rl=None),
    "CrossGET attention": lambda: CrossGET(rv=3, guidance="attention"),
    "TCA": lambda: TCA(ratio=0.7, layers=(1, 2, 3)),
    "Random": lambda: Random(stage="vision"),
    "three": lambda: [ToMe(r=[2, 2]), Random(keep=0.5, stage="vision", layer=2), PiToMe(ratio=[1.0, 0.9, 0.9, 0.9])],
}


@pytest.mark.parametrize("method", TOWER_METHODS)
@pytest.mark.parametrize("name", models.TOWERS)
def test_towers_are_counted_exactly(name, method):
    model, tower = _model(name), models.TOWERS[name]
    pictures = tower.pictures()
    report = _exact(model, TOWER_METHODS[method](), lambda: tower.run(model, pictures))
    assert report.macs.after.low < report.macs.before


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF DINOv2", "timm EVA"])
def test_every_kind_of_visit_in_a_tower_is_counted_exactly(name, method):
    model, tower = _model(name), models.TOWERS[name]
    pictures = tower.pictures()
    _exact(model, MORE[method](), lambda: tower.run(model, pictures))


def test_what_stands_behind_the_blocks_counts_where_it_ran():
    model, tower = _model("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures()
    whole = _exact(model, ToMe(r=3), lambda: model(pictures))
    features = _exact(model, ToMe(r=3), lambda: model.forward_features(pictures))
    assert whole.macs.before - features.macs.before == 3 * models.WIDTH * models.CLASSES


def test_both_towers_of_a_dual_encoder_count_touched_or_not():
    model, tower = _model("open_clip CLIP"), models.TOWERS["open_clip CLIP"]
    pictures, words = tower.pictures(), torch.randint(1, 60, (5, 12))
    words[:, -1] = 63  # end of text

    def both():
        model.encode_image(pictures)
        model.encode_text(words)

    for method in (ToMe(r=2), CrossGET(rv=2, rl=2), CrossGET.preset("clip", rv=0, rl=3)):
        report = _exact(model, method, both)
        assert [line.name for line in report.lines] == ["vision", "text", "signals", "method"]


# ---------------------------------------------------------------------- exact: language models
LANGUAGE_METHODS = {
    "Random": lambda: Random(),
    "ToDRE": lambda: ToDRE(keep=0.5, tau=1.0),
    "ToDRE stage 2": lambda: ToDRE(keep=None, tau=1.0),
    "TransPrune": lambda: TransPrune(),
    "TransPrune, positions kept": lambda: TransPrune(positions="keep"),
    "FastV": lambda: FastV(),
    "PyramidDrop": lambda: PyramidDrop(),
    "SparseVLM": lambda: SparseVLM(tokens=64),
    "AIM": lambda: AIM(),
    "VisionZip": lambda: VisionZip(keep=0.5),
    "PruMerge": lambda: PruMerge(),
    "PruMerge, fixed": lambda: PruMerge(keep=0.3),
    "DivPrune": lambda: DivPrune(keep=0.3),
    "SCOPE": lambda: SCOPE(keep=0.5),
    "AveragePool": lambda: AveragePool(),
    "CrossGET": lambda: CrossGET.preset("llava", rv=2),
    "PiToMe and TransPrune": lambda: [PiToMe.preset("llava", ratio=0.8), TransPrune()],
    "three": lambda: [ToMe(r=2), ToDRE(keep=0.5, tau=1.0), FastV()],
}
BATCH = ("^3I4", "^1I2I5", "6", "^2I")
"""A picture, two pictures, none, and one that ends its prompt: rows of different lengths, padded."""


def _generate(model, steps=4, rows=BATCH, **options):
    inputs = models.Batch.of(*rows).inputs()
    return lambda: model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)


@pytest.mark.parametrize("method", LANGUAGE_METHODS)
def test_generate_is_counted_exactly_prefill_and_each_step(method):
    model = _model("HF LLaVA")
    report = _exact(model, LANGUAGE_METHODS[method](), _generate(model))
    assert report.passes == {"vision": 1, "decoder": 1, "decode steps": 3}


@pytest.mark.parametrize("method", ["ToDRE", "TransPrune", "FastV", "SparseVLM", "PruMerge", "three"])
def test_a_plain_forward_is_counted_exactly(method):
    model = _model("HF LLaVA")
    for mask in (True, False):
        inputs = models.Batch.of("^3I4", "^2I5").inputs(mask)
        _exact(model, LANGUAGE_METHODS[method](), lambda inputs=inputs: model(**inputs))


@pytest.mark.parametrize("name", ["HF LLaVA eager", "HF LLaVA SigLIP"])
@pytest.mark.parametrize("method", ["ToDRE", "TransPrune", "FastV", "SparseVLM", "three"])
def test_other_attention_and_other_towers_are_counted_exactly(name, method):
    model = _model(name)
    _exact(model, LANGUAGE_METHODS[method](), _generate(model, rows=("^3I4", "^1I2I5")))


def test_the_inner_model_alone_is_counted_exactly():
    model = _model("HF LlavaModel")
    inputs = models.Batch.of("^3I4").inputs()
    report = _exact(model, TransPrune(), lambda: model(**inputs))
    assert [line.name for line in report.lines] == ["vision", "projector", "prefill", "signals", "method"]


WAYS = {
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "steps": 6, "rows": ("^3I4",)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["Random", "TransPrune", "three"])
def test_ways_to_generate_are_counted_exactly(way, method):
    model = _model("HF LLaVA")
    # How many candidates prompt lookup accepts depends on what the model says.
    _exact(model, LANGUAGE_METHODS[method](), _generate(model, **WAYS[way]), bare=way != "prompt lookup")


def test_a_later_turn_is_counted_exactly_and_leaves_the_prefill_in_sight():
    from transformers import DynamicCache

    model = _model("HF LLaVA")
    inputs = models.Batch.of("^3I4").inputs(mask=False)
    later = models.prompt("5", 7)[None]

    def turns():
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, **with_cache(model, cache), logits_to_keep=1)
        model(input_ids=later, **with_cache(model, cache), logits_to_keep=2)
        model(input_ids=later[:, :1], **with_cache(model, cache))

    report = _exact(model, [Random(keep=0.5), FastV(keep=0.5)], turns)
    names = [line.name for line in report.lines]
    assert names == ["vision", "projector", "prefill", "continued", "signals", "method"]
    assert report.layers[-1].before == 24 and report.line("continued").before > report.line("continued").after.low


# ---------------------------------------------------------------------- what a report says
def _llava_report(method=None, steps=4):
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, method or FastV(keep=0.25)) as run:
        _generate(model, steps, ("^3I4",))()
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
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV(keep=0.25)) as run:
        for steps, rows in ((4, ("^3I4",)), (4, ("^3I4",)), (2, ("^2I5", "^2I5"))):
            _generate(model, steps, rows)()
            last = run.report()
    total = run.report(total=True)
    assert total.source == "all passes" and total.layers == [] and total.step is None and total.cache is None
    assert total.passes == {"vision": 3, "decoder": 3, "decode steps": 7}
    assert run.report().macs == last.macs and last.macs.before < total.macs.before
    assert total.line("vision").before == 4 * _llava_report().report().line("vision").before
    assert total.line("decode").after.low < total.line("decode").before


def test_a_report_is_of_the_last_prompt_with_pictures():
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        _generate(model, 2, ("^3I4",))()
        seen = run.report()
        _generate(model, 2, ("6",))()
        report, total = run.report(), run.report(total=True)
    assert report.problem is None and report.lines == seen.lines and report.layers == seen.layers
    assert total.line("prefill").before > seen.line("prefill").before, "all passes count the prompt without pictures"


def test_a_prompt_without_pictures_has_no_tower_pass_in_its_report():
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        _generate(model, 2, ("6",))()
        report = run.report()
        _generate(model, 2, ("^3I4",))()
    assert [line.name for line in report.lines] == ["prefill", "signals", "method"]
    assert report.line("prefill").before == report.line("prefill").after.low
    # A tower that ran by itself before is no part of it either.
    with torch.no_grad(), vlmtok.compress(model, FastV()) as run:
        model.model.get_image_features(models.Batch.of("^3I4").inputs()["pixel_values"])
        _generate(model, 2, ("6",))()
        assert [line.name for line in run.report().lines] == ["prefill", "signals", "method"]
        _generate(model, 2, ("^3I4",))()


def test_sites_of_all_passes_show_the_last_one():
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, FastV(keep=4)) as run:
        _generate(model, 2, ("^3I4",))()
        (first,) = run.report(total=True).sites
        _generate(model, 2, ("^2I8",))()
        (last,) = run.report(total=True).sites
    assert (first.before, first.after.high, first.visits) == (24, 12, 1)
    assert (last.before, last.after.high, last.visits) == (27, 15, 2)


def test_a_compression_that_never_fired_says_so():
    model = _model("HF LLaVA")
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
    model, tower = _model("timm ViT"), models.TOWERS["timm ViT"]
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
    model, tower = _model("timm ViT"), models.TOWERS["timm ViT"]
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
    model, tower = _model("timm ViT"), models.TOWERS["timm ViT"]
    signals = {"mine": lambda view: (view.tokens @ view.tokens.transpose(1, 2)).sum(-1)}
    with torch.no_grad(), vlmtok.compress(model, _Given(), signals=signals) as run:
        tower.run(model, tower.pictures())
        report = run.report()
    assert report.notes == ["the user's own signals for _Given are not counted"]
    with pytest.raises(MissingSignal):
        vlmtok.estimate(model, _Given())
    assert vlmtok.estimate(model, _Given(), signals=["mine"], batch=3).line("vision") == report.line("vision")


def test_counting_leaves_no_trace_in_the_kernel_statistics():
    model, tower = _model("timm ViT"), models.TOWERS["timm ViT"]
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
