"""Sums of attention by key-value head and key, over sets of query rows."""

from __future__ import annotations

import torch
from drawing import DTYPES, NONE, close, rows

from vlmtok.kernels import reference, table

SMALL = {k: table.Tile("causal_column_sums", 4, 256, 0, 16, 16, k, 4) for k in (64, 256)}


def _heads(batch: int, heads: int, n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return rows(batch * heads, n, d, dtype, seed).reshape(batch, heads, n, d)


def _both(k, q, keys, tolerance: float = 2e-6, **settings):
    """The kernel, on its own tiles and on small ones, against the definition."""
    expected = reference.causal_column_sums(q, keys, **settings)
    for config in (None, SMALL[64 if q.shape[3] <= 64 else 256]):
        found = k.columns.causal_column_sums(q, keys, config=config, **settings)
        assert found.shape == expected.shape and found.is_contiguous()
        close(found, expected, tolerance)
    return expected


def columns(k):
    """Heads that share keys, keys in front of the first query, widths between powers of two, every dtype."""
    for batch, heads, groups, m, n, d in ((1, 1, 1, 1, 1, 8), (2, 4, 2, 19, 37, 16), (1, 6, 2, 33, 33, 40)):
        for dtype in DTYPES:
            q, keys = _heads(batch, heads, m, d, dtype), _heads(batch, groups, n, d, dtype, 1)
            found = _both(k, q, keys, scale=d**-0.5)
            close(found.sum((1, 3)), torch.full((batch, groups), float(m)), 1e-4)


def columns_wide(k):
    q, keys = _heads(1, 2, 5, 200), _heads(1, 1, 9, 200, seed=1)
    _both(k, q, keys, scale=0.07)
    _both(k, q.half(), keys.half(), scale=0.07)


def columns_places(k):
    """Queries in any order, some twice, some with nothing to see; padding on either side."""
    q, keys = _heads(2, 4, 50, 16), _heads(2, 2, 43, 16, seed=1)
    at = torch.randint(-1, 43, (2, 50), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(43).expand(2, 43) >= torch.tensor([[0], [17]])
    for given in (None, valid, valid.flip(1), torch.stack([valid[1], valid[1].flip(0)])):
        found = _both(k, q, keys, scale=0.3, at=at, valid=given)
        assert given is None or found.masked_select(~given[:, None, None]).eq(0).all()
    late = at.clamp(min=30)  # of the first tiles nobody stands
    _both(k, q, keys, scale=0.3, at=late.sort(1).values)
    step = torch.empty(2, 100, dtype=torch.int64)[:, ::2].copy_(at)
    _both(k, q, keys, scale=0.3, at=step)


def columns_long(k):
    """More queries than are looked at in one step for the first that sees a key."""
    q, keys = _heads(1, 1, 1100, 8), _heads(1, 1, 60, 8, seed=1)
    at = torch.full((1, 1100), 3).index_fill(1, torch.tensor([1050, 1099]), 59)
    expected = reference.causal_column_sums(q, keys, scale=0.3, at=at)
    close(k.columns.causal_column_sums(q, keys, scale=0.3, at=at), expected, 1e-5)
    assert expected[0, 0, 0, 4:].gt(0).all()


def columns_sets(k):
    """One to four sets in one pass are the same sums as alone."""
    q, keys = _heads(2, 4, 35, 16), _heads(2, 2, 40, 16, seed=1)
    drawn = torch.rand(3, 2, 35, generator=torch.Generator().manual_seed(3)) > 0.6
    sets = [drawn[0], None, drawn[1][:, 30:], drawn[2][:, 18:]]
    for count in (1, 2, 3, 4):
        found = k.columns.causal_column_sums(q, keys, scale=0.3, sets=sets[:count])
        _both(k, q, keys, scale=0.3, sets=sets[:count])
        for place, own in enumerate(sets[:count]):
            alone = k.columns.causal_column_sums(q, keys, scale=0.3, sets=[own])
            assert torch.equal(found[:, place], alone[:, 0])
    _both(k, q[:, :2], keys, scale=0.3, sets=sets)  # no heads share keys
    none = _both(k, q, keys, scale=0.3, sets=[drawn[0], torch.zeros(2, 0, dtype=torch.bool)])
    assert none[:, 1].eq(0).all()


def columns_masks(k):
    """What a layer was told: bool and floating, of each row of the batch and head or of all; blocks that look ahead."""
    q, keys = _heads(2, 4, 21, 16), _heads(2, 2, 30, 16, seed=1)
    at = torch.randint(6, 30, (2, 21), generator=torch.Generator().manual_seed(2))
    ahead = torch.ones(24, 30).tril(6).bool() | (torch.arange(30) // 8 == (torch.arange(24) // 8)[:, None])
    padded = ahead & (torch.arange(30) >= torch.tensor([0, 5])[:, None])[:, None]
    for seen in (ahead[None, None], padded[:, None], padded[:1, None].expand(-1, 4, -1, -1)):
        _both(k, q, keys, scale=0.3, at=at, mask=seen)
        _both(k, q, keys, scale=0.3, mask=seen, sets=[None, torch.ones(2, 3, dtype=torch.bool)])
        for dtype in DTYPES:
            added = torch.where(seen, _heads(2, 4, 24, 30, seed=5), NONE).to(dtype)
            _both(k, q, keys, scale=0.3, at=at, mask=added)


def columns_capped(k):
    q, keys = _heads(1, 2, 21, 16), _heads(1, 1, 30, 16, seed=1)
    for cap in (0.5, 50.0):
        for scale in (0.3, 60.0):
            _both(k, q, keys, 2e-5, scale=scale, cap=cap)
    _both(k, q, keys, 2e-5, scale=0.3, cap=5.0, mask=rows(21, 1, 30, seed=3).transpose(0, 1)[None])


def columns_not_finite(k):
    """A NaN reaches the keys that its row sees; what is masked, and rows outside a set, may be anything."""
    q, keys = _heads(1, 2, 40, 16), _heads(1, 1, 40, 16, seed=1)
    q[0, 0, 20] = float("nan")
    found = _both(k, q, keys, scale=0.3, sets=[None, torch.arange(40)[None] != 20])
    assert found[0, 0, 0, :21].isnan().all() and found[0, 0, 0, 21:].isfinite().all() and found[0, 1].isfinite().all()
    q, keys = _heads(1, 2, 40, 16), _heads(1, 1, 40, 16, seed=1)
    keys[0, 0, 7] = float("nan")
    valid = torch.arange(40)[None] != 7
    assert _both(k, q, keys, scale=0.3, valid=valid).isfinite().all()
    assert _both(k, q, keys, scale=0.3, mask=(valid & torch.ones(40, 40).tril().bool())[None, None]).isfinite().all()
    assert _both(k, q, keys, scale=0.3, sets=[torch.arange(40)[None] < 7]).isfinite().all()
    keys[0, 0, 7] = 0
    blind = torch.zeros(1, 1, 40, 40).index_fill(2, torch.tensor([3]), NONE)
    assert _both(k, q, keys, scale=0.3, mask=blind).isnan().all()
    assert _both(k, q, keys, scale=0.3, mask=blind == 0).isfinite().all()
    _both(k, q * 40, keys, 1e-5, scale=40.0)


def columns_batches(k):
    """Three rows are three times one, bit for bit, and strides are those of views."""
    q, keys = _heads(3, 4, 37, 16), _heads(3, 2, 50, 16, seed=1)
    at = torch.randint(0, 50, (3, 37), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(50).expand(3, 50) >= torch.tensor([[0], [9], [30]])
    chosen = at % 3 == 0
    whole = k.columns.causal_column_sums(q, keys, scale=0.3, at=at, valid=valid, sets=[None, chosen])
    for row in range(3):
        one = {"at": at[row : row + 1], "valid": valid[row : row + 1], "sets": [None, chosen[row : row + 1]]}
        alone = k.columns.causal_column_sums(q[row : row + 1], keys[row : row + 1], scale=0.3, **one)
        assert torch.equal(whole[row : row + 1], alone)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, keys)]
    _both(k, *views, scale=0.3, at=at)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, keys)]
    _both(k, *turned, scale=0.3, at=at, valid=valid[:, ::2].repeat_interleave(2, 1)[:, :50])


def columns_of_nothing(k):
    q, keys = _heads(2, 4, 6, 8), _heads(2, 2, 9, 8, seed=1)
    assert _both(k, q[:, :, :0], keys, scale=0.3).eq(0).all()
    assert k.columns.causal_column_sums(q[:0], keys[:0], scale=0.3, sets=[None, None]).shape == (0, 2, 2, 9)
    _both(k, q[..., :0], keys[..., :0], scale=0.3)
