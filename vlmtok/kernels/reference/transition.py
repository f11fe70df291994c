"""How a module changes a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..exact import exact


def transition_stats(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Definition of `vlmtok.kernels.transition_stats`."""
    with exact(x.device):
        a, b = x.float(), y.float()
        na, nb = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
        ratio = torch.where(na > 0, nb / na.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        cosine = (a * b).sum(-1) / (na.clamp(min=1e-8) * nb.clamp(min=1e-8))
        return ratio, cosine
