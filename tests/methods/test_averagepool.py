"""AveragePool: torch's adaptive pooling, what it refuses, and the rules every method keeps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.mergers.averagepool import AveragePool, pool_windows


def view(grid, batch=2, width=3, n=None):
    x = torch.randn(batch, n or grid[0] * grid[1], width)
    return TokenView(x, Site("projected"), grid=grid)


def pooled(seen, out):
    picture = seen.tokens.transpose(1, 2).unflatten(2, seen.grid)
    return F.adaptive_avg_pool2d(picture, out).flatten(2).transpose(1, 2)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_equals_torch(rows, columns, down, across):
    seen = view((rows, columns))
    method = AveragePool((down, across), overlap=True)
    if down > rows or across > columns:
        with pytest.raises(ParameterError, match="larger"):
            method.reduce(seen)
        return
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == down * across
    if (down, across) == (rows, columns):
        assert reduction is None
        return
    out, size = reduction.apply(seen.tokens)
    assert reduction.slots == down * across
    torch.testing.assert_close(out, pooled(seen, (down, across)), atol=1e-5, rtol=1e-5)
    owner = reduction.assignment(rows * columns)
    assert (owner >= 0).all()  # every patch is owned once, also where windows overlap
    assert torch.equal(size.sum(1), torch.full((2,), float(rows * columns)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_grids_that_cannot_be_divided_are_refused(rows, columns, out):
    seen, method = view((rows, columns)), AveragePool(out)
    if rows % out or columns % out:
        with pytest.raises(ParameterError, match="larger" if out > rows or out > columns else "overlap=True"):
            method.reduce(seen)
        return
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (rows * columns if reduction is None else reduction.slots)


def test_the_default_halves_each_side():
    seen = view((24, 24))
    reduction = AveragePool().reduce(seen)
    assert AveragePool().count(seen.counts) == reduction.slots == 144
    torch.testing.assert_close(reduction.apply(seen.tokens)[0], pooled(seen, 12), atol=1e-5, rtol=1e-5)
    for grid in ((5, 4), (1, 8)):
        with pytest.raises(ParameterError, match="cannot be divided"):
            AveragePool().reduce(view(grid))
    odd = view((5, 4))
    wide = AveragePool(overlap=True)
    assert wide.reduce(odd).slots == wide.count(odd.counts) == 6
    assert wide.count(replace(odd.counts, grid=None)) is None


def test_only_whole_grids():
    with pytest.raises(ParameterError, match="no longer its 4 x 4"):
        AveragePool(2).reduce(view((4, 4), n=12))
    with pytest.raises(ParameterError, match="no single grid"):
        AveragePool(2).reduce(view(None, n=12))


def test_windows():
    assert pool_windows(6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
    assert pool_windows(5, 3) == [range(0, 2), range(1, 4), range(3, 5)]


def test_message_names_what_fits():
    with pytest.raises(ParameterError, match=r"rows of 1, 2, 3, 6 and columns of 1, 2, 4 fits"):
        AveragePool((4, 2)).reduce(view((6, 4)))


def test_meta_compiled_and_half_precision():
    method, seen = AveragePool(2), view((6, 4))

    def run(x):
        return method.reduce(TokenView(x, Site("projected"), grid=(6, 4))).apply(x)[0]

    assert run(seen.tokens.to("meta")).shape == (2, 4, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(seen.tokens), run(seen.tokens))
    half = run(seen.tokens.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), run(seen.tokens), atol=2e-3, rtol=0)


def test_gradients_flow():
    x = torch.randn(1, 16, 2, requires_grad=True)
    AveragePool(2).reduce(TokenView(x, Site("projected"), grid=(4, 4))).apply(x)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))


def test_sites_and_parameters():
    layout = Layout("by hand", {"projected": StageLayout(1, 8, 0, 0)})
    assert AveragePool().sites(layout) == [Site("projected")]
    with pytest.raises(SiteError):
        AveragePool().sites(Layout("a tower", {"vision": StageLayout(2, 8, 1, 1)}))
    for wrong in (0, -2, 1.5, (2, 0), (2,), (2, 2, 2), True):
        with pytest.raises(ParameterError):
            AveragePool(wrong)
    for spec in ("averagepool", "averagepool:output_size=8", "averagepool:output_size=(12;8):overlap=true"):
        assert str(parse_methods(spec)[0]) == spec
