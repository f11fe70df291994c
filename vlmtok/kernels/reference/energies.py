"""PiToMe's energy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exact import exact
from .rows import products, unit_rows
from .steps import in_one, in_steps


def energy(x: Tensor, *, margin: float, alpha: float = 1.0, kind: str = "elu") -> Tensor:
    """Definition of `vlmtok.kernels.energy`."""
    with exact(x.device):
        return energy_unit(unit_rows(x), margin=margin, alpha=alpha, kind=kind)


def energy_unit(unit: Tensor, *, margin: float, alpha: float, kind: str) -> Tensor:
    """`energy` of rows that have length one."""
    with exact(unit.device):
        unit = unit.nan_to_num(nan=0.0)
        steps = in_steps(unit.shape[0], unit.shape[1], unit.shape[1], unit.device.type)
        parts = [_energy_of(products(unit[batch, rows], unit[batch]), margin, alpha, kind) for batch, rows in steps]
        return in_one(parts, unit.shape[:2])


def _energy_of(over: Tensor, margin: float, alpha: float, kind: str) -> Tensor:
    """Energy of rows from their cosines `[B, M, N]`, which are overwritten."""
    if kind == "gaussian":
        sigma = 1.0 - margin
        over.sub_(1.0).div_(sigma).square_().mul_(-0.5).exp_()
        return over.mean(-1) / (sigma * (2.0 * torch.pi) ** 0.5)
    over.sub_(margin)
    alike = (over >= 0).sum(-1) if kind == "paper" else None
    total = _elu(over, alpha).sum(-1)
    if alike is not None:
        total = total + margin * alike
    return total / over.shape[2]


def _elu(x: Tensor, alpha: float) -> Tensor:
    """ELU, in which equal elements get equal values; torch's on a CPU rounds the last ones of a table differently."""
    if x.device.type != "cpu":
        return F.elu(x, alpha, inplace=True)
    below = x.clamp(max=0.0).expm1_()
    return x.clamp_(min=0.0).add_(below, alpha=alpha)
