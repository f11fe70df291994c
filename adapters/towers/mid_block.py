"""A row that gets shorter between attention and MLP of a pre-norm block, by three hooks.

A block computes ``x1 = x + attn(norm(x))`` and ``x1 + mlp(norm2(x1))``; x1 is a local variable that no hook can shorten
for the second residual. So: (1) a pre-hook on what reads x1 gives the MLP branch the shorter row M x1; (2) a hook on
the last module of that branch keeps its output z; (3) a hook on the block returns M x1 + z. With gradients the block
must stay whole (stochastic depth, checkpointing), so (2) puts z back on its slots' places, U z, and (3) returns
S(x1 + U z) + (M - S) x1, where S gathers at `keep`: S U is the identity since a kept token owns its slot, so this is
M x1 + z for any weights. Without gradients, under torch.compile, (2) hands the block a zero to add. Without gradients
in eager mode (1) does it all: the tensor object that it is given is that local variable, nobody else's, so M x1 is set
into it and the block goes on with the shorter row as if it had always had it: no other hook works, nothing is added
twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PassError
from .tower_pass import LayerRecord, Pass


def check_history(stage: str, run: Pass) -> None:
    """Before a row gets shorter in the middle of a block.

    Args:
        stage: of the tower, for messages.
        run: the pass.

    Raises:
        PassError: gradients went off inside the block, so that x1 has no history and its gradient would be lost.
    """
    if run.grad and not torch.is_grad_enabled():
        raise PassError(
            f"{stage}: gradients went off inside a block, as in reentrant gradient checkpointing; a merge "
            "between attention and MLP needs use_reentrant=False"
        )


def can_be_set(x1: Tensor, record: LayerRecord) -> bool:
    """Whether x1 is the block's own, a plain tensor without history, so that it can be given other contents."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x1) is Tensor
        and id(x1) != record.taps.get("block")
        and not (x1.requires_grad or x1._is_view())
        and not torch._C._functorch.is_functorch_wrapped_tensor(x1)
    )


def branch_output(record: LayerRecord, module: nn.Module, z: Tensor, through: bool) -> Tensor:
    """What the end of the MLP branch hands its block: a zero, with z kept aside, or U z.

    Args:
        record: of the layer, with x1 and the steps taken behind it.
        module: the end of the branch.
        z: its output.
        through: whether the block changes the branch behind it, so that a merge must go through the block.
    """
    assert record.full is not None
    # torch.jit.trace compares what it saw with and without gradients, so that both must go the same way.
    whole = through or module.training or torch.jit.is_tracing()
    if not (whole or (torch.is_grad_enabled() and record.full.requires_grad)):
        record.branch = z
        return z.new_zeros(1)
    index = _own_places(record.mid).unsqueeze(-1).expand(-1, -1, z.shape[-1])
    room = z.new_zeros(z.shape[0], record.full.shape[1], z.shape[-1])
    return room.scatter(1, index, z)


def is_open(record: LayerRecord) -> bool:
    """Whether the block still has to give the shorter row."""
    return bool(record.mid) and record.merged is not None and record.full is not None


def close(record: LayerRecord, out: Tensor) -> Tensor:
    """M x1 + z, from what the block gave.

    Args:
        record: of the layer; it is open.
        out: `[B, L, C]`, the block's output.
    """
    assert record.merged is not None and record.full is not None
    if record.branch is not None:
        return record.merged + record.branch
    kept = _own_places(record.mid).unsqueeze(-1).expand_as(record.merged)
    return out.gather(1, kept) + (record.merged - record.full.gather(1, kept))


def _own_places(steps: list[Any]) -> Tensor:
    """S of several steps in a row: the place of each last slot's own token."""
    kept: Tensor = steps[0].kept
    for step in steps[1:]:
        kept = kept.gather(1, step.kept)
    return kept
