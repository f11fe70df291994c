"""The rows that a prefill begins with: which column belongs to which picture and part, and what hosts keep for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...core.pictures import HELD, PAD, TEXT
from ...core.rows import PromptRows
from ..hosts import Role
from . import shapes
from .call import BLOCKS, HOST, Opened, deepstack
from .parts import PARTS, Look
from .spans import crop_length
from .spec import VLMSpec


def prefill_rows(
    spec: VLMSpec, core: Any, opened: Opened, positions: Tensor, tower_sizes: Iterable[Tensor], trace: bool
) -> PromptRows:
    """The rows of a prefill.

    Args:
        spec: the family.
        core: the inner model.
        opened: the call, with pictures.
        positions: int64 `[..., B, S]`, in the count of the first segment.
        tower_sizes: of pictures and of clips, as the tower was told.
        trace: whether owners of the columns are kept.
    """
    x, pictures, valid, blocks = opened.x, opened.pictures, opened.valid, opened.call.blocks
    lengths, drafts = opened.incoming.lengths, opened.incoming.drafts
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
    look = Look(pictures, x.detach(), positions, core, spec, crop_length(lengths, spec))
    part = PARTS[spec.parts](look)
    if spec.tower_size_argument is not None:
        shapes.measure(pictures, [call.tolist() for call in tower_sizes])
    for picture in pictures:
        picture.show()
    place = torch.arange(columns, device=x.device).expand(batch, columns)
    rows = PromptRows(batch, columns, counts, pictures, label, part, valid, place, positions, drafts=drafts)
    if blocks is not None:
        rows.states[BLOCKS] = blocks
    if trace:
        rows.owner, rows.first_part = place.clone(), part
    return rows


def take_over(spec: VLMSpec, rows: PromptRows, x: Tensor, given: Callable[[Role], Any]) -> dict[Role, Any]:
    """Takes over what hosts keep for each token, so that it follows the cuts.

    Args:
        spec: the family.
        rows: get it as states.
        x: `[B, S, C]`, embeddings.
        given: arguments of the text model.

    Returns:
        Arguments of the text model that change: features that we add ourselves are taken out.
    """
    for role in spec.gather:
        value = given(role)
        if value is not None:
            rows.states[HOST, role.what] = value
    if spec.deepstack is None:
        return {}
    where, what = spec.deepstack
    visual, features = given(where), given(what)
    if visual is None or features is None:
        return {}
    for layer, feature in enumerate(features):
        room = x.new_zeros(x.shape)
        rows.states[deepstack(layer)] = room.masked_scatter(
            visual.unsqueeze(-1).to(x.device), feature.to(x.device, x.dtype)
        )
    return {where: None, what: None}
