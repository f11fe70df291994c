"""Every pair of a method of caches and a family that attaches, at released depth: `generate` equals a cache-free host.

The method decides on what it is shown; that later rows do not see what it left out, layer by layer and head by head, is
held here. What merges is held to its own loops elsewhere, so that here nothing joins.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import cache_by_mask as by_mask
from support.checks import Seen, watched
from support.matrix import spec_of
from support.methods import on_caches
from torch import Tensor

import vlmtok
from vlmtok.lab.tiny import released

from .harness import generate
from .test_pairs import IN_ROWS, NOISE, STEPS, batch

ALONE = {"ems_style": "ems_style:window=3:tau=2.0"}
"""Settings under which no entry joins another."""
ON_CACHES = [pair for pair in IN_ROWS if on_caches(pair[1])]


def gone_of(seen: list[Seen], length: int, heads: int) -> dict[int, Tensor]:
    """What left each layer of one row without padding, bool `[1, heads, length]`, by the answers of a method."""
    gone: dict[int, Tensor] = {}
    shown: Counter[tuple[int, ...]] = Counter()
    for one in seen:
        table = gone.setdefault(one.view.layer, torch.zeros(1, heads, length, dtype=torch.bool))
        if one.reduction is None:
            continue
        reduction = one.reduction
        for row, columns in enumerate(one.view.columns.tolist()):
            real = reduction.keep[row] if reduction.valid is None else reduction.keep[row][reduction.valid[row]]
            left = sorted({*range(len(columns))} - {*real.tolist()})
            at = torch.tensor(columns)[left]
            if one.method.scope == "head":  # the heads of a picture are shown one behind the other
                key = (one.view.layer, *columns)
                table[0, shown[key], at] = True
                shown[key] += 1
            else:
                table[0, :, at] = True
    return gone


@pytest.mark.parametrize(("name", "method"), ON_CACHES, ids=[" on ".join(pair[::-1]) for pair in ON_CACHES])
def test_a_method_of_caches_equals_the_host_without_one(name: str, method: str) -> None:
    model, alone = released.shared(name), batch(name).alone(0).inputs()
    methods = vlmtok.parse_methods(ALONE.get(method) or spec_of(method))
    bare = generate(model, alone, STEPS)[1]
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(model, methods) as run:
        tokens, logits = generate(model, alone, STEPS)
        heads = run.layout.stages["cache"].heads
    gone = by_mask.for_readers(model, gone_of(seen, alone["input_ids"].shape[1], heads))
    assert gone and all(bool(table.any()) for table in gone.values())
    with torch.no_grad(), by_mask.hidden(model, gone) as fired:
        words, wanted = generate(model, alone, STEPS, use_cache=False)
    assert fired == {*gone}
    assert (logits - wanted).abs().max() <= NOISE
    assert torch.equal(tokens, words)
    assert (logits[:, 0] - bare[:, 0]).abs().max() <= NOISE
    assert (logits[:, 1:] - bare[:, 1:]).abs().max() > 10 * NOISE
