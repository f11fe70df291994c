"""What only a GPU can tell: tensor-core products, races, graphs, streams, launches. Skipped where there is none."""

from contextlib import nullcontext

import pytest
import torch
from count_ops import CountOps

from vlmtok import kernels
from vlmtok.kernels import reference, table

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rows(batch, n, d, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, d, generator=generator).to("cuda", dtype)


def plan(batch, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(batch)]).cuda()
    return order[:, r:], order[:, :r], torch.randint(-1, n - r, (batch, r), generator=generator).cuda()


def calls(batch=2, n=577, d=64, dtype=torch.bfloat16):
    """Every op on inputs of one size."""
    x, wide = rows(batch, n, d, dtype), rows(batch, n, 1024, dtype, 1)
    size = rows(batch, n, 1, seed=2)[..., 0].abs() + 0.5
    keep, src, dst = plan(batch, n, n // 4)
    kw, sw = torch.rand(keep.shape, device="cuda"), torch.rand(src.shape, device="cuda")
    q, k = (
        rows(batch * 4, n, d, dtype, 3).reshape(batch, 4, n, d),
        rows(batch * 2, n, d, dtype, 4).reshape(batch, 2, n, d),
    )
    start = torch.arange(batch, device="cuda")
    bias = size.log()[:, None, None].to(dtype)
    return {
        "match halves": lambda: kernels.match_max(x[:, ::2], x[:, 1::2]),
        "match complete": lambda: kernels.match_max(x, x, exclude_diag=True),
        "match long": lambda: kernels.match_max(wide, wide, exclude_diag=True),
        "energy": lambda: kernels.energy(x, margin=0.1),
        "energy long": lambda: kernels.energy(wide, margin=0.1, kind="paper"),
        "bipartite": lambda: kernels.bipartite_match(x, n // 8, 1),
        "energy match": lambda: kernels.energy_match(x, n // 8, margin=0.1),
        "complete match": lambda: kernels.complete_match(x, torch.zeros_like(size), n // 8),
        "guided match": lambda: kernels.guided_match(x, x[:, 0], n // 8),
        "merge": lambda: kernels.merge_rows(wide, size, keep, src, dst),
        "merge weights": lambda: kernels.merge_rows(wide, size, keep, src, dst, keep_weight=kw, src_weight=sw),
        "merge pairs": lambda: kernels.merge_rows_biased(wide, size, keep, src, dst, importance=size),
        "greedy": lambda: kernels.greedy_select(x, n // 8, start),
        "greedy sum": lambda: kernels.greedy_select(x, n // 8, start, rule="sum"),
        "greedy l2": lambda: kernels.greedy_select(x, n // 8, start, metric="l2"),
        "transition": lambda: kernels.transition_stats(wide, wide.flip(1)),
        "received": lambda: kernels.received_attention(q, k, scale=d**-0.5, bias=bias),
    }


def both(call):
    with kernels.use("triton"):
        found = call()
    with kernels.use("torch"):
        expected = call()
    return [[out] if isinstance(out, torch.Tensor) else list(out) for out in (found, expected)]


NAMES = (
    "match halves", "match complete", "match long", "energy", "energy long", "bipartite", "energy match",
    "complete match", "guided match", "merge", "merge weights", "merge pairs", "greedy", "greedy sum", "greedy l2",
    "transition", "received",
)  # fmt: skip


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
            if not name.startswith("greedy"):  # one near tie changes every later state
                torch.testing.assert_close(found.float(), expected.float(), atol=tolerance, rtol=1e-3, equal_nan=True)
        else:
            if not found.numel():  # r = 0: a plan without pairs
                continue
            share = 0.9 if name.startswith(("greedy", "energy", "complete", "guided")) else 0.99
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


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graphs_capture(name):
    call = calls(2)[name]
    with kernels.use("triton"):
        expected = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
    torch.cuda.synchronize()
    pairs = zip(*([out] if isinstance(out, torch.Tensor) else out for out in (captured, expected)))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def test_other_streams():
    """A kernel runs on the stream that is current, behind the work that makes its input."""
    x = rows(4, 577, 64)
    with kernels.use("triton"):
        expected = kernels.energy(2 * x, margin=0.1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            found = kernels.energy(2 * x, margin=0.1)
        stream.synchronize()
    assert torch.equal(found, expected)


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


def test_compiles_to_one_graph():
    x, size = rows(64, 197, 64), torch.ones(64, 197, device="cuda")

    def layer(x, size):
        keep, src, dst = kernels.bipartite_match(x, 16, 1)
        return kernels.merge_rows(x, size, keep, src, dst)

    torch._dynamo.reset()
    kernels.ran(reset=True)
    for found, expected in zip(torch.compile(layer, fullgraph=True)(x, size), layer(x, size)):
        torch.testing.assert_close(found, expected)
    assert "merge_rows:triton" in kernels.ran()  # 64 pictures: auto takes the kernel


@pytest.fixture
def _as_users_run(monkeypatch):
    """Without the tests' NaN in every new tensor, which costs a launch each."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.usefixtures("_as_users_run")
def test_launches_are_what_the_counter_says():
    """The counter of `test_count.py` against the profiler."""
    keys, x = rows(16, 577, 64, torch.bfloat16).unsqueeze(0), rows(1, 577, 1024, torch.bfloat16)
    size = torch.ones(1, 577, device="cuda")

    def layer(keys, x, size):
        keep, src, dst = kernels.bipartite_match(keys[:, :, 1:].mean(1), 8, 1)
        return kernels.merge_rows_biased(x, size, keep, src, dst, prefix=1)

    with kernels.use("triton"):
        layer(keys, x, size)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer(keys, x, size)
            torch.cuda.synchronize()
        shapes = [t.to("meta") for t in (keys, x, size)]
        with CountOps() as count:
            layer(*shapes)
    launched = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    assert launched == count.total <= 6, (
        count,
        sorted((event.key, event.count) for event in profile.key_averages() if event.device_type.name == "CUDA"),
    )


@pytest.mark.usefixtures("_as_users_run")
@pytest.mark.parametrize("method, most", [("tome:r=3", 4), ("pitome:ratio=0.9", 5), ("crossget:rv=3", 6)])
def test_launches_of_a_layer_in_a_tower(method, most):
    """What one more layer of a compressed ViT launches beyond one of the bare ViT, as the profiler saw it."""
    import timm

    import vlmtok

    seen = []

    def launched(depth, method=None):
        model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=96, num_classes=10)
        model = model.to("cuda", torch.bfloat16).eval()
        pixels = torch.randn(1, 3, 96, 96, device="cuda", dtype=torch.bfloat16)
        with (
            torch.no_grad(),
            kernels.use("triton"),
            nullcontext() if method is None else vlmtok.compress(model, method),
        ):
            model(pixels)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                model(pixels)
                torch.cuda.synchronize()
        kernels_of = [(e.key, e.count) for e in profile.key_averages() if e.device_type.name == "CUDA"]
        seen.append(sorted(kernels_of))
        return sum(count for _, count in kernels_of)

    # Without proportional attention: its bias costs no launch of ours, but attention may take another kernel for it.
    added = [launched(depth, f"{method}:prop_attn=false") - launched(depth) for depth in (4, 5)]
    assert 0 < added[1] - added[0] <= most, seen


def test_cuda_graphs_capture_a_tower():
    """A compressed tower replays: no host decision depends on the pictures."""
    import timm

    import vlmtok

    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=96, num_classes=10).cuda().eval()
    first, second = (torch.randn(2, 3, 96, 96, device="cuda") for _ in range(2))
    with torch.no_grad(), kernels.use("triton"), vlmtok.compress(model, "pitome:ratio=0.8"):
        expected = [model(first), model(second)]
        pixels = first.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(pixels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(pixels)
        for x, wanted in zip((first, second), expected):
            pixels.copy_(x)
            graph.replay()
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
