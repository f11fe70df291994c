"""Definitions of attention, its bias and transition statistics, against naive loops in double precision."""

import naive
import pytest
import torch
from drawn import DTYPES, NONE, rows

from vlmtok import kernels


def test_transition_stats():
    x, y = rows(2, 5, 7), rows(2, 5, 7, seed=1)
    x[0, 0], y[0, 1] = 0, 0
    ratio, cosine = kernels.transition_stats(x, y)
    a, b = x.double().norm(dim=-1), y.double().norm(dim=-1)
    torch.testing.assert_close(ratio.double(), torch.where(a > 0, b / a, 0.0))
    expected = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    torch.testing.assert_close(cosine.double(), expected, atol=1e-6, rtol=1e-5)
    assert ratio[0, 0] == 0 and cosine[0, :2].eq(0).all()


@pytest.mark.parametrize("bias", ["none", "key", "causal"])
def test_attention(bias):
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    masks = {
        "none": None,
        "key": torch.randn(2, 1, 1, 6),
        "causal": torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), NONE),
    }
    expected = naive.attention(q, k, 0.3, masks[bias])
    found = kernels.attention_rows(q, k, scale=0.3, bias=masks[bias])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    for chunk in (1, 4, 256):
        received = kernels.received_attention(q, k, scale=0.3, bias=masks[bias], chunk=chunk)
        torch.testing.assert_close(received.double(), expected.mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_key_bias_rounds_once():
    size = torch.tensor([[1.0, 2.0, 3.0]])
    for dtype in DTYPES:
        bias = kernels.key_bias(size, dtype)
        assert bias.shape == (1, 1, 1, 3) and bias.dtype == dtype
        assert torch.equal(bias[0, 0, 0], size[0].log().to(dtype))
    q = torch.randn(1, 2, 4, 8)
    k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kernels.key_bias(size, q.dtype))
    times = size[0].long()
    k, v = (x.repeat_interleave(times, 2) for x in (k, v))
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v))
