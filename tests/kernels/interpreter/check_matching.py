"""Matching, and the lengths of rows that it divides by."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from drawing import DTYPES, NONE, close, rows, same
from torch import Tensor

from vlmtok.kernels import reference, table

SMALL = {  # tiles of 16, so that small inputs make many of them, and lengths measured in or before the kernel
    "inline": table.Tile("match", 4, 1 << 30, 0, 16, 16, 64, 4),
    "scaled": table.Tile("match", 4, 1 << 30, 1, 16, 16, 64, 4),
}


def _match(k: SimpleNamespace, a: Tensor, b: Tensor, tiles: str = "inline", **masks):
    value = torch.empty(a.shape[:2])
    index = torch.empty(a.shape[:2], dtype=torch.int64)
    k.match.match(a, b, index, value, config=SMALL[tiles], **masks)
    return value, index


def match_values(k):
    for m, n, d in ((1, 1, 8), (17, 33, 40), (5, 18, 130)):
        for dtype in DTYPES:
            a, b = rows(2, m, d, dtype), rows(2, n, d, dtype, 1)
            for tiles in SMALL:
                same(_match(k, a, b, tiles), reference.match_max(a, b))
            same(k.match.match_max(a, b), reference.match_max(a, b))


def match_ties(k):
    """Equal columns inside a tile, across tiles and across lanes: the lowest wins."""
    x = rows(1, 1, 16).expand(1, 40, 16).contiguous()
    for tiles in SMALL:
        assert _match(k, x, x, tiles)[1].eq(0).all()
        assert _match(k, x, x, tiles, exclude_diag=True)[1][0].tolist() == [1] + [0] * 39
        b = rows(1, 40, 16, seed=3)
        b[0, 37] = b[0, 21] = b[0, 5] = x[0, 0]
        assert _match(k, x[:, :3], b, tiles)[1].eq(5).all()
        b[0, 5] = 0
        assert _match(k, x[:, :3], b, tiles)[1].eq(21).all()
        y = rows(1, 2, 16, seed=5)
        b = torch.cat([y[:, [0]], x[:, :20], y[:, [1]], x[:, :5]], 1)
        assert _match(k, x[:, :1], b, tiles)[1].eq(1).all()


def match_negative(k):
    """Every similarity is negative: padding must not win."""
    b = rows(2, 19, 12).abs()
    for tiles in SMALL:
        same(_match(k, -b[:, :7], b, tiles), reference.match_max(-b[:, :7], b))


def match_scales(k):
    """Lengths matter: long columns do not win by length, and values are cosines."""
    a, b = rows(2, 9, 24), rows(2, 21, 24, seed=1)
    b = b * torch.linspace(0.01, 50, 21)[:, None]
    for tiles in SMALL:
        same(_match(k, 7 * a, b, tiles), reference.match_max(a, b))


def match_masks(k):
    a, b = rows(2, 21, 16), rows(2, 19, 16, seed=1)
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(2, 19, generator=generator) > 0.5
    rank_a, rank_b = (torch.randint(0, 9, (2, n), generator=generator) for n in (21, 19))
    for tiles in SMALL:
        same(_match(k, a, b, tiles, valid_b=valid), reference.match_max(a, b, valid_b=valid))
        same(_match(k, a, b, tiles, exclude_diag=True), reference.match_max(a, b, exclude_diag=True))
        ranks = {"rank_a": rank_a, "rank_b": rank_b}
        same(_match(k, a, b, tiles, **ranks), reference.match_max(a, b, **ranks))
        everything = {"valid_b": valid, "exclude_diag": True, **ranks}
        same(_match(k, a, b, tiles, **everything), reference.match_max(a, b, **everything))
    same(k.match.match_max(a, a, exclude_diag=True), reference.match_max(a, a, exclude_diag=True))
    turned = {"rank_a": rank_a.int(), "rank_b": rank_b.flip(1), "valid_b": valid.t().contiguous().t()}
    same(k.match.match_max(a, b, **turned), reference.match_max(a, b, **turned))


def match_by_score(k):
    """Ranks given as scores: later means lower, and among equals behind."""
    x = rows(2, 37, 16)
    score = torch.randint(0, 5, (2, 37), generator=torch.Generator().manual_seed(1)).float()
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(37).expand(2, 37))
    for tiles in SMALL:
        found = _match(k, x, x, tiles, rank_a=score, rank_b=score)
        same(found, reference.match_max(x, x, rank_a=rank, rank_b=rank))


def match_nothing_allowed(k):
    a, b = rows(2, 5, 8), rows(2, 18, 8, seed=1)
    none = torch.zeros(2, 18, dtype=torch.bool)
    for tiles in SMALL:
        value, index = _match(k, a, b, tiles, valid_b=none)
        assert value.eq(NONE).all() and index.eq(0).all()
    value, index = k.match.match_max(a, b[:, :0])
    assert value.eq(NONE).all() and index.eq(0).all()
    assert k.match.match_max(a[:, :0], b)[0].shape == (2, 0)


def match_not_finite(k):
    for dtype in DTYPES:
        a, b = rows(1, 19, 16, dtype), rows(1, 21, 16, dtype, 1)
        b[0, 0], b[0, 3, 2], b[0, 18] = float("nan"), float("inf"), 0
        a[0, 1, 1], a[0, 2, 0], a[0, 4] = float("nan"), -float("inf"), 0
        for tiles in SMALL:
            same(_match(k, a, b, tiles), reference.match_max(a, b))
    a, b = rows(1, 3, 4).abs(), -rows(1, 4, 4, seed=1).abs()
    b[0, 0] = 1e25  # its length overflows, its elements do not
    for tiles in SMALL:
        same(_match(k, a, b, tiles), reference.match_max(a, b))


def match_views(k):
    """Strided halves, batch strides, transposed features, another dtype on one side."""
    wide = rows(3, 45, 20)
    same(k.match.match_max(wide[:, ::2], wide[:, 1::2]), reference.match_max(wide[:, ::2], wide[:, 1::2]))
    part = wide[:, 4:30]
    same(k.match.match_max(part, part, exclude_diag=True), reference.match_max(part, part, exclude_diag=True))
    turned = rows(2, 8, 30).transpose(1, 2)
    same(k.match.match_max(turned, turned.flip(1)), reference.match_max(turned, turned.flip(1)))
    half = wide[:, 1::2].to(torch.bfloat16)
    same(k.match.match_max(wide[:, ::2], half), reference.match_max(wide[:, ::2], half))
    same(k.match.match_max(wide[..., :0], wide[..., :0]), reference.match_max(wide[..., :0], wide[..., :0]))


def match_symmetric(k):
    """A graph with itself: the cosine of i and j is bit for bit that of j and i."""
    x = rows(1, 40, 30) * torch.linspace(0.1, 9, 40)[:, None]
    value, index = k.match.match_max(x, x, exclude_diag=True)
    mutual = index.gather(1, index) == torch.arange(40)
    assert mutual.sum() > 4
    assert torch.equal(value[mutual], value.gather(1, index)[mutual])


def scale_rows(k):
    x = rows(3, 21, 300)[:, 2:19]
    x[0, 1], x[1, 2, 5], x[2, 0] = 0, float("nan"), 1e30
    expected = 1 / x.norm(dim=-1).clamp_min(1e-12)
    expected[1, 2] = expected[2, 0] = float("nan")
    torch.testing.assert_close(k.common.row_scale(x), expected, equal_nan=True)


def scale_and_ask(k):
    """Row lengths with the cosine to a query, also where a tile holds rows of two pictures."""
    for dtype in DTYPES:
        x, query = rows(3, 21, 300, dtype)[:, 2:19], rows(3, 2, 300, dtype, seed=7)[:, 1]
        x[0, 1], x[1, 2, 5], query[2, 0] = 0, float("nan"), float("inf")
        cosine = torch.empty(3, 17)
        torch.testing.assert_close(k.common.row_scale(x, query, cosine), k.common.row_scale(x), equal_nan=True)
        close(cosine, reference.query_cosine(x, query), 1e-5)
        assert cosine[0, 1] == cosine[1, 2] == 0 and not cosine[2].any() and cosine[:2].abs().max() > 0.1
