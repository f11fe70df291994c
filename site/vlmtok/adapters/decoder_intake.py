"""From the arguments of the inner model to the rows of a prefill: where its pictures are, what belongs to each token.

The inner model is told more than the text model; hooks on it and on the tower note what the text model's pre-hook will
ask for.
"""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment import Attachment, replaying, weak
from ..rows import HELD, PAD, TEXT, Picture, Rows
from . import shapes
from .base import VLMSpec, child
from .decoder_call import BLOCKS, HOST, Incoming, deepstack
from .handover import Projector
from .spans import IMAGE, NONE, PARTS, VIDEO, Look, crop_length, find_pictures, usable


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
        self.signature = inspect.signature(type(core).forward)
        config: Any = core.config
        self.ids = [getattr(config, name, None) for name in spec.ids]
        self.told = dict(zip((IMAGE, VIDEO), spec.told))
        self.shapes: deque[Tensor] = deque(maxlen=2)  # of pictures and of clips, as the tower was told
        self.incoming: Incoming | None = None
        self.drafts = 0

    def install(self, core: nn.Module, model: nn.Module) -> None:
        """Places the hooks."""
        if model is not core:
            self.attachment.hook(model, "pre", self.ask)
        self.attachment.hook(core, "pre", self.enter)
        if self.spec.shapes is not None:
            tower = child(core, self.spec.tower)
            self.tower_signature = inspect.signature(type(tower).forward)
            self.attachment.hook(tower, "pre", self.measure)

    # ------------------------------------------------------------------ hooks
    def ask(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on the whole model: how many drafts speculative decoding put behind the prompt.

        It wants logits of the prompt's last token and of every draft, on a cache. What the drafts say must not decide
        what stays: their tokens may be thrown away again.
        """
        wanted = kwargs.get("logits_to_keep")
        cached = kwargs.get("past_key_values") is not None
        self.drafts = wanted - 1 if cached and isinstance(wanted, int) and wanted > 1 else 0

    def enter(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Core pre-hook: where the pictures are; placeholders count only where features come along."""
        given = self.signature.bind(module, *args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        encoded = given.get("mm_encoder_outputs") or {}
        features = {
            code: getattr(encoded[name], "pooler_output", None)  # absent where the projector runs later
            for code, name in ((IMAGE, "image"), (VIDEO, "video"))
            if encoded.get(name) is not None
        }
        pixels = any(given.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        types = given.get(self.spec.types) if self.spec.types else None
        codes = None
        if features or pixels:
            codes = self._codes(module, given.get("input_ids"), given.get("inputs_embeds"), types)
        lengths: dict[int, list[int]] | None
        if pixels:
            self.shapes.clear()  # the tower is about to be called
            packing = self.projector.packing
            if packing is None:
                lengths = shapes.lengths(self.told, given, module.config)
            else:
                packing.calls.clear()
                lengths = packing.lengths(given)
        else:
            lengths = {code: [len(part) for part in parts] for code, parts in features.items() if parts is not None}
        placed = given.get("position_ids") is not None
        drafts, self.drafts = self.drafts, 0
        seen = {code: len(set(map(id, parts))) for code, parts in features.items() if isinstance(parts, (list, tuple))}
        self.incoming = Incoming(codes, given.get("attention_mask"), types, lengths or None, placed, seen, drafts)

    def measure(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tower pre-hook: rows and columns of the pictures that it encodes."""
        name = self.spec.shapes
        assert name is not None
        value = self.tower_signature.bind(module, *args, **kwargs).arguments.get(name)
        if value is not None and not replaying():
            self.shapes.append(shapes.read(name, value, self.core().config))

    def _codes(self, module: Any, ids: Tensor | None, embeds: Tensor | None, types: Tensor | None) -> Tensor | None:
        """What each column is, int8 `[B, S]`."""
        if ids is None:
            if embeds is None:
                return None
            table = module.get_input_embeddings()
            ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
            for number in self.ids:
                if number is not None:
                    wanted = table(torch.tensor(number, device=embeds.device)).to(embeds.dtype)
                    ids = torch.where((embeds == wanted).all(-1), number, ids)
        codes = torch.full(ids.shape, NONE, dtype=torch.int8, device=ids.device)
        for code, number in zip((IMAGE, VIDEO), self.ids):
            if number is not None:
                codes = torch.where(ids == number, code, codes)
        if types is not None and self.spec.positions == "mrope":  # some clips carry the id of pictures
            clip = (types[:, -ids.shape[1] :] == 2) & (codes > 0)
            codes = torch.where(clip, VIDEO, codes)
        return codes.to(torch.int8)

    # ------------------------------------------------------------------ for the text model
    def take(self, kwargs: dict[str, Any]) -> Incoming:
        """What this call came with; where the text model was called alone, its own arguments tell."""
        incoming, self.incoming = self.incoming, None
        if incoming is None:
            incoming = Incoming(None, kwargs.get("attention_mask"), None, None, kwargs.get("position_ids") is not None)
        return incoming

    def pictures(self, incoming: Incoming, columns: int) -> tuple[list[Picture], Tensor | None]:
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
        host = both.cpu().tolist()
        seen, real = (host, None) if valid is None else host
        if real is not None and all(map(all, real)):
            valid = real = None
        total = sum(code in (IMAGE, VIDEO) for row in seen for code in row)
        lengths = self.projector.lengths(usable(incoming.lengths, self.spec), total)
        pictures = find_pictures(seen, lengths)
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
        return pictures, valid

    def rows(
        self,
        x: Tensor,
        pictures: list[Picture],
        valid: Tensor | None,
        positions: Tensor,
        blocks: Tensor | None,
        lengths: dict[int, list[int]] | None,
        drafts: int,
    ) -> Rows:
        """The rows of a prefill.

        Args:
            x: `[B, S, C]`, embeddings.
            pictures: of the call, and
            valid: bool `[B, S]` or None, as `pictures` gave them.
            positions: int64 `[..., B, S]`, in the count of the first segment.
            blocks: int64 `[B, S]`, bidirectional blocks, or None.
            lengths: by code, what the encoder's outputs told, or None.
            drafts: last columns that hold drafts of the answer.
        """
        batch, columns = x.shape[:2]
        label = torch.full((batch, columns), TEXT)
        label[:, columns - drafts :] = HELD
        for picture in pictures:
            label[picture.row, picture.columns] = picture.index
        label = label.to(x.device)
        counts = [columns] * batch
        if valid is not None:
            label = torch.where(valid, label, PAD)
            counts = valid.sum(1).tolist()
        look = Look(pictures, x.detach(), positions, self.core(), self.spec, crop_length(lengths, self.spec))
        part = PARTS[self.spec.parts](look)
        if self.spec.shapes is not None:
            shapes.measure(pictures, [call.tolist() for call in self.shapes])
        place = torch.arange(columns, device=x.device).expand(batch, columns)
        rows = Rows(batch, columns, counts, pictures, label, part, valid, place, positions, drafts=drafts)
        if blocks is not None:
            rows.states[BLOCKS] = blocks
        if self.attachment.trace:
            rows.owner, rows.first_part = place.clone(), part
        return rows

    def own(self, rows: Rows, kwargs: dict[str, Any]) -> None:
        """Takes over what hosts keep for each token, so that it follows the cuts.

        Args:
            rows: get it as states.
            kwargs: of the text model; features that we add ourselves are taken out.
        """
        for name in self.spec.gather:
            if kwargs.get(name) is not None:
                rows.states[HOST, name] = kwargs[name]
        if self.spec.deepstack is None:
            return
        where, what = self.spec.deepstack
        visual, features = kwargs.get(where), kwargs.get(what)
        if visual is None or features is None:
            return
        x = kwargs["inputs_embeds"]
        for layer, feature in enumerate(features):
            room = x.new_zeros(x.shape)
            rows.states[deepstack(layer)] = room.masked_scatter(
                visual.unsqueeze(-1).to(x.device), feature.to(x.device, x.dtype)
            )
        kwargs[where] = kwargs[what] = None
