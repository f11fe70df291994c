"""Transition statistics and received attention."""

from __future__ import annotations

import torch
from drawing import DTYPES, NONE, close, rows, same

from vlmtok.kernels import reference, table


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
