"""DivPrune: the released choice, its edges done right, and the rules every method keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.pruners.divprune import DivPrune, max_min_subset


def view(x, **more):
    return TokenView(x, Site("projected"), **more)


@pytest.mark.parametrize("name", golden_names("divprune_[a-w]_*.npz"))
def test_choice_equals_the_release(name):
    data = golden(name)
    x = data["x"].unsqueeze(0)
    kept, order = max_min_subset(x, data["k"])
    assert order[0].tolist() == data["order"].tolist()
    assert kept[0].tolist() == data["keep_sorted"].tolist()
    reduction = DivPrune(keep=data["k"]).reduce(view(x))
    if data["k"] == x.shape[1]:
        assert reduction is None
    else:
        assert reduction.keep[0].tolist() == data["keep_sorted"].tolist()


@pytest.mark.parametrize("name", golden_names("divprune_x_edge_*.npz"))
def test_edges_where_the_release_repeats_itself(name):
    data = golden(name)
    x = data["x"].unsqueeze(0)
    k = min(data["k"], x.shape[1])
    _, order = max_min_subset(x, k)
    assert len(set(order[0].tolist())) == k
    assert len(set(data["order"].tolist())) < data["k"]  # what the release gives there
    assert DivPrune(keep=data["k"]).count(view(x).counts) == k


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 20), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_step_is_the_best_by_plain_loops(n, k, seed):
    x = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    order = max_min_subset(x, min(k, n))[1][0].tolist()
    unit = x[0].double() / x[0].double().norm(dim=-1, keepdim=True)
    gap = (1 - unit @ unit.T).tolist()
    alone = [min(gap[i][j] for j in range(n) if j != i) for i in range(n)]
    assert alone[order[0]] == pytest.approx(max(alone), abs=1e-5)
    for t in range(1, len(order)):
        far = {i: min(gap[i][j] for j in order[:t]) for i in range(n) if i not in order[:t]}
        assert far[order[t]] == pytest.approx(max(far.values()), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    keep=st.one_of(st.integers(1, 50), st.floats(0.01, 1.0)),
    newlines=st.sampled_from(["candidates", "drop"]),
)
def test_count_is_what_reduce_keeps(n, keep, newlines):
    method = DivPrune(keep=keep, newlines=newlines)
    part = torch.arange(n).remainder(5).eq(4).to(torch.int64).neg().expand(2, n)
    seen = view(torch.randn(2, n, 4), part=part)
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert (reduction.keep.diff(dim=1) > 0).all()


def test_newlines():
    x = torch.randn(1, 25, 4)
    x[:, 4::5] *= -3.0
    part = torch.zeros(1, 25, dtype=torch.int64)
    part[:, 4::5] = -1
    dropped = DivPrune(keep=20, newlines="drop").reduce(view(x, part=part)).keep[0]
    assert (part[0, dropped] == 0).all()
    assert (part[0, DivPrune(keep=20).reduce(view(x, part=part)).keep[0]] == -1).any()


def test_nested_scale_free_and_batched():
    x = torch.randn(3, 30, 8)
    _, order = max_min_subset(x, 20)
    assert torch.equal(max_min_subset(x, 7)[1], order[:, :7])
    assert torch.equal(max_min_subset(x * torch.rand(3, 30, 1).add(0.5), 20)[1], order)
    assert torch.equal(torch.cat([max_min_subset(x[i : i + 1], 20)[1] for i in range(3)]), order)


def test_ties_and_nan():
    assert max_min_subset(torch.eye(3)[[0, 1, 2, 0, 1, 2]].unsqueeze(0), 3)[1].tolist() == [[0, 1, 2]]
    x = torch.randn(1, 12, 4)
    x[0, 3] = float("nan")
    assert max_min_subset(x, 12)[1][0, -1] == 3
    only = torch.zeros(1, 12, dtype=torch.bool)
    only[0, 5:7] = True
    assert set(max_min_subset(x, 2, only)[1][0].tolist()) == {5, 6}


def test_half_precision_autocast_meta_and_compiled():
    x = torch.randn(2, 20, 8).bfloat16()
    method = DivPrune(keep=6)
    expected = method.reduce(view(x.float())).keep
    assert torch.equal(method.reduce(view(x)).keep, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.reduce(view(x.float())).keep, expected)
    assert method.reduce(view(x.to("meta"))).keep.shape == (2, 6)
    compiled = torch.compile(lambda t: method.reduce(view(t)).keep, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x.float()), expected)


def test_sites_and_parameters():
    layout = Layout("by hand", {"projected": StageLayout(1, 8, 0, 0)})
    assert DivPrune(positions="keep").sites(layout) == [Site("projected", positions="keep")]
    with pytest.raises(SiteError):
        DivPrune().sites(Layout("a tower", {"vision": StageLayout(2, 8, 1, 1)}))
    for wrong in ({"keep": 0}, {"keep": 1.5}, {"keep": True}, {"newlines": "keep"}, {"positions": "shuffle"}):
        with pytest.raises(ParameterError):
            DivPrune(**wrong)
    for spec in ("divprune", "divprune:keep=64:newlines=drop"):
        assert str(parse_methods(spec)[0]) == spec
