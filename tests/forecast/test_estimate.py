"""`estimate` against the report of a run on the same shapes, and what it can be given."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from support import models

import vlmtok
from vlmtok import (
    AIM,
    IMA,
    SCOPE,
    TCA,
    AveragePool,
    CrossGET,
    DivPrune,
    FastV,
    Learned,
    PiToMe,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    ToDRE,
    ToMe,
    TransPrune,
    VisionZip,
    estimate,
)
from vlmtok.core.model_shape import ModelShape
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.forecast.presets import preset
from vlmtok.loading import LoadError
from vlmtok.pruners.learned import ConvScorer

LLAVA = "llava-1.5-7b"


# ---------------------------------------------------------------------- content decides
def test_counts_that_depend_on_content_give_a_range_and_say_so():
    report = estimate(LLAVA, ToDRE(keep=None, tau=0.1))
    # Layers 28 to 31 run with 64 or with 640 tokens.
    last = report.layers[-1]
    assert (last.attention.low, last.attention.high, report.layers[-5].attention.low) == (64, 640, 640)
    assert report.macs.after.low < report.macs.after.high == report.macs.before + _deciding(report)
    assert report.open == ["ToDRE at decoder layer 27 end"]
    assert any("depends on content" in note for note in report.notes)
    assert json.loads(report.to_json())["total_macs"]["after"] == [report.macs.after.low, report.macs.after.high]


def _deciding(report):
    return sum(report.line(name).after.high for name in ("signals", "method"))


def test_counts_can_be_given_by_site():
    report = estimate(LLAVA, ToDRE(keep=64), counts={"decoder layer 27 end": 0})
    assert report.macs.after.fixed and report.layers[-1].visual.low == 0 and report.open == []
    with pytest.raises(ParameterError, match="no site 'decoder layer 3 end'; sites: decoder layer 27 end, projected"):
        estimate(LLAVA, ToDRE(keep=64), counts={"decoder layer 3 end": 0})
    with pytest.raises(ParameterError, match="must be a number of tokens"):
        estimate(LLAVA, ToDRE(keep=64), counts={"projected": 0.5})
    with pytest.raises(ParameterError, match="must be a Compression, a Report or a dict"):
        estimate(LLAVA, ToDRE(keep=64), counts=5)


# ---------------------------------------------------------------------- the same as a run
TOWER_METHODS = {
    "ToMe": lambda: ToMe(r=3),
    "PiToMe": lambda: PiToMe(ratio=0.8),
    "PiToMe end": lambda: PiToMe.preset("llava", ratio=0.8),
    "CrossGET": lambda: CrossGET(rv=3),
    "CrossGET inserted": lambda: CrossGET.preset("clip", rv=3, rl=None),
    "TCA": lambda: TCA(ratio=0.7, layers=(1, 2, 3)),
    "Random": lambda: Random(stage="vision"),
    "three": lambda: [ToMe(r=[2, 2]), Random(keep=0.5, stage="vision", layer=2), PiToMe(ratio=[1.0, 0.9, 0.9, 0.9])],
}
WITHOUT_CLS = ("HF SigLIP vision", "timm SigLIP")
TOWERS = ("timm ViT", "timm SigLIP", "timm EVA", "timm DINOv2 registers", "open_clip VisionTransformer", "HF DINOv2")
COMPARED = ("macs", "flops", "total_macs", "decode_step_macs", "cache_bytes", "layers")


@functools.cache
def _model(name):
    return models.fresh(name).requires_grad_(False)


def _same(run, planned):
    run, planned = run.to_dict(), planned.to_dict()
    for name in COMPARED:
        assert run[name] == planned[name], name


@pytest.mark.parametrize("method", TOWER_METHODS)
@pytest.mark.parametrize("name", TOWERS)
def test_an_estimate_equals_the_report_of_a_tower(name, method):
    model, tower = _model(name), models.TOWERS[name]
    if name in WITHOUT_CLS and "CrossGET " in method:  # a guide that somebody named
        with pytest.raises(MissingSignal):
            estimate(model, TOWER_METHODS[method]())
        return
    with torch.no_grad(), vlmtok.compress(model, TOWER_METHODS[method]()) as run:
        tower.run(model, tower.pictures())
    _same(run.report(), estimate(model, TOWER_METHODS[method](), batch=3))


LANGUAGE_METHODS = {
    "Random": lambda: Random(),
    "ToDRE": lambda: ToDRE(keep=0.5, tau=1.0),
    "ToDRE drops nothing": lambda: ToDRE(keep=None, tau=0.0),
    "TransPrune": lambda: TransPrune(),
    "FastV": lambda: FastV(),
    "PyramidDrop": lambda: PyramidDrop(),
    "SparseVLM": lambda: SparseVLM(tokens=64),
    "AIM": lambda: AIM(),
    "VisionZip": lambda: VisionZip(keep=0.5),
    "PruMerge": lambda: PruMerge(),
    "PruMerge+": lambda: PruMerge(plus=True),
    "DivPrune": lambda: DivPrune(keep=0.3),
    "SCOPE": lambda: SCOPE(keep=0.5),
    "AveragePool": lambda: AveragePool(),
    "CrossGET": lambda: CrossGET.preset("llava", rv=2),
    "two": lambda: [PiToMe.preset("llava", ratio=0.8), TransPrune()],
    "three": lambda: [ToMe(r=2), ToDRE(keep=0.5, tau=1.0), FastV()],
    "Learned": lambda: Learned(keep=0.3, scorer=ConvScorer((4, 8), 5)),
    "Learned behind a cut": lambda: [DivPrune(keep=0.7), Learned()],
    "IMA": lambda: IMA(),
    "IMA, attention": lambda: IMA(part="attn", interval=3),
    "IMA and cuts": lambda: [IMA(part="block", interval=1), PiToMe.preset("llava", ratio=0.8), TransPrune(), FastV()],
}
# Pattern of the rows, text around the pictures, rows of the batch.
PROMPTS = {
    "one picture": (("^3I4",), (4, 4), 1),
    "two pictures, two rows": (("^1I2I5", "^1I2I5"), (2, 2, 5), 2),
    "ends with the picture": (("^7I",), (8, 0), 1),
}


@pytest.mark.parametrize("method", LANGUAGE_METHODS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_estimate_equals_the_report_of_llava(prompt, method):
    model = _model("HF LLaVA")
    rows, text, batch = PROMPTS[prompt]
    with torch.no_grad(), vlmtok.compress(model, LANGUAGE_METHODS[method]()) as run:
        model(**models.Batch.of(*rows).inputs(mask=False))
    given = {"batch": batch, "pictures": len(text) - 1, "text_tokens": text, "logits": "all"}
    report = run.report()
    _same(report, estimate(model, LANGUAGE_METHODS[method](), counts=run, **given))
    _same(report, estimate(model, LANGUAGE_METHODS[method](), counts=report, **given))
    # Without the run's counts its figures lie in the range.
    free = estimate(model, LANGUAGE_METHODS[method](), **given)
    assert free.macs.after.low <= report.macs.after.low <= free.macs.after.high
    assert free.cache.after.low <= report.cache.after.low <= free.cache.after.high
    assert bool(free.open) == (not free.macs.after.fixed)


def test_an_estimate_equals_the_prefill_of_generate():
    model = _model("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, TransPrune()) as run:
        model.generate(**models.Batch.of("^3I4").inputs(), max_new_tokens=3, do_sample=False)
    _same(run.report(), estimate(model, TransPrune(), text_tokens=(4, 4)))


def test_an_estimate_takes_over_what_a_run_has_learned():
    model, tower = _model("open_clip CLIP"), models.TOWERS["open_clip CLIP"]
    run = vlmtok.compress(model, TCA(ratio=0.7, layers=(1, 2), reservoir_size=2, anchor_gate="per_class"))
    text = torch.nn.functional.normalize(torch.randn(4, 24), dim=-1)
    classify = vlmtok.zero_shot(model, run, text)
    with torch.no_grad():
        for seed in range(12):
            classify(tower.pictures(1, seed))
    with_anchors = run.report()
    assert any(event.kind == "insert" for event in run._attachment.ledger.last["vision"].events)
    method = TCA(ratio=0.7, layers=(1, 2), reservoir_size=2, anchor_gate="per_class")
    learned = estimate(model, method, batch=1, counts=run)
    assert learned.line("vision") == with_anchors.line("vision")
    assert learned.line("method") == with_anchors.line("method")
    assert estimate(model, method, batch=1).line("vision").after < learned.line("vision").after
    run.remove()


# ---------------------------------------------------------------------- what can be given as a model
def test_models_configurations_dicts_and_folders_are_one(tmp_path):
    model = _model("HF LLaVA")
    config = model.config
    config.save_pretrained(tmp_path)
    given = [model, config, config.to_dict(), str(tmp_path)]
    found = [estimate(one, FastV(), text_tokens=9) for one in given]
    assert all(one.to_dict()["total_macs"] == found[0].to_dict()["total_macs"] for one in found)
    assert all(one.cache == found[0].cache for one in found)


def test_models_of_timm_and_open_clip_by_name():
    named, known = estimate("timm:vit_base_patch16_224", ToMe(r=16)), estimate("vit-b-16", ToMe(r=16))
    assert named.macs == known.macs and named.layers == known.layers
    dual = estimate("open_clip:ViT-B-16", ToMe(r=8))
    assert dual.line("vision") == estimate("clip-vit-b-16", ToMe(r=8)).line("vision")
    # q and k of nn.MultiheadAttention have to be computed again.
    assert dual.line("signals").after.low > estimate("clip-vit-b-16", ToMe(r=8)).line("signals").after.low == 0


def test_the_size_of_pictures_prompts_and_batches():
    one, four = estimate("vit-b-16", ToMe(r=8)), estimate("vit-b-16", ToMe(r=8), batch=4)
    assert four.macs.before == 4 * one.macs.before and four.macs.after.low == 4 * one.macs.after.low
    assert estimate("vit-b-16", ToMe(r=8), visual_tokens=576).layers[0].before == 577
    texts = [estimate(LLAVA, FastV(), text_tokens=n) for n in (64, (0, 64), (24, 40))]
    assert len({report.line("prefill") for report in texts}) == 1
    assert texts[1].line("signals") == texts[0].line("signals")
    two = estimate(LLAVA, FastV(), pictures=2, text_tokens=(1, 2, 61))
    assert two.layers[-1].before == 2 * 576 + 64
    assert two.line("vision").before == 2 * texts[0].line("vision").before
    every = estimate(LLAVA, FastV(), logits="all").line("prefill").before - texts[0].line("prefill").before
    assert every == 639 * 4096 * 32064


def test_a_convention_counts_the_same_pass_in_its_own_way():
    report = estimate(LLAVA, [PiToMe.preset("llava"), FastV()])
    assert report.by("pitome").unit == "MACs" and report.by("language").unit == "FLOPs"
    with pytest.raises(ParameterError, match="counts vision and text, and this report has no pass through text"):
        report.by("crossget")
    with pytest.raises(ParameterError, match="has no pass through decoder"):
        estimate("vit-b-16", ToMe(), convention="transprune")


WRONG = [
    ({"model": "llava"}, "no preset 'llava'; did you mean"),
    ({"model": 5}, "takes a preset, a model, a transformers configuration"),
    ({"model": {"hidden_size": 5}}, "needs 'model_type'"),
    ({"text_tokens": -1}, "text_tokens=-1 must be an integer in"),
    ({"text_tokens": (1, 2, 3)}, "must be one number, or 2"),
    ({"pictures": 0}, "pictures=0 must be an integer in"),
    ({"batch": True}, "batch=True must be an integer in"),
    ({"visual_tokens": 2.5}, "visual_tokens=2.5 must be an integer in"),
    ({"parts": 7}, "visual_tokens=576 cannot be shared by 7 equal parts"),
    ({"parts": (1, 2)}, "must sum to the picture's 576 tokens"),
    ({"crops": 5, "visual_tokens": 576}, "cannot be shared by 5"),
    ({"logits": "some"}, "logits='some' is not possible"),
    ({"model": "vit-b-16", "method": "tome", "crops": 2}, "crops and parts are for vision-language models"),
    ({"method": "fastv", "convention": "flops"}, "no convention 'flops'"),
    ({"method": []}, "needs at least one method"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG)
def test_what_is_not_possible_says_so(wrong, says):
    given = {"model": LLAVA, "method": "fastv", **wrong}
    with pytest.raises(ParameterError, match=says):
        estimate(given.pop("model"), given.pop("method"), **given)


def test_methods_are_refused_as_compress_refuses_them():
    with pytest.raises(SiteError, match="FastV acts at stage 'decoder', which vit-b-16 does not offer"):
        estimate("vit-b-16", FastV())
    with pytest.raises(SiteError, match="has nothing to do"):
        estimate("vit-b-16", ToMe(r=0))
    with pytest.raises(MissingSignal, match="needs a class token"):
        estimate("siglip-so400m-14-384", CrossGET(guidance="cls"))
    with pytest.raises(LoadError, match="no timm model|no model"):
        estimate("timm:vit_base_patch17", ToMe())


def test_a_model_that_does_not_say_how_many_tokens_a_picture_has():
    shape = preset(LLAVA)
    unknown = ModelShape("unknown", shape.layout, shape.vision, None, shape.projector, shape.language)
    with pytest.raises(ParameterError, match="pass visual_tokens="):
        estimate(unknown, FastV())
    assert estimate(unknown, FastV(), visual_tokens=576).macs == estimate(LLAVA, FastV()).macs


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("averagepool:output_size=5", "a grid of 24 x 24 tokens cannot be divided into 5 x 5 equal windows"),
        ("divprune:keep=16+averagepool", "these 16 tokens are no longer its 24 x 24 grid"),
        ("pitome:ratio=0.5+averagepool", "are no longer its 24 x 24 grid"),
        ("todre:pivot=576:tau=none", "pivot=576 does not exist among 576 tokens"),
        ("tca:first=500", "first=500 does not exist among"),
    ],
)
def test_what_a_run_would_refuse_the_estimate_refuses(spec, words):
    with pytest.raises(ParameterError, match=re.escape(words)):
        estimate("llava-1.5-7b", spec)


def test_halves_are_rounded_by_the_grid_that_a_processor_made():
    (line,) = estimate("qwen2.5-vl-7b", "averagepool:overlap=true", image_size=(336, 308)).sites
    assert line.before - line.after.low == line.before - line.after.high == 11 * 12 - 6 * 6
