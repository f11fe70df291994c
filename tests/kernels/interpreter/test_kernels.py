"""The kernels in Triton's interpreter, and the public functions on the Triton path."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import checks
import drawing
import numpy as np
import pytest
import torch

from vlmtok import kernels
from vlmtok.errors import ParameterError
from vlmtok.kernels import dispatch, reference

pytestmark = pytest.mark.filterwarnings("error::UserWarning:triton", "ignore::RuntimeWarning")
NAMES = sorted(path.stem.removeprefix("triton_") for path in Path(kernels.__file__).parent.glob("triton_*.py"))


def modules():
    """The modules with kernels, by short name."""
    return SimpleNamespace(**{name: importlib.import_module(f"vlmtok.kernels.triton_{name}") for name in NAMES})


@pytest.mark.parametrize("name", checks.CHECKS)
def test_kernel(name):
    checks.CHECKS[name](modules())


def test_heads_far_apart():
    """A head's offset beyond 32 bits; the room is asked for and not touched."""
    step = 2**28
    room = torch.empty(8 * step + 64, dtype=torch.float16)
    bias = room.as_strided((1, 9, 4, 4), (0, step, 4, 1))
    q, drawn = drawing.rows(9, 4, 8).unsqueeze(0), drawing.rows(9, 4, 4, torch.float16, 1).unsqueeze(0)
    bias.copy_(drawn)
    found = modules().received.received_attention(q, q, scale=0.3, bias=bias)
    drawing.close(found, reference.received_attention(q, q, scale=0.3, bias=drawn))


def test_this_process_interprets():
    assert dispatch.INTERPRETS


@pytest.mark.parametrize(("m", "k"), [(16, 16), (16, 32), (16, 64), (64, 64), (128, 64)])
def test_a_dot_is_the_same_at_every_place_of_a_tile(m, k):
    """What hardware gives and checks of ties and symmetry stand on; the interpreter's own product does not."""
    from triton.language import core
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(a, b):
        """Rows of a with rows of b, which are read along either axis."""
        tiles = (TensorHandle(x, core.float32) for x in (a, b.T, np.ascontiguousarray(b.T), np.zeros((m, m), a.dtype)))
        a, turned, copied, zeros = tiles
        found = [InterpreterBuilder().create_dot(a, b, zeros, None, 0).data for b in (turned, copied)]
        assert np.allclose(found[0], found[1], atol=1e-5)
        return found[0]

    x = drawing.rows(1, m, k)[0].numpy()
    assert np.allclose(dot(x, x), x.astype(np.float64) @ x.T.astype(np.float64), atol=1e-4)
    assert (dot(x, x) == dot(x, x).T).all()
    equal = dot(np.repeat(x[:1], m, 0), np.repeat(x[1:2], m, 0))
    assert (equal == equal[0, 0]).all()


def test_public_functions_take_the_kernels():
    """Every op, through dispatch and the opaque op, equals its definition."""
    x = drawing.rows(2, 12, 8)
    keep, src, dst = drawing.plan(2, 12, 4)
    q = drawing.rows(4, 12, 8).reshape(2, 2, 12, 8)
    start = torch.tensor([0, 3])
    calls = {
        "match_max": lambda m: m.match_max(x, x),
        "energy": lambda m: m.energy(x, margin=0.3),
        "bipartite_match": lambda m: m.bipartite_match(x, 3, 1),
        "energy_match": lambda m: m.energy_match(x, 3, margin=0.3),
        "complete_match": lambda m: m.complete_match(x, torch.zeros(2, 12), 3),
        "guided_match": lambda m: m.guided_match(x, x[:, 3], 3),
        "merge_rows": lambda m: m.merge_rows_biased(x, torch.ones(2, 12), keep, src, dst, importance=x[..., 0]),
        "greedy_select": lambda m: m.greedy_select(x, 4, start),
        "greedy_cover": lambda m: m.greedy_cover(x, 4),
        "greedy_cover_cosine": lambda m: m.greedy_cover_cosine(x, 4),
        "greedy_determinant": lambda m: m.greedy_determinant(x, 4, relevance=x[..., 0].abs()),
        "drop_duplicates": lambda m: m.drop_duplicates(x, order=torch.arange(12).expand(2, 12), k=5, step=3),
        "transition_stats": lambda m: m.transition_stats(x, x + 1),
        "received_attention": lambda m: m.received_attention(q, q, scale=0.3),
        "causal_column_sums": lambda m: m.causal_column_sums(q, q[:, :1], scale=0.3, sets=[None, x[..., 0] > 0]),
    }
    from vlmtok.kernels import triton_common

    for op, call in calls.items():
        kernels.ran(reset=True)
        before = triton_common.launches
        with kernels.use("triton"):
            found = call(kernels)
        assert kernels.ran() == {f"{op}:triton": 1} and triton_common.launches > before
        expected = call(reference)
        if isinstance(found, torch.Tensor):
            found, expected = [found], [expected]
        drawing.same(found, expected, 1e-5)


@pytest.mark.parametrize("weighted", [None, "importance", "weights"])
def test_gradients_through_the_kernels(weighted):
    x = drawing.rows(2, 12, 20).requires_grad_()
    keep, src, dst = drawing.plan(2, 10, 4, repeats=weighted == "weights")
    weights = {}
    if weighted == "importance":
        weights = {"importance": drawing.rows(2, 10, 1, seed=4)[..., 0]}
    if weighted == "weights":
        weights = {"keep_weight": drawing.rows(2, 6, 1)[..., 0], "src_weight": drawing.rows(2, 4, 1, seed=1)[..., 0]}
    inputs = [x, *(w.requires_grad_() for w in weights.values())]
    size = drawing.rows(2, 12, 1, seed=2)[..., 0].abs() + 0.5
    grads = []
    for mode in ("triton", "torch"):
        with kernels.use(mode):
            y, total, bias = kernels.merge_rows_biased(x, size, keep, src, dst, prefix=1, suffix=1, **weights)
            assert not total.requires_grad and not bias.requires_grad
            grads.append(torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(-1)))
    for a, b in zip(*grads):
        drawing.close(a, b, 1e-5)


def test_auto_stays_on_torch_for_cpu_tensors():
    kernels.ran(reset=True)
    with kernels.use("auto"):
        kernels.energy(drawing.rows(64, 4, 8), margin=0.3)
    assert kernels.ran() == {"energy:torch": 1}


def test_bad_input_is_an_error_here_too():
    x = drawing.rows(1, 6, 8)
    with kernels.use("triton"):
        for call in (
            lambda: kernels.match_max(x.long(), x),
            lambda: kernels.match_max(x, x.to("meta")),
            lambda: kernels.greedy_select(x, 7, torch.zeros(1, dtype=torch.int64)),
        ):
            with pytest.raises(ParameterError):
                call()
        with pytest.raises(kernels.KernelError):
            kernels.energy(x.double(), margin=0.3)


def test_an_index_outside_reads_nothing_foreign():
    """No illegal access: what does not exist is NaN."""
    x, size = drawing.rows(1, 6, 8), torch.ones(1, 6)
    keep, src, dst = torch.tensor([[0, 99, -7]]), torch.tensor([[3, 10**9]]), torch.tensor([[0, 2]])
    with kernels.use("triton"):
        rows, total = kernels.merge_rows(x, size, keep, src, dst)
    assert rows[0, 0].isfinite().all() and rows[0, 1:].isnan().all()
    assert total[0, 0] == 2 and total[0, 1:].isnan().all()
    with kernels.use("triton"):
        order, _ = kernels.greedy_select(x.expand(2, -1, -1), 3, torch.tensor([10**9, -(10**9)]))
    assert order[:, 0].tolist() == [10**9, -(10**9)] and order[:, 1:].lt(6).all()


@pytest.mark.parametrize("op", ["bipartite_match", "energy_match", "complete_match", "guided_match"])
def test_rows_longer_than_one_program_sorts(op, monkeypatch):
    """Torch sorts then; cosines and energies stay with the kernels, and the plan is the same."""
    monkeypatch.setattr(modules().order, "LIMIT_ORDER", 8)
    x = drawing.rows(2, 21, 8)
    call = {
        "bipartite_match": lambda m: m.bipartite_match(x, 4, 1),
        "energy_match": lambda m: m.energy_match(x, 4, margin=0.3),
        "complete_match": lambda m: m.complete_match(x, x[..., 0].contiguous(), 4),
        "guided_match": lambda m: m.guided_match(x, x[:, 5], 4),
    }[op]
    before = modules().common.launches
    with kernels.use("triton"):
        found = call(kernels)
    assert modules().common.launches > before
    drawing.same(found, call(reference), 1e-6)


@pytest.mark.parametrize("method", ["tome:r=4", "pitome:ratio=0.8", "crossget:rv=3", "tca"])
def test_a_tower_on_the_kernels(method):
    """Hooks, signals, choice and merge of a whole forward; the report says which path it took."""
    import timm

    import vlmtok

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=4, embed_dim=32, num_heads=2)
    model.eval()
    pixels = torch.randn(2, 3, 48, 48)
    outputs = {}
    for mode in ("torch", "triton"):
        with torch.no_grad(), kernels.use(mode), vlmtok.compress(model, method) as run:
            outputs[mode] = model.forward_features(pixels)
            ops = {name.split(":")[0] for name in run.report().kernels if name.endswith(f":{mode}")}
        assert {"merge_rows"} < ops, run.report().kernels
    torch.testing.assert_close(outputs["triton"], outputs["torch"], atol=1e-4, rtol=1e-4)
