"""Signals of a tower's tokens, kept beside the projector's output until the language model's boundary takes them.

Placeholders hold the encoder's tokens in order, row by row; the rows of a sample are repeated for beams. So what waits
is taken in order too, and a few channels of the projector's output tell whether these are the tokens that it belongs
to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.pictures import Picture
from ...core.rows import PromptRows
from ...core.threads import PerThread
from ...errors import CacheError
from .packing import PROBE
from .spans import IMAGE, VIDEO


@dataclass(frozen=True, eq=False)
class Waiting:
    """One call of the tower and the projector.

    Attributes:
        probe: `[T, c]`, the first channels of all tokens of the call, in order.
        signals: name to `[T, ...]`, with the axis of the tokens in a view.
    """

    probe: Tensor
    signals: dict[str, tuple[Tensor, int]]


def probe_of(x: Tensor) -> Tensor:
    """The first channels of tokens `[..., C]`, in one run `[T, c]`, by which they are known again."""
    return x[..., :PROBE].detach().flatten(0, -2).clone()


class SignalQueue:
    """What waits for the placeholders of a prompt, by thread."""

    def __init__(self) -> None:
        self._calls = PerThread(lambda: deque[Waiting](maxlen=2))  # pictures are encoded before clips

    @property
    def calls(self) -> deque[Waiting]:
        """The last calls of this thread."""
        return self._calls.mine()

    def record(self, output: Tensor, signals: Mapping[str, tuple[Tensor, int]]) -> None:
        """Notes what the projector made of a call, and the signals that wait.

        Args:
            output: `[..., C]`, all tokens in the order in which they fill placeholders.
            signals: name to `[..., ...]` with the same leading dimensions, and the axis of the tokens in a view.
        """
        leading = output.dim() - 1
        tokens = {name: (value.flatten(0, leading - 1), axis) for name, (value, axis) in signals.items()}
        self.calls.append(Waiting(probe_of(output), tokens))

    def carry(self, rows: PromptRows, x: Tensor) -> None:
        """Sets signals of the tower beside the columns of the language model's input.

        Args:
            rows: as they arrive.
            x: `[B, L, C]`, their embeddings.

        Raises:
            CacheError: these are not the pictures that the tower saw last.
        """
        kinds = [[p for p in rows.pictures if p.video == (code == VIDEO)] for code in (IMAGE, VIDEO)]
        kinds = [pictures for pictures in kinds if pictures]
        if len(self.calls) < len(kinds):
            raise CacheError(_STRANGE)
        for pictures, call in zip(reversed(kinds), reversed(self.calls), strict=False):
            if call.signals:
                self._place(rows, x, pictures, call)

    @staticmethod
    def _place(rows: PromptRows, x: Tensor, pictures: list[Picture], call: Waiting) -> None:
        held, have = sum(len(picture.columns) for picture in pictures), len(call.probe)
        repeat = held // have if have else 0
        if not repeat or held % have:
            raise CacheError(_STRANGE)
        starts: dict[tuple[int, int], int] = {}
        total = 0
        for picture in pictures:
            if picture.row % repeat == 0:
                starts[picture.row, picture.index] = total
                total += len(picture.columns)
        where: list[tuple[int, int, int]] = []
        for picture in pictures:
            start = starts.get((picture.row - picture.row % repeat, picture.index), have)
            where += [(picture.row, column, start + i) for i, column in enumerate(picture.columns)]
        if total != have or any(source >= have for _, _, source in where):
            raise CacheError(_STRANGE)
        row, column, source = torch.tensor(where, device=x.device).unbind(1)
        probe = call.probe.to(x.device)[source].to(x.dtype)
        if not bool((x[row, column, : probe.shape[1]] == probe).all()):
            raise CacheError(_STRANGE if repeat == 1 else _STRANGE + _BEAMS)
        for name, (value, axis) in call.signals.items():
            if name not in rows.carried:
                rows.carried[name] = (value.new_zeros(rows.batch, rows.length, *value.shape[1:]), axis)
            table = rows.carried[name][0]
            at = (row.to(table.device), column.to(table.device))
            rows.carried[name] = (table.index_put(at, value[source.to(value.device)].to(table.dtype)), axis)


_STRANGE = (
    "the features in this prompt are not those that the tower made last, in their order: features of an earlier call, "
    "or parts of a picture (a prefill in chunks), cannot be combined with methods that read the tower's attention "
    "here; encode and ask in one call"
)
_BEAMS = (
    "; this call repeats rows, and with beams some hosts (GLM-4.1V and GLM-4.6V in transformers) give rows of several "
    "pictures the features of others, with vlmtok or without: use one beam there, or one picture a prompt"
)
