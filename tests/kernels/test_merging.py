"""Definitions of merging, against naive loops in double precision, and their gradients."""

import naive
import pytest
import torch
from drawn import DTYPES, plan, rows

from vlmtok import kernels
from vlmtok.kernels import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_merge_rows(dtype, weighted):
    x, size = rows(2, 14, 5, dtype), rows(2, 14, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 14, 6, 4, repeats=weighted)
    weights = {"keep_weight": rows(2, 8, 1)[..., 0], "src_weight": rows(2, 6, 1)[..., 0]} if weighted else {}
    found, total = kernels.merge_rows(x, size, keep, src, dst, **weights)
    expected, sizes = naive.merge_rows(x, size, keep, src, dst, **weights)
    assert found.dtype == dtype and total.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(total.double(), sizes, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_rows_with_rows_around(weighted):
    x, size = rows(2, 17, 5), rows(2, 17, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 14, 6, 4, repeats=weighted)
    weights = {"keep_weight": rows(2, 8, 1)[..., 0], "src_weight": rows(2, 6, 1)[..., 0]} if weighted else {}
    inner, inner_size = kernels.merge_rows(x[:, 2:16], size[:, 2:16], keep, src, dst, **weights)
    found, total = kernels.merge_rows(x, size, keep, src, dst, **weights, prefix=2, suffix=1)
    torch.testing.assert_close(found, torch.cat([x[:, :2], inner, x[:, 16:]], 1))
    torch.testing.assert_close(total, torch.cat([size[:, :2], inner_size, size[:, 16:]], 1))


def test_merge_rows_alone_is_bit_for_bit_and_empty_entries_carry_nothing():
    x, size = rows(1, 6, 4, torch.float16), torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.0, 1.0]])
    x[0, 5] = float("nan")
    keep, src, dst = torch.tensor([[0, 1, 2]]), torch.tensor([[4, 5, 3]]), torch.tensor([[0, -1, 2]])
    found, total = kernels.merge_rows(x, size, keep, src, dst)
    assert torch.equal(found[:, :2], x[:, :2])  # nothing, or only size 0, joins them
    assert total.tolist() == [[1.0, 2.0, 7.0]] and found.isfinite().all()
    same = rows(1, 1, 4).expand(1, 6, 4).contiguous()
    found, _ = kernels.merge_rows(same, size + 0.37, keep, src, dst.abs())
    assert torch.equal(found, same[:, :3])


@pytest.mark.parametrize("weighted", [False, True])
def test_merge_rows_gradients(weighted):
    x = rows(2, 9, 3).double().requires_grad_()
    size = rows(2, 9, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 7, 3, 4, repeats=weighted)
    weights = [rows(2, k, 1)[..., 0].double().requires_grad_() for k in (4, 3)] if weighted else [None, None]

    def merge(x, kw, sw):
        return kernels.merge_rows(x, size, keep, src, dst, keep_weight=kw, src_weight=sw, prefix=1, suffix=1)[0]

    assert torch.autograd.gradcheck(merge, (x, *weights))


def pairs_by_hand(size, keep, src, dst, importance):
    """Weights of kept and joining rows, pair by pair."""
    kept, joined = torch.zeros(keep.shape).double(), torch.zeros(src.shape).double()
    for b, members in enumerate(keep.tolist()):
        for slot, token in enumerate(members):
            entries = [e for e, to in enumerate(dst[b].tolist()) if to == slot]
            total = size[b, token].double() + sum(size[b, src[b, e]].double() for e in entries)
            own = 1.0
            for e in entries:
                mine, theirs = importance[b, token].double().exp(), importance[b, src[b, e]].double().exp()
                joined[b, e] = 2 * theirs / (mine + theirs) * size[b, src[b, e]] / total
                own += 2 * mine / (mine + theirs) - 1
            kept[b, slot] = own * size[b, token] / total
    return {"keep_weight": kept.float(), "src_weight": joined.float()}


def test_merge_rows_by_importance():
    x, size = rows(2, 17, 5), rows(2, 17, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 14, 6, 4)
    importance = rows(2, 14, 1, seed=8)[..., 0]
    weights = pairs_by_hand(size[:, 2:16], keep, src, dst, importance)
    expected = kernels.merge_rows(x, size, keep, src, dst, **weights, prefix=2, suffix=1)
    found = kernels.merge_rows(x, size, keep, src, dst, importance=importance, prefix=2, suffix=1)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    equal = kernels.merge_rows(x[:, :14], torch.ones(2, 14), keep, src[:, :1], dst[:, :1], importance=0 * importance)
    mean = kernels.merge_rows(x[:, :14], torch.ones(2, 14), keep, src[:, :1], dst[:, :1])
    torch.testing.assert_close(equal[0], mean[0])  # equal importance and sizes: the mean


def test_merge_rows_by_importance_has_gradients():
    x, importance = rows(2, 9, 3).double().requires_grad_(), rows(2, 7, 1, seed=8)[..., 0].double().requires_grad_()
    size = rows(2, 9, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 7, 3, 4)

    def merge(x, importance):
        return kernels.merge_rows(x, size, keep, src, dst, importance=importance, prefix=1, suffix=1)[0]

    assert torch.autograd.gradcheck(merge, (x, importance))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_rows_biased(dtype):
    x, size = rows(2, 14, 5, dtype), rows(2, 14, 1, seed=3)[..., 0].abs() + 0.5
    keep, src, dst = plan(2, 14, 6, 4)
    found, total, bias = kernels.merge_rows_biased(x, size, keep, src, dst)
    expected, sizes = kernels.merge_rows(x, size, keep, src, dst)
    assert torch.equal(found, expected) and torch.equal(total, sizes)
    assert torch.equal(bias, kernels.key_bias(total, dtype)[:, 0, 0]) and bias.dtype == dtype


def test_merge_rows_grad_is_the_transpose():
    x = rows(2, 10, 3).requires_grad_()
    size = torch.ones(2, 10)
    keep, src, dst = plan(2, 8, 3, 7, repeats=True)
    kw, sw = rows(2, 5, 1)[..., 0], rows(2, 3, 1, seed=1)[..., 0]
    out, _ = kernels.merge_rows(x, size, keep, src, dst, keep_weight=kw, src_weight=sw, prefix=1, suffix=1)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(reference.merge_rows_grad(grad, keep, src, dst, kw, sw, 10, 1, 1), expected)
