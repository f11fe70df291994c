"""What comes into a text tower: token ids and the mask of padding, and the rows that a pass begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.ledger import StageRun
from ...core.pictures import PAD, TEXT, Picture
from ...core.rows import PromptRows
from ...core.threads import BlockOrder, PerThread
from ...errors import PassError
from .. import hosts
from ..base import TextSpec
from ..hosts import Arguments
from .checks import check_input
from .text_state import TextState
from .tower_pass import Pass, autocast_dtype


@dataclass
class Given:
    """Token ids and mask of the call that a thread is in, or None."""

    ids: tuple[Tensor, Tensor | None] | None = None


class TextIntake:
    """Begins the passes of a text tower.

    Args:
        attachment: whose books.
        spec: the tower as data.
    """

    def __init__(self, attachment: Attachment, spec: TextSpec) -> None:
        self.attachment = attachment
        self.width = spec.width
        self.end_of_text = spec.end
        self.ids = Arguments(spec.ids, [hosts.IDS], [hosts.MASK])
        self.given = PerThread(Given)

    def read(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook where the ids come by."""
        ids = self.ids.get(hosts.IDS, args, kwargs)
        if isinstance(ids, Tensor) and not replaying():
            self.given.mine().ids = (ids.view(-1, ids.shape[-1]), self.ids.get(hosts.MASK, args, kwargs))

    def embed(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Text has no map of patches."""

    def begin(
        self, module: nn.Module, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], watch: BlockOrder
    ) -> Pass:
        """Checks the call of block 0 and makes the state of a forward; its causal mask is made anew for each layer.

        Args:
            module: block 0.
            arguments: of it.
            args: of the call.
            kwargs: of the call.
            watch: how far this thread is.

        Raises:
            PassError: the block was called without the model, whose ids tell where the text ends.
            HostChanged: it gets no row of tokens.
        """
        x = arguments.get(hosts.HIDDEN, args, kwargs)
        check_input(module, x, self.width)
        mine = self.given.mine()
        given, mine.ids = mine.ids, None
        if given is None or given[0].shape != x.shape[:2]:
            raise PassError("the text tower ran without its token ids: call the model, not its blocks")
        watch.begin()
        ids, mask = given
        state = self._state(ids, mask)
        run = self.attachment.ledger.begin(StageRun("text", *ids.shape))
        return Pass(state, run, grad=torch.is_grad_enabled(), autocast=autocast_dtype(x.device.type))

    def _state(self, ids: Tensor, mask: Tensor | None) -> TextState:
        """The rows as they come in; start and end of text are no tokens of a view."""
        batch, length = ids.shape
        end = self.end_of_text(ids)
        label = torch.zeros_like(ids)
        label[:, 0] = TEXT
        label = label.scatter(1, end[:, None], TEXT)
        valid = None if mask is None else mask.bool()
        lengths = [length] * batch
        if valid is not None:
            lengths = valid.sum(1).tolist()
            if min(lengths) == length:
                valid = None
            else:
                label = torch.where(valid, label, PAD)
        counts = (label == 0).sum(1).tolist()
        pictures = [Picture(row, 0, [], n=n, entered=n) for row, n in enumerate(counts)]
        place = torch.arange(length, device=ids.device).expand(batch, length)
        rows = PromptRows(batch, length, lengths, pictures, label, None, valid, place, torch.zeros_like(ids))
        return TextState(rows, length, end)
