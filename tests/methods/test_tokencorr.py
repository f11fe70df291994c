"""Token-level correlation: density by plain loops, blank crops, and that it says what it is."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.asking import llava

from vlmtok import Site, TokenCorr, TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.tokencorr import LAST, local_and_global, repeated

NEEDS = ("cls_attention@vision:1", "cls_attention@vision:-1", LAST)


def view(keys, shallow, deep):
    signals = {NEEDS[0]: shallow.unsqueeze(1), NEEDS[1]: deep.unsqueeze(1), LAST: keys}
    return TokenView(torch.randn(*shallow.shape, 3), Site("features", needs=NEEDS), signals=signals)


def kept(reduction, row=0):
    return reduction.keep[row][reduction.valid[row]].tolist()


@given(n=st.integers(2, 30), threshold=st.sampled_from([0.0, 0.5, 0.9]), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_by_plain_loops(n, threshold, k, seed):
    g = torch.Generator().manual_seed(seed)
    keys, shallow, deep = (torch.randn(1, n, 3, generator=g), *(torch.rand(2, 1, n, generator=g)))
    cosines = [[float(F.cosine_similarity(a, b, dim=0)) for b in keys[0].double()] for a in keys[0].double()]
    if min(abs(c - threshold) for i, row in enumerate(cosines) for j, c in enumerate(row) if i != j) < 1e-6:
        return
    alike = [sum(c > threshold for j, c in enumerate(row) if j != i) >= k for i, row in enumerate(cosines)]
    assert repeated(keys, threshold, k)[0].tolist() == alike
    count = max(1, int((1 - sum(alike) / n) * n + 0.5))
    local = sorted(range(n), key=lambda i: -shallow[0, i].item())[: count // 2]
    rest = sorted(set(range(n)) - set(local), key=lambda i: -deep[0, i].item())[: count - count // 2]
    made = TokenCorr(threshold=threshold, counterparts=k).reduce(view(keys, shallow, deep))
    assert kept(made) == sorted([*local, *rest])


def test_a_blank_crop_keeps_one_token_and_a_full_one_all():
    blank, full = torch.ones(9, 9), torch.eye(9)
    score = torch.arange(9.0).expand(2, 9)
    made = TokenCorr().reduce(view(torch.stack([blank, full]), score, score))
    assert kept(made, 0) == [8] and kept(made, 1) == list(range(9))
    assert TokenCorr().reduce(view(torch.zeros(1, 9, 4), score[:1], score[:1])).valid.all()


def test_nan_loses():
    score = torch.arange(9.0)[None].clone()
    score[0, 8] = float("nan")
    assert not local_and_global(score, score, torch.tensor([8]))[0, 8]
    # Also where it is needed to fill up: the first half is not counted twice.
    deep = torch.full((1, 9), float("nan"))
    assert local_and_global(score, deep, torch.tensor([7]))[0].sum() == 7


@given(n=st.integers(1, 30), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), seed=st.integers(0, 99))
def test_a_fixed_number_of_tokens(n, keep, seed):
    """Half by the shallow layer, rounded down, the rest by the deep one; keys have no say."""
    g = torch.Generator().manual_seed(seed)
    shallow, deep = torch.rand(2, 3, n, generator=g)
    method = TokenCorr(keep=keep)
    seen = view(torch.full((3, n, 4), float("nan")), shallow, deep)
    made, k = method.reduce(seen), method.count(seen.counts)
    assert k == min(n, max(1, int(keep * n + 0.5) if isinstance(keep, float) else keep))
    if k == n:
        assert made is None
        return
    assert made.valid is None and made.slots == k
    for row in range(3):
        local = sorted(range(n), key=lambda i: -shallow[row, i].item())[: k // 2]
        rest = sorted(set(range(n)) - set(local), key=lambda i: -deep[row, i].item())[: k - k // 2]
        assert made.keep[row].tolist() == sorted([*local, *rest])


def test_the_local_half_is_of_a_quarter_of_the_depth():
    layout = llava()
    tower = replace(layout.stages["vision"], depth=24, last=23)
    sites = TokenCorr().sites(replace(layout, stages={**layout.stages, "vision": tower}))
    assert sites[0].needs == ("cls_attention@vision:6", "cls_attention@vision:-1", LAST)


def test_it_says_that_it_is_approximate():
    assert "approximate" in TokenCorr.parity and "approximate" in TokenCorr.__doc__
    assert any("approximate" in said for said in TokenCorr().remarks(llava()))
    assert TokenCorr(shallow=-2).sites(llava())[0].needs[0] == "cls_attention@vision:-2"
    for wrong in ({"keep": 0}, {"threshold": 2.0}, {"counterparts": 0}, {"separators": "all"}):
        with pytest.raises(ParameterError):
            TokenCorr(**wrong)
