"""Attention rows of every family, derived from tapped projections: equal to what the host's eager attention says.

At the start of a layer they come from its own norm and projections, at the end from what it did.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vlmtok
from vlmtok import Counts, Layout, Method, Site, TokenView
from vlmtok.errors import MissingSignal, SiteError

from .build import FAMILIES, shared
from .harness import batch


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes a signal before or after a layer."""

    layer: int = 1
    point: str = "end"
    signal: str = "last_attention"
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("decoder", self.layer, self.point, (self.signal,), scope="sample")]

    def reduce(self, view: TokenView) -> None:
        for row in range(len(view.tokens)):
            self.seen.append((view.columns[row], view.signal(self.signal)[row]))

    def count(self, counts: Counts) -> int:
        return counts.n


def text_model(model):
    return next(part for part in model.modules() if hasattr(part, "layers") and hasattr(part, "embed_tokens"))


def check(model, inputs, layer, point):
    """Compares the attention of the last token on visual ones in a layer; returns how much there is of it."""
    caught, listen = [], Listen(layer=layer, point=point)
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


BLIND = ("llama4", "lfm3_vl", "muse_glimmer", "muse_spark", "kimi_k25", "step3p7")
"""Families of which no layer makes queries and keys in a way that is known."""


@pytest.mark.parametrize("point", ["start", "end"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BLIND])
def test_attention_is_that_of_the_host(name, point):
    model = shared(name, "eager")
    layers = text_model(model).layers
    seen = 0.0
    for layer in range(1, len(layers) - (point == "end")):
        if not hasattr(layers[layer], "self_attn"):
            with pytest.raises(MissingSignal, match="no attention rows"):
                vlmtok.compress(model, Listen(layer=layer, point=point))
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


def test_attention_of_another_kind_is_refused():
    """A projection that nobody knows may do anything: no rows are made up."""
    model = FAMILIES["llava"].build()
    text_model(model).layers[1].self_attn.gate_proj = torch.nn.Linear(4, 4)
    with pytest.raises(MissingSignal, match="no attention rows can be derived"):
        vlmtok.compress(model, Listen(layer=1, point="end"))


@pytest.mark.parametrize("name", BLIND)
def test_families_of_another_kind_are_refused(name):
    for point, layer in (("start", 1), ("end", 1), ("start", 3)):
        with pytest.raises(MissingSignal, match="no attention rows can be derived"):
            vlmtok.compress(shared(name, "eager"), Listen(layer=layer, point=point))
