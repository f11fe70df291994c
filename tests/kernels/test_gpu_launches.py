"""What only a GPU can tell of many launches: graphs, streams, how many there are. Skipped where there is none."""

from contextlib import nullcontext

import pytest
import torch
from count_ops import CountOps
from gpu_calls import NAMES, calls, rows

from vlmtok import kernels

pytestmark = pytest.mark.gpu


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
