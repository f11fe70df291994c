"""Placeholders of pictures in a prompt: their ids, the columns that they fill, and calls that do not tell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.attachment import Attachment
from ...core.rows import Picture
from ...errors import UnsupportedModel, VlmtokWarning
from .. import hosts
from .call import Incoming
from .spans import IMAGE, NONE, VIDEO
from .spec import VLMSpec


def placeholders(core: Any, spec: VLMSpec) -> list[int | None]:
    """Ids of the placeholders of pictures and of clips, from a model's configuration.

    Raises:
        UnsupportedModel: the configuration has no id for pictures.
    """
    ids = [getattr(core.config, name, None) for name in spec.ids]
    if not isinstance(ids[0], int):
        raise UnsupportedModel(
            f"the configuration of {type(core).__name__} ({hosts.library_of(core)}) has no {spec.ids[0]!r}, by which "
            "pictures are found in a prompt"
        )
    return ids


def column_codes(
    module: Any,
    numbers: Sequence[int | None],
    spec: VLMSpec,
    ids: Tensor | None,
    embeds: Tensor | None,
    types: Tensor | None,
) -> Tensor | None:
    """What each column is, int8 `[B, S]` (see `spans`), or None where nothing tells.

    Args:
        module: the inner model.
        numbers: ids of the placeholders.
        spec: the family.
        ids: int64 `[B, S]`, token ids, or None.
        embeds: `[B, S, C]`, embeddings, which are looked at where there are no ids.
        types: int `[B, S]`, type ids, or None.
    """
    if ids is None:
        if embeds is None:
            return None
        table = module.get_input_embeddings()
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for number in numbers:
            if number is not None:
                wanted = table(torch.tensor(number, device=embeds.device)).to(embeds.dtype)
                ids = torch.where((embeds == wanted).all(-1), number, ids)
    codes = torch.full(ids.shape, NONE, dtype=torch.int8, device=ids.device)
    for code, number in zip((IMAGE, VIDEO), numbers):
        if number is not None:
            codes = torch.where(ids == number, code, codes)
    if types is not None and spec.positions == "mrope":  # some clips carry the id of pictures
        clip = (types == 2) & (codes > 0)
        codes = torch.where(clip, VIDEO, codes)
    return codes.to(torch.int8)


def aligned_types(types: Tensor | None, columns: Tensor | None, mask: Any) -> Tensor | None:
    """Type ids of the new columns, int `[B, S]`: callers may give those of the past too, or leave out drafts (text)."""
    if types is None or columns is None:
        return types
    count = columns.shape[1]
    whole = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else count
    types = types.long() if types.dtype == torch.bool else types
    missing = max(whole, count) - types.shape[1]
    if types.shape[1] != count and missing > 0:
        types = torch.nn.functional.pad(types, (0, missing))
    return types[:, -count:]


def check_features(
    module: Any, numbers: Sequence[int | None], incoming: Incoming, pictures: list[Picture], columns: int, held: int
) -> None:
    """Placeholders without features, or features without placeholders, are no call that is known.

    Args:
        module: the inner model.
        numbers: ids of the placeholders.
        incoming: what the call came with.
        pictures: that were found.
        columns: S.
        held: columns that the cache holds.

    Raises:
        HostChanged: one came without the other; a compression would do nothing and say nothing.
    """
    if held:  # a placeholder that was generated is text
        return
    if incoming.codes is not None and not pictures:
        raise hosts.changed(
            module,
            f"features of pictures came along, and none of the placeholders {numbers} stands in the prompt",
        )
    ids = incoming.ids
    if ids is None or columns == 1 or torch.compiler.is_compiling():
        return
    known = torch.tensor([number for number in numbers if number is not None], device=ids.device)
    count = int(torch.isin(ids, known).sum())
    if count:
        raise hosts.changed(
            module,
            f"the prompt holds {count} placeholders of pictures, and no pixels or features came with them under a "
            f"known name ({', '.join(hosts.PIXELS.names + hosts.ENCODED.names)}). In assisted generation "
            "an assistant gets the prompt without its pictures; compress the model that it drafts for, not itself",
        )


def warn_of_unseen(attachment: Attachment) -> None:
    """Warns, once, of methods that let a prompt of embeddings alone pass: its pictures may be merged in already."""
    ledger = attachment.ledger
    if ledger.unseen:
        return
    fired = {key[3] for key in ledger.fired}
    idle = {
        entry.index
        for entry in attachment.entries
        if entry.site.stage in ("projected", "decoder") or entry.index not in fired
    }
    if not idle:
        return
    ledger.unseen = True
    ids, pixels, encoded, given = (r.names[0] for r in (hosts.IDS, hosts.PIXELS, hosts.ENCODED, hosts.EMBEDDINGS))
    warnings.warn(
        f"{' + '.join(str(attachment.methods[index]) for index in sorted(idle))} cut nothing in this prompt: "
        f"it came as embeddings alone ({given}), in which pictures that are merged in "
        f"already cannot be told from text; give the pictures along ({pixels}, or {encoded}) and the prompt as "
        f"{ids}, or as embeddings that still hold the placeholders, and let the model merge them",
        VlmtokWarning,
        stacklevel=2,
    )
