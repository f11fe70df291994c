"""Caches that lose entries while the answer is written: what is known of each entry between two decode steps.

It travels with the layer of the cache, so that beams reorder it with the entries that it tells of.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.attachment import Entry
from ...core.eviction import heads_as_rows
from ...core.pictures import PAD, TEXT, Picture
from ...core.rows import PromptRows
from .cache_views import Seen, pictures_by_head
from .cache_watch import RECENT

LABEL, PART, ROWS, VALID = "label", "part", "attention_rows", "valid"
"""Names of tables beside masses: picture of each entry or TEXT, PAD; its part; rows that could see it; whether it is
one, for each row of the batch."""


def tables_of(seen: Seen) -> dict[str, Tensor]:
    """What is known of the entries behind a prefill, `[B, past + L, ...]`, by name; of heads as rows in scope ``head``.

    Args:
        seen: the layer's cache, of which nothing has left yet.
    """
    rows = seen.rows
    real = torch.ones_like(rows.label) if rows.valid is None else rows.valid.to(torch.int64)
    behind = (real.flip(1).cumsum(1).flip(1) - rows.drafts).clamp(min=0)
    made = {LABEL: rows.label, ROWS: behind.float()[:, :, None], **seen.masses}
    if rows.part is not None:
        made[PART] = rows.part
    front = seen.past
    return {
        name: F.pad(table, _front(table, front), value=TEXT if name == LABEL else 0) for name, table in made.items()
    }


def _front(table: Tensor, count: int) -> tuple[int, ...]:
    """Padding of `count` columns in front of a table's columns."""
    return (*(0, 0) * (table.dim() - 2), count, 0)


def grown(tables: dict[str, Tensor], attention: Tensor | None, count: int) -> dict[str, Tensor]:
    """Tables behind a call that added text.

    Args:
        tables: as they were.
        attention: fp32 `[B, past + R, H, R]`, what each entry received of the rows of the call, or None where no method
            asks.
        count: R.
    """
    made = {
        name: F.pad(table, (*(0, 0) * (table.dim() - 2), 0, count), value=TEXT if name == LABEL else 0)
        for name, table in tables.items()
        if name != VALID
    }
    behind = torch.arange(count, 0, -1, device=made[ROWS].device, dtype=torch.float32)
    made[ROWS] = made[ROWS] + F.pad(behind, (made[ROWS].shape[1] - count, 0), value=count)[None, :, None]
    if attention is None:
        return made
    whole = attention.sum(3)
    for name in ("attention_mass", "text_mass"):
        if name in made:
            made[name] = made[name] + whole
    if RECENT in made:
        made[RECENT] = torch.cat([made[RECENT], attention], 3)[..., -made[RECENT].shape[3] :]
        made["recent_mass"] = made[RECENT].sum(3)
    return made


def seen_now(
    entry: Entry, tables: dict[str, Tensor], valid: Tensor | None, pictures: list[Picture], keys: Tensor, values: Tensor
) -> Seen:
    """A layer's cache as its method sees it while the answer is written.

    Args:
        entry: the method at its site.
        tables: of the layer; in scope ``head`` of its heads as rows.
        valid: bool `[B, n]`, or None while all entries are real.
        pictures: as they entered.
        keys: `[B, Hkv, n, d]`.
        values: the same.
    """
    heads = keys.shape[1] if entry.scope == "head" else 1
    if entry.scope == "head":
        keys, values, pictures = heads_as_rows(keys), heads_as_rows(values), pictures_by_head(pictures, heads)
        valid = None if valid is None else valid.repeat_interleave(heads, 0)
    label = tables[LABEL] if valid is None else torch.where(valid, tables[LABEL], PAD)
    batch, n = label.shape
    place = torch.arange(n, device=label.device).expand(batch, n)
    lengths = [n] * batch if valid is None else valid.sum(1).tolist()
    gone = [replace(picture, n=None, grid=None, fields={}, cells=0) for picture in pictures]
    rows = PromptRows(batch, n, lengths, gone, label, tables.get(PART), valid, place, place)
    masses = {name: table for name, table in tables.items() if name not in (LABEL, PART)}
    return Seen(entry, rows, masses, keys, values, heads)
