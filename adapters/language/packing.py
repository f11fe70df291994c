"""Signals of a tower's crops, taken through the host's own packing, where it reassembles crops behind the projector.

The host turns the crops of a picture into a thumbnail and a canvas: un-padded, shrunk where it is too large, with a
separator behind every row. Signals take the same way, through the same function of the host. `generate` encodes
pictures before its loop and passes picture sizes to no module, so sizes are read back from the features that arrived:
of all canvases that the model's configuration knows, the one is taken whose packing of the projector's output equals
them.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.hooks import weak
from ...core.pictures import Picture
from ...core.rows import PromptRows
from ...core.threads import PerThread
from ...errors import CacheError
from .. import forms, hosts
from ..hosts import Role
from .intake_checks import check_counts, check_shapes
from .parts import separators
from .spans import IMAGE, VIDEO
from .spec import VLMSpec

PROBE = 8
"""Channels of the projector's output that are kept to know it again."""
CLOSE = 1e-2
"""How far the features of a shrunk canvas may lie apart, as a share of the largest."""
STRIP = 1 << 20
"""Rows or columns of a strip so thin that the host's un-padding leaves nothing of its canvas."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """One call of the tower and the projector.

    Attributes:
        probe: `[crops, N, c]`, the first channels of the projector's output.
        signals: of the tower, one entry for each patch, with the axis of the patches.
    """

    probe: Tensor
    signals: dict[str, tuple[Tensor, int]]

    def channels(self) -> Tensor:
        """All signals side by side, fp32 `[crops, N, channels]`."""
        flat = [
            value.movedim(axis, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(-1)
            for value, axis in self.signals.values()
        ]
        return torch.cat([value.float() for value in flat], -1)

    def split(self, packed: Tensor) -> Iterator[tuple[str, Tensor, int]]:
        """Signals of packed channels `[n, channels]`: name, `[n, ...]`, axis in a view."""
        at = 0
        for name, (value, axis) in self.signals.items():
            shape = value.movedim(axis, 1).shape[2:]
            yield name, packed[:, at : at + shape.numel()].unflatten(-1, shape) if shape else packed[:, at], axis
            at += shape.numel()


class Packing:
    """The host's packing of pictures and of clips."""

    def __init__(self, spec: VLMSpec, core: nn.Module) -> None:
        assert spec.packing_methods is not None
        self.pack, self.pool = spec.packing_methods
        self.core = weak(core)
        self._calls = PerThread(lambda: deque[Encoded](maxlen=2))  # pictures are encoded before clips

    @property
    def calls(self) -> deque[Encoded]:
        """The last calls of this thread."""
        return self._calls.mine()

    def record(self, output: Tensor, signals: Mapping[str, tuple[Tensor | None, int | None]]) -> None:
        """Notes what the projector made of a call, and the signals that wait."""
        carried = {
            name: (value, axis)
            for name, (value, axis) in signals.items()
            if value is not None and axis is not None  # what a crop has once has no place in a canvas
        }
        self.calls.append(Encoded(output[..., :PROBE].detach().clone(), carried))

    # ------------------------------------------------------------------ what the arguments of the inner model tell
    def lengths(self, given: Callable[[Role], Any], options: Mapping[str, Any]) -> dict[int, list[int]] | None:
        """Tokens of each picture and clip, before they are encoded.

        Args:
            given: arguments of the inner model, and
            options: the same under the host's names, for its own packing.

        Returns:
            By code, in the order of the placeholders; None where nothing is told.
        """
        core = self.core()
        found: dict[int, list[int]] = {}
        patches = self._side()[1]
        sizes, pixels, clips = (given(role) for role in (hosts.IMAGE_SIZES, hosts.PIXELS, hosts.CLIP_PIXELS))
        if pixels is not None and sizes is not None:
            sizes = check_shapes(hosts.IMAGE_SIZES, sizes, 2).tolist()
            crops = [torch.empty(count, patches, 1, device="meta") for count in self.crops(given)]
            options = {name: value for name, value in options.items() if value is not None}
            packed = self._packed(core, crops, sizes, self._newline(crops[0]), options)
            found[IMAGE] = [len(one) for one in packed]
        if clips is not None and self.pool:
            pooled = getattr(core, self.pool)(torch.empty(1, patches, 1, device="meta")).shape[1]
            found[VIDEO] = [clips.shape[1] * pooled + 1] * clips.shape[0]
        return found or None

    def crops(self, given: Callable[[Role], Any]) -> list[int]:
        """Crops of each picture, thumbnail included.

        Args:
            given: arguments of the inner model.
        """
        sizes = given(hosts.IMAGE_SIZES)
        if sizes is None:
            return []
        sizes = check_shapes(hosts.IMAGE_SIZES, sizes, 2).tolist()
        counts = [self._crops(size) for size in sizes]
        several = given(hosts.SHARED_PICTURES)
        if several is not None:  # pictures that share a prompt are not cut into crops
            alone = [n == 1 for n in check_counts(hosts.SHARED_PICTURES, several, len(sizes)) for _ in range(n)]
            counts = [count if one else 1 for count, one in zip(counts, alone)]
        return counts

    def separators(self, given: Callable[[Role], Any]) -> list[Tensor]:
        """Where the host puts separators into each picture: `[n, 1]`, 1 there and 0 elsewhere.

        Args:
            given: arguments of the inner model.
        """
        crops = [torch.zeros(count, self._side()[1], 1) for count in self.crops(given)]
        if not crops:
            return []
        sizes = check_shapes(hosts.IMAGE_SIZES, given(hosts.IMAGE_SIZES), 2).tolist()
        return self._packed(self.core(), crops, sizes, torch.ones(1), {})

    def _side(self) -> tuple[int, int]:
        vision = self.core().config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side * side

    def _crops(self, size: Any) -> int:
        """Crops of a picture, thumbnail included, as the host counts them."""
        config = self.core().config
        count = forms.beside(self.core(), "image_size_to_num_patches")
        crops: int = count(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return crops

    @staticmethod
    def _newline(like: Tensor) -> Tensor:
        """A separator without any signal."""
        return like.new_zeros(like.shape[-1])

    def _packed(
        self, owner: Any, crops: list[Tensor], sizes: Any, newline: Tensor, given: Mapping[str, Any]
    ) -> list[Tensor]:
        """The host's packing of some crops, `[n, channels]` for each picture."""
        pack = getattr(type(self.core()), self.pack)
        ours = hosts.named(pack, {hosts.FEATURES: crops, hosts.IMAGE_SIZES: sizes, hosts.SEPARATOR: newline})
        names = [name for name in list(inspect.signature(pack).parameters)[1:] if name not in ours]
        rest = {name: given[name] if name in given else getattr(owner.config, name) for name in names}
        packed: list[Tensor] = pack(owner, **ours, **rest)[0]
        return packed

    # ------------------------------------------------------------------ signals of the columns
    def carry(self, rows: PromptRows, x: Tensor, encoded: Mapping[int, int]) -> None:
        """Sets signals of the tower beside the columns of the language model's input; 0 in those of separators.

        Args:
            rows: as they arrive.
            x: `[B, L, C]`, their embeddings.
            encoded: by code, how many pictures the host encoded; beams show them again.

        Raises:
            CacheError: these are not the pictures that the tower saw last.
        """
        kinds = [(code, [p for p in rows.pictures if p.video == (code == VIDEO)]) for code in (IMAGE, VIDEO)]
        kinds = [(code, pictures) for code, pictures in kinds if pictures]
        if not self.calls:
            return
        for (code, pictures), call in zip(reversed(kinds), reversed(self.calls), strict=False):
            if not call.signals:
                continue
            found = self._clips(call, pictures, x) if code == VIDEO else None
            if code == IMAGE:
                found = self._pictures(call, pictures, x, encoded.get(code, len(pictures)))
            if found is None:
                raise CacheError(
                    "the features in this prompt are not those that the tower made last: features of an earlier call, "
                    "or parts of a picture, cannot be combined with methods that read the tower's attention here; "
                    "encode and ask in one call"
                )
            for picture, packed in zip(pictures, found):
                self._set(rows, picture, call, packed)

    @staticmethod
    def _set(rows: PromptRows, picture: Picture, call: Encoded, packed: Tensor) -> None:
        at = (torch.tensor(picture.row), torch.tensor(picture.columns))
        for name, value, axis in call.split(packed):
            if name not in rows.carried:
                rows.carried[name] = (value.new_zeros(rows.batch, rows.length, *value.shape[1:]), axis)
            table = rows.carried[name][0]
            rows.carried[name] = (table.index_put(tuple(i.to(table.device) for i in at), value), axis)

    def _clips(self, call: Encoded, clips: list[Picture], x: Tensor) -> list[Tensor] | None:
        """Packed channels of each clip: frames pooled by the host, one separator at the end."""
        pool = getattr(self.core(), self.pool)
        probe, channels = pool(call.probe), pool(call.channels())
        frames = [(len(clip.columns) - 1) // probe.shape[1] for clip in clips]
        repeat = sum(frames) // len(probe)
        if not repeat or sum(frames) != repeat * len(probe):
            return None
        found: dict[tuple[int, int], Tensor] = {}
        at = 0
        for clip, count in zip(clips, frames):
            if clip.row % repeat:
                continue
            seen = x[clip.row, clip.columns[:-1], :PROBE]
            if count * probe.shape[1] != len(seen) or _apart(probe[at : at + count].flatten(0, 1), seen) > CLOSE:
                return None
            flat = channels[at : at + count].flatten(0, 1)
            found[clip.row, clip.index] = torch.cat([flat, self._newline(flat)[None]])
            at += count
        return _repeated(clips, found, repeat)

    def _pictures(self, call: Encoded, pictures: list[Picture], x: Tensor, encoded: int) -> list[Tensor] | None:
        """Packed channels of each picture, or None where the call did not make these."""
        repeat = len(pictures) // encoded
        if not repeat or len(pictures) % encoded:
            return None
        found: dict[tuple[int, int], Tensor] = {}
        channels, at = call.channels(), 0
        own = [picture for picture in pictures if picture.row % repeat == 0]
        for picture, follow in zip_longest(own, own[1:]):
            best, least = None, CLOSE
            for crops, pinpoint, size in self._canvases(x[picture.row, picture.columns]):
                if not self._ends(call, at + crops, follow, x):
                    continue
                owner = self._owner(pinpoint)
                probe, both = call.probe[at : at + crops], channels[at : at + crops]
                newline = self.core().image_newline[:PROBE].to(probe)
                (shown,) = self._packed(owner, [probe], [size], newline, {})
                apart = _apart(shown, x[picture.row, picture.columns, :PROBE])
                if apart <= least:
                    best, least = (crops, owner, both, size), apart
                if apart == 0:
                    break
            if best is None:
                return None
            crops, owner, both, size = best
            (found[picture.row, picture.index],) = self._packed(owner, [both], [size], self._newline(both), {})
            at += crops
        return _repeated(pictures, found, repeat) if at == len(channels) else None

    def _ends(self, call: Encoded, end: int, follow: Picture | None, x: Tensor) -> bool:
        """Whether a picture's crops can end there: the next one begins with its thumbnail, the last one takes all."""
        if follow is None or end >= len(call.probe):
            return follow is None and end == len(call.probe)
        first = call.probe[end]
        return _apart(first, x[follow.row, follow.columns[: len(first)], :PROBE]) <= CLOSE

    def _owner(self, pinpoint: list[int]) -> Any:
        """What the host's packing reads: its configuration, with one canvas to choose from."""
        config = copy.copy(self.core().config)
        config.image_grid_pinpoints = [pinpoint]
        return SimpleNamespace(config=config)

    def _canvases(self, tokens: Tensor) -> Iterator[tuple[int, list[int], list[int]]]:
        """Canvases that may have become these tokens `[n, C]`, those that were not shrunk first.

        Returns:
            Crops, the canvas in pixels, and rows and columns of patches behind the host's un-padding, which takes equal
            parts of two opposite sides; of a strip it may leave none.
        """
        config = self.core().config
        pixels, (side, patches), n = config.vision_config.image_size, self._side(), len(tokens)
        if n == patches + 1:
            yield 1, [pixels, pixels], [side, side]
            return
        breaks = separators(tokens, self.core().image_newline).to(torch.int8)
        wide = int(breaks[patches:].argmax()) if n > patches else -1
        high = (n - patches) // (wide + 1) if n > patches else 0
        found = []
        for height, width in config.image_grid_pinpoints:
            rows, columns = height // pixels * side, width // pixels * side
            crops = height // pixels * (width // pixels) + 1
            if high == 0 and rows % 2 == 0:
                found.append((0, crops, [height, width], [1, STRIP]))
            if wide == 0 and columns % 2 == 0 and high == rows:
                found.append((0, crops, [height, width], [STRIP, 1]))
            sizes = {(r, columns) for r in range(rows, 0, -2)} | {(rows, c) for c in range(columns, 0, -2)}
            for r, c in sizes if wide > 0 else ():
                # Shrinking keeps the proportions and rounds down.
                if r >= high and c >= wide and r * (wide + 1) > high * c and r * wide < (high + 1) * c:
                    found.append((r * c, crops, [height, width], [r, c]))
        for _, crops, pinpoint, size in sorted(found):
            yield crops, pinpoint, size


def _repeated(pictures: list[Picture], found: dict[tuple[int, int], Tensor], repeat: int) -> list[Tensor]:
    """What was found for the first row of each sample, for all its rows: beams lie one behind the other."""
    return [found[p.row - p.row % repeat, p.index] for p in pictures]


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest number; infinite for different shapes."""
    if a.shape != b.shape:
        return float("inf")
    a, b = (v.detach().float().nan_to_num(nan=0.0) for v in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
