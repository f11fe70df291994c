"""From the arguments of the inner model to the rows of a prefill: where its pictures are, what belongs to each token.

The inner model is told more than the text model; hooks on it and on the tower note what the text model's pre-hook will
ask for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying, weak
from ...core.rows import Picture
from ...core.threads import PerThread
from ...errors import CacheError
from .. import host_objects, hosts
from ..base import child
from ..hosts import Arguments, Role
from . import shapes
from .call import Incoming
from .checks import check_call
from .intake_checks import check_encoded, check_tokens
from .placeholders import aligned_types, check_features, column_codes, placeholders, warn_of_unseen
from .projector import Projector
from .spans import IMAGE, NONE, VIDEO, find_pictures, usable
from .spec import VLMSpec


@dataclass
class IntakeRun:
    """What a thread's call brought so far.

    Attributes:
        tower_sizes: of pictures and of clips, as the tower was told.
        incoming: what the inner model was called with, until the text model takes it.
        drafts: last columns that hold drafts of speculative decoding.
    """

    tower_sizes: deque[Tensor] = field(default_factory=lambda: deque(maxlen=2))
    incoming: Incoming | None = None
    drafts: int = 0


class Intake:
    """Hooks on the inner model and the tower, and the rows made of what they saw.

    Args:
        attachment: whose hooks they are.
        spec: the family.
        core: the inner model.
        projector: which knows how many tokens the tower left of each picture.
    """

    def __init__(self, attachment: Attachment, spec: VLMSpec, core: nn.Module, projector: Projector) -> None:
        self.attachment = attachment
        self.spec = spec
        self.core = weak(core)
        self.projector = projector
        of_pictures = [*spec.grid_arguments, *([] if spec.types is None else [spec.types])]
        required = [hosts.IDS, hosts.EMBEDDINGS, hosts.MASK, hosts.POSITIONS, hosts.CACHE, hosts.PIXELS, *of_pictures]
        also = [hosts.CLIP_PIXELS, hosts.ENCODED, hosts.CLIP_FRAMES, hosts.IMAGE_SIZES, hosts.SHARED_PICTURES]
        self.arguments = Arguments(core, required, also)
        self.ids = placeholders(core, spec)
        self.grid_arguments = dict(zip((IMAGE, VIDEO), spec.grid_arguments))
        self.running = PerThread(IntakeRun)

    def install(self, core: nn.Module, model: nn.Module) -> None:
        """Places the hooks."""
        if model is not core:
            self.asked = Arguments(model, [hosts.CACHE, hosts.LOGITS])
            self.attachment.hook(model, "pre", self.ask)
        self.attachment.hook(core, "pre", self.enter)
        self.attachment.hook(core, "close", self.leave)
        if self.spec.tower_size_argument is not None:
            tower = child(core, self.spec.tower)
            self.tower_arguments = Arguments(tower, [self.spec.tower_size_argument])
            self.attachment.hook(tower, "pre", self.measure)

    # ------------------------------------------------------------------ hooks
    def ask(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on the whole model: how many drafts speculative decoding put behind the prompt.

        It wants logits of the prompt's last token and of every draft, on a cache. What the drafts say must not decide
        what stays: their tokens may be thrown away again.
        """
        wanted = self.asked.get(hosts.LOGITS, args, kwargs)
        cached = host_objects.cache_in(module, self.asked, args, kwargs) is not None
        self.running.mine().drafts = wanted - 1 if cached and isinstance(wanted, int) and wanted > 1 else 0

    def enter(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Core pre-hook: where the pictures are; placeholders count only where features come along."""

        def given(role: Role) -> Any:
            return self.arguments.get(role, args, kwargs)

        running = self.running.mine()
        encoded = check_encoded(hosts.ENCODED, given(hosts.ENCODED))
        features = {
            code: host_objects.features_in(module, encoded[name], self.spec.projects_late)
            for code, name in ((IMAGE, hosts.IMAGE_KEY), (VIDEO, hosts.CLIP_KEY))
            if encoded.get(name) is not None
        }
        pixels = given(hosts.PIXELS) is not None or given(hosts.CLIP_PIXELS) is not None
        ids, mask, x = given(hosts.IDS), given(hosts.MASK), given(hosts.EMBEDDINGS)
        types = None if self.spec.types is None else given(self.spec.types)
        of_types = None if self.spec.types is None else (self.spec.types, types)
        check_tokens((hosts.IDS, ids), (hosts.EMBEDDINGS, x), of_types, (hosts.MASK, mask))
        types = aligned_types(types, x if ids is None else ids, mask)
        codes = None
        if features or pixels:
            codes = column_codes(module, self.ids, self.spec, ids, x, types)
        lengths: dict[int, list[int]] | None
        if pixels:
            running.tower_sizes.clear()  # the tower is about to be called
            self.projector.forget()
            packing = self.projector.packing
            if packing is None:
                lengths = shapes.lengths(self.grid_arguments, given, module.config)
            else:
                lengths = packing.lengths(given, self.arguments.called(args, kwargs))
        else:
            lengths = {code: [len(part) for part in parts] for code, parts in features.items() if parts is not None}
        placed = given(hosts.POSITIONS) is not None
        drafts, running.drafts = running.drafts, 0
        seen = {code: len(set(map(id, parts))) for code, parts in features.items() if isinstance(parts, (list, tuple))}
        running.incoming = Incoming(codes, mask, types, lengths or None, placed, seen, drafts)
        if given(hosts.PIXELS) is not None and self.spec.lengths_of == "crop":
            # `[crops, channels, H, W]`, or `[pictures, crops, channels, H, W]`.
            running.incoming.crops = given(hosts.PIXELS).shape[:-3].numel()
        if codes is None:
            running.incoming.ids = ids
        elif not pixels and features.get(IMAGE) is not None:
            running.incoming.made = self.projector.made(features[IMAGE])

    def leave(self, layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Core hook, after an exception too: what a call came with is gone with it."""
        self.running.mine().incoming = None

    def measure(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tower pre-hook: rows and columns of the pictures that it encodes."""
        role = self.spec.tower_size_argument
        assert role is not None
        value = self.tower_arguments.get(role, args, kwargs)
        if value is not None and not replaying():
            self.running.mine().tower_sizes.append(shapes.read(role, value, self.core().config))

    # ------------------------------------------------------------------ for the text model
    def take(self, mask: Any, positions: Any) -> Incoming:
        """What this call came with; where the text model was called alone, its own arguments tell."""
        running = self.running.mine()
        incoming, running.incoming = running.incoming, None
        return Incoming(None, mask, None, None, positions is not None) if incoming is None else incoming

    def find(
        self, incoming: Incoming, batch: int, columns: int, held: int, cache: Any
    ) -> tuple[list[Picture], Tensor | None]:
        """Pictures of a call that the mask does not hide, and which columns are no padding.

        Args:
            incoming: what the call came with.
            batch: B.
            columns: S.
            held: columns that the cache holds.
            cache: of the call, or None.
        """
        pictures: list[Picture] = []
        valid: Tensor | None = None
        if incoming.codes is not None and incoming.codes.shape == (batch, columns):
            check_call(incoming.mask, cache)
            pictures, valid = self._pictures(incoming, columns)
        if incoming.codes is None and incoming.ids is None and columns > 1 and not torch.compiler.is_compiling():
            warn_of_unseen(self.attachment)
        check_features(self.core(), self.ids, incoming, pictures, columns, held)
        return [picture for picture in pictures if picture.n], valid  # one that the mask hides is padding

    def _pictures(self, incoming: Incoming, columns: int) -> tuple[list[Picture], Tensor | None]:
        """Finds the pictures of a call; the one read-back of a prefill.

        Args:
            incoming: with codes.
            columns: S.

        Returns:
            The pictures, row by row, and bool `[B, S]`, which columns are no padding, or None where all are real.
        """
        codes, mask = incoming.codes, incoming.mask
        assert codes is not None
        valid = None if mask is None else mask[:, -columns:].bool()
        both = codes if valid is None else torch.stack([codes, valid.to(torch.int8)])
        made = torch.ones((), device=codes.device) if incoming.made is None else incoming.made
        read = torch.cat([both.flatten(), made.to(both)[None]]).cpu()
        if not read[-1]:
            raise CacheError(
                "the features in this prompt are not those that the tower made last in this thread: features of an "
                "earlier call, of the bare model or of another thread, and parts of a picture (a prefill in chunks), "
                "cannot be combined with cuts or signals of the tower; encode and ask in one call"
            )
        host = read[:-1].view(both.shape).tolist()
        seen, real = (host, None) if valid is None else host
        if real is not None and all(map(all, real)):
            valid = real = None
        total = sum(code in (IMAGE, VIDEO) for row in seen for code in row)
        lengths = self.projector.lengths(usable(incoming.lengths, self.spec), total)
        pictures = find_pictures(seen, lengths)
        if incoming.crops and total % incoming.crops == 0:
            incoming.lengths = {IMAGE: [total // incoming.crops] * incoming.crops}
        prompt = columns - incoming.drafts
        if any(max(p.columns) >= prompt for p in pictures) or (real and not all(all(row[prompt:]) for row in real)):
            incoming.drafts, prompt = 0, columns  # not what speculative decoding puts there
        for picture in pictures:
            row = seen[picture.row][:prompt]
            text = [c == NONE and (real is None or bool(real[picture.row][i])) for i, c in enumerate(row)]
            picture.text_after = sum(text[picture.columns[0] :])
            picture.text_after_last = sum(text[picture.columns[-1] :])
            picture.n = len(picture.columns)
        self.projector.number(pictures)
        if real is not None:
            self._hide(pictures, real)
        return pictures, valid

    def _hide(self, pictures: list[Picture], real: list[list[int]]) -> None:
        """Placeholders that the mask hides are padding.

        Raises:
            CacheError: what the tower left of such a picture, or its signals, are on their way.
        """
        for picture in pictures:
            picture.hidden = [not real[picture.row][column] for column in picture.columns]
            if not any(picture.hidden):
                continue
            if self.projector.waits():
                raise CacheError(
                    f"the attention mask hides {sum(picture.hidden)} of the {len(picture.columns)} tokens of picture "
                    f"{picture.index} in row {picture.row}, which cannot be combined with methods that cut in the "
                    "tower or read its signals; leave the mask open there, or use methods of the language model alone"
                )
            picture.n = len(picture.columns) - sum(picture.hidden)

    def tower_sizes(self) -> list[Tensor]:
        """Rows and columns of pictures and of clips, as the tower was told in this thread."""
        return list(self.running.mine().tower_sizes)
