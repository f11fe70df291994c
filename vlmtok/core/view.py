"""`TokenView`: what a method sees of one stage at one moment, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MissingSignal, ParameterError
from .site import Counts, Site

if TYPE_CHECKING:
    from torch import nn

Signal = Tensor | Callable[[], Tensor | None] | None


class TokenView:
    """The reducible tokens of one stage, with lazy signals; built by the core, or by hand in one line.

    A view holds the stage's reducible tokens only: no protected token, no padding. All its rows have the same number
    of tokens. One view row is one picture, one part of a picture or one sample, as the method's ``scope`` says.

    Attributes:
        tokens: `[B, N, C]`, any floating dtype.
        site: the site, as the method named it.
        size: fp32 `[B, N]`, patches each token stands for; None means ones.
        num_prefix: protected tokens in front of the row (CLS, registers); they are not among `tokens`.
        depth: layers of the stage.
        grid: (rows, columns) of the patches as they entered, or None where there is no single grid.
        frames: frames of the clip that a view row is, as the language model gets them (a temporal patch is one frame);
            0 where it is no clip. Pictures of one size in a view of scope ``sample`` count as frames too.
        cells: tokens of each frame while the clip is whole, so that ``tokens.unflatten(1, (frames, cells))`` is the
            clip; else 0.
        part: int64 `[B, N]`: 0 thumbnail or only picture, 1.. crops or frames, -1 separators.
        picture: int64 `[B, N]`: which picture of a sample each token belongs to; 0 where a view row is of one.
        entered: tokens of a row when they entered the stage.
        columns: int64 `[B, N]`, place of each token in its whole row (prefix or text included).
        signals: name to tensor, or to a function that makes it when first asked.
        state: dict of `[B, N, ...]`, kept for this forward and gathered at `keep` by every reduction of any method.
        row: dict of `[B, ...]`, kept for this forward, not gathered.
        memory: the module that `Method.build` made; it lives across forwards.
    """

    def __init__(
        self,
        tokens: Tensor,
        site: Site | None = None,
        size: Tensor | None = None,
        num_prefix: int = 0,
        depth: int = 1,
        grid: tuple[int, int] | None = None,
        part: Tensor | None = None,
        picture: Tensor | None = None,
        entered: int | None = None,
        columns: Tensor | None = None,
        signals: Mapping[str, Signal] | None = None,
        state: MutableMapping[str, Tensor] | None = None,
        row: MutableMapping[str, Any] | None = None,
        memory: nn.Module | None = None,
        frames: int = 0,
        cells: int | None = None,
    ) -> None:
        """Makes a view; only `tokens` is needed.

        Raises:
            ParameterError: `tokens` or `size` have a shape that does not fit.
        """
        if tokens.dim() != 3:
            raise ParameterError(f"TokenView.tokens must be [B, N, C], got {list(tokens.shape)}")
        batch, n, _ = tokens.shape
        if size is not None and size.dim() == 3:
            size = size.squeeze(-1)
        if size is not None and size.shape != (batch, n):
            raise ParameterError(f"TokenView.size must be [B, N] = [{batch}, {n}], got {list(size.shape)}")
        self.tokens = tokens
        self.site = Site("vision", 0) if site is None else site
        self.size = size
        self.num_prefix = num_prefix
        self.depth = depth
        self.grid = grid
        self.frames = frames
        self.cells = (0 if not frames or n % frames else n // frames) if cells is None else cells
        self.entered = n if entered is None else entered
        self.signals = {} if signals is None else signals
        self.state: MutableMapping[str, Tensor] = {} if state is None else state
        self.row: MutableMapping[str, Any] = {} if row is None else row
        self.memory = memory
        self._part = part
        self._picture = picture
        self._columns = columns
        self._made: dict[str, Tensor | None] = {}

    # Made on demand: most methods ask for neither, and a tensor made is a launch paid.
    @property
    def part(self) -> Tensor:
        """int64 `[B, N]`: 0 thumbnail or only picture, 1.. crops or frames, -1 separators."""
        if self._part is None:
            self._part = self._zeros()
        return self._part

    @property
    def picture(self) -> Tensor:
        """int64 `[B, N]`: which picture of a sample each token belongs to; 0 where a view row is of one."""
        if self._picture is None:
            self._picture = self._zeros()
        return self._picture

    def _zeros(self) -> Tensor:
        return torch.zeros(self.tokens.shape[:2], dtype=torch.int64, device=self.tokens.device)

    @property
    def columns(self) -> Tensor:
        """int64 `[B, N]`, place of each token in its whole row."""
        if self._columns is None:
            batch, n, _ = self.tokens.shape
            place = torch.arange(self.num_prefix, self.num_prefix + n, device=self.tokens.device)
            self._columns = place.expand(batch, n)
        return self._columns

    @property
    def counts(self) -> Counts:
        """The same as host ints."""
        n = self.tokens.shape[1]
        return Counts(self.site, n, self.entered, self.num_prefix, self.depth, self.grid, self.frames, self.cells)

    @property
    def layer(self) -> int:
        """The site's layer; 0 where the stage has none."""
        return self.site.layer or 0

    def has(self, name: str) -> bool:
        """Whether `signal(name)` can be asked for; a signal may still turn out to be None (no text row, say)."""
        return name in self.signals

    def signal(self, name: str) -> Tensor:
        """A signal, made when first asked.

        Args:
            name: as in `Site.needs`, for instance ``"keys"`` or ``"cls_attention@vision:-1"``.

        Returns:
            Its tensor; the shapes are those of the table in `vlmtok.core.signals`.

        Raises:
            MissingSignal: the view has no such signal, or it does not exist for these rows.
        """
        value = self.maybe(name)
        if value is None:
            known = ", ".join(sorted(self.signals)) or "none"
            raise MissingSignal(f"signal {name!r} does not exist at {self.site}; this view has: {known}")
        return value

    def maybe(self, name: str) -> Tensor | None:
        """As `signal`, but None where it does not exist (a prompt without text behind the picture, say)."""
        if name not in self._made:
            value = self.signals.get(name)
            self._made[name] = value() if callable(value) else value
        return self._made[name]
