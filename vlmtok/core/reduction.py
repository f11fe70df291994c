"""`Reduction`: which tokens stay and which join which, the one vocabulary in which every method answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..errors import ParameterError
from . import composition, merging
from .reduction_data import ReductionData


@dataclass(frozen=True, eq=False)
class Reduction(ReductionData):
    """Which tokens of a view stay, and which of the others join them.

    Pruning is `keep` alone. Merging adds one entry ``r`` per joining token: token ``src_r`` goes to slot ``dst_r``.

    Values follow the weights, bookkeeping follows ownership. Without weights a slot is the size-weighted mean of its
    members and a token occurs once, in `keep` or in `src`. With weights, ``y_k = keep_weight_k x_keep_k + sum
    src_weight_r x_src_r`` for any real weights, and a token may occur several times. A kept token owns its slot; any
    other token belongs to the first entry (``dst >= 0``) that names it, else it is dropped. Sizes, `assignment`,
    `unmerge` and traces use ownership only.

    Attributes:
        keep: int64 `[B, K]`, the input token that represents each slot, in output order, without repeats. At the
            stage ``features`` an index ``N + j`` names protected token ``j`` (in the order of the signal
            ``protected``); such a slot has size 0 and takes no `src` without weights.
        src: int64 `[B, R]`, tokens that join a slot; of an empty entry it may be -1 too.
        dst: int64 `[B, R]`, the slot of each; -1 marks an empty entry (ragged R).
        keep_weight: fp32 `[B, K]`, or None for the size-weighted mean.
        src_weight: fp32 `[B, R]`, given if and only if `keep_weight` is.
        valid: bool `[B, K]`, False where a row has fewer slots (ragged results), or None when all count.

    Raises:
        ParameterError: shapes or dtypes do not fit each other.
    """

    # ------------------------------------------------------------------ making one
    @classmethod
    def mean(cls, keep: Tensor, src: Tensor, dst: Tensor, valid: Tensor | None = None) -> Reduction:
        """A merge by the plain mean of the members' vectors, whatever their sizes.

        Args:
            keep: int64 `[B, K]`.
            src: int64 `[B, R]`, every token at most once.
            dst: int64 `[B, R]`, -1 for an empty entry.
            valid: bool `[B, K]` or None.

        Returns:
            A reduction with weights 1/n, n the number of members of the slot.
        """
        slot = torch.where(dst < 0, keep.shape[1], dst)
        members = keep.new_ones(keep.shape[0], keep.shape[1] + 1, dtype=torch.float32)
        members = members.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))
        weight = 1.0 / members
        return cls(keep, src, dst, weight[:, :-1].contiguous(), weight.gather(1, slot), valid)

    @classmethod
    def paired(
        cls, keep: Tensor, src: Tensor, dst: Tensor, importance: Tensor, size: Tensor | None = None
    ) -> Reduction:
        """A merge in which the more important of two tokens weighs more; see `vlmtok.kernels.pair_weights`.

        Args:
            keep: int64 `[B, K]`.
            src: int64 `[B, R]`, every token at most once.
            dst: int64 `[B, R]`, -1 for an empty entry.
            importance: fp32 `[B, N]`; gradients flow.
            size: fp32 `[B, N]`, the sizes that `apply` will be given, or None for ones.

        Returns:
            A reduction with weights. They are worked out when they are read; `apply` leaves that to the merge.
        """
        return _Paired(keep, src, dst, importance, size)

    # ------------------------------------------------------------------ using one
    def apply(
        self,
        tokens: Tensor,
        size: Tensor | None = None,
        protected: Tensor | None = None,
        *,
        prefix: int = 0,
        suffix: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Shortens `tokens`.

        Differentiable in `tokens`, `protected` and the weights; sums are accumulated in fp32.

        Args:
            tokens: `[B, prefix + N + suffix, C]`, any floating dtype.
            size: fp32 `[B, prefix + N + suffix]`, patches each token stands for; None means ones.
            protected: `[B, P, C]`, what indices from N on name; not with a prefix or suffix.
            prefix: tokens in front that stay as they are; the reduction counts from behind them.
            suffix: tokens behind that stay as they are.

        Returns:
            The slots `[B, prefix + K + suffix, C]` in the dtype of `tokens`, and their sizes, fp32.
        """
        return merging.apply(self, tokens, size, protected, prefix, suffix)

    def apply_biased(
        self, tokens: Tensor, size: Tensor | None = None, *, prefix: int = 0, suffix: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`apply`, and the log(size) that proportional attention asks for next, if a merge makes it on its way.

        Args:
            tokens: `[B, prefix + N + suffix, C]`.
            size: fp32 `[B, prefix + N + suffix]`; None means ones.
            prefix: tokens in front that stay as they are.
            suffix: tokens behind that stay as they are.

        Returns:
            Slots and sizes as of `apply`, and log(size) in the dtype of `tokens`, or None where nothing merges or
            results are ragged.
        """
        return merging.apply_biased(self, tokens, size, prefix, suffix)

    def assignment(self, n: int) -> Tensor:
        """The slot that owns each input token.

        Args:
            n: number of input tokens, protected ones that `keep` names included.

        Returns:
            int64 `[B, n]`, -1 for a dropped token.
        """
        return merging.assignment(self, n)

    def unmerge(self, tokens: Tensor, n: int) -> Tensor:
        """Gives every input token the value of the slot that owns it.

        Args:
            tokens: `[B, K, C]`, one row per slot.
            n: number of input tokens.

        Returns:
            `[B, n, C]`, zeros where the token was dropped.
        """
        return merging.unmerge(self, tokens, n)

    def gather(self, table: Tensor, dim: int = 1) -> Tensor:
        """Follows the kept tokens in a table that has one entry per token.

        Args:
            table: `[B, ..., N, ...]`, tokens along `dim`.
            dim: the axis of the tokens.

        Returns:
            The table with K entries along `dim`.
        """
        return merging.gather(self, table, dim)

    def widen(self, prefix: int, n: int, suffix: int = 0) -> Reduction:
        """The same reduction on a whole row: `prefix` tokens in front and `suffix` behind stay as they are.

        Args:
            prefix: protected tokens in front of the view's tokens.
            n: the view's tokens.
            suffix: inserted tokens behind them.

        Returns:
            A reduction over ``prefix + n + suffix`` tokens with ``prefix + K + suffix`` slots.
        """
        return Reduction(*merging.widen(self, prefix, n, suffix)) if prefix or suffix else self

    def then(self, other: Reduction, size: Tensor | None = None) -> Reduction:
        """The one reduction that equals this one followed by `other`.

        In both, each token may occur once only (always so without weights, and for `Reduction.mean`): what two slots
        share, one reduction cannot say of one cut and one kept.

        Args:
            other: acts on the slots of this one.
            size: fp32 `[B, N]`, sizes of this one's input tokens; needed where one of the two has weights and the
                other has none. None means ones.

        Returns:
            A reduction of this one's input tokens; weights are given if either had them.

        Raises:
            ParameterError: `other` is ragged (`valid`), names protected tokens, or this one is ragged.
        """
        return Reduction(*composition.compose(self, other, size))


class _Paired(Reduction):
    """`Reduction.paired`: weights that nobody reads are never written out."""

    importance: Tensor
    size: Tensor | None

    def __init__(self, keep: Tensor, src: Tensor, dst: Tensor, importance: Tensor, size: Tensor | None) -> None:
        fields = {"keep": keep, "src": src, "dst": dst, "valid": None, "importance": importance, "size": size}
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # as a frozen dataclass does
        self._check_plan()
        if importance.dim() != 2 or importance.shape[0] != keep.shape[0] or not importance.is_floating_point():
            raise ParameterError(
                f"importance must be floating [B, N] with B = {keep.shape[0]}, got {importance.dtype} "
                f"{list(importance.shape)}"
            )

    @property
    def keep_weight(self) -> Tensor:
        """fp32 `[B, K]`."""
        return self._pair()[0]

    @property
    def src_weight(self) -> Tensor:
        """fp32 `[B, R]`."""
        return self._pair()[1]

    def _pair(self) -> tuple[Tensor, Tensor]:
        assert self.src is not None and self.dst is not None
        size = torch.ones_like(self.importance, dtype=torch.float32) if self.size is None else self.size
        return kernels.pair_weights(self.keep, self.src, self.dst, self.importance, size)

    def merge_weights(self) -> dict[str, Tensor | None]:
        return {"importance": self.importance}
