"""Cases of a vision tower: its merge layers, and what its tokens change from layer to layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_cases import COLREDUCE
from .drawing import features, orders, shares
from .floors import Case


def tower_layer(batch: int, scale: int = 1) -> list[Case]:
    """One merge layer of CLIP ViT-L/14-336: 576 tokens and CLS, head-mean keys of width 64, a tenth merges."""
    n, d, c, heads, r = 576 // scale, 64, 1024, 16, 58 // scale
    layer = "CLIP-L/336 layer" if scale == 1 else f"1/{scale} of a CLIP-L/336 layer"
    what, pairs, keys = f"{layer}, N={n}", 2 * batch * n * n * d, 2 * batch * n * d
    many = batch * n >= 132 * 64

    def merge(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        order = orders(device, batch, n)
        x = features(device, dtype, batch, n + 1, c)
        dst = torch.randint(0, n - r, (batch, r), device=device)
        return x, torch.ones(batch, n + 1, device=device, dtype=torch.float32), order[:, r:], order[:, :r], dst

    def mean_keys(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (features(device, dtype, batch, n, d),)

    def scored(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, d), shares(device, batch, n)

    def asked(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return features(device, dtype, batch, n, c), features(device, dtype, batch, c)

    def heads_of(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q = features(device, dtype, batch, heads, n + 1, d)
        return q, q.flip(2)

    plan = 8 * batch * (n + r)
    return [
        Case(
            "bipartite_match", what, batch, mean_keys, lambda m, x: m.bipartite_match(x, r, 1),
            keys + plan, pairs // 4, 3 if batch * n // 2 >= 132 * 64 else 2,
        ),
        Case(
            "match_max", f"{what}, complete graph", batch, mean_keys,
            lambda m, x: m.match_max(x, x, exclude_diag=True), keys + 12 * batch * n, pairs, 2,
        ),
        Case(
            "complete_match", what, batch, scored, lambda m, x, i: m.complete_match(x, i, r),
            keys + 4 * batch * n + plan, 2 * pairs + 2 * batch * r * (n - r) * d, 5,
        ),
        Case(
            "guided_match", f"{what}, keys of all heads", batch, asked, lambda m, x, query: m.guided_match(x, query, r),
            2 * batch * (n + 1) * c + 4 * batch * n + plan, (4 * n * n + 2 * r * (n - r) + 2 * n) * batch * c, 5,
        ),
        Case(
            "energy", what, batch, mean_keys, lambda m, x: m.energy(x, margin=0.45),
            keys + 4 * batch * n, pairs, 2 if many else 1,
        ),
        Case(
            "energy_match", what, batch, mean_keys, lambda m, x: m.energy_match(x, r, margin=0.45),
            keys + plan, pairs + 2 * batch * r * r * d, 4 if many else 3,
        ),
        Case(
            "merge_rows", what, batch, merge, lambda m, *args: m.merge_rows(*args, prefix=1),
            2 * batch * c * (2 * n + 2 - r) + 8 * batch * (n + r) + 4 * batch * (2 * n - r), 0, 1,
        ),
        Case(
            "received_attention", what, batch, heads_of, lambda m, q, k: m.received_attention(q, k, scale=0.125),
            4 * batch * heads * n * d + 4 * batch * n, 4 * batch * heads * n * n * d, 3, rivals=(COLREDUCE,),
        ),
    ]  # fmt: skip


def transition(n: int, width: int, batch: int) -> Case:
    """How tokens differ from one layer of a language model to the next (TransPrune)."""

    def pair(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = features(device, dtype, batch, n, width)
        return x, x + 0.1

    return Case(
        "transition_stats", f"N={n}, C={width}", batch, pair, lambda m, x, y: m.transition_stats(x, y),
        4 * batch * n * width + 8 * batch * n, 0, 1,
    )  # fmt: skip
