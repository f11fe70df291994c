"""A page a method: all of it is the class, its docstring, its layout on published shapes, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...core.registry import create_method, method_class
from ...errors import VlmtokError
from ...forecast.estimate import estimate
from ..catalogue import KINDS, Entry, docstring_of, methods, refusal, sites
from ..tables import DIFFERS, method_table, paper, parity, table
from .measured import Measured
from .section import Section

SHAPES = ("llava-1.5-7b", "clip-vit-b-16", "vit-b-16")
"""Published shapes on which costs are counted: the first on which a method runs, and a lone tower."""
TEXT = 64
"""Text tokens of the prompt."""


class PageError(VlmtokError):
    """Something of which no page can be made."""


def method_pages(measured: Measured) -> Section:
    """The index and a page for each registered method."""
    found = methods()
    made = {f"methods/{entry.name}.md": method_page(entry, measured) for entry in found}
    said = "A method is named in a spec string (`todre:keep=0.1+fastv`) or made as `vlmtok.ToDRE(keep=0.1)`."
    made["methods/index.md"] = f"# Methods\n\n{said}\n\n{method_table()}\n"
    named = [{entry.title: f"methods/{entry.name}.md"} for entry in found]
    return Section(made, ["methods/index.md", *named])


def method_page(entry: Entry, measured: Measured) -> str:
    """The page of a method.

    Args:
        entry: from the catalogue.
        measured: the committed results.

    Raises:
        PageError: its docstring has no section ``Algorithm``.
    """
    cls = method_class(entry.name)
    said = docstring_of(cls)
    if not said.get("Algorithm"):
        raise PageError(f"{cls.__name__}: its docstring has no section 'Algorithm:' with the steps in a few lines")
    parts = {
        "Algorithm": said["Algorithm"],
        "Parameters": _parameters(entry),
        "Names of the paper": _other_names(entry),
        "Presets": _presets(entry),
        "Where it acts": _places(entry),
        "What it saves": _cost(entry),
        "Measured": measured.section(entry.name),
        f"Where it differs from the released code {{#{DIFFERS}}}": _points(entry.deviations),
        "Where it does badly": _points(entry.caveats),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)
    return f"# {entry.title}\n\n{said['']}\n\n{_facts(entry)}\n\n{body}\n"


def _facts(entry: Entry) -> str:
    cls = method_class(entry.name)
    budget = cls.budget_parameter
    rows = [
        ("in spec strings", f"`{entry.name}`"),
        ("paper", paper(entry)),
        ("training-free", "yes" if entry.training_free else "no"),
        ("acts at", ", ".join(f"`{stage}`" for stage in entry.stages)),
        ("one view row is", f"a {entry.scope}"),
        ("`vlmtok.budget` moves", f"`{budget}`" if budget else "nothing"),
        ("compared with its release", parity(entry)),
        *[("wants of you the signal", ", ".join(f"`{name}`" for name in wants)) for wants in [cls.wants] if wants],
    ]
    return table(("", ""), [(name, text) for name, text in rows if text])


def _parameters(entry: Entry) -> str:
    rows = [(f"`{item.name}`", f"`{item.default}`", item.what) for item in entry.parameters]
    return table(("name", "default", "meaning"), rows)


def _other_names(entry: Entry) -> str:
    if not entry.other_names:
        return ""
    rows = [(f"`{one.name}`", one.stands_for, one.whose) for one in entry.other_names]
    return f"Spec strings and `create_method` read them too.\n\n{table(('name', 'stands for', 'name in'), rows)}"


def _presets(entry: Entry) -> str:
    if not entry.presets:
        return ""
    rows = [(f"`{name}`", f"`{create_method(entry.name, preset=name)}`") for name in entry.presets]
    return f"`vlmtok.create_method({entry.name!r}, preset=NAME)`.\n\n{table(('name', 'is'), rows)}"


# ---------------------------------------------------------------------- sites
def grouped(found: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sites as `catalogue.sites` gives them, those that differ in their layer alone as one.

    Args:
        found: rows of sites.

    Yields:
        The first row of each group, its site named with all the layers.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in found:
        stage, layer, point = _words(row["site"])
        groups.setdefault((stage, layer and "layers", point, row["scope"], row["positions"], *row["needs"]), []).append(
            row
        )
    for (stage, layered, point, *_), rows in groups.items():
        if len(rows) == 1 or not layered:
            yield dict(rows[0])
            continue
        layers = [int(_words(row["site"])[1]) for row in rows]
        whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
        told = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
        yield {**rows[0], "site": f"{stage} layers {told}, {point}"}


def first_clause(why: str) -> str:
    """A refusal without the list of what is possible, which a page has beside it."""
    return why.partition("; it offers")[0]


def _words(site: str) -> tuple[str, str, str]:
    """Stage, layer and point of a site's name; empty ones where the stage has no layers."""
    stage, _, rest = site.partition(" layer ")
    layer, _, point = rest.partition(" ")
    return stage, layer, point


def _places(entry: Entry) -> str:
    method = create_method(entry.name)
    kinds = [kind for kind in KINDS.values() if kind.name in entry.kinds]
    if not kinds:
        raise PageError(f"{entry.title} runs on no kind of model with its defaults")
    shown = next((kind for kind in kinds if kind.shape == SHAPES[0]), kinds[0])
    rows = [
        (row["site"], row["scope"], row["positions"], ", ".join(f"`{name}`" for name in row["needs"]))
        for row in grouped(sites(method, shown.layout())[1])
    ]
    said = f"With its defaults on `{shown.shape}`:"
    runs = []
    for kind in KINDS.values():
        why = refusal(method, kind.layout(), given=True)
        runs.append((kind.name, f"{kind.what} (`{kind.shape}`)", "yes" if why is None else f"no: {first_clause(why)}"))
    return "\n\n".join(
        (
            said,
            table(("site", "a view row is a", "positions", "signals"), rows),
            table(("kind of model", "for example", "runs"), runs),
        )
    )


# ---------------------------------------------------------------------- cost
def _cost(entry: Entry) -> str:
    shapes = {kind.shape for kind in KINDS.values() if kind.name in entry.kinds}
    found = [shape for shape in SHAPES if shape in shapes]
    chosen = [*found[:1], *(shape for shape in found[1:] if shape == SHAPES[-1])]
    method = create_method(entry.name)
    parts = []
    for shape in chosen:
        report = estimate(shape, method, text_tokens=TEXT if shape == SHAPES[0] else None)
        tables = report.to_markdown().split("\n\n")
        counted = [part for part in tables if part.startswith("|  |") and "/ before" in part.splitlines()[0]]
        notes = [part for part in tables if part.startswith("- ")]
        asked = f", text_tokens={TEXT}" if shape == SHAPES[0] else ""
        call = f'`vlmtok.estimate("{shape}", "{entry.name}"{asked})`:'
        parts += [call, *counted, *notes]
    return "\n\n".join(parts)


def _points(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {one}" for one in sentences)
