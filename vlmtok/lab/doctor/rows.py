"""The rows of the self-test: every tower and family on a tiny random model, and the families that cannot be carried."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ...adapters.host_faults import fault_of
from ...errors import ParameterError, hint
from ...kernels import exact
from ..tiny.families import FAMILIES, TOWER_ONLY, Family
from ..tiny.towers import TOWERS, Tower
from .facts import BROKEN, OK, REFUSED, Fact, Row, first_line
from .language import Language
from .towers import Vision

QUICK = (
    "timm ViT",
    "timm EVA-02",
    "open_clip CLIP",
    "HF CLIP vision",
    "HF DINOv2",
    "HF CLIPModel",
    "llava",
    "llava_next",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "gemma3",
    "internvl",
    "paligemma",
    "llama4",
    "blip-2",
    "generic-vlm",
)
"""Rows that stand for all kinds of hooks, masks and positions."""
SMALL = 50e6
"""Parameters of a model that one thread is enough for."""
LIBRARIES = ("timm", "open_clip", "transformers")
GENERIC = "generic-vlm"
"""The row of the adapter that takes families without a row; a LLaVA stands for one."""


class Subject(Protocol):
    """A model with inputs, whose facts can be asked for."""

    model: Any
    adapter_name: str

    def facts(self) -> list[Fact]:
        """All of them."""


@dataclass(frozen=True)
class Case:
    """A row before it has run.

    Attributes:
        name: of the row.
        library: that its model comes from.
        build: makes the model and its inputs on a device, or None where nothing runs.
        refused: why nothing runs, or empty.
        family: ``config.model_type``, where that is not the name.
    """

    name: str
    library: str
    build: Callable[[torch.device], Subject] | None = None
    refused: str = ""
    family: str = ""

    def run(self, device: torch.device) -> Row:
        """Builds the model, runs it, and says what was found; nothing is raised."""
        if self.build is None:
            return Row(self.name, self.library, refused=self.refused)
        begin = time.perf_counter()
        with torch.random.fork_rng(), exact(device), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            try:
                subject = self.build(device)
            except Exception as problem:  # a library that cannot be imported or does not know its own model
                fact = Fact("bare", BROKEN, f"the host cannot build it: {first_line(problem)}")
                return self._judged(Row(self.name, self.library, (fact,)), begin)
            facts = tuple(subject.facts())
        row = Row(self.name, self.library, facts, type(subject.model).__name__, subject.adapter_name)
        return self._judged(row, begin)

    def _judged(self, row: Row, begin: float) -> Row:
        """The row with its time; what its library is known to fail at is no fault of this installation."""
        known, bare = fault_of(self.family or self.name), row.facts[0]
        if bare.status == BROKEN and known is not None:
            bare = replace(bare, status=REFUSED, why=known)
        elif bare.status == BROKEN and row.model:
            bare = replace(bare, why=f"the host fails bare: {bare.why}")
        elif bare.status == OK and known is not None:
            bare = replace(bare, status=BROKEN, why=f"it is said that {known}; yet it runs: host_faults.py is outdated")
        return replace(row, facts=(bare, *row.facts[1:]), seconds=time.perf_counter() - begin)


def cases() -> dict[str, Case]:
    """All rows, by name."""
    from ...adapters.language import families as vlm_rows

    found = [Case(tower.name, _library(tower.name), _tower(tower)) for tower in TOWERS.values()]
    families = {**FAMILIES, **TOWER_ONLY}
    found += [Case(family.name, "transformers", _family(family)) for family in families.values()]
    found.append(Case(GENERIC, "transformers", _family(FAMILIES["llava"], GENERIC)))
    found += [Case(name, "transformers", refused=why) for name, why in vlm_rows.REFUSED.items()]
    return {case.name: case for case in found}


def chosen(names: Iterable[str] = (), everything: bool = False) -> list[Case]:
    """The rows that are asked for.

    Args:
        names: of rows or libraries; by default those of `QUICK`.
        everything: all rows.

    Raises:
        ParameterError: there is no such row.
    """
    table = cases()
    if everything:
        return list(table.values())
    picked: dict[str, Case] = {}
    for name in names:
        rows = [case for case in table.values() if name.lower() in (case.name.lower(), case.library)]
        if not rows:
            known = [*table, *LIBRARIES]
            raise ParameterError(f"no family or tower {name!r}{hint(name, known, 3)} There are: {', '.join(known)}")
        picked.update({case.name: case for case in rows})
    return list(picked.values()) or [table[name] for name in QUICK]


def _library(name: str) -> str:
    """Library of a tower, by its row's name."""
    first = name.split()[0]
    return "transformers" if first == "HF" else first


def _tower(tower: Tower) -> Callable[[torch.device], Subject]:
    def build(device: torch.device) -> Subject:
        return Vision(tower.build().to(device), tower.run, tower.pictures(2).to(device))

    return build


def _family(family: Family, adapter: str | None = None) -> Callable[[torch.device], Subject]:
    def build(device: torch.device) -> Subject:
        model = family.build(family.attentions[0]).to(device)
        batch = family.batch(*_rows(family, model))
        rows = [batch.alone(row).inputs() for row in range(len(batch))]
        return Language(model, _to(batch.inputs(), device), [_to(row, device) for row in rows], adapter)

    return build


def _rows(family: Family, model: Any) -> list[str]:
    """The family's two prompts, with more words where a prompt is as long as a weight: see `replay`."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    rows: list[str] = []
    lengths: set[int] = set()
    for pattern in family.rows:
        for words in range(int(pattern[-1]), 10):
            made = pattern[:-1] + str(words)
            length = len(family.prompt(made).ids)
            if length not in sizes | lengths:
                rows.append(made)
                lengths.add(length)
                break
        else:
            raise LookupError(f"no prompt of {family.name} has a length of its own")
    return rows


def _to(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


@contextmanager
def one_thread(model: torch.nn.Module | None = None) -> Iterator[None]:
    """Context in which torch computes with one thread, unless this model is too large for it: tiny ones run faster."""
    before = torch.get_num_threads()
    if model is None or sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def hushed() -> Iterator[None]:
    """Context without warnings and log lines: what matters is in the rows."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
