"""Which method runs on which model, at which stages, and why not elsewhere: tried, not written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters import adapter_for
from ..adapters.host_faults import fault_of
from ..core.method import Method
from ..core.registry import list_methods
from ..core.spec import as_methods
from ..dispatcher import dispatcher_of
from ..errors import ParameterError, UnknownMethod
from ..guard import guarded
from ..loading import Loaded, quiet, skeleton
from ..tabular import Table, Tabular
from .pairs import Pair, by_sentence, named_pairs, pair
from .tiny import released

if TYPE_CHECKING:
    from ..timing import Progress

LETTERS = {"vision": "V", "features": "F", "projected": "P", "decoder": "D", "cache": "C", "text": "T"}
"""Stages in cells."""
REFUSED, CHOSEN = "-", "*"
LEGEND = (
    "where tokens leave or merge: V in the tower (vision), F before the projector (features), P behind it (projected), "
    "D between layers of the language model (decoder), C from its key-value cache behind the prefill (cache), T in the "
    "text tower; * chosen by itself, see below; - refused"
)


@dataclass(frozen=True, eq=False)
class Matrix(Tabular):
    """Methods on models, or on one; print it, or take one of its forms.

    Attributes:
        pairs: by model, then by method.
        faults: of models that the installed library cannot run by itself, and what happens.
    """

    pairs: tuple[Pair, ...]
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The families, or the model."""
        return list(dict.fromkeys(one.model for one in self.pairs))

    @property
    def methods(self) -> list[str]:
        """Names, or spec strings."""
        return list(dict.fromkeys(one.method for one in self.pairs))

    @property
    def attaching(self) -> list[Pair]:
        """Pairs that run."""
        return [one for one in self.pairs if one.attaches]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, method: str, model: str | None = None) -> Pair:
        """One of them.

        Args:
            method: as in `methods`.
            model: as in `models`; None where there is one.

        Raises:
            ParameterError: there is none, or it is not clear which.
        """
        found = [one for one in self.pairs if one.method == method and model in (None, one.model)]
        if len(found) != 1:
            raise ParameterError(
                f"Matrix.pair({method!r}, {model!r}): {len(found)} pairs are called that; methods: "
                f"{', '.join(self.methods)}; models: {', '.join(self.models)}"
            )
        return found[0]

    # ------------------------------------------------------------------ forms
    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        return {
            "attaching": len(self.attaching),
            "of": len(self),
            "faults": dict(self.faults),
            "pairs": [one.to_dict() for one in self.pairs],
        }

    def to_records(self) -> list[dict[str, Any]]:
        """A record for each pair; several stages or notes are joined by ``; ``."""
        return [{**one.to_dict(), "stages": "; ".join(one.stages), "notes": "; ".join(one.notes)} for one in self]

    def table(self) -> Table:
        """A row for each family and a column for each method; of one model, a row for each method."""
        if len(self.models) == 1:
            told = [[one.method, ", ".join(one.stages) or "refused", _told(one)] for one in self.pairs]
            return Table(("method", "acts at", "notes, or why not"), told)
        cells = {(one.model, one.method): _cell(one) for one in self.pairs}
        rows = [[model, *(cells.get((model, method), "") for method in self.methods)] for model in self.models]
        return Table(("family", *self.methods), rows)

    def notes(self) -> list[str]:
        """The count; of several families also how to read the table, choices and reasons, with their pairs."""
        count = f"{len(self.attaching)} of {len(self)} pairs attach"
        faults = [f"{model}: {fault}" for model, fault in self.faults.items()]
        if len(self.models) == 1:
            return [count, *faults]
        chosen, refused = self.sentences()
        lines = [f"chosen: {sentence}: {named_pairs(found)}" for sentence, found in chosen.items()]
        lines += [f"refused: {sentence}: {named_pairs(found)}" for sentence, found in refused.items()]
        return [LEGEND, *lines, *faults, count]

    def sentences(self) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
        """What methods chose by themselves, and why they are refused, each with the pairs for which it holds."""
        chosen = by_sentence((note, one) for one in self.pairs for note in one.plain_notes)
        return chosen, by_sentence((one.clause, one) for one in self.pairs if not one.attaches)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table and its notes for a rich console; names of many columns stand upright."""
        if len(self.models) == 1:
            yield from super().__rich_console__(console, options)
            return
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        found = self.table()
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        shown.add_column(found.head[0], vertical="bottom", overflow="fold")
        height = max(map(len, found.head[1:]))
        for name in found.head[1:]:
            shown.add_column("\n".join(name.rjust(height)), overflow="fold")
        for row in found.rows:
            shown.add_row(*map(Text, row))
        yield shown
        yield from (Text(note, style="dim") for note in self.notes())

    def __repr__(self) -> str:
        return f"<Matrix of {len(self.methods)} methods on {', '.join(self.models)}: {len(self.attaching)} attach>"


def _cell(one: Pair) -> str:
    if not one.attaches:
        return REFUSED
    return "".join(LETTERS[stage] for stage in one.stages) + (CHOSEN if one.notes else "")


def _told(one: Pair) -> str:
    return "; ".join(one.notes) if one.attaches else one.reason


@guarded
def matrix(
    model: nn.Module | Loaded | str | None = None,
    methods: str | Sequence[Method | str] = "*",
    *,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Which methods run on a model, at which stages, what they choose there by themselves, and why others do not.

    Every method is attached and taken off again. Without a model that is done to a tiny model of every vision-language
    family, as deep as released ones and with their order of kinds of layers.

    Args:
        model: None for all families; a model; one from `vlmtok.load`; or a name as there, of which no weights are read.
        methods: shell wildcards, for the methods of those names with their defaults; or methods and spec strings, each
            tried by itself.
        adapter: as for `vlmtok.compress`; of a model.
        progress: told what is being done.

    Returns:
        A pair for each family, or the model, and each method.

    Raises:
        UnknownMethod: no method matches.
        ParameterError: the model carries a compression, or an adapter is given without a model.
        UnsupportedModel: no adapter carries the model.
        LoadError: there is no model of that name.
        SpecError: of spec strings.
    """
    asked = _asked(methods)
    if model is None:
        if adapter is not None:
            raise ParameterError(f"matrix: adapter={adapter!r} is of a model, and none is given")
        families = released.NAMES
        found: list[Pair] = []
        with quiet():
            for number, name in enumerate(families):
                if progress is not None:
                    progress(f"trying {name}", number, len(families))
                found += _tried(released.shared(name), name, asked, None)
        return Matrix(tuple(found), _faults({name: released.shared(name) for name in families}))
    if isinstance(model, str):
        if progress is not None:
            progress(f"reading {model}", 0, 0)
        model = skeleton(model)
    name, module = (model.name, model.model) if isinstance(model, Loaded) else (type(model).__name__, model)
    return Matrix(tuple(_tried(module, name, asked, adapter)), _faults({name: module}))


def _faults(models: Mapping[str, nn.Module]) -> dict[str, str]:
    """What the installed libraries cannot run by themselves, by name."""
    kinds = {name: getattr(getattr(model, "config", None), "model_type", "") for name, model in models.items()}
    return {name: fault for name, kind in kinds.items() if (fault := fault_of(kind)) is not None}


def _asked(methods: str | Sequence[Method | str]) -> list[Method | str]:
    """Names in the registry, or methods."""
    if not isinstance(methods, str):
        return list(as_methods(methods))
    names = list_methods(methods)
    if not names:
        raise UnknownMethod(f"no method matches {methods!r}; known: {', '.join(list_methods())}")
    return list(names)


def _tried(module: nn.Module, name: str, methods: Sequence[Method | str], adapter: str | None) -> list[Pair]:
    """Every method on a model."""
    carrier = adapter_for(module, adapter)
    if dispatcher_of(carrier.model) is not None:
        raise ParameterError(f"matrix: this {type(module).__name__} carries a compression; vlmtok.remove(model) first")
    layout = carrier.layout()
    return [pair(module, layout, method, name, adapter) for method in methods]
