"""Launches of a whole forward, counted on meta tensors; see `vlmtok.kernels.bench.launches` for the counter."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from vlmtok.kernels.bench.launches import CountOps, Launch, capture

__all__ = ["CountOps", "Launch", "capture", "launches_of_a_forward"]


def launches_of_a_forward(depth: int, method: str | None = None) -> Counter[str]:
    """What a forward of a ViT launches on the Triton path, in bf16 at batch 1.

    Args:
        depth: blocks of the ViT.
        method: what compresses it; None is the bare model.

    Returns:
        Ops and kernels by name. Attention is left out: on a GPU it is one kernel, with a bias on the keys or without,
        and on the meta device torch would write it out.
    """
    import timm

    import vlmtok
    from vlmtok import kernels

    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=96, num_classes=10)
    model = model.to(torch.bfloat16).eval()
    pixels = torch.empty(1, 3, 96, 96, dtype=torch.bfloat16, device="meta")

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.empty_like(v)

    compressed = nullcontext() if method is None else vlmtok.compress(model, method)
    patched = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.no_grad(), kernels.use("triton"), patched, compressed, CountOps() as count:
        model(pixels)
    return count.ops
