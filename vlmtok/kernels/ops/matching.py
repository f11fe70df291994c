"""The ops that tell who is most similar to whom, and which tokens merge into which."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...errors import ParameterError
from ..dispatch import choose
from .checks import BOOL, INTS, check_device, check_floating, check_index, check_r, check_word
from .energies import check_energy
from .paths import run_detached, square_bytes, too_wide

SPLITS = ("alternate", "halves")


def match_max(
    a: Tensor,
    b: Tensor,
    *,
    rank_a: Tensor | None = None,
    rank_b: Tensor | None = None,
    exclude_diag: bool = False,
    valid_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The most similar row of `b` for each row of `a`, by cosine.

    Args:
        a: `[B, M, D]`, any floating dtype.
        b: `[B, N, D]`.
        rank_a: int `[B, M]`, and
        rank_b: int `[B, N]`: row i may only match columns j with ``rank_b[j] > rank_a[i]``. Both or neither.
        exclude_diag: row i may not match column i.
        valid_b: bool `[B, N]`, columns that may be matched; None means all.

    Returns:
        The cosine, fp32 `[B, M]` (-inf where no column is allowed), and its column, int64 `[B, M]` (0 there). The
        lowest column wins a tie; a NaN similarity never wins.
    """
    op = "match_max"
    check_floating(op, "[B, M, D]", a=a)
    check_floating(op, "[B, N, D]", b=b)
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ParameterError(f"{op}: a {list(a.shape)} and b {list(b.shape)} must agree in B and D")
    if (rank_a is None) != (rank_b is None):
        raise ParameterError(f"{op}: rank_a and rank_b are given together, or neither")
    check_index(op, tuple(a.shape[:2]), INTS, rank_a=rank_a)
    check_index(op, tuple(b.shape[:2]), INTS, rank_b=rank_b)
    check_index(op, tuple(b.shape[:2]), BOOL, valid_b=valid_b)
    check_device(op, a, b=b, rank_a=rank_a, rank_b=rank_b, valid_b=valid_b)
    triton = choose(op, a, batch=a.shape[0], pair_bytes=4 * a.shape[0] * a.shape[1] * b.shape[1], limit=too_wide(a, b))
    masks = {"rank_a": rank_a, "rank_b": rank_b, "exclude_diag": exclude_diag, "valid_b": valid_b}
    return cast("tuple[Tensor, Tensor]", run_detached(op, triton, a, b, **masks))


def bipartite_match(metric: Tensor, r: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs the even places of a row with the odd ones and merges the r most similar pairs (ToMe, arXiv 2210.09461).

    Args:
        metric: `[B, N, D]`, what is compared; protected tokens are not among them.
        r: pairs to merge, 0 to N // 2.
        num_prefix: protected tokens in front of the row; they count for which places are even.

    Returns:
        keep `[B, N - r]`: the even places that stay (ascending behind a prefix, by falling similarity without one),
        then the odd ones; src `[B, r]` by falling similarity; dst `[B, r]`, the slot of each. All int64.
    """
    op = "bipartite_match"
    check_floating(op, "[B, N, D]", metric=metric)
    check_r(op, r, metric.shape[1] // 2)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=square_bytes(metric) // 4)
    return cast("tuple[Tensor, Tensor, Tensor]", run_detached(op, triton, metric, r, num_prefix))


def energy_match(
    metric: Tensor,
    r: int,
    *,
    margin: float,
    alpha: float = 1.0,
    kind: str = "elu",
    split: str = "alternate",
    protect: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """PiToMe's matching (arXiv 2405.16148, algorithm 1).

    Args:
        metric: `[B, N, D]`, what is compared; protected tokens are not among them.
        r: tokens to merge away, 0 to N // 2.
        margin: as in `energy`.
        alpha: as in `energy`.
        kind: as in `energy`.
        split: the 2r tokens of highest energy are split into sources and targets by ``"alternate"`` ranks, or into
            ``"halves"``.
        protect: leave tokens of low energy alone; False matches all tokens, every second rank with the others, and
            merges the r most similar pairs (the ordered matching of the released DeiT and MAE patches).

    Returns:
        keep `[B, N - r]`: protected tokens by falling energy (or unmerged sources by falling similarity), then the
        targets by falling energy; src `[B, r]`; dst `[B, r]`, the slot of each. All int64.
    """
    op = "energy_match"
    check_energy(op, metric, margin, alpha, kind)
    check_word(op, "split", split, SPLITS)
    check_r(op, r, metric.shape[1] // 2)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=square_bytes(metric))
    settings = {"margin": margin, "alpha": alpha, "kind": kind, "split": split, "protect": protect}
    return cast("tuple[Tensor, Tensor, Tensor]", run_detached(op, triton, metric, r, **settings))


def complete_match(
    metric: Tensor, importance: Tensor | None, r: int, protected: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Complete-graph soft matching of CrossGET (arXiv 2305.17455, section 3.1).

    Every token looks for its most similar token among those whose own best similarity ranks later; the r tokens of
    smallest importance minus that similarity join their most similar token among the others.

    Args:
        metric: `[B, N, D]`, what is compared.
        importance: `[B, N]`; important tokens merge later. None means all alike.
        r: tokens to merge away; at most (N - protected tokens) // 2, or protected ones would merge.
        protected: bool `[B, N]`, tokens that neither join nor are joined; None means none.

    Returns:
        keep `[B, N - r]` ascending; src `[B, r]` by rising priority; dst `[B, r]`, the slot of each. All int64.
    """
    op = "complete_match"
    check_floating(op, "[B, N, D]", metric=metric)
    check_floating(op, "[B, N]", importance=importance)
    rows = tuple(metric.shape[:2])
    if importance is not None and tuple(importance.shape) != rows:
        raise ParameterError(f"{op}: importance must be [B, N] = {list(rows)}, got {list(importance.shape)}")
    check_index(op, rows, BOOL, protected=protected)
    check_r(op, r, metric.shape[1] // 2)
    check_device(op, metric, importance=importance, protected=protected)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=square_bytes(metric))
    return cast("tuple[Tensor, Tensor, Tensor]", run_detached(op, triton, metric, importance, r, protected))


def guided_match(metric: Tensor, query: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`complete_match` where a token's importance is its cosine with one that asks (CrossGET, section 3.2).

    Args:
        metric: `[B, N, D]`, what is compared.
        query: `[B, D]`, who asks.
        r: tokens to merge away, at most N // 2.

    Returns:
        keep `[B, N - r]`, src `[B, r]` and dst `[B, r]` as of `complete_match`, and the importance, fp32 `[B, N]` (0
        where a row or its query is not finite). None carries a gradient, as released.
    """
    op = "guided_match"
    check_floating(op, "[B, N, D]", metric=metric)
    check_floating(op, "[B, D]", query=query)
    if (query.shape[0], query.shape[1]) != (metric.shape[0], metric.shape[2]):
        raise ParameterError(f"{op}: query must be [B, D] = {[*metric.shape[::2]]}, got {list(query.shape)}")
    check_r(op, r, metric.shape[1] // 2)
    check_device(op, metric, query=query)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=square_bytes(metric), limit=too_wide(metric, query))
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", run_detached(op, triton, metric, query, r))
