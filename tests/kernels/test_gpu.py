"""What only a GPU can tell of an op: tensor-core products, ties, races, memory. Skipped where there is none."""

import pytest
import torch
from gpu_calls import DTYPES, NAMES, both, calls, plan, rows

from vlmtok import kernels
from vlmtok.kernels import reference, table

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, n", [(1, 1), (1, 197), (2, 577), (64, 100)])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_equal_their_definitions(name, batch, n, dtype):
    """Floats close; indices differ only where cosines are near ties."""
    if n == 1 and ("match" in name and name.split()[0] in ("bipartite", "energy", "complete", "guided")):
        n = 2
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}[dtype] if "merge" in name else 2e-5
    for found, expected in zip(*both(calls(batch, n, dtype=dtype)[name])):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if found.is_floating_point():
            if not name.startswith(("greedy", "determinant")):  # one near tie changes every later state
                torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=1e-3, equal_nan=True)
        else:
            if not found.numel():  # r = 0: a plan without pairs
                continue
            share = 0.9 if name.startswith(("greedy", "energy", "complete", "guided", "determinant")) else 0.99
            if name.startswith("duplicates"):  # one near tie changes the places of a whole list
                found, expected, share = found.sort(1).values, expected.sort(1).values, 0.5
            assert (found == expected).float().mean() >= share


def test_fp32_is_not_tf32():
    """The nearest column leads by 4e-5: TF32, which keeps 10 bits of each factor, takes another."""
    base, other = torch.nn.functional.normalize(rows(1, 2, 64, seed=8), dim=-1).split(1, 1)
    away = torch.cat([torch.linspace(0.05, 0.006, 127), torch.zeros(1)]).cuda()
    b = base + away[:, None] * (other - base)
    a = b[:, -1:].clone()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for mode in ("triton", "torch"):
            with kernels.use(mode):
                assert kernels.match_max(a, b)[1].item() == 127
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES)
def test_mutual_neighbours_tie(dtype):
    """The cosine of i and j is bit for bit that of j and i, also from tensor cores."""
    x = rows(2, 577, 64, dtype)
    with kernels.use("triton"):
        value, index = kernels.match_max(x, x, exclude_diag=True)
    mutual = index.gather(1, index) == torch.arange(577, device="cuda")
    assert mutual.sum() > 20
    assert torch.equal(value[mutual], value.gather(1, index)[mutual])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_take_the_lowest_index(dtype):
    x = rows(1, 1, 64, dtype).expand(1, 600, 64).contiguous()
    with kernels.use("triton"):
        assert kernels.match_max(x, x)[1].eq(0).all()
        order, _ = kernels.greedy_select(x, 600, torch.tensor([5], device="cuda"))
    assert order[0].tolist() == [5, *(i for i in range(600) if i != 5)]


@pytest.mark.parametrize("name", NAMES)
def test_twenty_runs_are_bit_equal(name):
    call = calls(8)[name]
    with kernels.use("triton"):
        first = call()
        first = [first] if isinstance(first, torch.Tensor) else list(first)
        for _ in range(20):
            again = call()
            for a, b in zip(first, [again] if isinstance(again, torch.Tensor) else again):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="marker gpu: needs two devices")
def test_other_devices():
    x = rows(2, 100, 64).to("cuda:1")
    with kernels.use("triton"):
        value, index = kernels.match_max(x, x, exclude_diag=True)
    assert value.device == index.device == x.device
    torch.testing.assert_close(value, reference.match_max(x, x, exclude_diag=True)[0])


def test_as_many_tokens_as_a_program_holds():
    x, start = rows(1, table.LIMIT_GREEDY, 64, torch.bfloat16), torch.zeros(1, dtype=torch.int64, device="cuda")
    found, expected = both(lambda: kernels.greedy_select(x, 32, start))
    assert (found[0] == expected[0]).float().mean() > 0.9


def test_coverage_of_as_many_tokens_as_there_may_be():
    """Sums of eighths are exact, so that ties are ties and both paths choose the same."""
    eighths = (rows(1, table.LIMIT_GREEDY, 1024) * 8).round() / 8
    late = (torch.arange(table.LIMIT_GREEDY, device="cuda") % 7).unsqueeze(0)
    for found, expected in zip(*both(lambda: kernels.greedy_cover(eighths, 24, late=late))):
        assert torch.equal(found, expected)


def test_coverage_asks_no_host_and_a_batch_is_its_pictures():
    x, weight = rows(3, 577, 64, torch.bfloat16), torch.rand(3, 577, device="cuda")
    with kernels.use("triton"):
        expected = kernels.greedy_cover_cosine(x, 57, weight=weight)
        torch.cuda.set_sync_debug_mode("error")
        try:
            alone = [kernels.greedy_cover_cosine(x[i : i + 1], 57, weight=weight[i : i + 1]) for i in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for at, both_ways in enumerate(expected):
        torch.testing.assert_close(torch.cat([one[at] for one in alone]), both_ways)


@pytest.mark.parametrize("n", [2880, table.LIMIT_GREEDY])
def test_determinants_of_long_rows(n):
    """A launch a round: products in a table, and from features where a table would be 1 GiB."""
    x, relevance = rows(1, n, 256, torch.bfloat16), rows(1, n, 1, seed=5)[..., 0].abs()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with kernels.use("triton"):
        found = kernels.greedy_determinant(x, 64, relevance=relevance)
    assert torch.cuda.max_memory_allocated() - before < 128 << 20
    with kernels.use("torch"):
        expected = kernels.greedy_determinant(x, 64, relevance=relevance)
    assert (found[0] == expected[0]).float().mean() > 0.9
    torch.testing.assert_close(found[1].sort().values, expected[1].sort().values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n", [577, 2880])
def test_copies_tie_in_determinants(n):
    """The lowest index of copies, whose products tensor cores compute in different places."""
    x = rows(1, n // 2, 256, torch.bfloat16).repeat(1, 2, 1)
    with kernels.use("triton"):
        order, _ = kernels.greedy_determinant(x, 64)
    assert order.max() < n // 2


def test_memory_is_linear():
    """The complete graph of 16,384 tokens would be 1 GiB of similarities."""
    x = rows(1, 16384, 64, torch.bfloat16)
    with kernels.use("triton"):
        kernels.match_max(x[:, :64], x[:, :64])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernels.match_max(x, x, exclude_diag=True)
        kernels.energy(x, margin=0.1)
    assert torch.cuda.max_memory_allocated() - before < 4 << 20


def test_gradients():
    x = rows(2, 577, 256).requires_grad_()
    keep, src, dst = plan(2, 577, 140)
    size = torch.rand(2, 577, device="cuda") + 0.5
    grads = []
    for mode in ("triton", "torch"):
        with kernels.use(mode):
            y, _ = kernels.merge_rows(x, size, keep, src, dst)
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
