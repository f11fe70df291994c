"""The opaque ops: schemas, shapes, one graph under torch.compile, FLOPs, gradients."""

import subprocess
import sys

import pytest
import torch
from support import referee

from vlmtok import kernels
from vlmtok.kernels import flop_formulas, library, reference, shapes
from vlmtok.kernels.ops.merging import MergeRows

OPS = torch.ops.vlmtok


def examples():
    """Arguments of every op."""
    x, y = torch.randn(2, 9, 8), torch.randn(2, 7, 8)
    keep, src = torch.arange(6).expand(2, 6), torch.arange(6, 9).expand(2, 3)
    dst = torch.tensor([[0, -1, 2], [1, 1, 5]])
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    kw, sw = torch.randn(2, 6), torch.randn(2, 3)
    mask = torch.rand(2, 7) > 0.3
    at, seen = torch.arange(9).flip(0).expand(2, 9), torch.rand(2, 1, 9, 9) > 0.3
    return [
        ("match_max", (x, y), {}),
        ("match_max", (x, x), {"exclude_diag": True}),
        ("match_max", (x, y), {"valid_b": mask, "rank_a": torch.arange(9).expand(2, 9), "rank_b": mask.long()}),
        ("energy", (x,), {"margin": 0.4, "kind": "paper"}),
        ("bipartite_match", (x, 3, 1), {}),
        ("bipartite_match", (x, 4), {}),
        ("energy_match", (x, 3), {"margin": 0.4}),
        ("energy_match", (x, 3), {"margin": 0.4, "protect": False}),
        ("complete_match", (x, torch.rand(2, 9), 3), {}),
        ("complete_match", (x, torch.rand(2, 9), 3, torch.arange(9).expand(2, 9) == 0), {}),
        ("complete_match", (x, None, 3), {}),
        ("guided_match", (x, y[:, 0], 3), {}),
        ("merge_rows", (x, torch.ones(2, 9), keep, src, dst), {}),
        ("merge_rows", (x, torch.ones(2, 9), keep, src, dst), {"importance": torch.randn(2, 9)}),
        ("merge_rows_biased", (x, torch.ones(2, 9), keep, src, dst), {"keep_weight": kw, "src_weight": sw}),
        ("merge_rows_biased", (x, torch.ones(2, 9), keep[:, :4], src - 2, dst.clamp(max=3)), {"prefix": 2}),
        ("merge_rows", (x, torch.ones(2, 9), keep[:, :4], src - 2, dst.clamp(max=3)), {"prefix": 1, "suffix": 1}),
        ("merge_rows", (x, torch.ones(2, 9), keep, src, dst), {"keep_weight": kw, "src_weight": sw}),
        ("merge_rows_grad", (x[:, :6], keep, src, dst, kw, sw, 9), {}),
        ("greedy_select", (x, 4, torch.tensor([0, 3])), {}),
        ("greedy_select", (x, 4, torch.tensor([0, 3])), {"metric": "l2", "valid": torch.rand(2, 9) > 0.4}),
        ("greedy_cover", (x, 4), {}),
        ("greedy_cover", (x, 4), {"weight": torch.rand(2, 9), "late": torch.arange(9).expand(2, 9) // 4}),
        ("greedy_cover_cosine", (x, 4), {"weight": torch.rand(2, 9)}),
        ("greedy_cover_cosine", (x, 4), {"valid": torch.arange(9).expand(2, 9) > 2}),
        ("greedy_determinant", (x, 4), {}),
        ("greedy_determinant", (x, 9), {"relevance": torch.rand(2, 9), "valid": torch.rand(2, 9) > 0.4}),
        ("drop_duplicates", (x, torch.arange(9).expand(2, 9), 2), {"step": 3}),
        ("drop_duplicates", (x, torch.arange(8).expand(2, 8), 3), {"valid": torch.rand(2, 9) > 0.4}),
        ("transition_stats", (x, x + 1), {}),
        ("attention_rows", (q[:, :, :2], k), {"scale": 0.3}),
        ("received_attention", (q, k), {"scale": 0.3, "bias": torch.randn(2, 1, 1, 9)}),
        ("causal_column_sums", (q[:, :, :7], k), {"scale": 0.3, "sets": [None]}),
        ("causal_column_sums", (q, k), {"scale": 0.3, "valid": x[..., 0] > 0, "sets": [x[..., 1] > 0, None]}),
        ("causal_column_sums", (q, k), {"scale": 0.3, "at": at, "mask": seen, "cap": 5.0, "sets": [None, mask]}),
    ]  # fmt: skip


IDS = [f"{i}-{name}" for i, (name, _, _) in enumerate(examples())]
CASES = pytest.mark.parametrize("case", range(len(IDS)), ids=IDS)


def test_every_op_has_an_example():
    names = {name for name, _, _ in examples()}
    assert names == set(library.SCHEMAS) == set(shapes.SHAPES) == set(flop_formulas.FLOPS)


@CASES
def test_opcheck(case):
    name, args, kwargs = examples()[case]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # A state or gain of NaN is one that this check finds unequal to itself.
    if name not in ("greedy_select", "greedy_determinant"):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, args, kwargs, test_utils=checks)


@CASES
def test_shapes_without_data(case):
    """Meta tensors give the shapes and dtypes that real ones give."""
    name, args, kwargs = examples()[case]
    real = getattr(OPS, name)(*args, **kwargs)

    def to(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    meta = getattr(OPS, name)(*map(to, args), **{key: to(value) for key, value in kwargs.items()})
    for a, b in zip(*((out,) if isinstance(out, torch.Tensor) else out for out in (real, meta))):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and b.is_meta


@CASES
def test_flops_are_those_of_the_definition(case):
    name, args, kwargs = examples()[case]
    with referee.counter() as plain:
        getattr(reference, name)(*args, **kwargs)
    kernels.register_flop_formulas()
    with referee.counter() as opaque:
        getattr(OPS, name)(*args, **kwargs)
    assert opaque.get_total_flops() == plain.get_total_flops()


def test_flops_are_counted_whoever_comes_first():
    """The formulas are registered late, because the counter imports triton; a counter at work learns them too."""
    code = (
        "import torch, vlmtok.kernels as kernels\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with kernels.use('triton'), FlopCounterMode(display=False) as count:\n"
        "    kernels.match_max(torch.empty(1, 5, 8, device='meta'), torch.empty(1, 6, 8, device='meta'))\n"
        "assert count.get_total_flops() == 2 * 5 * 6 * 8, count.get_total_flops()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def layer(k, x, size):
    """A merge layer, a greedy choice and the statistics, in one function."""
    metric = k.mean(1)
    keep, src, dst = kernels.bipartite_match(metric, 2, 1)
    y, total = kernels.merge_rows(x, size, keep, src, dst)
    keep, src, dst = kernels.energy_match(metric[:, :5], 2, margin=0.4)
    order, _ = kernels.greedy_select(x, 3, keep[:, 0], rule="sum")
    picks, gain = kernels.greedy_determinant(x, 3, relevance=x[..., 0].abs(), split=2)
    left = kernels.drop_duplicates(x, 3)
    value, index = kernels.match_max(x, x, exclude_diag=True)
    ratio, cosine = kernels.transition_stats(x, x + 1)
    received = kernels.received_attention(k, k, scale=0.3)
    sums = kernels.causal_column_sums(k, k[:, :2], scale=0.3, sets=[None, x[:, 1:, 0] > 0])
    with kernels.exact(x.device):
        product = kernels.unit_rows(x) @ x.transpose(1, 2)
    bias = kernels.key_bias(total, torch.float16)
    return y, total, src, dst, order, picks, gain, left, value, index, ratio, cosine, received, sums, product, bias


@pytest.mark.parametrize("autocast", [False, True])
def test_one_graph(autocast):
    k, x, size = torch.randn(2, 4, 9, 8), torch.randn(2, 9, 8, requires_grad=True), torch.ones(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for found, expected in zip(compiled(k, x, size), layer(k, x, size)):
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_products_stay_opaque_under_compile_and_open_in_export():
    """Their precision is set when they run; an exported program needs no op of ours."""
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(1, 6, 8)
    torch._dynamo.reset()
    torch.compile(lambda x: kernels.match_max(x, x), fullgraph=True, backend=backend)(x)
    assert any("vlmtok" in name for name in seen)

    class Module(torch.nn.Module):
        def forward(self, x):
            return kernels.match_max(x, x)

    program = torch.export.export(Module(), (x,), strict=False)
    assert not any("vlmtok" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x)[1], kernels.match_max(x, x)[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_the_opaque_merge(weighted):
    """`MergeRows` with the op's torch implementation, against numbers and against plain autograd."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 9) + 0.5
    keep, src = torch.tensor([[0, 2, 4, 6], [1, 3, 4, 5]]), torch.tensor([[1, 3, 5], [0, 2, 6]])
    dst = torch.tensor([[0, 0, -1], [3, 2, 0]])
    kw, sw = None, None
    if weighted:
        src = torch.tensor([[0, 3, 3], [0, 2, 2]])
        kw = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        sw = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def merge(x, kw, sw):
        return MergeRows.apply("merge_rows", x, size, keep, src, dst, kw, sw, 1, 1, "torch")[0]

    # Sizes are fp32, so shares carry its rounding into the numerical gradient.
    assert torch.autograd.gradcheck(merge, (x, kw, sw), atol=1e-5)
    plain, _ = kernels.merge_rows(x, size, keep, src, dst, keep_weight=kw, src_weight=sw, prefix=1, suffix=1)
    grad = torch.randn_like(plain)
    inputs = [t for t in (x, kw, sw) if t is not None]
    expected = torch.autograd.grad(plain, inputs, grad)
    for a, b in zip(torch.autograd.grad(merge(x, kw, sw), inputs, grad), expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_opaque_merge_trains_inside_one_graph():
    x = torch.randn(1, 6, 4, requires_grad=True)
    index = torch.arange(3).unsqueeze(0)

    def merge(x):
        dst = index.clone()
        return MergeRows.apply("merge_rows", x, torch.ones(1, 6), index, index + 3, dst, None, None, 0, 0, "torch")[0]

    torch._dynamo.reset()
    torch.compile(merge, fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((1, 6, 4), 0.5))


def test_selections_carry_no_gradient():
    x = torch.randn(1, 6, 8, requires_grad=True)
    with kernels.use("triton"):
        meta = x.detach().to("meta").requires_grad_()
        outputs = [*kernels.match_max(meta, meta), kernels.energy(meta, margin=0.3)]
    outputs += [*kernels.match_max(x, x), kernels.energy(x, margin=0.3), *kernels.transition_stats(x, x)]
    outputs += [*kernels.greedy_cover(x, 3, weight=x[..., 0]), *kernels.greedy_cover_cosine(x, 3)]
    outputs += [*kernels.greedy_select(x, 3, torch.tensor([0])), *kernels.greedy_determinant(x, 3, relevance=x[..., 0])]
    assert not any(out.requires_grad for out in outputs)
