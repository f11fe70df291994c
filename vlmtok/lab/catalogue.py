"""What there is: methods, adapters, families, and which runs on which; read off the registry, nothing is written down.

A method runs on a model if its sites and signals fit what the model's adapter offers. All models that offer the same
are one kind; a kind is represented by a published shape, so that no library has to be imported for the tables.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..core.attachment import Attachment, looks_on
from ..core.method import Method, setting_fields
from ..core.registry import create_method, list_methods, method_class
from ..core.settings import choices_noted, format_value
from ..core.site import STAGES, Layout
from ..errors import VlmtokError
from ..forecast.estimate import absent
from ..forecast.presets import preset
from .family_table import ADAPTERS, families


# ---------------------------------------------------------------------- kinds of models
@dataclass(frozen=True)
class Kind:
    """Models that offer methods the same stages and signals.

    Attributes:
        name: what tables call it.
        shape: preset that stands for it.
        stages: of that preset; None means all.
        what: in words.
    """

    name: str
    shape: str
    stages: tuple[str, ...] | None
    what: str

    def layout(self) -> Layout:
        """What such a model offers."""
        whole = preset(self.shape).layout
        if self.stages is None:
            return whole
        return Layout(whole.family, {name: whole.stages[name] for name in self.stages})


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("tower", "vit-b-16", None, "a vision tower with a class token"),
        Kind("tower, no CLS", "siglip-so400m-14-384", None, "a vision tower without a class token"),
        Kind("dual", "clip-vit-b-16", None, "a vision tower and a text tower"),
        Kind("VLM, slots", "llava-1.5-7b", None, "cuts in tower and language model; shorter rows reach the latter"),
        Kind("VLM, spread", "llava-next-7b", None, "the same, but rows get their length back behind the tower"),
        Kind(
            "VLM",
            "llava-1.5-7b",
            ("projected", "decoder", "cache"),
            "cuts at and in the language model, and in its key-value cache",
        ),
        Kind("VLM, tower", "llava-next-7b", ("vision",), "cuts in the tower alone"),
    )
}
"""Columns of the tables."""


def _attached(method: Method, layout: Layout) -> Attachment:
    """A method on a model, with the signals that it wants of a user."""
    return Attachment([method], layout, dict.fromkeys(method.wants, absent))


def refusal(method: Method, layout: Layout, given: bool = False) -> str | None:
    """Why a method does not run on a model, or None where it does.

    Args:
        method: the method.
        layout: what the model offers.
        given: whether a user gives the signals that it wants.
    """
    try:
        entries = (_attached(method, layout) if given else Attachment([method], layout)).entries
    except VlmtokError as problem:
        return str(problem)
    return None if entries else f"{type(method).__name__} has nothing to do there"


@lru_cache
def kinds_of(name: str) -> tuple[str, ...]:
    """Kinds of models on which a method runs with its defaults.

    Args:
        name: of the method.
    """
    method = method_class(name)()
    return tuple(kind.name for kind in KINDS.values() if refusal(method, kind.layout(), given=True) is None)


def adapters_of(name: str) -> dict[str, tuple[str, ...]]:
    """Adapters that can run a method, each with the kinds of its models for which that holds."""
    fit = set(kinds_of(name))
    found = {adapter: tuple(kind for kind in kinds if kind in fit) for adapter, kinds in ADAPTERS.items()}
    return {adapter: kinds for adapter, kinds in found.items() if kinds}


@lru_cache
def stages_of(name: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Stages in which a method acts or looks, with its defaults or a preset.

    Args:
        name: of the method.
        kinds: kinds of models, as from `kinds_of`.

    Returns:
        In the order of the forward.
    """
    cls = method_class(name)
    made = [cls(), *(create_method(name, preset=preset) for preset in presets_of(cls))]
    layouts = [KINDS[kind].layout() for kind in kinds]
    found = {
        site.stage
        for method in made
        for layout in layouts
        if refusal(method, layout, given=True) is None
        for site in method.sites(layout)
    }
    return tuple(sorted(found, key=STAGES.index))


# ---------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Parameter:
    """A setting of a method.

    Attributes:
        name: of it.
        default: as spec strings write it.
        what: from the docstring.
    """

    name: str
    default: str
    what: str


@dataclass(frozen=True)
class OtherName:
    """What a paper or its code calls a parameter; spec strings take it.

    Attributes:
        name: as typed.
        stands_for: the parameter, and how it follows where the name is another quantity; else what to write instead.
        whose: who calls it that; empty where it is no parameter's.
    """

    name: str
    stands_for: str
    whose: str


@dataclass(frozen=True)
class Entry:
    """A method as tables show it.

    Attributes:
        name: in the registry.
        title: its class.
        summary: one line.
        stages: where it acts, on any kind of model.
        training_free: whether it works on a released checkpoint as it is.
        paper: title and venue.
        arxiv: number.
        code: official code.
        parity: what it has been compared with.
        deviations: where it differs from the released code.
        caveats: where it does badly, and why.
        scope: what one row of a view is.
        parameters: its settings.
        other_names: names that its paper and the released code have for them.
        presets: names of its presets.
        kinds: kinds of models on which it runs.
        adapters: adapters that can run it.
    """

    name: str
    title: str
    summary: str
    stages: tuple[str, ...]
    training_free: bool
    paper: str
    arxiv: str
    code: str
    parity: str
    deviations: tuple[str, ...]
    caveats: tuple[str, ...]
    scope: str
    parameters: tuple[Parameter, ...]
    other_names: tuple[OtherName, ...]
    presets: tuple[str, ...]
    kinds: tuple[str, ...]
    adapters: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def methods(pattern: str = "*") -> list[Entry]:
    """The registered methods.

    Args:
        pattern: shell wildcards.
    """
    return [entry(name) for name in list_methods(pattern)]


def entry(name: str) -> Entry:
    """One method.

    Args:
        name: in the registry.

    Raises:
        UnknownMethod: no such method.
    """
    cls = method_class(name)
    return Entry(
        name=name,
        title=cls.__name__,
        summary=inspect.getdoc(cls).splitlines()[0] if cls.__doc__ else "",  # type: ignore[union-attr]
        stages=stages_of(name, kinds_of(name)),
        training_free=cls.training_free,
        paper=cls.paper,
        arxiv=cls.arxiv,
        code=cls.code,
        parity=cls.parity,
        deviations=tuple(cls.deviations),
        caveats=tuple(cls.caveats),
        scope=cls.scope,
        parameters=_parameters(cls),
        other_names=tuple(
            OtherName(one.name, one.meaning, one.whose)
            if one.parameter
            else OtherName(one.name, f"no single parameter: {one.instead}", "")
            for one in cls.aliases
        ),
        presets=presets_of(cls),
        kinds=kinds_of(name),
        adapters=tuple(adapters_of(name)),
    )


def sites(method: Method, layout: Layout) -> tuple[str, list[dict[str, Any]]]:
    """Where a method acts on a model.

    Args:
        method: the method.
        layout: what the model offers.

    Returns:
        What the model is called, and a row for each site: its name, scope, signals, and what becomes of the language
        model's position ids (empty where it only looks on).

    Raises:
        VlmtokError: it does not run there.
    """
    return layout.family, [
        {
            "site": str(visit.site),
            "scope": visit.scope,
            "positions": "" if looks_on(method, visit.asked, layout) else layout.positions_at(visit.site),
            "needs": list(visit.site.needs),
        }
        for visit in _attached(method, layout).entries
    ]


def refused_settings(method: Method, layout: Layout) -> list[dict[str, str]]:
    """Words and switches that a method takes elsewhere and a model refuses, where all else stays as it is.

    Args:
        method: it runs on the model.
        layout: what the model offers.

    Returns:
        A row for each: ``setting`` as a spec string has it, and ``why``.
    """
    with choices_noted() as choices:
        dataclasses.replace(method)
    rows = []
    for name, offered in choices.items():
        if name not in method.settings():
            continue  # a word of the class, checked as its relatives' setting is
        for choice in offered:
            try:
                changed = dataclasses.replace(method, **{name: choice})
            except VlmtokError:
                continue  # it does not go with the method's other settings, on any model
            why = refusal(changed, layout)
            if why is not None:
                rows.append({"setting": f"{name}={format_value(choice)}", "why": why})
    return rows


def said_of(method: Method, layout: Layout) -> list[str]:
    """What reports of a method on a model say of how it acts there.

    Args:
        method: it runs on the model.
        layout: what the model offers.
    """
    return _attached(method, layout).said


def remarks(method: Method, layout: Layout) -> list[str]:
    """What reports say of how a method acts on a model: stages and settings that it chose by itself.

    Args:
        method: the method.
        layout: what the model offers.

    Raises:
        VlmtokError: it does not run there.
    """
    return _attached(method, layout).said


def limits(found: Entry) -> str:
    """What a table adds to a method's adapters: the models of theirs on which it does not run."""
    said = []
    if "tower" in found.kinds and "tower, no CLS" not in found.kinds:
        said.append("with a class token")
    if "VLM, slots" in found.kinds and "VLM" not in found.kinds:
        slots = ", ".join(row["family"] for row in families() if row["tower"] == "slots")
        said.append("VLMs whose towers can be cut" if "VLM, spread" in found.kinds else f"of the VLMs {slots}")
    return "; ".join(said)


def _parameters(cls: type[Method]) -> tuple[Parameter, ...]:
    told = argument_docs(cls)
    found = []
    for item in setting_fields(cls):
        if item.default is not dataclasses.MISSING:
            default = format_value(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            default = format_value(item.default_factory())
        else:
            default = "required"
        found.append(Parameter(item.name, default, told.get(item.name, "")))
    return tuple(found)


def argument_docs(cls: type) -> dict[str, str]:
    """What the ``Args:`` section of a class's docstring says of each name, those of its bases too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        name = ""
        for line in docstring_of(base).get("Args", "").splitlines():
            start = re.match(r"(\w+(?:, \w+)*): (.*)", line)
            if start:
                name = start[1]
                found[name] = start[2]
            elif name and line.strip():
                found[name] += " " + line.strip()
    return {single: what.replace("``", "") for names, what in found.items() for single in names.split(", ")}


def docstring_of(cls: type) -> dict[str, str]:
    """A class's docstring by section: the text before the first one under an empty name, then those like ``Args``."""
    found, title = {"": ""}, ""
    for line in (inspect.getdoc(cls) or "").splitlines():
        head = re.fullmatch(r"([A-Z]\w+):", line)
        if head:
            title = head[1]
            found[title] = ""
            continue
        if line and not line.startswith(" "):  # a section ends where nothing is indented
            title = ""
        found[title] += (line.removeprefix("    ") if title else line) + "\n"
    return {name: text.strip("\n") for name, text in found.items()}


def presets_of(cls: type[Method]) -> tuple[str, ...]:
    """Names that `preset` takes: the keys of the table that stands beside the class."""
    table = getattr(inspect.getmodule(cls), "_PRESETS", None)
    return tuple(table) if hasattr(cls, "preset") and isinstance(table, dict) else ()
