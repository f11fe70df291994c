"""What a `Reduction` holds, and the checks that its tensors fit each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ParameterError

Fields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""The fields of `ReductionData`, in their order."""


@dataclass(frozen=True, eq=False)
class ReductionData:
    """The fields of a `Reduction`, whose docstring says what they mean.

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

    @property
    def slots(self) -> int:
        """K, the number of slots of a row (a host int)."""
        return self.keep.shape[1]

    @property
    def merges(self) -> bool:
        """Whether any entry can join a slot (a host flag; ragged empty entries count)."""
        return self.src is not None and self.src.shape[1] > 0

    def merge_weights(self) -> dict[str, Tensor | None]:
        """What `vlmtok.kernels.merge_rows` needs to weigh rows."""
        return {"keep_weight": self.keep_weight, "src_weight": self.src_weight}
