"""AveragePool: adaptive average pooling of the visual grid, the baseline that looks at nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_flag, check_range
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError


def pool_windows(size: int, out: int) -> list[range]:
    """Windows of adaptive pooling along one side.

    Args:
        size: tokens of the side.
        out: windows, at most `size`.

    Returns:
        `out` ranges: window i goes from floor(i size / out) to ceil((i + 1) size / out); they overlap unless `out`
        divides `size`.
    """
    return [range(i * size // out, -((i + 1) * size // -out)) for i in range(out)]


@register_method
@dataclass(eq=False)
class AveragePool(Method):
    """Replaces windows of the visual grid by their mean, before the language model (adaptive average pooling).

    Algorithm:
        1. A grid of R x C tokens becomes one of R' x C', by default half of each side.
        2. Window i spans rows ``floor(i R / R')`` to ``ceil((i + 1) R / R') - 1``; columns likewise.
        3. A slot is the plain mean of its window, ``y = sum_{n in window} x_n / |window|``; slots lie row by row.

    Args:
        output_size: rows and columns of the pooled grid, or one number for both; None halves each side.
        overlap: let windows overlap where the grid cannot be divided, as ``torch.nn.AdaptiveAvgPool2d`` does; without
            it such a grid is refused, in the pass where grids depend on the picture (crops of LLaVA-NeXT and
            LLaVA-OneVision, each pooled by itself; pictures of Qwen-VL and Mistral 3).
        positions: ``"renumber"`` or ``"keep"`` the position ids; None is the model's default.
    """

    paper = "baseline; as in TokenFLEX (2025)"
    arxiv = "2504.03154"
    parity = "equals torch.nn.functional.adaptive_avg_pool2d"
    caveats = (
        "It loses to Random on tiny-llava (63.0 % against 75.9 % at 36 tokens): a window blends a thing with what"
        " lies beside it, and that model was never shown such means.",
    )
    deviations = (
        "TokenFLEX pools before its projector and trains with it; this pools what a released projector gives, which is "
        "the same for a linear one.",
    )
    scope = "part"
    budget_parameter = "output_size"

    output_size: int | tuple[int, int] | None = None
    overlap: bool = False
    positions: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.output_size, (tuple, list)):
            if len(self.output_size) != 2:
                raise ParameterError(f"AveragePool: output_size={self.output_size!r} must be an int or (rows, columns)")
            for side in self.output_size:
                check_range(side, "AveragePool", "output_size", 1, kind=int)
        elif self.output_size is not None:
            check_range(self.output_size, "AveragePool", "output_size", 1, kind=int)
        check_flag(self.overlap, "AveragePool", "overlap")
        check_choice(self.positions, "AveragePool", "positions", (None, *POSITIONS))

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input."""
        layout.stage("projected", "AveragePool")
        return [Site("projected", positions=self.positions)]

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """Moves `output_size` through the sides that a square grid allows."""
        side = math.isqrt(tokens)
        sides = [out for out in range(1, side + 1) if self.overlap or side % out == 0]
        return replace(self, output_size=sides[min(int(level * len(sides)), len(sides) - 1)])

    def reduce(self, view: TokenView) -> Reduction | None:
        """One slot a window, row by row; its first token stands for it.

        Raises:
            ParameterError: the tokens are no whole grid, or it cannot be divided.
        """
        batch = view.tokens.shape[0]
        grid, out = self._grids(view.counts)
        if out == grid:
            return None
        rows, columns = pool_windows(grid[0], out[0]), pool_windows(grid[1], out[1])
        windows = [[i * grid[1] + j for i in down for j in across] for down in rows for across in columns]
        entries = [(token, slot) for slot, window in enumerate(windows) for token in window[1:]]
        share = [1.0 / len(window) for window in windows]

        def tensor(values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=view.tokens.device).expand(batch, -1)

        keep = tensor([window[0] for window in windows], torch.int64)
        src = tensor([token for token, _ in entries], torch.int64)
        dst = tensor([slot for _, slot in entries], torch.int64)
        return Reduction(
            keep, src, dst, tensor(share, torch.float32), tensor([share[slot] for _, slot in entries], torch.float32)
        )

    def count(self, counts: Counts) -> int | None:
        """The pooled grid; None where halves are rounded and the sides are not known.

        Raises:
            ParameterError: as `reduce`, where the grid is known.
        """
        if counts.grid is not None:
            rows, columns = self._grids(counts)[1]
        elif self.output_size is not None:
            rows, columns = self._pair()
        else:
            return None if self.overlap else counts.n // 4
        return rows * columns

    def _pair(self) -> tuple[int, int]:
        size = self.output_size
        assert size is not None
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def _grids(self, counts: Counts) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid, and the pooled one.

        Raises:
            ParameterError: the tokens are no whole grid, or the pooled one is larger, or does not divide it.
        """
        n, grid = counts.n, counts.grid
        if grid is None or grid[0] * grid[1] != n:
            raise ParameterError(
                f"AveragePool needs the whole grid of a picture; these {n} tokens are "
                + ("no single grid" if grid is None else f"no longer its {grid[0]} x {grid[1]} grid")
            )
        if self.output_size is not None:
            out, even = self._pair(), None
        else:
            out, even = ((grid[0] + 1) // 2, (grid[1] + 1) // 2), 2
        if out[0] > grid[0] or out[1] > grid[1]:
            raise ParameterError(
                f"AveragePool: output_size={out[0]} x {out[1]} is larger than the grid {grid[0]} x {grid[1]}"
            )
        if not self.overlap and any(side % (even or windows) for side, windows in zip(grid, out)):
            fits = [", ".join(str(d) for d in range(1, side + 1) if side % d == 0) for side in grid]
            raise ParameterError(
                f"AveragePool: a grid of {grid[0]} x {grid[1]} tokens cannot be divided into {out[0]} x {out[1]} equal "
                f"windows; output_size with rows of {fits[0]} and columns of {fits[1]} fits, or overlap=True"
            )
        return grid, out
