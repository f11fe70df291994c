"""What is measured: tasks ask a model questions, one answer a question, whatever compression it is under."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from ..errors import ParameterError, hint
from ..loading.models import Loaded


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
        id: its name; another run of the task has the same.
        kind: by which answers are also counted apart.
        what: whatever the task asks with.
    """

    id: str
    kind: str
    what: Any = None


@dataclass(frozen=True)
class Outcome:
    """What became of a question.

    Attributes:
        quality: in [0, 1]; 1 for a right answer.
        answer: as it was given.
        measures: other figures of the answer by name.
    """

    quality: float
    answer: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """Questions, and how a model is asked them.

    A task whose answers depend on more than the names of its questions has a further attribute `settings`, a mapping
    that says on what; a sweep with others does not go on from its journal.

    Attributes:
        name: of the task.
        about: what it measures, in one line.
        model: name of the checkpoint that it asks where none is named.
        language: whether it asks vision-language models; else towers and dual encoders.
    """

    name: str
    about: str
    model: str
    language: bool

    def items(self, limit: int | None) -> Sequence[Item]:
        """The questions, the first `limit` of them, kinds in turn."""
        ...

    def check(self, loaded: Loaded) -> None:
        """Refuses a model that cannot be asked.

        Raises:
            VlmtokError: what it lacks.
        """
        ...

    def batches(self, loaded: Loaded, items: Sequence[Item], size: int) -> list[list[int]]:
        """Places of items that are asked together, at most `size` each; every item once."""
        ...

    def pictures(self, item: Item) -> list[Image.Image]:
        """The pictures of an item, RGB."""
        ...

    def answer(self, loaded: Loaded, items: Sequence[Item]) -> list[Outcome]:
        """Asks a batch; the model is under whatever compression it carries.

        Raises:
            VlmtokError: the model refuses; nothing is scored then.
        """
        ...

    def probe(self, loaded: Loaded, item: Item) -> None:
        """Runs the pass with an item's pictures once, alone: the one whose cost is reported."""
        ...


TASKS: dict[str, str] = {
    "scenes-vqa": "scenes_vqa:ScenesVqa",
    "scenes-clip": "scenes_clip:ScenesClip",
    "scenes-shift": "scenes_shift:ScenesShift",
    "fidelity": "fidelity:Fidelity",
}
"""Name to module and class, below ``vlmtok.evaluation``; imported when it is asked for."""


def task_named(name: str, **settings: Any) -> Task:
    """A task of the registry.

    Args:
        name: one of `TASKS`.
        settings: of the task, where it has any.

    Raises:
        ParameterError: no such task, or no such setting.
    """
    if name not in TASKS:
        raise ParameterError(f"no task {name!r}{hint(name, TASKS)} There are: {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    made = getattr(importlib.import_module(f"{__package__}.{module}"), kind)
    try:
        return made(**settings)
    except TypeError as problem:
        raise ParameterError(f"task {name}: {problem}") from None
