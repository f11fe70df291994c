"""What traces say of caches, in every family: entries are looked for in the cache, key by key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.hosts_of import cache_of
from support.sweep import some
from vlmtok.adapters.language.masks import RECURRENT, layer_kinds

import vlmtok
from vlmtok import Method, Reduction, Site
from vlmtok.core.stream import ATTRIBUTE

from .build import FAMILIES, shared
from .harness import batch


@dataclass(eq=False)
class Loudest(Method):
    """Keeps entries with the largest values; layer 1 and its like are left whole."""

    how: str = "head"

    def sites(self, layout):
        scope = self.how if self.how in ("head", "sample") else "picture"
        return [Site("cache", layer, scope=scope) for layer in layout.cached_layers()]

    def reduce(self, view):
        if view.site.layer % 3 == 1:
            return None
        size = view.tokens.float().norm(dim=-1)
        order = size.argsort(dim=1, descending=True, stable=True)
        if self.how == "ragged":
            return Reduction(order, valid=(size > size.mean(1, keepdim=True)).gather(1, order))
        return Reduction(order[:, : max(1, view.counts.n * 2 // 5)])

    def count(self, counts):
        return None


def prefilled(model, inputs):
    """Keys of each layer behind a prefill, or None, and which of them later tokens see (None: all but padding)."""
    given = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(given)
    stream = getattr(cache, ATTRIBUTE, None)
    seen = [None if stream is None else stream.segment(layer).valid for layer in range(len(cache.layers))]
    return [getattr(layer, "keys", None) for layer in cache.layers], seen


def text_config(model):
    return model.config.get_text_config()


def found_in(whole, now, seen, row, column, columns):
    """Share of heads in whose cache the key of a column is still seen; `whole` may be a window's."""
    column -= columns - whole.shape[2]
    if column < 0:
        return 0.0
    there = []
    for head in range(now.shape[1]):
        alike = (now[row, head] == whole[row, head, column]).all(-1)
        there.append(bool((alike if seen is None else alike & seen[row, -len(alike) :]).any()))
    return sum(there) / len(there)


MLA = ("kimi_k25",)
"""Their caches hold latents, and the stage is refused."""
LOSING = [name for name in FAMILIES if name not in MLA]


@pytest.mark.parametrize(("name", "how"), some(LOSING, ["head", "picture", "ragged", "sample"], every=4))
def test_traces_hold_what_caches_hold(name, how):
    model, which = shared(name, FAMILIES[name].attentions[0]), "rows" if how == "head" else "several"
    rows = batch(name, which)
    inputs = rows.inputs()
    whole, _ = prefilled(model, inputs)
    with vlmtok.compress(model, Loudest(how), trace=True) as run:
        (now, seen), trace = prefilled(model, inputs), run.trace()
    lm = text_config(model)
    depth = lm.num_hidden_layers
    kinds = layer_kinds(lm, depth)
    stored = depth - int(getattr(lm, "num_kv_shared_layers", 0) or 0)
    columns = inputs["attention_mask"].shape[1]
    wanted = []
    for row, prompt in enumerate(rows.prompts):
        length = int(inputs["attention_mask"][row].sum())
        for picture in prompt.pictures:
            wanted += [(row, columns - length + column) for column in picture.columns.tolist()]
    table = torch.cat([picture.cached for picture in trace.pictures], 1)
    assert table.shape == (depth, len(wanted)) and table.dtype == torch.float32
    for layer in range(depth):
        if kinds[layer] in RECURRENT or layer >= stored:
            assert table[layer].isnan().all()
            continue
        held = [found_in(whole[layer], now[layer], seen[layer], *at, columns) for at in wanted]
        assert table[layer].tolist() == pytest.approx(held), f"layer {layer}"
    assert 0 < float(table.nansum()) < len(wanted) * int((~table[:, 0].isnan()).sum())
    for picture in trace.pictures:
        assert torch.equal(picture.held_in(), picture.cached.nan_to_num(0.0).sum(0))
