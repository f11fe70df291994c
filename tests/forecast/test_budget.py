"""`budget`: targets are met within 1 percent under a convention that has a name, or the nearest setting is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import models
from support.methods import on_caches

import vlmtok
from vlmtok import (
    AIM,
    SCOPE,
    TCA,
    AveragePool,
    CDPruner,
    CrossGET,
    DivPrune,
    FastV,
    Method,
    PiToMe,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    ToDRE,
    ToMe,
    TransPrune,
    VisionZip,
    budget,
    estimate,
    list_methods,
    method_class,
)
from vlmtok.core.clips import ClipMethod
from vlmtok.core.settings import scaled
from vlmtok.errors import MissingSignal, ParameterError, SiteError, TargetError
from vlmtok.forecast.budget import WITHIN, measure
from vlmtok.forecast.presets import preset

LLAVA, VIT = "llava-1.5-7b", "vit-b-16"


# ---------------------------------------------------------------------- meeting targets
TARGETS = [
    (FastV(), LLAVA, {"tokens": 128}),
    (FastV(keep=1), LLAVA, {"tokens": 128}),
    (FastV(), LLAVA, {"layer_average_tokens": 128}),
    (FastV(K=3), LLAVA, {"kv_bytes": 0.5}),
    (FastV(), LLAVA, {"kv_bytes": 200 << 20}),
    (TransPrune(), LLAVA, {"layer_average_tokens": 192}),
    (TransPrune(), "llava-next-7b", {"macs": 0.4}),
    (PyramidDrop(), LLAVA, {"macs": 0.5}),
    (SparseVLM(), LLAVA, {"layer_average_tokens": 192}),
    (SparseVLM(budgets=(300, 200, 110)), LLAVA, {"layer_average_tokens": 100}),
    (AIM(), LLAVA, {"layer_average_tokens": 99}),
    (ToDRE(), LLAVA, {"tokens": 64}),
    (DivPrune(), LLAVA, {"macs": 0.156}),
    (SCOPE(), LLAVA, {"tokens": 0.25}),
    (VisionZip(), LLAVA, {"tokens": 192}),
    (VisionZip(keep=64, contextual=10), LLAVA, {"tokens": 128}),
    (PruMerge(keep=0.2), LLAVA, {"tokens": 100}),
    (AveragePool(), LLAVA, {"tokens": 144}),
    (AveragePool(overlap=True), LLAVA, {"tokens": 100}),
    (Random(), LLAVA, {"tokens": 0.1}),
    (PiToMe.preset("llava"), LLAVA, {"tokens": 100}),
    (PiToMe(ratio=[0.9] * 12), VIT, {"macs": 0.6}),
    (PiToMe(), "deit-s", {"macs": 2.9e9, "convention": "tome"}),
    (ToMe(), VIT, {"macs": 0.5}),
    (ToMe(r=[8] * 6), VIT, {"macs": 0.8}),
    (ToMe(r=(8, -1)), VIT, {"macs": 0.5}),
    (ToMe(), VIT, {"tokens": 50}),
    (CrossGET(), VIT, {"tokens": 28}),
    (TCA(reservoir_size=0), VIT, {"macs": 0.7}),
    (TCA(drop_rate=0.1, reservoir_size=0), VIT, {"macs": 0.6}),
    ("fastv:K=4", LLAVA, {"macs": 1.4e12, "convention": "transprune"}),
]


def _identified(value):
    return value if isinstance(value, str) else str(value)


@pytest.mark.parametrize(("method", "model", "target"), TARGETS, ids=_identified)
def test_targets_are_met_within_one_percent(method, model, target):
    target = dict(target)
    name = target.pop("convention", None)
    ((what, value),) = target.items()
    made = budget(method, model, **{what: value}, convention=name)
    given = vlmtok.parse_methods(method)[0] if isinstance(method, str) else method
    bare, reached = measure(estimate(model, made), what, name)
    asked = value * bare if isinstance(value, float) and value <= 1 else value
    assert abs(reached - asked) <= WITHIN * asked
    # Only the parameter that the class names has moved, and what was given is as it was.
    moved = {f.name for f in dataclasses.fields(made) if getattr(made, f.name) != getattr(given, f.name)}
    allowed = {"first", "last"} if isinstance(given, AIM) else {given.budget_parameter, "drop_rate"}
    assert type(made) is type(given) and moved <= allowed and given.budget is None
    assert made.budget.reached == reached and made.budget.asked == asked and made.budget.bare == bare
    # It is an ordinary method: its spec string makes it again.
    assert vlmtok.parse_methods(str(made))[0].settings() == made.settings()


def test_128_tokens_are_told_apart():
    # (2 x 576 + 30 x 144) / 32 = 171 tokens on average is "FastV at 128 tokens" in some tables.
    quoted = estimate(LLAVA, FastV(K=2, keep=0.25))
    assert measure(quoted, "layer_average_tokens") == (576, 171) and measure(quoted, "tokens") == (576, 144)
    last, mean = budget(FastV(), LLAVA, tokens=128), budget(FastV(), LLAVA, layer_average_tokens=128)
    assert (last.keep, mean.keep) == (0.223, 0.17)
    assert (last.budget.tokens, last.budget.layer_average_tokens) == (128, 156)
    assert str(last.budget) == (
        "tokens = 128 tokens on llava-1.5-7b, 128 tokens asked; "
        "visual tokens: 128 at the end, 156 on average over layers"
    )
    assert budget(FastV(), LLAVA, layer_average_tokens=171).keep == 0.25


@pytest.mark.parametrize("method", [FastV(), FastV(keep=5), DivPrune()], ids=str)
def test_one_is_a_token_and_one_point_zero_is_all(method):
    one, every = budget(method, LLAVA, tokens=1), budget(method, LLAVA, tokens=1.0)
    assert (one.budget.asked, one.budget.reached) == (1, 1) and (every.budget.asked, every.budget.reached) == (576, 576)
    assert budget(method, LLAVA, tokens=2).budget.reached == 2


class _Narrow(DivPrune):
    """Knows levels in the middle alone."""

    def at_level(self, level, layout, tokens):
        if not 0.3 <= level <= 0.8:
            raise ParameterError(f"no level {level}")
        return super().at_level(level, layout, tokens)


@pytest.mark.parametrize("share", [0.35, 0.5, 0.75])
def test_levels_that_a_method_refuses_are_too_strong_or_too_weak(share):
    assert budget(_Narrow(), LLAVA, tokens=share).keep == pytest.approx(share, abs=0.01)


def test_a_count_stays_a_count_and_a_share_a_share():
    assert budget(FastV(keep=5), LLAVA, tokens=128).keep == 128
    assert isinstance(budget(FastV(keep=0.5), LLAVA, tokens=128).keep, float)
    assert isinstance(budget(ToMe(r=8), VIT, tokens=100).r, int)
    assert budget(ToMe(r=8), VIT, tokens=98).r == [9, 9] + [8] * 10


def test_content_dependent_stages_enter_as_if_they_dropped_nothing():
    made = budget(ToDRE(), LLAVA, kv_bytes=0.4)
    assert made.budget.notes == (
        "ToDRE at decoder layer 27 end depends on content and enters as if it dropped nothing",
    )
    assert "as if it dropped nothing" in str(made.budget)
    report = estimate(LLAVA, made)
    assert report.cache.after.high == pytest.approx(0.4 * report.cache.before, rel=WITHIN)
    assert report.cache.after.low < report.cache.after.high


def test_published_schedules_come_out():
    low = budget(TransPrune(), LLAVA, macs=1.19e12, convention="transprune")
    assert low.ratios == pytest.approx((0.4375, 0.3125, 0.0625), abs=1e-3)
    assert low.budget.unit == "MACs" and low.budget.what == "macs by transprune"
    pyramid = budget(PyramidDrop(), LLAVA, layer_average_tokens=200)
    assert pyramid.ratios[1] == pytest.approx(pyramid.ratios[0] ** 2, abs=0.01)


def test_prompts_count():
    short = budget(FastV(), LLAVA, macs=0.5, text_tokens=16)
    long = budget(FastV(), LLAVA, macs=0.5, text_tokens=256)
    assert long.keep < short.keep
    assert budget(FastV(), LLAVA, tokens=64, visual_tokens=144).keep == pytest.approx(64 / 144, abs=0.005)
    two = budget(FastV(keep=9), LLAVA, tokens=256, pictures=2)
    assert two.keep == 256  # both pictures share one budget


def test_a_loaded_model_meets_its_budget_when_it_runs():
    model = models.fresh("HF LLaVA")
    made = budget(FastV(keep=3), model, layer_average_tokens=7.25, text_tokens=(4, 4))
    with torch.no_grad(), vlmtok.compress(model, made) as run:
        model(**models.Batch.of("^3I4").inputs())
    assert measure(run.report(), "layer_average_tokens")[1] == made.budget.reached == 7.25


# ---------------------------------------------------------------------- what cannot be met
def test_a_target_out_of_reach_names_the_nearest():
    with pytest.raises(TargetError, match=r"= 20 tokens by keep: the nearest is 36.9 tokens with fastv"):
        budget(FastV(), LLAVA, layer_average_tokens=20)
    with pytest.raises(TargetError, match=r"by output_size: .*output_size=8 \(possible: 1 to 576 tokens\)"):
        budget(AveragePool(), LLAVA, tokens=100)
    with pytest.raises(TargetError, match=r"by output_size: the nearest is 2 tokens"):
        budget("averagepool", "llava-next-7b", tokens=144)  # its weakest, 53 x 53, is more than a crop has
    with pytest.raises(TargetError, match=r"by rv: the nearest is .* with crossget:rv=13"):
        budget(CrossGET(), VIT, macs=0.6)
    with pytest.raises(TargetError, match=r"tokens = 1000"):
        budget(FastV(), LLAVA, tokens=1000)


WRONG = [
    ({}, "takes one target of tokens, layer_average_tokens, macs, kv_bytes; got none"),
    ({"tokens": 5, "macs": 0.5}, "got tokens, macs"),
    ({"tokens": 0}, "tokens=0 is not possible"),
    ({"tokens": True}, "tokens=True is not possible"),
    ({"macs": -1.0}, "macs=-1.0 is not possible"),
    ({"tokens": 64, "convention": "fastv"}, "a convention counts macs, not tokens"),
    ({"macs": 0.5, "convention": "flops"}, "no convention 'flops'"),
    ({"macs": 0.5, "text_tokens": -1}, "text_tokens=-1"),
    ({"method": "fastv+todre", "tokens": 5}, "sets one method, got 2: fastv"),
    ({"method": PruMerge(), "tokens": 5}, "keep=None leaves the number to the method"),
    ({"method": ToDRE(keep=None), "tokens": 5}, "keep=None leaves the number to the method"),
    ({"method": AIM(prune=False), "tokens": 5}, "prune=False leaves that out"),
    ({"method": ToMe(), "model": VIT, "kv_bytes": 0.5}, "vit-b-16 has no key-value cache"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_possible_says_so(wrong, says):
    given = {"method": FastV(), "model": LLAVA, **wrong}
    with pytest.raises(ParameterError, match=says):
        budget(given.pop("method"), given.pop("model"), **given)


class _Fixed(Method):
    """A method without a parameter to move."""

    def settings(self):
        return {}

    def __str__(self):
        return "fixed"


def test_a_method_without_a_parameter_to_move_says_so():
    with pytest.raises(ParameterError, match="fixed: a budget cannot be set, it has no parameter for it"):
        budget(_Fixed(), LLAVA, tokens=64)


def test_models_that_a_method_does_not_fit_are_refused_as_compress_refuses_them():
    with pytest.raises(SiteError, match="does not offer"):
        budget(FastV(), VIT, tokens=64)
    with pytest.raises(MissingSignal):
        budget(CrossGET(guidance="cls"), "siglip-so400m-14-384", tokens=64)
    assert budget(CDPruner(), LLAVA, tokens=64, signals=["relevance"]).keep == pytest.approx(0.111, abs=1e-3)


# ---------------------------------------------------------------------- the contract of levels
@pytest.mark.parametrize("name", list_methods())
def test_levels_of_every_method_never_leave_more_tokens_when_stronger(name):
    cls = method_class(name)
    if name in ("ima", "recoverable"):  # nothing leaves, or content decides
        assert not cls.budget_parameter
        return
    own = {
        "corematching": {"keep": 0.3},
        "tokencorr": {"keep": 0.3},
        "prumerge": {"keep": 0.3},
        "tca": {"reservoir_size": 0},
    }
    method = cls(**own.get(name, {}))
    tower = name in ("tome", "pitome", "crossget", "tca")
    shape = preset(VIT if tower else LLAVA)
    what = "kv_bytes" if on_caches(name) else "layer_average_tokens"
    found = []
    for level in (0.05, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95):
        made = method.at_level(level, shape.layout, 196 if tower else 576)
        assert type(made) is cls and made is not method
        clip = {"visual_tokens": 576, "frames": 8} if issubclass(cls, ClipMethod) else {}
        report = estimate(shape, made, deciding=False, signals=["relevance"], **clip)
        found.append(measure(report, what)[1])
    assert found == sorted(found) and found[0] < found[-1]


def test_scaled_parameters():
    assert scaled(0.5, 0.3, 100) == 0.3 and scaled(7, 0.3, 100) == 30 and scaled(7, 0.0, 100) == 1
    assert scaled((0.875, 0.625, 0.125), 0.5, 100) == (0.875, 0.625, 0.125)
    assert scaled([0.8, 0.2], 0.6, 100) == pytest.approx([1.0, 0.3])
    assert scaled((50, 20), 0.5, 100) == (0.5, 0.2)
    assert scaled((0.5, 0.2), 1.0, 100) == (1.0, 1.0)
