"""The public ops: check the arguments, choose the path, run."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from ...errors import ParameterError
from .. import library, reference
from ..dispatch import choose, note
from ..table import LIMIT_GREEDY, LIMIT_HEAD

KINDS = ("elu", "paper", "gaussian")
SPLITS = ("alternate", "halves")
RULES = ("max", "sum")
METRICS = ("cosine", "l2")


# ---------------------------------------------------------------------- checks
def _check(op: str, shape: str, **tensors: Tensor | None) -> None:
    """Floating tensors of as many axes as `shape` has letters."""
    axes = shape.count(",") + 1
    for name, x in tensors.items():
        if x is not None and (x.dim() != axes or not x.is_floating_point()):
            raise ParameterError(f"{op}: {name} must be floating {shape}, got {x.dtype} {list(x.shape)}")


def _check_index(op: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes):
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ParameterError(f"{op}: {name} must be {wanted} {list(shape)}, got {x.dtype} {list(x.shape)}")


def _check_device(op: str, first: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            raise ParameterError(f"{op}: {name} is on {x.device}, the others are on {first.device}")


def _check_word(op: str, name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ParameterError(f"{op}: {name}={value!r} is not possible; one of {', '.join(map(repr, words))}")


_INTS = (torch.int64, torch.int32)
_LONG = (torch.int64,)
_BOOL = (torch.bool,)


# ---------------------------------------------------------------------- running
def _opaque() -> bool:
    """Whether the torch path must be one node too.

    Under torch.compile an op that multiplies stays opaque on every path: the precision of its matmuls can only be set
    when it runs, and the greedy loop would unroll. So does a merge where compiled sums would have no order. An exported
    program takes plain torch.
    """
    return torch.compiler.is_compiling() and not _exporting()


def _exporting() -> bool:
    """As `torch.compiler.is_exporting`, which Dynamo of torch 2.9 takes to be true in whatever it compiles."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def _detached(args: tuple[Any, ...]) -> list[Any]:
    """Tensors without their history; one that is given twice stays one."""
    made: list[Any] = []
    for x in args:
        own = x.detach() if isinstance(x, Tensor) else x
        for earlier, done in zip(args, made):
            if earlier is x:  # Dynamo of torch 2.9 knows no id() of a tensor
                own = done
        made.append(own)
    return made


def _select(op: str, triton: bool, *args: Any, **kwargs: Any) -> Any:
    """Runs an op whose outputs carry no gradient."""
    if triton or _opaque():
        with torch.no_grad():
            return library.call(op, *_detached(args), path="triton" if triton else "torch", **kwargs)
    return getattr(reference, op)(*args, **kwargs)


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
    _check(op, "[B, M, D]", a=a)
    _check(op, "[B, N, D]", b=b)
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ParameterError(f"{op}: a {list(a.shape)} and b {list(b.shape)} must agree in B and D")
    if (rank_a is None) != (rank_b is None):
        raise ParameterError(f"{op}: rank_a and rank_b are given together, or neither")
    _check_index(op, tuple(a.shape[:2]), _INTS, rank_a=rank_a)
    _check_index(op, tuple(b.shape[:2]), _INTS, rank_b=rank_b)
    _check_index(op, tuple(b.shape[:2]), _BOOL, valid_b=valid_b)
    _check_device(op, a, b=b, rank_a=rank_a, rank_b=rank_b, valid_b=valid_b)
    triton = choose(op, a, batch=a.shape[0], pair_bytes=4 * a.shape[0] * a.shape[1] * b.shape[1], limit=_wide(a, b))
    masks = {"rank_a": rank_a, "rank_b": rank_b, "exclude_diag": exclude_diag, "valid_b": valid_b}
    return cast("tuple[Tensor, Tensor]", _select(op, triton, a, b, **masks))


def _wide(*tensors: Tensor) -> str | None:
    """Why a kernel cannot take these dtypes together, or None."""
    if any(x.dtype == torch.float64 for x in tensors):
        return "one dtype is torch.float64 and the kernels take float16, bfloat16 and float32"
    return None


def _check_energy(op: str, x: Tensor, margin: float, alpha: float, kind: str) -> None:
    _check(op, "[B, N, D]", x=x)
    _check_word(op, "kind", kind, KINDS)
    if not (math.isfinite(margin) and math.isfinite(alpha)):
        raise ParameterError(f"{op}: margin={margin!r} and alpha={alpha!r} must be finite numbers")
    if kind == "gaussian" and margin >= 1:
        raise ParameterError(f"{op}: margin={margin!r} leaves a Gaussian of width 1 - margin no width; it must be < 1")


def _square_bytes(x: Tensor) -> int:
    return 4 * x.shape[0] * x.shape[1] * x.shape[1]


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
    _check_energy("energy", x, margin, alpha, kind)
    triton = choose("energy", x, batch=x.shape[0], pair_bytes=_square_bytes(x))
    return cast(Tensor, _select("energy", triton, x, margin=margin, alpha=alpha, kind=kind))


def _check_r(op: str, r: int, most: int) -> None:
    if isinstance(r, bool) or not 0 <= r <= most:
        raise ParameterError(f"{op}: r={r!r} must be in [0, {most}]")


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
    _check(op, "[B, N, D]", metric=metric)
    _check_r(op, r, metric.shape[1] // 2)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=_square_bytes(metric) // 4)
    return cast("tuple[Tensor, Tensor, Tensor]", _select(op, triton, metric, r, num_prefix))


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
    _check_energy(op, metric, margin, alpha, kind)
    _check_word(op, "split", split, SPLITS)
    _check_r(op, r, metric.shape[1] // 2)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=_square_bytes(metric))
    settings = {"margin": margin, "alpha": alpha, "kind": kind, "split": split, "protect": protect}
    return cast("tuple[Tensor, Tensor, Tensor]", _select(op, triton, metric, r, **settings))


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
    _check(op, "[B, N, D]", metric=metric)
    _check(op, "[B, N]", importance=importance)
    rows = tuple(metric.shape[:2])
    if importance is not None and tuple(importance.shape) != rows:
        raise ParameterError(f"{op}: importance must be [B, N] = {list(rows)}, got {list(importance.shape)}")
    _check_index(op, rows, _BOOL, protected=protected)
    _check_r(op, r, metric.shape[1] // 2)
    _check_device(op, metric, importance=importance, protected=protected)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=_square_bytes(metric))
    return cast("tuple[Tensor, Tensor, Tensor]", _select(op, triton, metric, importance, r, protected))


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
    _check(op, "[B, N, D]", metric=metric)
    _check(op, "[B, D]", query=query)
    if (query.shape[0], query.shape[1]) != (metric.shape[0], metric.shape[2]):
        raise ParameterError(f"{op}: query must be [B, D] = {[*metric.shape[::2]]}, got {list(query.shape)}")
    _check_r(op, r, metric.shape[1] // 2)
    _check_device(op, metric, query=query)
    triton = choose(op, metric, batch=metric.shape[0], pair_bytes=_square_bytes(metric), limit=_wide(metric, query))
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", _select(op, triton, metric, query, r))


# ---------------------------------------------------------------------- merging
def merge_rows(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gathers the kept rows and adds the joining rows to them (see `vlmtok.Reduction` for the meaning).

    Args:
        x: `[B, prefix + N + suffix, C]`, any floating dtype; gradients flow.
        size: fp32 `[B, prefix + N + suffix]`; no gradient.
        keep: int64 `[B, K]`; keep, src and dst count from the first row behind the prefix.
        src: int64 `[B, R]`; of an empty entry it may be -1 too.
        dst: int64 `[B, R]`, -1 for an empty entry.
        keep_weight: fp32 `[B, K]`, or None for the size-weighted mean; gradients flow.
        src_weight: fp32 `[B, R]`, or None; gradients flow.
        importance: fp32 `[B, N]`, in place of both weights, which are then `vlmtok.kernels.pair_weights`; gradients
            flow.
        prefix: rows in front that stay as they are.
        suffix: rows behind that stay as they are.

    Returns:
        The rows `[B, prefix + K + suffix, C]` in the dtype of `x`, and their sizes, fp32. Sums are accumulated in fp32;
        a slot that nothing joins is its kept row, bit for bit, where there are no weights.
    """
    plan = (x, size, keep, src, dst)
    rows, total = _merged("merge_rows", plan, keep_weight, src_weight, importance, prefix, suffix)
    return rows, total


def merge_rows_biased(
    x: Tensor,
    size: Tensor,
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    *,
    keep_weight: Tensor | None = None,
    src_weight: Tensor | None = None,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge_rows`, and log(size) of its rows on the way: on the Triton path, proportional attention costs no launch.

    Args:
        x: as there, and so are all others.
        size: fp32 `[B, prefix + N + suffix]`.
        keep: int64 `[B, K]`.
        src: int64 `[B, R]`.
        dst: int64 `[B, R]`.
        keep_weight: fp32 `[B, K]`, or None.
        src_weight: fp32 `[B, R]`, or None.
        importance: fp32 `[B, N]`, or None.
        prefix: rows in front that stay as they are.
        suffix: rows behind that stay as they are.

    Returns:
        Rows and sizes as of `merge_rows`, and log(size) `[B, prefix + K + suffix]` in the dtype of `x`, what `key_bias`
        gives as `[B, 1, 1, L]`.
    """
    plan = (x, size, keep, src, dst)
    rows, total, bias = _merged("merge_rows_biased", plan, keep_weight, src_weight, importance, prefix, suffix)
    return rows, total, bias


def _merged(
    op: str, plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], keep_weight: Tensor | None,
    src_weight: Tensor | None, importance: Tensor | None, prefix: int, suffix: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Checks a merge, chooses its path and runs it."""
    x, size, keep, src, dst = plan = (plan[0], plan[1].detach(), *plan[2:])
    _check_merge(op, x, size, keep, src, dst, keep_weight, src_weight, importance, prefix, suffix)
    if prefix + keep.shape[1] + suffix == 0:
        return (x[:, :0], size[:, :0], x.new_empty(x.shape[0], 0))[: 3 if op == "merge_rows_biased" else 2]
    settings = {"keep_weight": keep_weight, "src_weight": src_weight, "prefix": prefix, "suffix": suffix}
    triton = choose("merge_rows", x, batch=x.shape[0])  # one kernel, one name in reports
    if not triton and not (_opaque() and x.device.type in reference.UNORDERED):
        definition = getattr(reference, op)
        return cast("tuple[Tensor, ...]", definition(*plan, importance=importance, **settings))
    path = "triton" if triton else "torch"
    weights = (x, keep_weight, src_weight, importance)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in weights):
        if importance is not None:  # written out in torch, which has their gradient
            inner = size[:, prefix : size.shape[1] - suffix]
            keep_weight, src_weight = reference.pair_weights(keep, src, dst, importance, inner)
        return cast("tuple[Tensor, ...]", MergeRows.apply(op, *plan, keep_weight, src_weight, prefix, suffix, path))
    with torch.no_grad():
        return cast("tuple[Tensor, ...]", library.call(op, *plan, importance=importance, **settings, path=path))


def _check_merge(
    op: str, x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor, keep_weight: Tensor | None,
    src_weight: Tensor | None, importance: Tensor | None, prefix: int, suffix: int,
) -> None:  # fmt: skip
    _check(op, "[B, N, C]", x=x)
    batch, n, _ = x.shape
    _check(op, "[B, N]", size=size)
    if size.dtype in (torch.float16, torch.bfloat16):
        raise ParameterError(f"{op}: size must be torch.float32, got {size.dtype}, which cannot count patches")
    if tuple(size.shape) != (batch, n):
        raise ParameterError(f"{op}: size must be [B, N] = {[batch, n]}, got {list(size.shape)}")
    if keep.dim() != 2 or src.dim() != 2:
        raise ParameterError(f"{op}: keep and src must be [B, K] and [B, R], got {keep.dim()} and {src.dim()} axes")
    _check_index(op, (batch, keep.shape[1]), _LONG, keep=keep)
    _check_index(op, (batch, src.shape[1]), _LONG, src=src, dst=dst)
    if (keep_weight is None) != (src_weight is None):
        raise ParameterError(f"{op}: keep_weight and src_weight are given together, or neither")
    if keep_weight is not None and src_weight is not None:
        if importance is not None:
            raise ParameterError(f"{op}: weights are given, or the importance that they follow from, not both")
        _check(op, "[B, K]", keep_weight=keep_weight, src_weight=src_weight)
        if keep_weight.shape != keep.shape or src_weight.shape != src.shape:
            raise ParameterError(f"{op}: weights must have the shapes of keep and src")
    if prefix < 0 or suffix < 0 or prefix + suffix > n:
        raise ParameterError(f"{op}: prefix={prefix} and suffix={suffix} do not fit in {n} rows")
    inner = (batch, n - prefix - suffix)
    if importance is not None and (tuple(importance.shape) != inner or not importance.is_floating_point()):
        raise ParameterError(
            f"{op}: importance must be floating [B, N] = {list(inner)}, got {importance.dtype} {list(importance.shape)}"
        )
    _check_device(
        op, x, size=size, keep=keep, src=src, dst=dst, keep_weight=keep_weight, src_weight=src_weight,
        importance=importance,
    )  # fmt: skip


class MergeRows(torch.autograd.Function):
    """Gradient of the opaque merge: for x by the transposed map, for the weights by row products."""

    @staticmethod
    def forward(
        ctx: Any, op: str, x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor,
        keep_weight: Tensor | None, src_weight: Tensor | None, prefix: int, suffix: int, path: str,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Runs the op; sizes and their logarithms carry no gradient."""
        made = library.call(
            op, x, size, keep, src, dst, keep_weight=keep_weight, src_weight=src_weight,
            prefix=prefix, suffix=suffix, path=path,
        )  # fmt: skip
        total = made[1]
        weighted = keep_weight is not None
        ctx.save_for_backward(x if weighted else None, size, keep, src, dst, keep_weight, src_weight, total)
        ctx.edges, ctx.path, ctx.n = (prefix, suffix), path, x.shape[1]
        ctx.mark_non_differentiable(*made[1:])
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for x, keep_weight and src_weight."""
        x, size, keep, src, dst, keep_weight, src_weight, total = ctx.saved_tensors
        prefix, suffix = ctx.edges
        slot, src = dst.clamp(min=0), src.clamp(min=0)
        kept, joined = keep_weight, src_weight
        if kept is None or joined is None:
            inner = total[:, prefix : total.shape[1] - suffix]
            mine = size.gather(1, keep + prefix)
            tiny = torch.finfo(torch.float32).tiny
            kept = torch.where(inner == mine, 1.0, mine / inner.clamp_min(tiny))
            joined = size.gather(1, src + prefix) / inner.gather(1, slot).clamp_min(tiny)
        grads: list[Tensor | None] = [None] * 11
        if ctx.needs_input_grad[1]:
            grads[1] = library.call(
                "merge_rows_grad", grad, keep, src, dst, kept, joined, ctx.n, prefix, suffix, path=ctx.path
            )
        wide = torch.promote_types(grad.dtype, torch.float32)
        if ctx.needs_input_grad[6]:
            mine = reference.take_rows(x, keep + prefix).to(wide)
            slots = grad[:, prefix : grad.shape[1] - suffix].to(wide)
            grads[6] = (mine * slots).sum(-1).to(keep_weight.dtype)
        if ctx.needs_input_grad[7]:
            theirs = reference.take_rows(grad, slot + prefix).to(wide)
            dot = (reference.take_rows(x, src + prefix).to(wide) * theirs).sum(-1)
            grads[7] = torch.where(dst < 0, 0.0, dot).to(src_weight.dtype)
        return tuple(grads)


# ---------------------------------------------------------------------- greedy choice
def greedy_select(
    x: Tensor,
    k: int,
    start: Tensor,
    *,
    rule: str = "max",
    metric: str = "cosine",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Farthest-first choice of k rows, one after the other.

    Args:
        x: `[B, N, D]`, any floating dtype.
        k: how many, at most N.
        start: int64 `[B]`, the first row chosen, from 0 to N - 1. (Another index is an error of torch's on the torch
            path; the kernel reads nothing foreign and returns it as it is.)
        rule: the next row minimises its ``"max"`` similarity to the chosen ones (k-center) or the ``"sum"`` of
            similarities (max-sum diversification).
        metric: ``"cosine"``, or ``"l2"`` for minus the squared Euclidean distance (rule ``"max"`` only).
        valid: bool `[B, N]`, rows that may be chosen; None means all. A row with fewer than k valid ones repeats none:
            it goes on with the invalid ones, lowest index first.

    Returns:
        The choice in the order taken, int64 `[B, k]`, and the state at which each was taken, fp32 `[B, k]`: the
        maximum or the sum of similarities; NaN for the first and for rows taken because no other was left. The lowest
        index wins a tie; rows that are not finite come after the others.
    """
    op = "greedy_select"
    _check(op, "[B, N, D]", x=x)
    _check_word(op, "rule", rule, RULES)
    _check_word(op, "metric", metric, METRICS)
    if rule == "sum" and metric == "l2":
        raise ParameterError(f"{op}: rule='sum' goes with metric='cosine'; a sum of negative distances has no floor")
    batch, n, _ = x.shape
    if isinstance(k, bool) or not 0 <= k <= n:
        raise ParameterError(f"{op}: k={k!r} must be in [0, {n}], the rows there are")
    _check_index(op, (batch,), _LONG, start=start)
    _check_index(op, (batch, n), _BOOL, valid=valid)
    _check_device(op, x, start=start, valid=valid)
    limit = f"{n} rows exceed {LIMIT_GREEDY}, what one program can hold" if n > LIMIT_GREEDY else None
    triton = choose(op, x, batch=batch, pair_bytes=_square_bytes(x), limit=limit)
    return cast("tuple[Tensor, Tensor]", _select(op, triton, x, k, start, rule=rule, metric=metric, valid=valid))


# ---------------------------------------------------------------------- statistics and attention
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
    _check_device(op, x, y=y)
    batch = x.shape[0] if x.dim() > 2 else 1
    if choose(op, x, batch=batch, limit=_wide(x, y)):
        return cast("tuple[Tensor, Tensor]", _select(op, True, x, y))
    return reference.transition_stats(x, y)


def _check_attention(op: str, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    _check(op, "[B, H, T, d]", q=q)
    _check(op, "[B, Hkv, L, d]", k=k)
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or (heads % groups if groups else heads):
        raise ParameterError(f"{op}: q {list(q.shape)} and k {list(k.shape)}: B and d must agree and Hkv divide H")
    if bias is not None and (not bias.is_floating_point() or bias.dim() > 4):
        raise ParameterError(f"{op}: bias must be floating, [B, H, T, L] or broadcastable, got {bias.dtype}")
    wanted = (*q.shape[:3], k.shape[2])
    if bias is not None and any(have not in (1, want) for have, want in zip(bias.shape[::-1], wanted[::-1])):
        raise ParameterError(f"{op}: bias {list(bias.shape)} does not broadcast to [B, H, T, L] = {list(wanted)}")
    _check_device(op, q, k=k, bias=bias)


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Softmax attention of some query rows, in fp32.

    Args:
        q: `[B, H, T, d]`.
        k: `[B, Hkv, L, d]`; Hkv divides H (grouped-query attention).
        scale: factor of the logits.
        bias: what is added to the logits, broadcastable to `[B, H, T, L]`, or None.
        cap: soft cap of the logits before the bias, ``cap tanh(logits / cap)``, or None.

    Returns:
        fp32 `[B, H, T, L]`. A row that may look nowhere (bias -inf everywhere) is NaN, as in torch's softmax.
    """
    _check_attention("attention_rows", q, k, bias)
    note("attention_rows", "torch")  # a few rows make no N x N: torch suffices
    return cast(Tensor, _select("attention_rows", False, q, k, scale=scale, bias=bias, cap=cap))


def received_attention(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None, chunk: int = 256) -> Tensor:
    """Attention that each token receives: the mean over heads and query rows, no `[L, L]` kept.

    Args:
        q: `[B, H, L, d]`.
        k: `[B, Hkv, L, d]`.
        scale: factor of the logits.
        bias: broadcastable to `[B, H, L, L]`, or None.
        chunk: query rows per step.

    Returns:
        fp32 `[B, L]`; a row sums to 1.
    """
    op = "received_attention"
    _check_attention(op, q, k, bias)
    if chunk < 1:
        raise ParameterError(f"{op}: chunk={chunk!r} must be at least 1")
    limit = _wide(q, k)
    if q.shape[3] > LIMIT_HEAD:
        limit = f"a head width of {q.shape[3]} exceeds {LIMIT_HEAD}"
    pair_bytes = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    triton = choose(op, q, batch=q.shape[0], pair_bytes=pair_bytes, limit=limit)
    return cast(Tensor, _select(op, triton, q, k, scale=scale, bias=bias, chunk=chunk))
