"""What travels beside the embeddings of pictures: features for the first layers, and positions of their own.

vLLM keeps one tensor for each picture, cuts it where it cuts a prompt, and hands rows back when it embeds a step's
tokens. So everything of a token lies side by side in its row, and is taken apart there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = 256
"""A position is two channels of digits to this base: bfloat16 holds whole numbers exactly up to it."""

AXES = 3


class Carried(nn.Module):
    """Takes rows apart, and keeps what belongs to the tokens of the step that runs.

    Args:
        width: channels of an embedding.
        levels: layers behind which features are added.
        moves: whether tokens bring positions.
        tokens: of a step, at most.
        dtype: of the model.
        device: of the model.
    """

    stacked: Tensor
    moved: Tensor

    def __init__(
        self, width: int, levels: int, moves: bool, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.width, self.levels, self.moves = width, levels, moves
        stacked = torch.zeros(levels, tokens, width, dtype=dtype, device=device)
        moved = torch.zeros(AXES, tokens if moves else 0, dtype=torch.long, device=device)
        self.register_buffer("stacked", stacked, persistent=False)
        self.register_buffer("moved", moved, persistent=False)
        self._used = False

    @property
    def wide(self) -> int:
        """Channels of a row."""
        return self.width * (1 + self.levels) + 2 * AXES * self.moves

    def join(self, rows: Tensor, stacked: Tensor | None, positions: Tensor | None) -> Tensor:
        """Everything of a picture's tokens, `[K, wide]`.

        Args:
            rows: `[K, C]`.
            stacked: `[levels, K, C]`, or None.
            positions: int64 `[3, K]`, from the picture's first token on, or None.

        Raises:
            ValueError: a position is too large for two digits.
        """
        parts = [rows]
        if self.levels:
            made = rows.new_zeros(self.levels, *rows.shape) if stacked is None else stacked
            parts += list(made.to(rows.dtype))
        if self.moves:
            if positions is None or (
                positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < BASE**2
            ):
                raise ValueError(f"positions of a picture must lie in 0 .. {BASE**2 - 1}")
            parts += [(positions // BASE).T.to(rows.dtype), (positions % BASE).T.to(rows.dtype)]
        return torch.cat(parts, dim=-1)

    def take(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Takes rows apart and keeps what is not an embedding.

        Args:
            rows: `[M, wide]`, of a step's visual tokens in order.
            columns: bool `[S]`, which tokens of the step they are.

        Returns:
            The embeddings, `[M, C]`.
        """
        self.forget()
        if self.levels or self.moves:
            self._used = True
            places = columns.nonzero()[:, 0].to(rows.device)
            features = rows[:, self.width : self.width * (1 + self.levels)]
            for level, feature in enumerate(features.split(self.width, dim=-1) if self.levels else ()):
                self.stacked[level, places] = feature
            if self.moves:
                high, low = rows[:, self.width * (1 + self.levels) :].long().split(AXES, dim=-1)
                self.moved[:, places] = (high * BASE + low).T
        return rows[:, : self.width]

    def forget(self) -> None:
        """A step without pictures begins."""
        if self._used:
            self.stacked.zero_()
            self.moved.zero_()
            self._used = False

    def positions(self, given: Tensor) -> Tensor:
        """Positions of a step's tokens, int64 `[3, S]`: those of pictures are counted from their first token."""
        return given + self.moved[:, : given.shape[-1]] if self.moves else given

    def behind(self, level: int) -> _Behind:
        """A hook that adds features behind a layer."""
        return _Behind(self, level)


class _Behind:
    """Forward hook of a layer."""

    def __init__(self, carried: Carried, level: int) -> None:
        self.carried, self.level = carried, level

    def __call__(self, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        added = hidden + self.carried.stacked[self.level, : hidden.shape[-2]]
        return (added, *output[1:]) if isinstance(output, tuple) else added
