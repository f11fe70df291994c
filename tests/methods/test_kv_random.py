"""KVRandom: a seeded draw for each layer."""

import pytest
import torch
from support.caches import kept, view_of

from vlmtok import KVRandom
from vlmtok.core.selection import random_subset
from vlmtok.errors import ParameterError


def drawn(layer, n=40, batch=2, **settings):
    view = view_of({"attention_mass": torch.zeros(batch, n)}, layer)
    return view, KVRandom(**settings).reduce(view)


def test_it_is_the_draw_of_random():
    """`random_subset` by seed, site and N, the same for every row."""
    view, reduction = drawn(3, keep=0.25, seed=5)
    assert kept(reduction, 40) == [random_subset(40, 10, 5, str(view.site)).tolist()] * 2


def test_draws_differ_by_layer_and_seed_and_not_by_batch():
    found = {tuple(kept(drawn(layer, keep=13, seed=seed)[1], 40)[0]) for layer in range(4) for seed in range(4)}
    assert len(found) == 16
    assert kept(drawn(1, batch=3)[1], 40) == kept(drawn(1, batch=1)[1], 40) * 3


def test_all_stays_at_one():
    assert drawn(0, keep=1.0)[1] is None and drawn(0, keep=40)[1] is None


@pytest.mark.parametrize("bad", [{"seed": 0.5}, {"keep": True}, {"scope": "row"}])
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="KVRandom"):
        KVRandom(**bad)
