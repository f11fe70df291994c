"""The op of PiToMe's energy."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from .checks import check_floating, check_word
from .paths import run_detached, square_bytes

KINDS = ("elu", "paper", "gaussian")


def energy(x: Tensor, *, margin: float, alpha: float = 1.0, kind: str = "elu") -> Tensor:
    """PiToMe's energy: how much company a token has (arXiv 2405.16148, eq. 4).

    Args:
        x: `[B, N, D]`, the metric, any floating dtype.
        margin: cosine from which on two tokens count as alike.
        alpha: slope of the part below the margin.
        kind: ``"elu"`` mean of ELU(cos - margin), as released; ``"paper"`` counts the full cosine from the margin on,
            as printed; ``"gaussian"`` mean of a Gaussian kernel of width 1 - margin, as released for text.

    Returns:
        fp32 `[B, N]`; higher means more redundant. The diagonal is counted. A row that is not finite counts as a zero
        row.
    """
    check_energy("energy", x, margin, alpha, kind)
    triton = choose("energy", x, batch=x.shape[0], pair_bytes=square_bytes(x))
    return cast(Tensor, run_detached("energy", triton, x, margin=margin, alpha=alpha, kind=kind))


def check_energy(op: str, x: Tensor, margin: float, alpha: float, kind: str) -> None:
    """Arguments of an energy, of whichever op."""
    check_floating(op, "[B, N, D]", x=x)
    check_word(op, "kind", kind, KINDS)
    if not (math.isfinite(margin) and math.isfinite(alpha)):
        raise ParameterError(f"{op}: margin={margin!r} and alpha={alpha!r} must be finite numbers")
    if kind == "gaussian" and margin >= 1:
        raise ParameterError(f"{op}: margin={margin!r} leaves a Gaussian of width 1 - margin no width; it must be < 1")
