"""Attention rows of every family, derived from tapped projections: equal to what the host's eager attention says.

At the start of a layer they come from its own norm and projections, at the end from what it did.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass, field

import pytest
import torch
from support.hosts_of import cache_of, with_cache
from torch import Tensor
from vlmtok.adapters import adapter_for
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok import Counts, Layout, Method, Reduction, Site, TokenView
from vlmtok.errors import MissingSignal, SiteError

from .build import FAMILIES, llama4, shared
from .harness import batch


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes a signal before or after a layer; in front of layer 0 it stands at the input."""

    layer: int = 1
    point: str = "end"
    signal: str = "last_attention"
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        if (self.layer, self.point) == (0, "start"):
            return [Site("projected", needs=(self.signal,), scope="sample")]
        return [Site("decoder", self.layer, self.point, (self.signal,), scope="sample")]

    def reduce(self, view: TokenView) -> None:
        for row in range(len(view.tokens)):
            self.seen.append((view.columns[row], view.signal(self.signal)[row]))

    def count(self, counts: Counts) -> int:
        return counts.n


def text_model(model):
    return next(part for part in model.modules() if hasattr(part, "layers") and hasattr(part, "embed_tokens"))


def check(model, inputs, layer, point, asked=None):
    """Compares the attention of the last token on visual ones in a layer; returns how much there is of it."""
    caught, listen = [], Listen(layer=layer if asked is None else asked, point=point)
    attention = text_model(model).layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: caught.append(output[1]))
    try:
        with torch.no_grad(), vlmtok.compress(model, listen):
            model(**inputs)
    finally:
        hook.remove()
    assert len(listen.seen) == len(caught[0]) > 1
    for row, (columns, found) in enumerate(listen.seen):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        wanted = caught[0][row, :, -1].gather(1, columns.expand(caught[0].shape[1], -1) + padding)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    return sum(float(found.sum()) for _, found in listen.seen)


BLIND = tuple(name for name, row in ROWS.items() if not row.attends)
"""Families of which no layer makes queries and keys in a way that is known."""


@pytest.mark.parametrize("point", ["start", "end"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BLIND])
def test_attention_is_that_of_the_host(name, point):
    model = shared(name, "eager")
    layers = text_model(model).layers
    seen = 0.0
    for layer in range(len(layers) - (point == "end")):
        if not hasattr(layers[layer], "self_attn"):
            if layer + 1 + (point == "end") == len(layers) or (layer, point) == (0, "start"):
                continue
            seen += check(model, batch(name).inputs(), layer + 1, point, layer)
            continue
        try:
            seen += check(model, batch(name).inputs(), layer, point)
        except SiteError as problem:
            assert name == "gemma4" and "reuse keys of earlier ones" in str(problem)
    assert seen > 0.1


@pytest.mark.parametrize("point", ["start", "end"])
def test_soft_caps_are_followed(point):
    model = FAMILIES["paligemma2"].build("eager")
    for layer in text_model(model).layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    assert check(model, batch("paligemma2").inputs(), 1, point) > 0.1


def test_attention_of_another_kind_is_passed_over():
    """A projection that nobody knows may do anything: no rows are made up, and the next layer's are taken."""
    model = FAMILIES["llava"].build("eager")
    text_model(model).layers[1].self_attn.gate_proj = torch.nn.Linear(4, 4)
    assert check(model, batch("llava").inputs(), 2, "end", asked=1) > 0.1
    with vlmtok.compress(model, Listen(layer=1)) as run, torch.no_grad():
        model(**batch("llava").inputs())
        notes = run.report().notes
    assert any("layer 1 has no attention rows (an attention of unknown form)" in note for note in notes)
    for layer in text_model(model).layers:
        layer.self_attn.gate_proj = torch.nn.Linear(4, 4)
    with pytest.raises(MissingSignal, match="no attention rows can be derived there"):
        vlmtok.compress(model, Listen(layer=1, point="end"))


def test_a_rotary_function_that_is_missing_leaves_layers_without_rows(monkeypatch):
    model = shared("llama4", "eager")
    assert not adapter_for(model).layout().stages["decoder"].blind
    monkeypatch.delattr(sys.modules[type(text_model(model).layers[0].self_attn).__module__], "apply_rotary_emb")
    assert sorted(adapter_for(model).layout().stages["decoder"].blind) == [0, 1, 2]  # layer 3 turns nothing


# ---------------------------------------------------------------------- behind cuts, chunks and pasts
@dataclass(eq=False)
class Halve(Method):
    """Every second visual token leaves at the start of a layer, of layer 0 at the input."""

    layer: int = 1

    def sites(self, layout: Layout) -> list[Site]:
        if self.layer == 0:
            return [Site("projected", scope="sample")]
        return [Site("decoder", self.layer, "start", scope="sample")]

    def reduce(self, view: TokenView) -> Reduction:
        return Reduction(torch.arange(0, view.tokens.shape[1], 2).expand(len(view.tokens), -1))

    def count(self, counts: Counts) -> int:
        return (counts.n + 1) // 2


@functools.cache
def warm_llama4(normed=True):
    """Layers 1 and 3 do not turn: their queries grow with their place, from the fourth token on."""

    def make():
        model = llama4(4)
        text = model.config.get_text_config()
        text.no_rope_layers, text.use_qk_norm = [1, 0, 1, 0], normed
        text.layer_types = ["chunked_attention", "full_attention"] * 2
        return type(model)(model.config)

    return dataclasses.replace(FAMILIES["llama4"], make=make).build("eager")


@pytest.mark.runs("llama4")
@pytest.mark.parametrize("normed", [True, False])
def test_places_of_llama4_count_padding(normed):
    model, plain = warm_llama4(normed), shared("llama4", "eager")
    for layer, point in ((1, "start"), (1, "end"), (2, "start"), (2, "end"), (3, "start")):
        assert check(model, batch("llama4").inputs(), layer, point) > 0.1
    attentions = [[layer.self_attn for layer in text_model(one).layers] for one in (model, plain)]
    assert [hasattr(attn, "qk_norm") for attn in attentions[0]] == [normed, False] * 2
    assert [attn.use_rope for attn in attentions[1]] == [1, 1, 1, 0]


def compare(model, methods, listen, turns):
    """Compares a row of attention with the host's, which runs the layer on what these methods left.

    Args:
        model: with eager attention.
        methods: in front of the listener.
        listen: looks at the last token's row.
        turns: inputs of one row each, without padding; the last one has pictures.
    """
    caught = []
    attention = text_model(model).layers[listen.layer].self_attn
    hook = attention.register_forward_hook(lambda module, args, output: caught.append(output[1]))
    try:
        with torch.no_grad(), vlmtok.compress(model, [*methods, listen]):
            held = {}
            for inputs in turns:
                held = with_cache(model, cache_of(model(**inputs, **held, use_cache=True)))
    finally:
        hook.remove()
    ((columns, found),), weights = listen.seen, caught[-1][0]
    columns = columns + weights.shape[2] - weights.shape[1]
    torch.testing.assert_close(found, weights[:, -1, columns], atol=1e-6, rtol=1e-5)
    return found


ALONE = [
    name for name, family in FAMILIES.items() if family.positions == "1d" and not family.prefix and name not in BLIND
]


@pytest.mark.parametrize("point", ["start", "end"])
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ALONE)
def test_attention_behind_a_cut_and_behind_a_past(name, layer, point):
    """Windows, chunks and places count what is left; a sliding cache holds the last keys only."""
    model = warm_llama4() if name == "llama4" else shared(name, "eager")
    stage = adapter_for(model).layout().stages["decoder"]
    assert len(stage.blind) < stage.depth
    if layer in stage.blind:  # a site there falls on a later layer or is refused
        return
    family, last = FAMILIES[name], len(text_model(model).layers) - 1
    if layer + (point == "end") > (2 if name == "gemma4" else last):
        return
    pictures = "2S4S1" if "S" in family.shots else "3I2J1"
    picture, text = family.batch(pictures).inputs(mask=False), family.batch("^19").inputs(mask=False)
    turns, cuts = ((picture,), (text, picture)), ((), (Halve(layer=min(layer, 1)),), (Halve(layer=layer),))
    found = [compare(model, cut, Listen(layer=layer, point=point), turn) for cut in cuts for turn in turns]
    assert all(one.sum() > 1e-3 for one in found)
    assert found[0].shape != found[-1].shape


@pytest.mark.parametrize("name", BLIND)
def test_families_of_another_kind_are_refused(name):
    for point, layer in (("start", 1), ("end", 1), ("start", 3)):
        with pytest.raises(MissingSignal, match="no attention rows can be derived"):
            vlmtok.compress(shared(name, "eager"), Listen(layer=layer, point=point))


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if FAMILIES[n].positions == "mrope" and not n.startswith("qwen3_5")]
)
def test_ahead_of_the_first_layer_generate_shows_what_a_forward_does(name):
    """`generate` hands M-RoPE models one row of positions more."""
    model, inputs, found = shared(name, "eager"), batch(name).inputs(), []
    for call in (model, functools.partial(model.generate, max_new_tokens=1, do_sample=False)):
        listen = Listen(layer=0, point="start")
        with torch.no_grad(), vlmtok.compress(model, listen):
            call(**inputs)
        found.append(listen.seen)
    assert len(found[0]) == len(found[1]) > 1
    for one, other in zip(*found):
        assert torch.equal(one[0], other[0]) and one[1].sum() > 1e-3
        torch.testing.assert_close(one[1], other[1], atol=1e-6, rtol=1e-5)


def test_a_first_layer_without_rows_is_not_looked_at_ahead():
    for name, what in {"qwen3_5": "linear attention", "lfm2_vl": "a convolution"}.items():
        with pytest.raises(
            MissingSignal, match=f"'last_attention' at projected.*layer 0 has no attention rows, but {what}"
        ):
            vlmtok.compress(shared(name, "eager"), Listen(layer=0, point="start"))
