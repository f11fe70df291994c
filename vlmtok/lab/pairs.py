"""One method on one model: where it attaches and what it chose there, or why it is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from torch import nn

from ..compression import compress
from ..core.attachment import Attachment, looks_on
from ..core.method import Method
from ..core.registry import create_method, method_class
from ..core.site import STAGES, Layout, named, runs_of_layers
from ..errors import VlmtokError, VlmtokWarning
from .catalogue import presets_of


@dataclass(frozen=True)
class Pair:
    """A method on a model.

    Attributes:
        model: the family, or the model's name.
        method: spec string.
        stages: where tokens leave or merge, in the order of the forward; empty where it is refused.
        sites: those places with their layers, and those at which it only looks.
        notes: what it chose by itself on this model: another stage, a setting, position ids.
        error: class of the error that refuses it; empty where it attaches.
        reason: that error's message.
        plain_notes: `notes`, the method and the model left out, so that equal ones are one.
        clause: `reason` in the same way, without its list of what is possible.
    """

    model: str
    method: str
    stages: tuple[str, ...] = ()
    sites: str = ""
    notes: tuple[str, ...] = ()
    error: str = ""
    reason: str = ""
    plain_notes: tuple[str, ...] = ()
    clause: str = ""

    @property
    def attaches(self) -> bool:
        """Whether the method runs on the model."""
        return not self.error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what only tables need."""
        found = {"model": self.model, "method": self.method, "attaches": self.attaches, **asdict(self)}
        del found["plain_notes"], found["clause"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def everyday(name: str) -> Method:
    """A method as it is tried where nothing is said: with its defaults, or its first preset where it has none.

    Args:
        name: in the registry.

    Raises:
        VlmtokError: it has settings without defaults, and no preset.
    """
    cls = method_class(name)
    needed = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING]
    presets = presets_of(cls) if needed else ()
    if needed and not presets:
        raise VlmtokError(f"{cls.__name__} has no default for {', '.join(needed)}, and no preset; give it settings")
    return create_method(name, preset=presets[0]) if needed else create_method(name)


def pair(model: nn.Module, layout: Layout, method: Method | str, name: str, adapter: str | None = None) -> Pair:
    """Attaches a method to a model, and takes it off again.

    Args:
        model: carries no compression; is left as it was.
        layout: what it offers.
        method: a method with its settings, or its name in the registry.
        name: what to call the model.
        adapter: as for `vlmtok.compress`.
    """
    said = method if isinstance(method, str) else str(method)
    words: list[str] = [] if isinstance(method, str) else [type(method).__name__, method.spec_name()]
    try:
        made = everyday(method) if isinstance(method, str) else method
        words = [type(made).__name__, made.spec_name()]
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            compress(model, made, adapter=adapter)._end(quiet=True)
            carried = Attachment([made], layout)
    except VlmtokError as refusal:
        why = " ".join(str(refusal).split())
        clause = plain(why, words, layout.family).partition("; it offers")[0]
        return Pair(name, said, error=type(refusal).__name__, reason=why, clause=clause)
    notes = [*carried.said, *(str(one.message) for one in heard if issubclass(one.category, VlmtokWarning))]
    notes = list(dict.fromkeys(" ".join(note.split()) for note in notes))
    acting = [one.site for one in carried.entries if not looks_on(made, one.site, layout)]
    stages = {site.stage for site in acting or [one.site for one in carried.entries]}
    runs = runs_of_layers([one.site for one in carried.entries], lambda site: site, lambda site: site in acting)
    return Pair(
        name,
        said,
        tuple(sorted(stages, key=STAGES.index)),
        "; ".join(named(run) + ("" if run[0] in acting or not acting else ", looks on") for run in runs),
        tuple(notes),
        plain_notes=tuple(plain(note, words, layout.family) for note in notes),
    )


def plain(text: str, words: Iterable[str], family: str) -> str:
    """A sentence about a method on a model, neither of them named.

    Args:
        text: the sentence.
        words: names of the method, with which it may begin.
        family: what the model is called in it.
    """
    names = "|".join(map(re.escape, words))
    text = re.sub(rf"^({names})\b:? ", "", text) if names else text
    return text.replace(family, "the model")


def by_sentence(found: Iterable[tuple[str, Pair]]) -> dict[str, list[Pair]]:
    """Pairs by what is said of them.

    Args:
        found: sentences, each with one pair of which it is said.

    Returns:
        Those of which most is said first.
    """
    groups: dict[str, list[Pair]] = {}
    for sentence, one in found:
        groups.setdefault(sentence, []).append(one)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def named_pairs(pairs: Sequence[Pair]) -> str:
    """Pairs in words: models that share their methods stand together."""
    methods: dict[str, list[str]] = {}
    for one in pairs:
        methods.setdefault(one.model, []).append(one.method)
    models: dict[tuple[str, ...], list[str]] = {}
    for model, found in methods.items():
        models.setdefault(tuple(found), []).append(model)
    return "; ".join(f"{', '.join(found)} on {', '.join(group)}" for found, group in models.items())
