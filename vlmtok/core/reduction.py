"""`Reduction`: which tokens stay and which join which, the one vocabulary in which every method answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..errors import ParameterError


@dataclass(frozen=True, eq=False)
class Reduction:
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

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    keep_weight: Tensor | None = None
    src_weight: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_plan()
        keep, src = self.keep, self.src
        if (self.keep_weight is None) != (self.src_weight is None):
            raise ParameterError("Reduction needs keep_weight and src_weight together, or neither")
        if self.keep_weight is not None and self.src_weight is not None:
            if src is None:
                raise ParameterError("Reduction weights need src and dst (R may be 0)")
            if self.keep_weight.shape != keep.shape or self.src_weight.shape != src.shape:
                raise ParameterError(
                    f"Reduction weights must have the shapes of keep {list(keep.shape)} and src {list(src.shape)}, got "
                    f"{list(self.keep_weight.shape)} and {list(self.src_weight.shape)}"
                )
        if self.valid is not None and (self.valid.shape != keep.shape or self.valid.dtype != torch.bool):
            raise ParameterError(
                f"Reduction.valid must be bool {list(keep.shape)}, got {self.valid.dtype} {list(self.valid.shape)}"
            )

    def _check_plan(self) -> None:
        """Who stays and who joins."""
        keep, src, dst = self.keep, self.src, self.dst
        if keep.dim() != 2 or keep.dtype != torch.int64:
            raise ParameterError(f"Reduction.keep must be int64 [B, K], got {keep.dtype} {list(keep.shape)}")
        if (src is None) != (dst is None):
            raise ParameterError("Reduction needs src and dst together, or neither")
        if src is not None and dst is not None:
            fits = src.dim() == 2 and src.shape == dst.shape and src.shape[0] == keep.shape[0]
            if not fits or src.dtype != torch.int64 or dst.dtype != torch.int64:
                raise ParameterError(
                    f"Reduction.src and dst must be int64 [B, R] with B = {keep.shape[0]}, got "
                    f"{src.dtype} {list(src.shape)} and {dst.dtype} {list(dst.shape)}"
                )

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

    @property
    def slots(self) -> int:
        """K, the number of slots of a row (a host int)."""
        return self.keep.shape[1]

    @property
    def merges(self) -> bool:
        """Whether any entry can join a slot (a host flag; ragged empty entries count)."""
        return self.src is not None and self.src.shape[1] > 0

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
        if tokens.dim() != 3 or tokens.shape[0] != self.keep.shape[0]:
            raise ParameterError(f"tokens must be [B = {self.keep.shape[0]}, N, C], got {list(tokens.shape)}")
        if protected is not None and (prefix or suffix):
            raise ParameterError("Reduction.apply takes protected tokens, or a prefix and suffix in the row, not both")
        if size is None:
            size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        weights = self._weights()
        if protected is not None and protected.shape[1]:
            weights = {"keep_weight": self.keep_weight, "src_weight": self.src_weight}  # those of the view's tokens
            tokens = torch.cat([tokens, protected.to(tokens.dtype)], 1)
            size = torch.cat([size, size.new_zeros(size.shape[0], protected.shape[1])], 1)
        if (prefix or suffix) and (self.src is None or self.valid is not None):
            return self.widen(prefix, tokens.shape[1] - prefix - suffix, suffix).apply(tokens, size)
        if self.src is None or self.dst is None:
            index = self.keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            return tokens.gather(1, index), size.gather(1, self.keep)
        merged, sizes = kernels.merge_rows(
            tokens, size, self.keep, self.src, self.dst, prefix=prefix, suffix=suffix, **weights
        )
        if self.valid is not None:  # a token of an invalid slot may belong to another one
            owner = self.assignment(tokens.shape[1])
            table = size.new_zeros(size.shape[0], self.slots + 1)
            sizes = table.scatter_add(1, torch.where(owner < 0, self.slots, owner), size)[:, :-1]
        return merged, sizes

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
        if not self.merges or self.src is None or self.dst is None or self.valid is not None:
            return *self.apply(tokens, size, prefix=prefix, suffix=suffix), None
        if size is None:
            size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        return kernels.merge_rows_biased(
            tokens, size, self.keep, self.src, self.dst, prefix=prefix, suffix=suffix, **self._weights()
        )

    def _weights(self) -> dict[str, Tensor | None]:
        """What a merge needs to weigh rows."""
        return {"keep_weight": self.keep_weight, "src_weight": self.src_weight}

    def assignment(self, n: int) -> Tensor:
        """The slot that owns each input token.

        Args:
            n: number of input tokens, protected ones that `keep` names included.

        Returns:
            int64 `[B, n]`, -1 for a dropped token.
        """
        batch, slots = self.keep.shape
        owner = self.keep.new_full((batch, n + 1), -1)  # column n takes what empty entries write
        if self.src is not None and self.dst is not None and self.src.shape[1]:
            token = torch.where(self.dst < 0, n, self.src)
            entry = torch.arange(self.src.shape[1], device=self.src.device).expand_as(self.src)
            none = self.src.shape[1]
            first = owner.new_full((batch, n + 1), none).scatter_reduce(1, token, entry, "amin")
            owner = torch.where(first < none, self.dst.gather(1, first.clamp(max=none - 1)), owner)
        slot = torch.arange(slots, device=self.keep.device).expand(batch, slots)
        token = self.keep if self.valid is None else torch.where(self.valid, self.keep, n)
        return owner.scatter(1, token, slot)[:, :n]

    def unmerge(self, tokens: Tensor, n: int) -> Tensor:
        """Gives every input token the value of the slot that owns it.

        Args:
            tokens: `[B, K, C]`, one row per slot.
            n: number of input tokens.

        Returns:
            `[B, n, C]`, zeros where the token was dropped.
        """
        owner = self.assignment(n)
        if tokens.shape[1] == 0:
            return tokens.new_zeros(tokens.shape[0], n, tokens.shape[2])
        index = owner.clamp(min=0).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return torch.where((owner >= 0).unsqueeze(-1), tokens.gather(1, index), 0.0)

    def gather(self, table: Tensor, dim: int = 1) -> Tensor:
        """Follows the kept tokens in a table that has one entry per token.

        Args:
            table: `[B, ..., N, ...]`, tokens along `dim`.
            dim: the axis of the tokens.

        Returns:
            The table with K entries along `dim`.
        """
        shape = [1] * table.dim()
        shape[0], shape[dim] = self.keep.shape
        target = list(table.shape)
        target[dim] = self.keep.shape[1]
        return table.gather(dim, self.keep.reshape(shape).expand(target))

    def widen(self, prefix: int, n: int, suffix: int = 0) -> Reduction:
        """The same reduction on a whole row: `prefix` tokens in front and `suffix` behind stay as they are.

        Args:
            prefix: protected tokens in front of the view's tokens.
            n: the view's tokens.
            suffix: inserted tokens behind them.

        Returns:
            A reduction over ``prefix + n + suffix`` tokens with ``prefix + K + suffix`` slots.
        """
        if not prefix and not suffix:
            return self
        batch, device = self.keep.shape[0], self.keep.device
        head = torch.arange(prefix, device=device).expand(batch, prefix)
        tail = torch.arange(prefix + n, prefix + n + suffix, device=device).expand(batch, suffix)
        keep = torch.cat([head, self.keep + prefix, tail], 1)
        src = None if self.src is None else self.src + prefix
        dst = None if self.dst is None else torch.where(self.dst < 0, self.dst, self.dst + prefix)
        keep_weight = self.keep_weight
        if keep_weight is not None:
            one = keep_weight.new_ones
            keep_weight = torch.cat([one(batch, prefix), keep_weight, one(batch, suffix)], 1)
        valid = self.valid
        if valid is not None:
            valid = torch.cat([valid.new_ones(batch, prefix), valid, valid.new_ones(batch, suffix)], 1)
        return Reduction(keep, src, dst, keep_weight, self.src_weight, valid)

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
        if self.valid is not None or other.valid is not None:
            raise ParameterError("Reduction.then takes no ragged reductions (valid)")
        weighted = self.keep_weight is not None or other.keep_weight is not None
        a, b = (self._weighted(size), other._weighted(self._sizes(size))) if weighted else (self, other)
        keep = a.keep.gather(1, b.keep)
        slot, scale = b._where(a.slots)
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if a.src is not None and a.dst is not None:
            empty = a.dst < 0
            at = a.dst.clamp(min=0)
            to = torch.where(empty, -1, slot.gather(1, at))
            weight = None if a.src_weight is None or scale is None else a.src_weight * scale.gather(1, at)
            parts.append((a.src, to, weight))
        if b.src is not None and b.dst is not None:
            from_a = a.keep.gather(1, b.src.clamp(min=0))
            weight = None
            if b.src_weight is not None and a.keep_weight is not None:
                weight = b.src_weight * a.keep_weight.gather(1, b.src.clamp(min=0))
            parts.append((from_a, b.dst, weight))
        keep_weight = None
        if a.keep_weight is not None and b.keep_weight is not None:
            keep_weight = a.keep_weight.gather(1, b.keep) * b.keep_weight
        if not parts:
            return Reduction(keep)
        src, dst = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
        src_weight = torch.cat([p[2] for p in parts if p[2] is not None], 1) if weighted else None
        return Reduction(keep, src, dst, keep_weight, src_weight)

    # ------------------------------------------------------------------ parts of `then`
    def _sizes(self, size: Tensor | None) -> Tensor:
        """Sizes of the slots, fp32 `[B, K]`."""
        n = int(self.keep.shape[1] + (0 if self.src is None else self.src.shape[1])) if size is None else size.shape[1]
        if size is None:
            kept = torch.ones_like(self.keep, dtype=torch.float32)
            if self.src is None or self.dst is None:
                return kept
            slot = torch.where(self.dst < 0, self.slots, self.dst)
            table = torch.cat([kept, kept.new_zeros(kept.shape[0], 1)], 1)
            return table.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))[:, :-1]
        return self.apply(size.unsqueeze(-1).expand(-1, n, 1), size)[1]

    def _weighted(self, size: Tensor | None) -> Reduction:
        """The same reduction with its weights written out."""
        if self.keep_weight is not None:
            return self
        if self.src is None or self.dst is None:
            none = self.keep.new_zeros(self.keep.shape[0], 0)
            ones = torch.ones_like(self.keep, dtype=torch.float32)
            return Reduction(self.keep, none, none, ones, none.to(torch.float32), self.valid)
        total = self._sizes(size)
        one = torch.ones_like
        kept = one(self.keep, dtype=torch.float32) if size is None else size.gather(1, self.keep)
        joined = one(self.src, dtype=torch.float32) if size is None else size.gather(1, self.src.clamp(min=0))
        share = joined / total.gather(1, self.dst.clamp(min=0))
        return Reduction(self.keep, self.src, self.dst, kept / total, torch.where(self.dst < 0, 0.0, share), self.valid)

    def _where(self, n: int) -> tuple[Tensor, Tensor | None]:
        """Slot of every one of n tokens (-1 dropped), and the weight it has there (None without weights)."""
        slot = self.assignment(n)
        if self.keep_weight is None or self.src_weight is None or self.src is None or self.dst is None:
            return slot, None
        weight = self.keep_weight.new_zeros(slot.shape[0], n + 1)
        weight = weight.scatter(1, torch.where(self.dst < 0, n, self.src), self.src_weight)
        return slot, weight.scatter(1, self.keep, self.keep_weight)[:, :n]


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

    def _weights(self) -> dict[str, Tensor | None]:
        return {"importance": self.importance}
