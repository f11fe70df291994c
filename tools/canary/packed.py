"""Facts of towers of transformers that pack pictures of any size, or pad them, asked for rows with hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vlmtok.adapters.base import BlockSpec
from vlmtok.adapters.towers import packed_spec, sized_attention
from vlmtok.adapters.towers.packed_rows import PACKED_ROWS, PackedRow

from .auto import Chooser, config_field
from .classes import HostClass, signature_of
from .facts import Questions
from .needs import NothingRead, Read, keywords, reads
from .shown import reached
from .towers import block_facts

PACKED: dict[str, PackedRow] = {kind: row for kind, row in PACKED_ROWS.items() if row.block is not None}
"""Rows of towers that hooks are placed on, by ``config.model_type``."""


def packed_facts(ask: Questions, chooser: Chooser, kind: str, row: PackedRow, towers: Iterable[HostClass]) -> None:
    """Facts of a tower that packs or pads pictures.

    Args:
        ask: takes the facts.
        chooser: of the release.
        kind: ``config.model_type``.
        row: of the family, with hook points.
        towers: classes that hold the blocks.
    """
    config, block = chooser.config(kind), chooser.beside(kind, row.layer)
    if ask.check(config is not None, f"no configuration has the tower's type {kind!r}"):
        assert config is not None
        for name in _fields(row):
            ask.check(config_field(config, name), f"the configuration of its tower has no `{name}`", config)
    for tower in towers:
        ask.check(reached(tower, row.layer), f"its tower holds no {row.layer}", tower)
        _parts(ask, tower, row)
    if ask.check(block is not None, f"there is no class {row.layer}"):
        assert block is not None and row.block is not None
        for path in (row.attn, row.mlp):
            ask.check(block.has(path), f"its blocks have no `{path}`", block)
        attentions = [made for made in block.made_of(row.block.attn) if isinstance(made, HostClass)]
        ask.check(attentions, f"its blocks have no `{row.block.attn}` of a class that is known", block)
        block_facts(ask, block, row.block, attentions)
        for attention in attentions:
            _form(ask, attention, row.block)


def whole_fields(row: PackedRow) -> list[str]:
    """Fields of the whole model's configuration that the row cannot do without."""
    return [read.path for read in _read(row.merge, "whole") if not read.default]


def _fields(row: PackedRow) -> list[str]:
    """Fields of the tower's configuration that the row and our code read."""
    wanted = [row.width, row.heads, "patch_size"]
    for function, root in ((row.merge, "own"), (row.span, "config"), (row.window, "config")):
        if callable(function):
            wanted += [read.path for read in _read(function, root) if not read.default]
    if row.window is not None:
        wanted += [read.path for read in reads(packed_spec._form, "config") if not read.default]
    return list(dict.fromkeys(wanted))


def _read(function: Callable[..., Any], root: str) -> tuple[Read, ...]:
    """What a function of a row reads of one of its values, which may be nothing."""
    try:
        return reads(function, root)
    except NothingRead:
        return ()


# ---------------------------------------------------------------------- the tower
def _parts(ask: Questions, tower: HostClass, row: PackedRow) -> None:
    """Where its parts are, and what they are told of sizes."""
    for path in filter(None, (row.stem, row.pool, row.readers, row.table)):
        _at(ask, tower, path)
    for told in _at(ask, tower, row.told):
        ask.takes(told, "the tower", *([] if row.sizes is None else [row.sizes]))
    for around in _at(ask, tower, row.table.rpartition(".")[0]) if row.table is not None else ():
        ask.check(around.has(row.resize), f"what holds its embedding of places has no `{row.resize}`", around)
    if row.window is not None:
        name = packed_spec._WINDOWS
        place = tower.module.find(name)
        if ask.check(place is not None, f"the module of its tower has no `{name}`", tower):
            assert place is not None
            given = signature_of(place[1]).names  # type: ignore[arg-type]
            for word in keywords(packed_spec._form, "find"):
                ask.check(word in given, f"`{name}` has no argument `{word}`", tower)


def _at(ask: Questions, tower: HostClass, path: str) -> list[HostClass]:
    """Classes of the library at a path of the tower; empty is the tower itself."""
    owners = [tower]
    for part in path.split(".") if path else ():
        found: list[HostClass] = []
        for owner in owners:
            if ask.check(owner.has(part), f"its tower has no `{path}`", owner):
                found += [kind for kind in owner.made_of(part) if isinstance(kind, HostClass)]
        owners = list(dict.fromkeys(found))
    return owners


# ---------------------------------------------------------------------- its attention
def _form(ask: Questions, attention: HostClass, spec: BlockSpec) -> None:
    """The attention is of a known form, and looks its function up where a bias can be brought in."""
    made = next((cls.name for cls in attention.lineage if "forward" in cls.own), attention.name)
    known = {form.rpartition(":")[2] for form in spec.forms}
    ask.check(made in known, "the attention of its blocks is of no known form", attention)
    beside = spec.functions
    if spec.by_name:
        beside += (sized_attention._TABLE, sized_attention._EAGER)
        ask.check(attention.has("config"), "the attention of its blocks has no `config`", attention)
    for name in beside:
        found = attention.module.find(name)
        ask.check(found is not None, f"the module of the attention of its blocks has no `{name}`", attention)
