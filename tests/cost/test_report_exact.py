"""Reports: 2 x their MACs are what torch's FlopCounterMode counts on what ran."""

from __future__ import annotations

import pytest
import torch
from support import models, referee
from support.counted import generating, model_of
from support.hosts_of import with_cache

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
)
from vlmtok.cost.lines import Line, Span
from vlmtok.pruners.learned import ConvScorer

pytestmark = pytest.mark.usefixtures("counted_paths")


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
    model, tower = model_of(name), models.TOWERS[name]
    pictures = tower.pictures()
    report = _exact(model, TOWER_METHODS[method](), lambda: tower.run(model, pictures))
    assert report.macs.after.low < report.macs.before


@pytest.mark.parametrize("method", MORE)
@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF DINOv2", "timm EVA"])
def test_every_kind_of_visit_in_a_tower_is_counted_exactly(name, method):
    model, tower = model_of(name), models.TOWERS[name]
    pictures = tower.pictures()
    _exact(model, MORE[method](), lambda: tower.run(model, pictures))


def test_what_stands_behind_the_blocks_counts_where_it_ran():
    model, tower = model_of("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures()
    whole = _exact(model, ToMe(r=3), lambda: model(pictures))
    features = _exact(model, ToMe(r=3), lambda: model.forward_features(pictures))
    assert whole.macs.before - features.macs.before == 3 * models.WIDTH * models.CLASSES


def test_both_towers_of_a_dual_encoder_count_touched_or_not():
    model, tower = model_of("open_clip CLIP"), models.TOWERS["open_clip CLIP"]
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
    "Learned": lambda: Learned(keep=0.3, scorer=ConvScorer((4, 8), 5)),
    "Learned behind a cut": lambda: [DivPrune(keep=0.7), Learned()],
    "IMA": lambda: IMA(),
    "IMA, attention": lambda: IMA(part="attn", interval=3),
    "IMA and cuts": lambda: [IMA(part="block", interval=1), PiToMe.preset("llava", ratio=0.8), TransPrune(), FastV()],
}


@pytest.mark.parametrize("method", LANGUAGE_METHODS)
def test_generate_is_counted_exactly_prefill_and_each_step(method):
    model = model_of("HF LLaVA")
    report = _exact(model, LANGUAGE_METHODS[method](), generating(model))
    assert report.passes == {"vision": 1, "decoder": 1, "decode steps": 3}


@pytest.mark.parametrize(
    "method", ["ToDRE", "TransPrune", "FastV", "SparseVLM", "PruMerge", "three", "Learned", "IMA", "IMA and cuts"]
)
def test_a_plain_forward_is_counted_exactly(method):
    model = model_of("HF LLaVA")
    for mask in (True, False):
        inputs = models.Batch.of("^3I4", "^2I5").inputs(mask)
        _exact(model, LANGUAGE_METHODS[method](), lambda inputs=inputs: model(**inputs))


@pytest.mark.parametrize("name", ["HF LLaVA eager", "HF LLaVA SigLIP"])
@pytest.mark.parametrize("method", ["ToDRE", "TransPrune", "FastV", "SparseVLM", "three"])
def test_other_attention_and_other_towers_are_counted_exactly(name, method):
    model = model_of(name)
    _exact(model, LANGUAGE_METHODS[method](), generating(model, rows=("^3I4", "^1I2I5")))


def test_the_inner_model_alone_is_counted_exactly():
    model = model_of("HF LlavaModel")
    inputs = models.Batch.of("^3I4").inputs()
    report = _exact(model, TransPrune(), lambda: model(**inputs))
    assert [line.name for line in report.lines] == ["vision", "projector", "prefill", "signals", "method"]


WAYS = {
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "steps": 6, "rows": ("^3I4",)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["Random", "TransPrune", "three", "IMA and cuts"])
def test_ways_to_generate_are_counted_exactly(way, method):
    model = model_of("HF LLaVA")
    # How many candidates prompt lookup accepts depends on what the model says.
    _exact(model, LANGUAGE_METHODS[method](), generating(model, **WAYS[way]), bare=way != "prompt lookup")


def test_a_later_turn_is_counted_exactly_and_leaves_the_prefill_in_sight():
    from transformers import DynamicCache

    model = model_of("HF LLaVA")
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
