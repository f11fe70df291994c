"""Where a definition may look at what its tensors hold; elsewhere its plain rounds run."""

from types import SimpleNamespace

import pytest
import torch
from count_ops import CountOps
from drawn import rows
from support import referee
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmtok import kernels
from vlmtok.kernels.reference import coverage, determinant, duplicates
from vlmtok.kernels.reference.looking import host_may_look

CPU, META = torch.ones(2), torch.empty(2, device="meta")


def test_data_on_a_cpu_is_looked_at():
    assert host_may_look(CPU) and host_may_look(CPU, any_device=True)


def test_a_device_is_waited_for_only_where_asked():
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    assert not host_may_look(elsewhere) and host_may_look(elsewhere, any_device=True)


@pytest.mark.parametrize("any_device", [False, True])
def test_where_there_is_no_data(any_device):
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(CPU)
        assert not host_may_look(fake, any_device)
    assert fake.device.type == "cpu" and not host_may_look(fake, any_device)  # the mode itself is over
    assert not host_may_look(META, any_device)


@pytest.mark.parametrize("any_device", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_where_torch_traces(any_device):
    seen = []

    def asks(x):
        seen.append(host_may_look(x, any_device))
        return x + 1

    torch.jit.trace(asks, (CPU,), check_trace=False)
    assert seen == [False]
    compiled = torch.compile(
        lambda x: x + 1 if host_may_look(x, any_device) else x - 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(CPU), CPU - 1)


@pytest.mark.parametrize("mode", [referee.counter, CountOps])
def test_where_something_counts(mode):
    with mode():
        assert not host_may_look(CPU) and not host_may_look(CPU, any_device=True)
    assert host_may_look(CPU)


@pytest.mark.parametrize(
    ("module", "shortcut", "call"),
    [
        (coverage, "cover_lazily", lambda x: kernels.greedy_cover(x, 4)[0]),
        (coverage, "cover_lazily", lambda x: kernels.greedy_cover_cosine(x, 4)[0]),
        (coverage, "cover_in_blocks", lambda x: kernels.greedy_cover_cosine(x, 4)[0]),
        (determinant, "choose_by_rows", lambda x: kernels.greedy_determinant(x, 4)[0]),
        (duplicates, "drop_by_neighbours", lambda x: kernels.drop_duplicates(x, 4, step=2)),
    ],
)
def test_a_counter_sees_the_plain_rounds(module, shortcut, call, monkeypatch):
    """Each definition with a shortcut takes it, but not where its ops are counted; what it gives is the same."""
    taken, original = [], getattr(module, shortcut)

    def counted(*args):
        taken.append(shortcut)
        return original(*args)

    monkeypatch.setattr(module, shortcut, counted)
    if shortcut == "cover_in_blocks":
        monkeypatch.setattr(module, "TABLE_BYTES", 0)
    x = rows(2, 12, 9)
    found = call(x)
    assert taken
    taken.clear()
    with referee.counter():
        assert torch.equal(call(x), found)
    assert not taken
