"""The torch definitions against naive loops in double precision, and what they promise at the edges."""

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmtok import kernels
from vlmtok.kernels import reference

NONE = float("-inf")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows(batch, n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, d, generator=generator).to(dtype)


def agree(found, expected, value, atol=2e-6):
    """Indices agree where they are not a near tie of the values."""
    picked_value, picked = found
    finite = value.isfinite()
    assert torch.equal(picked_value.isfinite(), finite)
    torch.testing.assert_close(picked_value[finite].double(), value[finite], atol=atol, rtol=1e-5)
    assert (picked == expected).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, d", [(1, 1, 4), (5, 3, 7), (17, 18, 16)])
def test_match_max(m, n, d, dtype):
    a, b = rows(2, m, d, dtype), rows(2, n, d, dtype, 1)
    valid = torch.rand(2, n, generator=torch.Generator().manual_seed(2)) > 0.4
    ranks = {"rank_a": torch.arange(m).expand(2, m), "rank_b": torch.arange(n).flip(0).expand(2, n)}
    for masks in ({}, {"exclude_diag": True}, {"valid_b": valid}, ranks):
        value, index = naive.match_max(a, b, **masks)
        agree(kernels.match_max(a, b, **masks), index, value)


@given(
    st.one_of(st.integers(1, 15), st.integers(16, 60)),
    st.one_of(st.integers(2, 15), st.integers(16, 60)),
    st.integers(1, 100),
    st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_equal_tokens_tie_whatever_the_size(m, n, d, seed):
    """MKL multiplies small matrices and edges another way: equal rows of one product differ there by an ulp."""
    y = rows(1, n, d, seed=seed)
    first, last = sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    y[:, last] = y[:, first]
    x = y[:, [first]] + 0.1 * rows(1, m, d, seed=seed + 1)
    assert not (kernels.match_max(x, y)[1] == last).any()
    value, _ = kernels.match_max(y, torch.cat([x, x], 1))
    assert value[0, first] == value[0, last]
    for kind in ("elu", "paper", "gaussian"):
        energy = kernels.energy(y, margin=0.5, kind=kind)
        assert energy[0, first] == energy[0, last]
    for rule in ("max", "sum"):
        order = kernels.greedy_select(y, n, torch.zeros(1, dtype=torch.int64), rule=rule)[0][0].tolist()
        assert first == 0 or order.index(first) < order.index(last)


def test_match_max_ties_take_the_lowest_column():
    x = rows(1, 1, 8).expand(1, 40, 8)
    assert kernels.match_max(x, x)[1].eq(0).all()
    assert kernels.match_max(x, x, exclude_diag=True)[1][0].tolist() == [1] + [0] * 39


def test_match_max_without_the_diagonal_of_two_sets():
    """Rows of one set against as many of another: (i, j) is not (j, i)."""
    a, b = rows(2, 9, 8, seed=1), rows(2, 9, 8, seed=2)
    expected = torch.nn.functional.cosine_similarity(a.double().unsqueeze(2), b.double().unsqueeze(1), dim=-1)
    expected.diagonal(dim1=1, dim2=2).fill_(NONE)
    value, index = kernels.match_max(a, b, exclude_diag=True)
    torch.testing.assert_close(value.double(), expected.max(-1).values, atol=1e-6, rtol=0)
    assert torch.equal(index, expected.argmax(-1))


def test_match_max_nan_loses_and_nothing_is_minus_infinity():
    a, b = rows(1, 4, 8), rows(1, 5, 8, seed=1)
    b[0, 0], b[0, 3, 2] = float("nan"), float("inf")
    value, index = kernels.match_max(a, b)
    expected, columns = kernels.match_max(a, b[:, [1, 2, 4]])
    assert torch.equal(value, expected) and torch.equal(index, torch.tensor([1, 2, 4])[columns])
    a[0, 1] = float("nan")
    for masks in ({"valid_b": torch.zeros(1, 5, dtype=torch.bool)}, {}):
        value, index = kernels.match_max(a, b, **masks)
        assert value[0, 1] == NONE and index[0, 1] == 0
    assert kernels.match_max(a, b, valid_b=torch.zeros(1, 5, dtype=torch.bool))[0].eq(NONE).all()


def test_zero_rows_are_similar_to_nothing():
    a, b = torch.zeros(1, 3, 8), rows(1, 5, 8)
    value, index = kernels.match_max(a, b)
    assert value.eq(0).all() and index.eq(0).all()


def test_unit_rows_that_overflow_are_nan():
    x = torch.tensor([[3e30, 4e30], [3.0, 4.0], [0.0, 0.0], [float("inf"), 1.0]])
    unit = kernels.unit_rows(x)
    assert unit[0].isnan().all() and unit[3].isnan().all()
    torch.testing.assert_close(unit[1:3], torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("kind", ["elu", "paper", "gaussian"])
@pytest.mark.parametrize("margin", [0.5, 0.0, -0.3])
def test_energy(kind, margin):
    x = rows(2, 9, 6)
    x[0, 1], x[0, 2], x[1, 3, 0] = 0, float("nan"), float("inf")
    found = kernels.energy(x, margin=margin, alpha=0.7, kind=kind)
    torch.testing.assert_close(found.double(), naive.energy(x, margin, 0.7, kind), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rule, metric", [("max", "cosine"), ("sum", "cosine"), ("max", "l2")])
def test_greedy_select(rule, metric):
    x = rows(2, 12, 6)
    x[1, 4], x[0, 7] = float("nan"), 0
    start = torch.tensor([3, 11])
    valid = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    for mask in (None, valid):
        for k in (0, 1, 5, 12):
            order, value = kernels.greedy_select(x, k, start, rule=rule, metric=metric, valid=mask)
            assert torch.equal(order, naive.greedy_select(x, k, start, rule, metric, mask).reshape(2, k))
            assert value.shape == (2, k) and value[:, :1].isnan().all()


def test_greedy_select_ties_and_fallbacks():
    order, _ = kernels.greedy_select(torch.ones(1, 8, 4), 8, torch.tensor([5]))
    assert order[0].tolist() == [5, 0, 1, 2, 3, 4, 6, 7]
    x = rows(1, 6, 4)
    x[0, 1] = float("nan")
    valid = torch.tensor([[True, True, False, True, False, True]])
    order, value = kernels.greedy_select(x, 6, torch.tensor([0]), valid=valid)
    assert sorted(order[0, 1:3].tolist()) == [3, 5] and order[0, 3:].tolist() == [1, 2, 4]
    assert value[0, 3:].isnan().all() and value[0, 1:3].isfinite().all()


def plan(batch, n, r, seed, repeats=False):
    """A merge that is partly empty; with `repeats` tokens may occur several times."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)])
    src, keep = order[:, :r], order[:, r:]
    if repeats:
        src = torch.randint(0, n, (batch, r), generator=generator)
    return keep, src, torch.randint(-1, n - r, (batch, r), generator=generator)


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


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 13), prefix=st.integers(0, 2), share=st.floats(0, 0.5), seed=st.integers(0, 9))
def test_plans_are_partitions(n, prefix, share, seed):
    x, r = rows(2, n, 6, seed=seed), int(share * n)
    importance = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    for keep, src, dst in (
        kernels.bipartite_match(x, r, prefix),
        kernels.energy_match(x, r, margin=0.2),
        kernels.energy_match(x, r, margin=0.2, split="halves", kind="gaussian"),
        kernels.energy_match(x, r, margin=0.2, protect=False),
        kernels.complete_match(x, importance, r),
    ):
        assert torch.cat([keep, src], 1).sort(1).values.eq(torch.arange(n)).all()
        assert dst.shape == (2, r) and dst.ge(0).all() and dst.lt(n - r).all()


def test_bipartite_match_by_hand():
    """Similar pairs (0, 3), (2, 1); places 0, 2 and 4 are even, the most similar even place goes first."""
    x = torch.tensor([[[1.0, 0, 0], [0, 1, 0.1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]])
    keep, src, dst = kernels.bipartite_match(x, 2)
    assert (keep.tolist(), src.tolist(), dst.tolist()) == ([[4, 1, 3]], [[0, 2]], [[2, 1]])
    keep, src, dst = kernels.bipartite_match(x, 1, num_prefix=1)  # now 1 and 3 are even
    assert (keep.tolist(), src.tolist(), dst.tolist()) == ([[1, 0, 2, 4]], [[3]], [[1]])


def test_energy_match_by_hand():
    x = torch.tensor([[[1.0, 0, 0], [1, 0.1, 0], [1, 0.2, 0], [1, 0.4, 0], [0, 0, 1], [0, 1, 0]]])
    order = kernels.energy(x, margin=0.5)[0].argsort(descending=True, stable=True).tolist()
    keep, src, dst = kernels.energy_match(x, 2, margin=0.5)
    assert keep[0].tolist() == [*order[4:], order[1], order[3]] and src[0].tolist() == [order[0], order[2]]
    _, partner = kernels.match_max(x[:, [order[0], order[2]]], x[:, [order[1], order[3]]])
    assert torch.equal(dst, partner + 2)


def test_guided_match_is_complete_match_by_the_cosine_with_a_query():
    x, query = rows(2, 11, 6), rows(2, 1, 6, seed=5)[:, 0]
    keep, src, dst, importance = kernels.guided_match(x, query, 4)
    expected = torch.nn.functional.cosine_similarity(x, query.unsqueeze(1), dim=-1)
    torch.testing.assert_close(importance, expected)
    for a, b in zip((keep, src, dst), kernels.complete_match(x, expected, 4)):
        assert torch.equal(a, b)
    assert not kernels.guided_match(x, query.requires_grad_(), 4)[3].requires_grad


def test_complete_match_protects():
    x = rows(2, 9, 6)
    protected = torch.zeros(2, 9, dtype=torch.bool)
    protected[:, [0, 8]] = True
    importance = torch.zeros(2, 9)
    keep, src, dst = kernels.complete_match(x, importance, 3, protected)
    assert not protected.gather(1, src).any()
    assert not protected.gather(1, keep.gather(1, dst)).any()
    assert torch.equal(keep, keep.sort(1).values)
    shielded = importance.scatter(1, src[:, :1], 100.0)  # what is important merges last
    assert not (kernels.complete_match(x, shielded, 3, protected)[1] == src[:, :1]).any()


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


def test_take_rows_is_gather():
    x, index = rows(3, 7, 4), torch.randint(0, 7, (3, 5))
    expected = x.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    assert torch.equal(kernels.take_rows(x, index), expected)
    assert torch.equal(kernels.take_rows(x[:1, 1:], index[:1].clamp(max=5)), x[:1, 1:][:, index[0].clamp(max=5)])


@pytest.mark.parametrize("lower", ["legacy", "backend", "autocast"])
def test_selection_is_exact_whatever_the_precision(lower):
    """TF32, bf16 matmuls and autocast are the model's business, and are put back."""
    x = rows(1, 64, 64)
    value, index = kernels.match_max(x, x, exclude_diag=True)
    matmul = torch.backends.mkldnn.matmul
    try:
        if lower == "legacy":
            torch.set_float32_matmul_precision("medium")
        elif lower == "backend":
            matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower == "autocast"), kernels.exact(x.device):
            assert not torch.is_autocast_enabled("cpu")
            assert matmul.fp32_precision in ("ieee", "none")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower == "autocast"):
            found, picked = kernels.match_max(x, x, exclude_diag=True)
        assert matmul.fp32_precision == {"legacy": "bf16", "backend": "bf16"}.get(lower, matmul.fp32_precision)
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, value) and torch.equal(picked, index)


# ---------------------------------------------------------------------- memory
class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("batch, n", [(1, 4096), (64, 512)])
def test_memory_does_not_grow_with_the_square(batch, n):
    """All similarities together would take 64 MiB; the definitions hold one step of them."""
    x = torch.randn(batch, n, 4)
    q = x.reshape(batch, 1, n, 4)
    calls = {
        "match": lambda: reference.match_max(x, x, exclude_diag=True),
        "energy": lambda: reference.energy(x, margin=0.3),
        "paper energy": lambda: reference.energy(x, margin=0.3, kind="paper"),
        "energy match": lambda: reference.energy_match(x, n // 4, margin=0.3),
        "complete match": lambda: reference.complete_match(x, x[..., 0], n // 4),
        "received attention": lambda: reference.received_attention(q, q, scale=0.5),
    }
    for name, call in calls.items():
        with Largest() as largest:
            call()
        most = batch * 256 * n * 4 if name == "received attention" else reference.STEP_BYTES["cpu"]
        assert largest.bytes <= most, f"{name}: {largest.bytes:,} bytes"


@pytest.mark.parametrize("room", [4, 500, 3000, 1 << 20])
def test_steps_change_nothing(room, monkeypatch):
    """Rows and pictures of any number, masks and the diagonal among them."""
    a, b = rows(3, 13, 8, seed=1), rows(3, 17, 8, seed=2)
    rank_a, rank_b = torch.randperm(39).view(3, 13) % 5, torch.randperm(51).view(3, 17) % 5
    valid = torch.rand(3, 17) > 0.3
    q = torch.randn(2, 2, 9, 4)

    def everything():
        return [
            *reference.match_max(a, b),
            *reference.match_max(b, b, exclude_diag=True, valid_b=valid),
            *reference.match_max(a, b, rank_a=rank_a, rank_b=rank_b, valid_b=valid),
            *(reference.energy(b, margin=0.3, kind=kind) for kind in ("elu", "paper", "gaussian")),
            reference.received_attention(q, q, scale=0.5, bias=torch.arange(162.0).view(2, 1, 9, 9) / 40),
        ]

    monkeypatch.setattr(reference, "STEP_BYTES", {"cpu": 1 << 40})
    expected = everything()
    monkeypatch.setattr(reference, "STEP_BYTES", {"cpu": room})
    monkeypatch.setattr(reference, "STEP_BYTES_ELSEWHERE", room)
    for found, wanted in zip(everything(), expected):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------------- merging at the edges
def test_empty_entries_go_nowhere():
    """They may name no token, and what stands where they would read leaves no trace, gradients included."""
    x = rows(2, 5, 4)
    x[:, 0] = float("inf")
    keep, src, dst = torch.tensor([[0, 1]] * 2), torch.tensor([[-1, 3, -1]] * 2), torch.tensor([[-1, 1, -1]] * 2)
    size, half = torch.ones(2, 5), {"keep_weight": torch.ones(2, 2), "src_weight": torch.full((2, 3), 0.5)}
    for weights in ({}, half, {"importance": rows(2, 5, 1)[..., 0]}):
        leaf = x.clone().requires_grad_()
        merged, total = kernels.merge_rows(leaf, size, keep, src, dst, **weights)
        alone, other = kernels.merge_rows(x, size, keep, src[:, 1:2], dst[:, 1:2], **{
            name: value[:, 1:2] if name == "src_weight" else value for name, value in weights.items()
        })  # fmt: skip
        assert torch.equal(merged, alone) and torch.equal(total, other) and merged[:, 0].isinf().all()
        merged[:, 1].sum().backward()
        assert leaf.grad[:, [2, 4]].eq(0).all() and leaf.grad[:, [1, 3]].isfinite().all()
    none = keep[:, :0]
    merged, total = kernels.merge_rows(x, size, none, src[:, :1], dst[:, :1], prefix=1)
    assert torch.equal(merged, x[:, :1]) and total.tolist() == [[1.0], [1.0]]


def test_pairs_without_size_have_weights():
    found = kernels.pair_weights(*torch.tensor([[[0]], [[1]], [[0]]]), torch.zeros(1, 2), torch.zeros(1, 2))
    assert all(weight.isfinite().all() for weight in found)


def test_sizes_have_no_gradient():
    size = torch.ones(1, 4, requires_grad=True)
    keep, src = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    merged, total = kernels.merge_rows(rows(1, 4, 3).requires_grad_(), size, keep, src, keep)
    assert merged.requires_grad and not total.requires_grad
    merged.sum().backward()
    assert size.grad is None


def test_sums_in_order_are_the_same_sums(monkeypatch):
    """The form for devices whose `index_add_` has no order, on one that has."""
    x, size = rows(2, 12, 5), torch.rand(2, 12) + 0.5
    keep, src = torch.arange(4).expand(2, 4), torch.arange(4, 12).expand(2, 8)
    dst = torch.tensor([[0, 0, 1, -1, 1, 1, 3, 0], [2] * 8])
    ways = (
        {},
        {"keep_weight": rows(2, 4, 1)[..., 0], "src_weight": rows(2, 8, 1)[..., 0]},
        {"importance": rows(2, 12, 1)[..., 0]},
    )
    expected = [kernels.merge_rows(x, size, keep, src, dst, **way) for way in ways]
    monkeypatch.setattr(reference, "UNORDERED", ("cpu",))
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(kernels.merge_rows, fullgraph=True, backend=backend)
    for way, (merged, total) in zip(ways, expected):
        for merge in (kernels.merge_rows, compiled):
            found = merge(x, size, keep, src, dst, **way)
            torch.testing.assert_close(found[0], merged)
            assert torch.equal(found[1], total)
    assert sum("vlmtok.merge_rows" in name for name in seen) == len(ways)  # compiled sums would have no order again
    leaf = x.clone().requires_grad_()
    compiled(leaf, size, keep, src, dst)[0].square().sum().backward()
    plain = x.clone().requires_grad_()
    kernels.merge_rows(plain, size, keep, src, dst)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad)
