"""Facts of blocks that the driver of towers cuts, and of the vision models of transformers that hold them."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from torch import nn
from vlmtok.adapters.base import BlockSpec
from vlmtok.adapters.towers import hf_rows
from vlmtok.adapters.towers.hf_rows import VisionRow, text_spec
from vlmtok.adapters.towers.hf_vit import HFDual

from .auto import Chooser, config_field
from .classes import HostClass
from .facts import Findings, Questions
from .needs import ROLES, Read, module_reads, reads
from .shown import called_in_order, reached

OF_TORCH = frozenset(name for name in dir(nn.Module()) if not name.startswith("__"))
"""Attributes that every module has."""


def block_facts(ask: Questions, block: HostClass, spec: BlockSpec, attentions: Iterable[HostClass]) -> None:
    """What the surgery leans on in one class of blocks.

    Args:
        ask: takes the facts.
        block: the class.
        spec: its hook points.
        attentions: classes of its attention; torch's own is not looked at.
    """
    paths = tuple(dict.fromkeys((spec.norm, spec.attn, spec.mid, spec.mlp, spec.branch_end)))
    for path in paths:
        ask.check(block.has(path.split(".")[0]), f"its blocks have no `{path}`", block)
    forward = block.method("forward")
    called = [] if forward is None else list(called_in_order(block, forward))
    order = [called.index(path) if path in called else -1 for path in paths]
    told = ", ".join(paths)
    ask.check(-1 not in order and order == sorted(order), f"its blocks do not call {told} in this order", block)
    ask.takes(block, "its blocks", ROLES["HIDDEN"], *(role for role in (spec.rope, spec.bounds) if role is not None))
    for attention in attentions:
        for name in filter(None, (spec.q, spec.k, spec.heads)):
            ask.check(attention.has(name.split(".")[0]), f"the attention of its blocks has no `{name}`", attention)
        given = [role for role in (ROLES["HIDDEN"], spec.bias, spec.rope, spec.bounds) if role is not None]
        ask.takes(attention, "the attention of its blocks", *given)
        turning = () if spec.functions else (spec.rotate,)  # functions by name are the host's, and read nothing here
        for function in filter(None, (spec.project, spec.scale, spec.split, *turning)):
            has_attributes(ask, attention, "the attention of its blocks", reads(function, "attn"))
            for name in module_reads(function):
                found = attention.module.find(name)
                ask.check(found, f"the module of the attention of its blocks has no `{name}`", attention)


def has_attributes(ask: Questions, cls: HostClass, what: str, wanted: Iterable[Read]) -> None:
    """Checks that a class, and what it holds, has what a function of ours reads of its instances.

    Args:
        ask: takes the facts.
        cls: the class.
        what: it is, for sentences.
        wanted: what is read; a read that goes on without is no fact.
    """
    for read in wanted:
        if read.default or (read.having and not cls.has(read.having)):
            continue
        if read.unless and not _may_be_none(cls, read.unless):
            continue
        first, _, rest = read.path.replace("[]", "").partition(".")  # what elements have is asked of their classes
        if first in OF_TORCH or first == "config":  # of torch, and of every model of transformers
            continue
        if ask.check(cls.has(first), f"{what} has no `{first}`", cls) and rest:
            for inner in cls.made_of(first):
                if isinstance(inner, HostClass):
                    has_attributes(ask, inner, f"the `{first}` of {what}", [Read(rest)])


def _may_be_none(cls: HostClass, name: str) -> bool:
    values = (value for owner in cls.lineage for value, _ in owner.own.get(name, ()))
    return any(isinstance(value, ast.Constant) and value.value is None for value in values)


# ---------------------------------------------------------------------- transformers
def tower_facts(ask: Questions, chooser: Chooser, kind: str, row: VisionRow, towers: Iterable[HostClass]) -> None:
    """Facts of a vision model of transformers.

    Args:
        ask: takes the facts.
        chooser: of the release.
        kind: ``config.model_type``.
        row: of the family.
        towers: classes that hold the blocks.
    """
    config, block = chooser.config(kind), chooser.beside(kind, row.layer)
    if ask.check(config is not None, f"no configuration has the tower's type {kind!r}"):
        assert config is not None
        for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size"):
            ask.check(config_field(config, name), f"the configuration of its tower has no `{name}`", config)
    for tower in towers:
        ask.check(reached(tower, row.layer), f"its tower holds no {row.layer}", tower)
    if ask.check(block is not None, f"there is no class {row.layer}"):
        assert block is not None
        attentions = [made for made in block.made_of(row.block.attn) if isinstance(made, HostClass)]
        ask.check(attentions, f"its blocks have no `{row.block.attn}` of a class that is known", block)
        block_facts(ask, block, row.block, attentions)


def class_facts(findings: Findings, chooser: Chooser, module: str, name: str, adapter: str) -> None:
    """Facts of a class of transformers that an adapter names; they count to the tower that it holds.

    Args:
        findings: of the release.
        chooser: of the release.
        module: of the class.
        name: of the class.
        adapter: name of the adapter's class.
    """
    rows = (item for item in hf_rows.ROWS.items() if chooser.find(module, item[1].layer) is not None)
    kind, row = next(rows, (module.split(".")[-2], None))
    ask, cls = findings.about(kind), chooser.find(module, name)
    ask.check(row is not None, f"{module} has blocks of no row")
    if not ask.check(cls is not None, f"{module} has no {name}") or row is None:
        return
    assert cls is not None
    ask.check(reached(cls, row.layer), f"{name} holds no {row.layer}")
    if adapter == HFDual.__name__:
        _dual(ask, cls, row)


def _dual(ask: Questions, cls: HostClass, row: VisionRow) -> None:
    """Where a dual encoder keeps its towers."""
    has_attributes(ask, cls, cls.name, reads(HFDual.vision, "self.model"))
    for path in (read.path for read in reads(text_spec, "model")):
        ask.check(cls.has(path), f"{cls.name} has no `{path}`")
        if row.block is hf_rows.CLIP_BLOCK and row.num_prefix:  # SigLIP's text tower is not cut
            for text in cls.made_of(path):
                if isinstance(text, HostClass):
                    has_attributes(ask, text, f"the text tower of {cls.name}", reads(text_spec, "text"))
                    ask.takes(text, "the text tower", ROLES["IDS"])
                    ask.check(reached(text, row.layer), f"the text tower of {cls.name} holds no {row.layer}", text)
