"""What every Triton kernel must get right, as functions of the modules that hold the kernels.

`test_kernels.py` runs them on the modules as they are, `test_mutations.py` on modules with a bug put in. The oracle is
the torch definition (itself held against naive loops elsewhere): indices exactly, also in ties.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from vlmtok.kernels import reference, table

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NONE = float("-inf")
SMALL = {  # tiles of 16, so that small inputs make many of them, and lengths measured in or before the kernel
    "inline": table.Tile("match", 4, 1 << 30, 0, 16, 16, 64, 4),
    "scaled": table.Tile("match", 4, 1 << 30, 1, 16, 16, 64, 4),
}


def rows(batch: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=1e-5, equal_nan=True)


def same(found, expected, tolerance: float = 2e-6) -> None:
    """Floats close, integers equal."""
    for a, b in zip(found, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.is_floating_point():
            close(a, b, tolerance)
        else:
            assert torch.equal(a, b), (a, b)


# ---------------------------------------------------------------------- match
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


# ---------------------------------------------------------------------- energy
def _energy(k, x, tiles, **settings):
    same([k.energy.energy(x, config=SMALL[tiles], **settings)], [reference.energy(x, **settings)], 1e-5)


def energy_values(k):
    for n, d in ((1, 8), (21, 40), (17, 130)):
        for dtype in DTYPES:
            for kind in ("elu", "paper", "gaussian") if dtype == torch.float32 else ("elu",):
                x = rows(2, n, d, dtype)
                for tiles in SMALL:
                    _energy(k, x, tiles, margin=0.2, alpha=0.7, kind=kind)


def energy_margins(k):
    x = rows(1, 21, 8).abs()
    for margin in (-0.5, 0.0, 0.9):
        for kind in ("elu", "paper", "gaussian"):
            for tiles in SMALL:
                _energy(k, x, tiles, margin=margin, alpha=1.3, kind=kind)
    _energy(k, x, "inline", margin=0.4, alpha=0.0)


def energy_not_finite(k):
    x = rows(2, 21, 16)
    x[0, 1], x[0, 2, 3], x[1, 20, 0], x[1, 3] = float("nan"), float("inf"), float("nan"), 0
    for margin in (0.4, -0.3):
        for kind in ("elu", "paper", "gaussian"):
            for tiles in SMALL:
                _energy(k, x, tiles, margin=margin, alpha=0.7, kind=kind)


def energy_views(k):
    x = rows(2, 40, 12)[:, 1::2]
    same([k.energy.energy(x, margin=0.3)], [reference.energy(x, margin=0.3)], 1e-5)
    assert k.energy.energy(x[:, :0], margin=0.3).shape == (2, 0)
    assert k.energy.energy(x[:0], margin=0.3).shape == (0, 20)


# ---------------------------------------------------------------------- orders and plans
def _distinct(n: int, d: int, seed: int) -> Tensor:
    """Rows whose energies and similarities are no near ties."""
    while True:
        x = rows(2, n, d, seed=seed)
        seed += 100
        levels = reference.energy(x, margin=0.3).sort(1).values
        if (levels[:, 1:] - levels[:, :-1]).min() > 3e-6:
            return x


def plan_bipartite(k):
    for n, d, cases in ((17, 16, ((0, 1), (4, 0), (4, 1), (4, 2), (8, 0))), (40, 130, ((20, 1),))):
        x = _distinct(n, d, 0)
        for r, prefix in cases:
            same(k.order.bipartite_match(x, r, prefix), reference.bipartite_match(x, r, prefix))


def plan_bipartite_ties(k):
    x = rows(1, 1, 8).expand(1, 16, 8).contiguous()
    x[0, 3], x[0, 9], x[0, 6] = rows(1, 1, 8, seed=9)[0, 0], 0, float("nan")
    for prefix in (0, 1):
        same(k.order.bipartite_match(x, 4, prefix), reference.bipartite_match(x, 4, prefix))


def plan_energy(k):
    cases = [{"r": r, "split": split} for r in (3, 8) for split in ("alternate", "halves")]
    cases += [{"r": 0}, {"r": 3, "protect": False}]
    for n, d, some in ((17, 16, cases), (24, 130, [{"r": 5}])):
        x = _distinct(n, d, 0)
        for case in some:
            same(k.order.energy_match(x, margin=0.3, **case), reference.energy_match(x, margin=0.3, **case))


def plan_complete(k):
    for n, d, counts in ((17, 16, (0, 4, 7)), (20, 130, (4,))):
        x = rows(2, n, d)
        importance = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) * 0.2
        protected = torch.zeros(2, n, dtype=torch.bool)
        protected[:, 0], protected[1, n - 1] = True, True
        for r in counts:
            turned = protected.t().contiguous().t()
            for mask in (None, protected, turned) if r == 4 else (protected,):
                found = k.order.complete_match(x, importance, r, mask)
                same(found, reference.complete_match(x, importance, r, mask))
    x = rows(1, 12, 8)
    x[0, 3], x[0, 4], x[0, 5] = float("nan"), x[0, 6], 0
    zero = torch.zeros(1, 12)
    zero[0, 2] = float("nan")
    same(k.order.complete_match(x, zero, 5), reference.complete_match(x, zero, 5))
    same(k.order.complete_match(x, None, 5), reference.complete_match(x, None, 5))
    x[0, 1:9] = float("nan")
    first = torch.zeros(1, 12, dtype=torch.bool)
    first[0, :2] = True
    found = k.order.complete_match(x, None, 5, first)
    same(found, reference.complete_match(x, None, 5, first))
    assert found[0][0, :2].tolist() == [0, 1]  # tokens with NaN go first


def plan_guided(k):
    for n, d, r in ((17, 16, 0), (17, 16, 7), (20, 130, 4)):
        x, query = rows(2, n, d), rows(2, 3, d, seed=4)[:, 1]
        same(k.order.guided_match(x, query, r), reference.guided_match(x, query, r))


def order_of_scores(k):
    """Ties, both zeros, infinities, negative numbers; NaN last."""
    score = torch.tensor(
        [[-0.0, 0.0, 2.5, -1.0, 2.5, NONE, 1e-40, -1e-40, -3.0, float("inf"), NONE, 7.0, float("nan")]]
    )
    n = score.shape[1]
    keep, src = torch.empty(1, n - 4, dtype=torch.int64), torch.empty(1, 4, dtype=torch.int64)
    k.order._order(score, keep, src, k.order._HALVES)
    expected = score.nan_to_num(nan=NONE, posinf=float("inf"), neginf=NONE).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(torch.cat([src, keep[:, n - 8 :], keep[:, : n - 8]], 1), expected)


# ---------------------------------------------------------------------- merge
def plan(batch: int, n: int, r: int, seed: int = 0, repeats: bool = False):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    src, keep = order[:, :r], order[:, r:]
    if repeats:
        src = torch.randint(0, n, (batch, r), generator=generator)
    return keep, src, torch.randint(-1, max(n - r, 1), (batch, r), generator=generator)


CHUNK = table.Tile("merge_rows", 4, 1 << 30, 0, 16, 16, 0, 4)  # several steps of entries, several parts of channels


def _merge(k, x, size, merge, tolerance=2e-5, **settings):
    expected = reference.merge_rows(x, size, *merge, **settings)
    for config in (None, CHUNK):
        same(k.merge.merge_rows(x, size, *merge, config=config, **settings), expected, tolerance)


def merge_means(k):
    for n, r, d in ((2, 1, 8), (26, 18, 20), (5, 0, 17)):
        for dtype in DTYPES:
            size = rows(2, n, 1, seed=2)[..., 0].abs() * 8 + 0.5
            # The interpreter truncates where a GPU rounds to nearest: one unit in the last place of bfloat16.
            tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}[dtype]
            _merge(k, rows(2, n, d, dtype), size, plan(2, n, r), tolerance)


def merge_is_deterministic_and_alone_is_exact(k):
    for dtype in DTYPES:
        x, size = rows(1, 12, 20, dtype), torch.ones(1, 12)
        size[0, 11] = 0
        keep, src, dst = torch.arange(8).unsqueeze(0), torch.tensor([[8, 9, 10, 11]]), torch.tensor([[0, 0, -1, 5]])
        x[0, 10] = float("nan")
        found, total = k.merge.merge_rows(x, size, keep, src, dst)
        assert torch.equal(found[:, 1:], x[:, 1:8]) and found.isfinite().all()
        assert total.tolist() == [[3.0, 1, 1, 1, 1, 1, 1, 1]]
        again, _ = k.merge.merge_rows(x, size, keep, src, dst)
        assert torch.equal(found, again)
    same_rows = rows(1, 1, 20).expand(1, 12, 20).contiguous()
    found, _ = k.merge.merge_rows(same_rows, size + 0.3, keep, src, dst.abs())
    assert torch.equal(found, same_rows[:, :8])


def merge_weights(k):
    for n, r, d in ((9, 4, 20), (8, 18, 7)):
        x, size = rows(2, n, d), rows(2, n, 1, seed=2)[..., 0].abs() + 0.5
        order, _, _ = plan(2, n, 0)
        keep = order[:, : n - 3]
        generator = torch.Generator().manual_seed(1)
        src = torch.randint(0, n, (2, r), generator=generator)
        dst = torch.randint(-1, n - 3, (2, r), generator=generator)
        weights = {"keep_weight": rows(2, n - 3, 1)[..., 0], "src_weight": rows(2, r, 1, seed=1)[..., 0]}
        _merge(k, x, size, (keep, src, dst), **weights)
        _merge(k, rows(2, n + 3, d), torch.ones(2, n + 3), (keep, src, dst), prefix=2, suffix=1, **weights)


def merge_pairs(k):
    """Weights worked out from importance, also where several join, none joins, or an entry is empty."""
    for n, r, d in ((2, 1, 8), (26, 18, 20), (5, 0, 17)):
        for dtype in DTYPES if n == 26 else DTYPES[:1]:
            x, size = rows(2, n + 3, d, dtype), rows(2, n + 3, 1, seed=2)[..., 0].abs() * 4 + 0.5
            importance = rows(2, n, 2, seed=3)[..., 1]
            tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}[dtype]
            _merge(k, x, size, plan(2, n, r), tolerance, importance=importance, prefix=2, suffix=1)
    x, size = rows(1, 4, 8), torch.tensor([[2.0, 1.0, 0.0, 3.0]])
    keep, src, dst = torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, -1]])
    found, total = k.merge.merge_rows(x, size, keep, src, dst, importance=torch.tensor([[0.0, 9.0, 0.0, 0.0]]))
    assert torch.equal(found, x[:, :2]) and total.tolist() == [[2.0, 1.0]]  # nothing, or only size 0, joins them


def merge_biased(k):
    """The logarithm of the sizes, whoever works them out."""
    n, r = 26, 18
    keep, src, dst = plan(2, n, r)
    size = rows(2, n + 3, 1, seed=2)[..., 0].abs() * 8 + 0.5
    ways = (
        {},
        {"importance": rows(2, n, 1, seed=3)[..., 0]},
        {"keep_weight": rows(2, n - r, 1)[..., 0], "src_weight": rows(2, r, 1, seed=1)[..., 0]},
    )
    for dtype in DTYPES:
        for way in ways if dtype == torch.float32 else ways[:1]:
            x = rows(2, n + 3, 20, dtype)
            settings = {**way, "prefix": 2, "suffix": 1}
            plain = k.merge.merge_rows(x, size, keep, src, dst, config=CHUNK, **settings)
            for config in (None, CHUNK):
                found = k.merge.merge_rows_biased(x, size, keep, src, dst, config=config, **settings)
                same(found[:2], plain, 0 if config else 2e-5 if dtype == torch.float32 else 3.2e-2)
                assert found[2].dtype == dtype
                expected = reference.log_size(plain[1], dtype)
                close(found[2], expected, {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype])


def merge_ownership(k):
    """The first entry that is not empty owns its token; kept tokens own themselves."""
    x, size = rows(1, 5, 8), torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    keep, src, dst = torch.tensor([[0, 1]]), torch.tensor([[3, 3, 3, 4, 1, 4]]), torch.tensor([[-1, 1, 0, 0, 0, 1]])
    weights = {"keep_weight": torch.ones(1, 2), "src_weight": torch.ones(1, 6)}
    _, total = k.merge.merge_rows(x, size, keep, src, dst, **weights)
    assert total.tolist() == [[1.0 + 16, 2.0 + 8]]


def merge_rows_around(k):
    x, size = rows(2, 15, 20), rows(2, 15, 1, seed=2)[..., 0].abs() + 0.5
    _merge(k, x, size, plan(2, 12, 5), prefix=1, suffix=2)
    _merge(k, x, size, plan(2, 15, 5))
    none = torch.zeros(2, 0, dtype=torch.int64)
    _merge(k, x, size, (none, none, none), prefix=10, suffix=5)
    _merge(k, x, size, (none, torch.ones(2, 3, dtype=torch.int64), -torch.ones(2, 3, dtype=torch.int64)), prefix=4)


def merge_empty(k):
    """An empty entry may name no token, and what it would read goes nowhere."""
    x = rows(2, 5, 8)
    x[:, 0] = float("inf")
    keep, src, dst = torch.tensor([[0, 1]] * 2), torch.tensor([[-1, 3, -1]] * 2), torch.tensor([[-1, 1, -1]] * 2)
    size, weight = torch.ones(2, 5), {"keep_weight": torch.ones(2, 2), "src_weight": torch.full((2, 3), 0.5)}
    for settings in ({}, weight, {"importance": rows(2, 5, 1)[..., 0]}):
        _merge(k, x, size, (keep, src, dst), **settings)
        assert k.merge.merge_rows(x, size, keep, src, dst, **settings)[0][:, 0].isinf().all()


def merge_views(k):
    wide = rows(2, 26, 20)[:, ::2]
    keep, src, dst = plan(2, 13, 5)
    size = torch.stack([torch.arange(13.0) + 1, torch.arange(13.0)], -1).expand(2, 13, 2)[..., 0]
    strided = torch.stack([keep, keep], -1)[..., 1]
    _merge(k, wide, size, (strided, src.t().contiguous().t(), dst))
    _merge(k, wide.transpose(1, 2).contiguous().transpose(1, 2), size, (keep, src, dst))
    _merge(k, wide[:1].expand(2, 13, 20), size, (keep[:1].expand(2, 8), src, dst))
    assert k.merge.merge_rows(wide[:0], size[:0], keep[:0], src[:0], dst[:0])[0].shape == (0, 8, 20)
    assert k.merge.merge_rows(wide[..., :0], size, keep, src, dst)[1].shape == (2, 8)


def merge_gradient(k):
    for n, r in ((12, 20), (12, 0)):
        keep, src, dst = plan(2, n, 4, repeats=True)
        src, dst = src.repeat(1, 5)[:, :r], dst.repeat(1, 5)[:, :r].roll(1, 1)
        kw, sw = rows(2, 8, 1)[..., 0], rows(2, r, 1, seed=1)[..., 0]
        grad = rows(2, 8 + 3, 20, seed=5)
        expected = reference.merge_rows_grad(grad, keep, src, dst, kw, sw, n + 3, 2, 1)
        for config in (None, CHUNK):
            found = k.merge.merge_rows_grad(grad, keep, src, dst, kw, sw, n + 3, 2, 1, config=config)
            close(found, expected, 1e-5)


# ---------------------------------------------------------------------- greedy
RULES = (("max", "cosine"), ("sum", "cosine"), ("max", "l2"))


def greedy_choices(k):
    for batch, n, d, count in ((1, 1, 8, 1), (2, 17, 24, 17), (3, 40, 24, 9)):
        for dtype in DTYPES:
            x, start = rows(batch, n, d, dtype), torch.arange(batch) % n
            for rule, metric in RULES:
                settings = {"rule": rule, "metric": metric}
                found = k.greedy.greedy_select(x, count, start, **settings)
                same(found, reference.greedy_select(x, count, start, **settings), 2e-4)


def greedy_ties(k):
    order, _ = k.greedy.greedy_select(torch.ones(1, 20, 8), 20, torch.tensor([5]))
    assert order[0].tolist() == [5, *(i for i in range(20) if i != 5)]
    x = torch.eye(8).repeat(1, 3, 1)
    for rule, metric in RULES:
        settings = {"rule": rule, "metric": metric}
        found, expected = (
            f(x, 24, torch.tensor([2]), **settings)[0] for f in (k.greedy.greedy_select, reference.greedy_select)
        )
        assert torch.equal(found, expected)


def greedy_tiers(k):
    """Free rows, then rows that are not finite, then rows that are not valid; none twice."""
    x = rows(2, 18, 8)
    x[0, 3], x[0, 5, 1], x[1, 0], x[1, 7] = float("nan"), float("inf"), float("nan"), 0
    valid = torch.rand(2, 18, generator=torch.Generator().manual_seed(2)) > 0.5
    for mask in (None, valid, torch.zeros(2, 18, dtype=torch.bool), valid.t().contiguous().t()):
        for rule, metric in RULES:
            settings = {"rule": rule, "metric": metric, "valid": mask}
            found = k.greedy.greedy_select(x, 18, torch.tensor([4, 0]), **settings)
            same(found, reference.greedy_select(x, 18, torch.tensor([4, 0]), **settings), 2e-4)


def greedy_far(k):
    """Squared lengths that overflow, alone or doubled: such rows come late, and none twice."""
    x = rows(2, 12, 4)
    unit = reference.unit_rows(x)
    x[0, [2, 5, 9]], x[1, [1, 3]] = unit[0, [2, 5, 9]] * 1.5e19, unit[1, [1, 3]] * 8e18
    for rule, metric in RULES:
        found = k.greedy.greedy_select(x, 12, torch.tensor([2, 0]), rule=rule, metric=metric)
        same(found, reference.greedy_select(x, 12, torch.tensor([2, 0]), rule=rule, metric=metric), 2e-4)
        assert all(sorted(order) == list(range(12)) for order in found[0].tolist())
    assert k.greedy.greedy_select(x, 12, torch.tensor([2, 0]), metric="l2")[0][0, -2:].tolist() == [5, 9]


def greedy_views(k):
    x, start = rows(4, 30, 12)[::2, 1::2], torch.tensor([[3, 9], [4, 9]])[:, 0]
    same(k.greedy.greedy_select(x, 6, start), reference.greedy_select(x, 6, start))
    assert k.greedy.greedy_select(x, 0, start)[0].shape == (2, 0)
    assert k.greedy.greedy_select(x[:0], 3, start[:0])[0].shape == (0, 3)
    before, k.greedy._GRAM_BYTES = k.greedy._GRAM_BYTES, 1  # a picture at a time
    same(k.greedy.greedy_select(x, 6, start), reference.greedy_select(x, 6, start))
    k.greedy._GRAM_BYTES = before


# ---------------------------------------------------------------------- transition, received attention
def transition(k):
    for n, d in ((1, 7), (5, 300), (2, 3000)):
        for dtype in DTYPES:
            x, y = rows(2, n, d, dtype), rows(2, n, d, dtype, 1)
            if n == 5:
                x[0, 1], y[0, 2], x[1, 3] = 0, 0, float("nan")
            same(k.transition.transition_stats(x, y), reference.transition_stats(x, y), 1e-5)
    x, y = rows(2, 10, 6)[:, ::2], rows(2, 6, 5, torch.float16).transpose(1, 2)
    same(k.transition.transition_stats(x, y), reference.transition_stats(x, y), 1e-5)
    for short in (x * 1e-6, x * 1e-9):
        same(k.transition.transition_stats(short, y), reference.transition_stats(short, y), 1e-5)
        same(k.transition.transition_stats(y, short), reference.transition_stats(y, short), 1e-5)
    assert k.transition.transition_stats(x[:0], y[:0])[0].shape == (0, 5)


def received(k):
    tiles = table.Tile("received_attention", 4, 256, 0, 16, 16, 64, 4)
    for batch, heads, groups, m, n, d in ((1, 1, 1, 1, 1, 8), (2, 2, 1, 19, 19, 16), (1, 2, 2, 5, 21, 40)):
        for dtype in DTYPES:
            q = rows(batch * heads, m, d, dtype).reshape(batch, heads, m, d)
            keys = rows(batch * groups, n, d, dtype, 1).reshape(batch, groups, n, d)
            causal = torch.zeros(m, n).masked_fill(torch.ones(m, n).triu(1).bool(), NONE)
            key = rows(batch, 1, n, dtype).unsqueeze(1)
            for bias in (None, key, causal, rows(heads, m, 1, seed=3)) if dtype == torch.float32 else (key,):
                settings = {"scale": d**-0.5, "bias": bias}
                expected = reference.received_attention(q, keys, **settings)
                for config in (None, tiles):
                    close(k.received.received_attention(q, keys, config=config, **settings), expected)


def received_edges(k):
    q = rows(2, 40, 8).unsqueeze(0)
    seen = torch.zeros(40, 40)
    seen[:, :20] = NONE  # the first tiles show nothing
    settings = {"scale": 0.3, "bias": seen}
    tiles = table.Tile("received_attention", 4, 256, 0, 16, 16, 64, 4)
    expected = reference.received_attention(q, q, **settings)
    close(k.received.received_attention(q, q, config=tiles, **settings), expected)
    assert expected[0, :20].eq(0).all()
    blind = {"scale": 0.3, "bias": seen.index_fill(0, torch.tensor([7]), NONE)}
    assert k.received.received_attention(q, q, **blind).isnan().all()
    assert reference.received_attention(q, q, **blind).isnan().all()
    loud = {"scale": 40.0}
    close(k.received.received_attention(q, q, **loud), reference.received_attention(q, q, **loud), 1e-5)
    view = q.transpose(2, 3).contiguous().transpose(2, 3)
    close(k.received.received_attention(view, view, scale=0.3), reference.received_attention(q, q, scale=0.3))
    assert k.received.received_attention(q[:, :, :0], q, scale=0.3).eq(0).all()
    none = q[..., :0]
    close(k.received.received_attention(none, none, scale=0.3), reference.received_attention(none, none, scale=0.3))
    assert k.received.received_attention(q[:0], q[:0], scale=0.3).shape == (0, 40)


CHECKS = {
    name: check
    for name, check in list(globals().items())
    if callable(check)
    and getattr(check, "__module__", "") == __name__
    and not name.startswith("_")
    and name not in ("rows", "close", "same", "plan")
}
