"""MACs of what runs, from the shapes of its matrix products and convolutions.

The formulas stand here, so that a report says the same under every release of torch: its own counter knows other
operators from one release to the next, and leaves out fused attention on a CPU (see docs/counting.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..kernels.flop_formulas import FLOPS


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return a.numel() * b.shape[-1]


def _addmm(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return a.numel() * b.shape[-1]


def _convolution(x: Tensor, weight: Tensor, *args: Any, out: Tensor, **kwargs: Any) -> int:
    """`weight` is `[outputs, inputs / groups, ...]`, and of a transposed one `[inputs, outputs / groups, ...]`."""
    transposed = args[4] if len(args) > 4 else kwargs.get("transposed", False)
    return (x if transposed else out).numel() * weight[0].numel()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Every key, masked ones too; `q` is `[B, H, N, d]`, and k and v may have fewer heads."""
    return q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * v.shape[-2] * v.shape[-1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::baddbmm": _addmm,
    "aten::convolution": _convolution,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
}
"""By the name of the operator; called with its arguments and, as `out`, what it returned."""


class MacCounter(TorchDispatchMode):
    """Context that adds up MACs of matrix products, convolutions, attention and the ops of `vlmtok.kernels`.

    Attributes:
        macs: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and books it; one that is made of others is taken apart first."""
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        if space == "vlmtok":
            shapes, named = tree_map_only(Tensor, lambda x: x.shape, (args, kwargs))
            self.macs += FLOPS[name](*shapes, **named) // 2
            return func(*args, **kwargs)
        formula = _FORMULAS.get(func._schema.name)
        if formula is None and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.macs += formula(*args, **{**kwargs, "out": out})
        return out
