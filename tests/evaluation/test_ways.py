"""The ways of a sweep: how names are read, that budgets are equal, and what is drawn anew."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.methods import on_caches

import vlmtok
from vlmtok.core.registry import list_methods
from vlmtok.core.spec import as_methods
from vlmtok.errors import ParameterError
from vlmtok.evaluation import engine
from vlmtok.evaluation.ways import BASELINES, CONVENTION, IN_CACHES, WITHIN, check_names, split_names, ways_of
from vlmtok.forecast.estimate import estimate
from vlmtok.lab.prompts import encode_prompt
from vlmtok.loading import load, open_picture, samples

PROMPT = {"text_tokens": 16}
TOKENS = 144
pytestmark = pytest.mark.filterwarnings("ignore:the hooks of")
EVERY = sorted(set(list_methods()) - set(BASELINES))


@pytest.fixture(scope="module")
def model():
    return load(device="cpu")


# ---------------------------------------------------------------------- names
@pytest.mark.parametrize(
    "text, names",
    [
        ("todre,random, downsample", ["todre", "random", "downsample"]),
        ("tome+fastv:keep=0.25,todre", ["tome+fastv:keep=0.25", "todre"]),
        ("tome:r=[4,4;2],scope", ["tome:r=[4,4;2]", "scope"]),
        ("pyramiddrop:ratios=(0.5,0.3,0.1),scope", ["pyramiddrop:ratios=(0.5,0.3,0.1)", "scope"]),
        ("fastv:keep=0.25,0.5,todre", ["fastv:keep=0.25,0.5", "todre"]),
        ("fastv:keep=.25,.5, 12,todre", ["fastv:keep=.25,.5,12", "todre"]),
        ("pyramiddrop:ratios=(0.5;0.3),(0.2;0.1),tome", ["pyramiddrop:ratios=(0.5;0.3),(0.2;0.1)", "tome"]),
        (" ,todre,, ", ["todre"]),
        ("", []),
    ],
)  # fmt: skip
def test_names_behind_commas(text, names):
    assert split_names(text) == names


@given(st.lists(st.sampled_from([*EVERY, "tome:r=4", "fastv:keep=0.25,0.5", "aim:first=15:last=15", "tome+fastv"])))
def test_whatever_is_joined_is_parted(names):
    assert split_names(",".join(names)) == names


def test_swept_settings_are_spelled_out_once():
    assert check_names(["fastv:keep=0.25,0.5", "none", "fastv:keep=0.5", "todre"]) == [
        "fastv:keep=0.25",
        "fastv:keep=0.5",
        "none",
        "todre",
    ]


@pytest.mark.parametrize(
    "methods, error, said",
    [
        (["todre", "tomee"], ParameterError, "no method 'tomee'; did you mean 'tome'"),
        (["downsampl"], ParameterError, "no method 'downsampl'; did you mean 'downsample'"),
        (["tome:r=x"], vlmtok.errors.VlmtokError, "r="),
        (["tome:q=3"], ParameterError, "no parameter 'q'"),
        (["tome+nosuch"], vlmtok.errors.VlmtokError, "nosuch"),
        ([""], ParameterError, "no method ''"),
        ([3], ParameterError, "as spec strings, not as a int"),
    ],
)
def test_wrong_names_are_told_before_a_model_is_loaded(methods, error, said, monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *args, **more: pytest.fail("it was loaded"))
    with pytest.raises(error, match=said.replace("(", r"\(")):
        engine.evaluate("scenes-vqa", methods=methods)
    with pytest.raises(vlmtok.errors.VlmtokError):
        engine.evaluate("scenes-vqa", methods="todre", as_written=methods)


# ---------------------------------------------------------------------- budgets
def test_every_method_is_at_the_budget_or_says_why(model):
    """Counted again of the spec string alone, which is what the table names."""
    ways = ways_of(model, EVERY, [0.5, 0.25], BASELINES, **PROMPT)
    assert [(way.name, way.keep) for way in ways[:5]] == [
        ("none", 1.0),
        ("random", 0.5),
        ("random", 0.25),
        ("downsample", 0.5),
        ("downsample", 0.25),
    ]
    assert [(way.asked, way.keep) for way in ways[5:]] == [(name, keep) for name in EVERY for keep in (0.5, 0.25)]
    refused = {(way.name, way.keep) for way in ways if way.problem}
    clips = {(name, keep) for name in ("evs", "vidcom2") for keep in (0.5, 0.25)}
    unset = {(name, keep) for name in ("ima", "recoverable", "tokencorr") for keep in (0.5, 0.25)}
    assert refused - clips - unset == {("aim", 0.5), ("averagepool", 0.5), ("transprune", 0.25)}
    assert clips <= refused
    for way in ways:
        if way.problem:
            said = (
                "a budget cannot be set"
                if (way.name, way.keep) in unset
                else "cannot be set to layer_average_tokens = "
            )
            assert said in way.problem and not way.methods
        elif way.methods:
            (method,) = way.methods
            of_bytes = on_caches(way.name)
            wanted = way.keep * (method.budget.bare if of_bytes else TOKENS)
            assert abs(method.budget.reached - wanted) <= WITHIN * wanted
            ran = as_methods(way.spec)  # the string alone is the same method
            again = estimate(model.model, ran, deciding=False, **PROMPT)
            line = again.last_layers()
            mean = sum(one.visual.high for one in line) / len(line)
            assert (again.cache.after.high if of_bytes else mean) == pytest.approx(method.budget.reached)
    assert len({way.key for way in ways}) == len(ways)
    assert vlmtok.dispatcher.dispatcher_of(model.model) is None


def test_a_method_that_leaves_its_number_to_the_content_is_given_one(model):
    """PruMerge without `keep` counts by itself."""
    assert as_methods("prumerge")[0].keep is None
    (_, way) = ways_of(model, ["prumerge"], [0.25], (), **PROMPT)
    assert not way.problem and way.methods[0].keep == pytest.approx(0.25, abs=0.01)


def test_stacks_and_what_is_as_written_keep_their_settings(model):
    ways = ways_of(model, ["tome:r=4+fastv:keep=0.5", "fastv"], [0.5, 0.25], (), ["tome:r=4", "tome:r=4"], **PROMPT)
    assert [way.asked for way in ways] == ["none", "tome:r=4+fastv:keep=0.5", "fastv", "fastv", "tome:r=4"]
    _, stack, _, _, alone = ways
    assert (stack.name, stack.spec, [str(m) for m in stack.methods]) == (
        "tome+fastv",
        "tome:r=4+fastv:keep=0.5",
        ["tome:r=4", "fastv"],
    )
    left = [TOKENS - 4 * (layer + 1) for layer in range(6)]
    assert alone.spec == "tome:r=4" and alone.keep == pytest.approx((TOKENS + sum(left[:-1])) / 6 / TOKENS, abs=0.2)
    for way in (stack, alone):
        lines = estimate(model.model, list(way.methods), deciding=False, **PROMPT).last_layers()
        assert way.keep == pytest.approx(sum(one.visual.high for one in lines) / len(lines) / TOKENS, abs=1e-4)


def test_methods_of_caches_as_written_are_told_by_their_bytes(model):
    """Beside a method by which tokens leave, tokens count."""
    written = ["snapkv:keep=0.4", "streaming:keep=0.3", "fastv:keep=0.5+snapkv:keep=0.4"]
    _, *ways = ways_of(model, [], [0.5], (), written, **PROMPT)
    assert not [way.problem for way in ways if way.problem]
    assert [way.convention for way in ways] == [IN_CACHES, IN_CACHES, CONVENTION]
    for way in ways:
        report = estimate(model.model, list(way.methods), deciding=False, **PROMPT)
        lines = report.last_layers()
        tokens = sum(one.visual.high for one in lines) / len(lines) / TOKENS
        caches = report.cache.after.high / report.cache.before
        assert way.keep == pytest.approx(caches if way.convention == IN_CACHES else tokens, abs=1e-4) and way.keep < 1
    assert ways[1].keep < ways[0].keep


def test_what_a_model_refuses_has_a_problem(model):
    """Too strong a setting, in a stack and as written; the sweep goes on without it."""
    _, stack, alone = ways_of(model, ["todre:keep=0.5+scope:keep=0.5"], [0.5], (), ["fastv:K=40"], **PROMPT)
    assert alone.problem and "40" in alone.problem and not alone.methods
    assert stack.problem == "" or not stack.methods


def test_baselines_that_are_left_out(model):
    for plain in ((), ("random",), ("downsample",)):
        assert [way.name for way in ways_of(model, [], [0.5], plain, **PROMPT)] == ["none", *plain]


# ---------------------------------------------------------------------- draws
def seeds(way, model, *seed):
    with way.attached(model, *seed) as run:
        return [method.seed for method in run.methods if hasattr(method, "seed")]


def test_batches_and_repeats_draw_anew_and_again_the_same(model):
    _, way = ways_of(model, [], [0.5], ("random",), **PROMPT)
    assert way.draws
    places = [(seed, repeat, number) for seed in (0, 1) for repeat in range(3) for number in range(3)]
    drawn = [way_seed for place in places for way_seed in seeds(way, model, *place)]
    assert len(set(drawn)) == len(places)
    assert drawn == [way_seed for place in places for way_seed in seeds(way, model, *place)]
    assert way.methods[0].seed == 0 and way.spec == "random"  # the way itself stays


def test_methods_that_draw_nothing_are_not_repeated(model):
    _, scope, todre = ways_of(model, ["scope", "todre"], [0.5], (), **PROMPT)
    assert not scope.draws and todre.draws
    assert seeds(scope, model, 0, 0, 0) == []


def test_what_is_said_follows_the_seed(model):
    """What random choice keeps of a picture is other places in another repeat, so the answer's distribution differs."""
    _, way = ways_of(model, [], [0.25], ("random",), **PROMPT)
    image = open_picture(samples()[0].path)
    inputs = encode_prompt(model, image, samples()[0].question)
    said = []
    for seed in ((0, 0, 0), (0, 1, 0), (0, 0, 0)):
        with way.attached(model, *seed), torch.inference_mode():
            said.append(model.model(**inputs).logits[0, -1])
    assert torch.equal(said[0], said[2]) and not torch.allclose(said[0], said[1], atol=1e-3)
