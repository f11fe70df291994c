"""`vlmtok.serving.plan`: what an engine can serve of every method, how much it leaves, and what it leaves."""

import re
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import drawn_settings
from support.asking import HEADS, WIDTH, llava, tower
from support.methods import METHODS, cuts
from support.serving import counter, encoder, show

import vlmtok
from vlmtok import Method, Reduction, Site
from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, StageLayout
from vlmtok.core.spec import counted_form
from vlmtok.errors import MissingSignal, ParameterError, SiteError, VlmtokError
from vlmtok.serving import plan

CLIP = llava()
SIGLIP = replace(CLIP, family="SigLIP by hand", stages={**CLIP.stages, "vision": tower(0, 0)})
SPREAD = replace(
    CLIP,
    family="a spread tower by hand",
    stages={name: stage for name, stage in CLIP.stages.items() if name != "features"},
    without={"features": "its projector joins patches"},
)
PACKED = Layout(
    "a packed M-RoPE family by hand",
    {
        "vision": StageLayout(4, WIDTH, HEADS, 3, frozenset({"mid", "end"}), tower_signals(0)),
        "projected": StageLayout(1, WIDTH, 0, 0, provides=frozenset({"text"}), renumbers=False),
        "decoder": CLIP.stages["decoder"],
    },
    without={"features": "its projector joins patches"},
)
LAYOUTS = {"clip": CLIP, "siglip": SIGLIP, "spread": SPREAD, "packed": PACKED}
IN_THE_DECODER = {
    *("corematching", "fastv", "pyramiddrop", "sparsevlm", "transprune"),
    *("ems_style", "kv_norm", "kv_random", "prefixkv", "snapkv", "streaming"),
    *(name for name in METHODS if not cuts(name)),
}
READ_LAYERS = {"learned": "text_attention"}
"""Methods that ask in front of the language model for what its layers compute, and what that is."""
NEVER = {"recoverable": "'relevance'|class token"}
"""Methods that no setting makes servable, and why: a signal is the user's."""
CURED = {
    "aim": "aim:prune=false",
    "dart": "dart:at=embeddings:positions=none",
    "todre": "todre:tau=none",
    "prumerge": "prumerge:keep=0.055",
    "tokencorr": "tokencorr:keep=0.34",
}
"""Methods whose defaults cannot be served, and the settings that can."""
SIDE = 9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_served_cured_or_refused(name, layout):
    if name not in {*IN_THE_DECODER, *READ_LAYERS, *CURED, *NEVER}:
        made = plan(name, LAYOUTS[layout])
        assert made.spec == name and made.sites
        assert {site.stage for site in made.sites} <= {"vision", "features", "projected"}
        return
    with pytest.raises(VlmtokError) as told:
        plan(name, LAYOUTS[layout], engine="some engine")
    said = str(told.value)
    if name in NEVER:
        assert re.search(NEVER[name], said) and "is served" not in said
        return
    assert "some engine" in said
    if name in READ_LAYERS:
        assert isinstance(told.value, MissingSignal) and READ_LAYERS[name] in said and "is served" not in said
        return
    if name in IN_THE_DECODER:
        assert isinstance(told.value, SiteError) and "a paged key-value cache has one length for all layers" in said
        assert "is served" not in said
        return
    cure = str(counted_form(vlmtok.create_method(name)))
    assert said.endswith(f"; {cure} is served")
    assert plan(cure, LAYOUTS[layout]).spec == cure


def test_refusals_of_settings_name_what_can_be_had():
    for spec, words in {
        "prumerge": "how many tokens it leaves depends on the picture",
        "divprune:positions=keep": "numbers the tokens of a prompt one by one; positions=renumber",
        "random:keep=4:stage=decoder:layer=2": "paged key-value cache",
    }.items():
        with pytest.raises(VlmtokError, match=words):
            plan(spec, CLIP)
    assert plan("divprune:positions=keep", PACKED)
    with pytest.raises(SiteError, match="all pictures of a prompt together .scope=sample.* scope=picture"):
        plan("visionzip:scope=sample", PACKED)
    for spec in ("divprune:positions=renumber", "todre:tau=none:positions=renumber"):
        with pytest.raises(SiteError, match="places in a picture|M-RoPE"):
            plan(spec, PACKED)
    with pytest.raises(MissingSignal, match="needs a class token"):
        plan("crossget:guidance=cls", SIGLIP)
    with pytest.raises(SiteError, match="paged"):
        plan("divprune+fastv", CLIP)
    with pytest.raises(VlmtokError, match="todre:tau=none\\+divprune is served"):
        plan("todre+divprune", CLIP)


def test_a_count_that_needs_a_grid_alone_is_served_and_refused_without_one():
    made = plan("averagepool:overlap=true", CLIP)
    assert made.count(63, grid=(7, 9)) == made.dry_run(63, grid=(7, 9)) == 20
    for ask in (made.count, made.dry_run, plan("averagepool:output_size=2", CLIP).count):
        with pytest.raises(ParameterError, match="no single grid"):
            ask(63)


# ---------------------------------------------------------------------- how much
@st.composite
def asked(draw, name):
    """A served method with some settings, how many tokens a picture has, and their grid: one that fits or none."""
    method = counted_form(vlmtok.create_method(name))
    choices = drawn_settings.values(name)
    for setting in draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True)):
        method = drawn_settings.variant(method, **{setting: draw(st.sampled_from(choices[setting]))}) or method
    grid = draw(st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)))
    fits = draw(st.booleans())
    n = grid[0] * grid[1] if fits else draw(st.integers(1, SIDE * SIDE))
    behind = draw(st.sampled_from(("", "+divprune:keep=3", "+random:keep=0.5")))
    return f"{method}{behind}", n, grid if fits else None


def answer(ask, *of):
    """What a plan says, or the words of its refusal."""
    try:
        return ask(*of)
    except ParameterError as refusal:
        return str(refusal)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {*IN_THE_DECODER, *NEVER}])
@settings(max_examples=12)
@given(data=st.data())
def test_counts_are_those_of_a_dry_run(name, data):
    spec, n, grid = data.draw(asked(name))
    for layout in LAYOUTS.values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = plan(spec, layout)
            except VlmtokError:
                continue
        for patches in {None, 4 * n} if "features" not in layout.stages else {None}:
            told = answer(made.count, n, patches, grid)
            assert told == answer(made.dry_run, n, patches, grid), f"{spec} on {layout.family}"
            assert isinstance(told, str) or 0 < told <= n + 1


@dataclass(eq=False)
class Lying(Method):
    """Counts one token and leaves two."""

    def sites(self, layout):
        return [Site("projected")]

    def reduce(self, view):
        return Reduction(torch.zeros(len(view.tokens), 2, dtype=torch.int64, device=view.tokens.device))

    def count(self, counts):
        return 1


@dataclass(eq=False)
class Entering(Method):
    """Leaves half of what entered the tower, in front of the projector."""

    def sites(self, layout):
        return [Site("features")]

    def reduce(self, view):
        return Reduction(torch.arange(self.count(view.counts), device=view.tokens.device).expand(len(view.tokens), -1))

    def count(self, counts):
        return counts.entered // 2


def test_a_method_that_counts_wrong_is_found():
    made = plan(Lying(), CLIP)
    assert made.count(9) == 1
    with pytest.raises(ParameterError, match="counts 1 of 9 tokens and leaves 2"):
        made.dry_run(9)


def test_what_entered_is_what_entered_the_tower():
    made = plan([*vlmtok.parse_methods("tome:r=2"), Entering()], CLIP)
    assert made.count(16) == made.dry_run(16) == 8
    tokens, _ = made.at("features", torch.randn(1, 10, WIDTH), entered=16)
    assert tokens.shape[1] == 8


# ---------------------------------------------------------------------- what it is
def test_keys_are_canonical_and_tell_apart():
    def key(spec):
        return plan(spec, CLIP).key

    assert key("divprune:keep=016") == key(" DivPrune : keep = 16 ") == key(vlmtok.DivPrune(keep=16))
    specs = ["divprune:keep=16", "divprune:keep=17", "divprune:keep=16.0e-2", "random:keep=16", "random:keep=16:seed=1"]
    specs += ["divprune:keep=16+random:keep=8", "random:keep=8+divprune:keep=16"]
    assert len({key(spec) for spec in specs}) == len(specs)
    assert '["divprune:keep=16",1]' in key("divprune:keep=16")


def test_another_version_of_a_selection_is_another_key(monkeypatch):
    before = plan("divprune:keep=16", CLIP).key
    monkeypatch.setattr(vlmtok.DivPrune, "version", vlmtok.DivPrune.version + 1)
    assert plan("divprune:keep=16", CLIP).key != before


def test_needs_are_told_once_and_text_by_itself():
    made = plan("visionzip:keep=40+scope:keep=16", CLIP)
    assert len(made.needs) == len(set(made.needs)) and "protected" in {need.name for need in made.needs}
    assert not made.reads_text
    assert plan("divprune:keep=40+cdpruner:keep=16", CLIP).reads_text


# ---------------------------------------------------------------------- what stays
CHAINS = (
    *("divprune:keep=5", "todre:keep=4:tau=none", "averagepool:output_size=2", "aim:prune=false"),
    *("visionzip:keep=6:contextual=2", "prumerge:keep=4", "scope:keep=4", "cdpruner:keep=4:negate=false"),
    *("visionzip:keep=9+scope:keep=4", "visionzip:keep=8+divprune:keep=3", "scope:keep=9+visionzip:keep=5"),
    "divprune:keep=9+cdpruner:keep=4",
)


@pytest.fixture(scope="module")
def parts():
    """A tiny LLaVA's tower and projector by hand: signals of the feature layer, features, projector, text."""
    whole, shown = encoder("llava"), show("llava", "I")
    return whole.stand_in.core, shown


def signals_of(core, shown, made):
    """Features, protected tokens and what a plan asks for, by hooks of one's own."""
    seen, handles = {}, []
    tower_, last = core.vision_tower, made.layout.stages["vision"].last
    layers = (tower_.vision_model if hasattr(tower_, "vision_model") else tower_).encoder.layers
    for index, layer in enumerate(layers):
        for one in "qk":
            part = getattr(layer.self_attn, f"{one}_proj")
            handles.append(part.register_forward_hook(lambda m, a, out, at=(one, index): seen.update({at: out})))
        handles.append(layer.register_forward_hook(lambda m, a, out, at=("x", index): seen.update({at: out})))
    with torch.no_grad():
        tower_(shown.inputs["pixel_values"])
        text = core.get_input_embeddings()(shown.text[None])
    for handle in handles:
        handle.remove()

    def rows_of(q, k):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)

    def signal(need):
        if need.name == "text":
            return text
        q, k, x = (seen[one, need.layer] for one in "qkx")
        by_head = [value.unflatten(-1, (layers[0].self_attn.num_heads, -1)).transpose(1, 2) for value in (q, k)]
        rows = rows_of(*by_head)
        return {
            "cls_attention": rows[:, :, 0, 1:],
            "received_attention": rows.mean((1, 2))[:, 1:],
            "flat_attention": rows_of(q[:, :1], k)[:, 0, 1:],
            "keys": by_head[1][:, :, 1:].mean(1),
            "keys_full": k[:, 1:],
            "protected": (x[0] if isinstance(x, tuple) else x)[:, :1],
            "protected_queries": q[:, :1],
            "protected_keys": k[:, :1],
        }[need.name]

    x = seen["x", last][0] if isinstance(seen["x", last], tuple) else seen["x", last]
    return x[:, 1:], x[:, :1], {need.key: signal(need) for need in made.needs}


@pytest.mark.parametrize("spec", CHAINS)
def test_what_at_leaves_is_what_hooks_leave(parts, spec):
    core, shown = parts
    made = counter("llava").plan(spec)
    features, protected, given_ = signals_of(core, shown, made)
    left = counter("llava").left(made, shown.item)
    text = shown.text if made.reads_text else None
    (wanted,) = encoder("llava").encode(made, [shown.item], [left], text)
    with torch.no_grad():
        tokens, size = made.at("features", features, grid=(4, 4), signals=given_, protected=protected)
        tokens = core.multi_modal_projector(tokens)
        tokens, _ = made.at("projected", tokens, size=size, grid=(4, 4), signals=given_)
    assert tokens.shape[1] == made.count(16, grid=(4, 4)) == len(wanted.rows)
    torch.testing.assert_close(tokens[0], wanted.rows, atol=1e-5, rtol=1e-5)


def test_at_is_for_stages_without_layers_and_says_what_is_missing():
    made = plan("visionzip:keep=4", CLIP)
    with pytest.raises(SiteError, match="'features' or 'projected', got 'vision'"):
        made.at("vision", torch.randn(1, 9, WIDTH))
    with pytest.raises(MissingSignal, match="cls_attention"):
        made.at("features", torch.randn(1, 9, WIDTH))
    tokens = torch.randn(1, 9, WIDTH)
    assert made.at("projected", tokens)[0] is tokens
