"""ToDRE's first token: who may be it, and what happens where it cannot be chosen."""

import pytest
import torch

from vlmtok import Site, ToDRE, TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.todre import PIVOTS, pivot_of

N = 20


def view(x, part=None, attention=None):
    signals = {} if attention is None else {"cls_attention@vision:-1": attention}
    return TokenView(x, Site("projected"), part=part, signals=signals)


def anyres(batch=1):
    """A thumbnail of 8 tokens and a canvas of three rows with a separator behind each."""
    part = torch.ones(batch, N, dtype=torch.int64)
    part[:, :8] = 0
    part[:, [11, 15, 19]] = -1
    return part


@pytest.mark.parametrize("pivot", PIVOTS)
def test_it_is_a_token_of_the_thumbnail_and_no_separator(pivot):
    torch.manual_seed(0)
    x = torch.randn(1, N, 6)
    for seed in range(20):
        attention = torch.rand(1, 2, N)
        one = ToDRE(keep=1, tau=None, pivot=pivot, seed=seed)
        assert int(one.reduce(view(x, anyres(), attention)).keep) < 8
        part = anyres().clamp(max=0) + (anyres() == 0).long()  # no thumbnail: any crop, but no separator
        assert int(one.reduce(view(x, part, attention)).keep) not in (11, 15, 19)


def test_random_ones_depend_on_the_seed_and_reach_everything():
    x, valid = torch.randn(2, N, 4), torch.ones(2, N, dtype=torch.bool)
    drawn = [pivot_of(x, "random", valid, seed=seed) for seed in range(150)]
    assert all(int(one[0]) == int(one[1]) for one in drawn)
    assert {int(one[0]) for one in drawn} == set(range(N))
    again = pivot_of(x, "random", valid, seed=3)
    assert torch.equal(again, drawn[3])
    valid[1, int(again[1])] = False  # the other row goes on in the same order
    first, second = pivot_of(x, "random", valid, seed=3).tolist()
    assert first == int(again[0]) and second != first


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("pivot", [*PIVOTS, 5])
def test_a_broken_token_is_never_it(pivot, bad):
    torch.manual_seed(1)
    x, attention = torch.randn(2, N, 6), torch.rand(2, 3, N)
    attention[:, :, 5] = 2.0
    valid = torch.ones(2, N, dtype=torch.bool)
    whole = pivot_of(x, pivot, valid, attention)
    at = whole.clone() if pivot != "cls" else torch.tensor([5, 5])
    broken = x.clone()
    broken[torch.arange(2), at, 2] = bad
    found = pivot_of(broken, pivot, valid, attention)
    assert bool((found != at).all())
    if pivot == 5:
        assert found.tolist() == [0, 0]
    keep = ToDRE(keep=4, tau=None, pivot=pivot).reduce(view(broken, attention=attention)).keep
    assert not bool((keep == at[:, None]).any())
    everything = torch.full_like(x, bad)
    assert ToDRE(keep=4, tau=None, pivot=pivot).reduce(view(everything, attention=attention)).slots == 4


def test_what_does_not_exist_is_said():
    x = torch.randn(1, N, 4)
    with pytest.raises(ParameterError, match="pivot=20 does not exist among 20 tokens"):
        ToDRE(keep=3, tau=None, pivot=N).reduce(view(x))
    with pytest.raises(ParameterError, match="attention is on 7 tokens, there are 20"):
        ToDRE(keep=3, tau=None).reduce(view(x, attention=torch.rand(1, 2, 7)))
