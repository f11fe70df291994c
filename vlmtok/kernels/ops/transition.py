"""The op that tells how a module changes a token."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...errors import ParameterError
from .. import reference
from ..dispatch import choose
from .checks import check_device
from .paths import run_detached, too_wide


def transition_stats(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How a module changes a token: the ratio of norms and the cosine (TransPrune, arXiv 2507.20630, eq. 1 and 2).

    Args:
        x: `[..., L, C]`, input of the module.
        y: `[..., L, C]`, its output.

    Returns:
        ``|y| / |x|`` and ``cos(x, y)``, fp32 `[..., L]`; a zero row of x has ratio 0, and either has cosine 0.
    """
    op = "transition_stats"
    for name, t in (("x", x), ("y", y)):
        if t.dim() < 2 or not t.is_floating_point():
            raise ParameterError(f"{op}: {name} must be floating [..., L, C], got {t.dtype} {list(t.shape)}")
    if x.shape != y.shape:
        raise ParameterError(f"{op}: x {list(x.shape)} and y {list(y.shape)} must have one shape")
    check_device(op, x, y=y)
    batch = x.shape[0] if x.dim() > 2 else 1
    if choose(op, x, batch=batch, limit=too_wide(x, y)):
        return cast("tuple[Tensor, Tensor]", run_detached(op, True, x, y))
    return reference.transition_stats(x, y)
