"""The table of a sweep: a row for each way, budget and kind of question, and its forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost.units import binary, si, whole
from ..tabular import Table, Tabular
from .statistics import Difference, paired_difference
from .task import Item
from .ways import NONE, Way

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .journal import Journal

ALL = "all"
"""Kind of a row over all questions."""
_COSTS = ("visual_tokens", "macs", "kv_bytes", "latency_ratio", "pruner_share")


@dataclass(frozen=True, eq=False)
class Evaluation(Tabular):
    """What ways keep of a task's answers; print it, or take one of its forms.

    Attributes:
        task: name of the task.
        model: name of the model.
        kinds: of its questions, in order.
        records: one for each way, budget and kind; `to_records` says the columns.
        measures: names of further figures of the task that rows have.
    """

    task: str
    model: str
    kinds: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    measures: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        task: str,
        model: str,
        items: Sequence[Item],
        ways: Sequence[Way],
        journal: Journal,
        fixed: Mapping[str, Any],
        repeats: int,
    ) -> Evaluation:
        """Counts what a journal holds, of ways that draw as many answers as there are `repeats` now."""
        kinds = tuple(dict.fromkeys(item.kind for item in items))
        records: list[dict[str, Any]] = []
        bare = _qualities(journal, ways[0], items, 1)
        measures = tuple(
            sorted({name for answers in journal.outcomes.values() for o in answers.values() for name in o.measures})
        )
        for way in ways:
            times = repeats if way.draws else 1
            start: dict[str, Any] = {"task": task, "model": model, "method": way.name, "asked": way.asked}
            start |= {"spec": way.spec, "keep": way.keep}
            quality = None if way.problem else _qualities(journal, way, items, times)
            for kind in (*kinds, ALL):
                rows = [i for i, item in enumerate(items) if kind in (item.kind, ALL)]
                record: dict[str, Any] = {**start, "kind": kind, "questions": len(rows)}
                if quality is None:
                    records.append({**record, "convention": way.convention, **fixed, "problem": way.problem})
                    continue
                gap = (
                    None if way.name == NONE else paired_difference(quality[rows], bare[rows], seed=int(fixed["seed"]))
                )
                record |= {"repeats": quality.shape[1], "quality": _short(quality[rows].mean())}
                record |= _interval(gap)
                record |= _measured(journal, way, [items[i].id for i in rows], measures, times)
                record |= _cost(journal, way, ways[0], kind, items)
                records.append({**record, "convention": way.convention, **fixed, "problem": ""})
        columns = list(dict.fromkeys(name for record in sorted(records, key=len, reverse=True) for name in record))
        whole_rows = tuple({name: record.get(name) for name in columns} for record in records)
        return cls(task, model, kinds, whole_rows, measures)

    # ------------------------------------------------------------------ forms
    def to_records(self) -> list[dict[str, Any]]:
        """One row for each way, budget and kind of question (``all`` for all of them).

        Columns: ``task``, ``model``; ``method``, ``asked`` (as it was given), ``spec`` (what ran), ``keep`` (share of
        the visual tokens asked for, or left by a method that runs as written);
        ``kind``, ``questions``, ``repeats``; ``quality`` in [0, 1]; ``difference`` to the uncompressed model with its
        95 % interval ``low`` to ``high``; ``visual_tokens`` (mean over layers), ``macs``, ``macs_ratio`` (uncompressed
        over this), ``kv_bytes``, ``pruner_share`` (of the MACs), ``latency_ratio`` (uncompressed over this);
        ``convention`` of the budget; ``seed``, ``device``, ``dtype``, versions, ``settings``; ``problem``, why there
        are no figures.
        """
        return [dict(record) for record in self.records]

    def table(self) -> Table:
        """A row for each way and budget: tokens, quality by kind, the difference over all with its interval, costs.

        Further figures of the task, over all questions, stand before the costs.
        """
        kinds = (*self.kinds, ALL) if len(self.kinds) > 1 else (ALL,)
        head = ["method", "budget", "visual tokens", *kinds, "difference", *self.measures, "MACs", "cache"]
        rows = []
        for group in self._groups():
            over = group[ALL]
            label = [over["asked"], "" if over["method"] == NONE else f"{over['keep']:.3g}"]
            if over["problem"]:
                rows.append([*label, "refused, see below", *[""] * (len(head) - 3)])
                continue
            shares = [f"{100 * group[kind]['quality']:.1f} %" for kind in kinds]
            gap = "" if over["difference"] is None else _said(Difference(over["difference"], over["low"], over["high"]))
            costs = [
                "" if over["macs"] is None else si(over["macs"]),
                "" if over["kv_bytes"] is None else binary(over["kv_bytes"]),
            ]
            tokens = "" if over["visual_tokens"] is None else whole(over["visual_tokens"])
            further = ["" if over[name] is None else f"{over[name]:.3g}" for name in self.measures]
            rows.append([*label, tokens, *shares, gap, *further, *costs])
        return Table(head, rows)

    def notes(self) -> list[str]:
        """What was measured on, and why rows are empty."""
        first = self.records[0]
        budgets = " or, where entries of caches leave, of the ".join(
            dict.fromkeys(record["convention"] for record in self.records)
        )
        said = [
            f"{self.task} on {self.model}, {self._asked()} questions; budget: share of the {budgets}; "
            "differences in points with 95 % paired bootstrap intervals over questions; "
            f"{first['device']}, {first['dtype']}, torch {first['torch']}, transformers {first['transformers']}"
        ]
        for group in self._groups():
            over = group[ALL]
            if over["problem"]:
                said.append(f"{over['asked']} at {over['keep']:.3g}: {' '.join(over['problem'].split())}")
        return said

    def _asked(self) -> int:
        return max(int(record["questions"]) for record in self.records)

    def _groups(self) -> list[dict[str, dict[str, Any]]]:
        """The records of each way at each budget, by kind."""
        found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
        for record in self.records:
            found.setdefault((record["asked"], record["spec"], record["keep"]), {})[record["kind"]] = record
        return list(found.values())

    def plot(self, cost: str = "macs", kind: str = ALL, ax: Axes | None = None) -> Axes:
        """Quality against a cost, a line a method, with the Pareto front.

        Args:
            cost: ``macs``, ``kv_bytes``, ``visual_tokens`` or ``latency_ratio``.
            kind: of question.
            ax: axes to draw on; new ones unless given.

        Raises:
            ParameterError: no such cost or kind, or no row has it.
            MissingPackage: matplotlib is not installed.
        """
        from .plot import quality_plot

        return quality_plot(self.to_records(), cost, kind, ax)


def _qualities(journal: Journal, way: Way, items: Sequence[Item], times: int) -> np.ndarray:
    """Quality by question and repeat, `[N, R]`."""
    repeats = [journal.outcomes[way.key, repeat] for repeat in range(times)]
    return np.array([[answers[item.id].quality for answers in repeats] for item in items])


def _measured(
    journal: Journal, way: Way, ids: Sequence[str], measures: Sequence[str], times: int
) -> dict[str, float | None]:
    """Means of a task's further figures, over questions and repeats as the quality."""
    repeats = [journal.outcomes[way.key, repeat] for repeat in range(times)]
    found: dict[str, float | None] = {}
    for name in measures:
        told = [answers[one].measures for answers in repeats for one in ids if name in answers[one].measures]
        found[name] = _short(float(np.mean([one[name] for one in told]))) if told else None
    return found


def _cost(journal: Journal, way: Way, bare: Way, kind: str, items: Sequence[Item]) -> dict[str, float | None]:
    """Costs of a kind; of all kinds the mean over the questions."""
    number: dict[str, int] = {}
    for item in items:
        number[item.kind] = number.get(item.kind, 0) + 1
    kinds = list(number) if kind == ALL else [kind]

    def mean(key: str, name: str) -> float | None:
        total, asked = 0.0, 0
        for one in kinds:
            value = journal.costs.get((key, one), {}).get(name)
            if value is None:
                return None
            total, asked = total + value * number[one], asked + number[one]
        return total / asked

    found = {name: mean(way.key, name) for name in _COSTS}
    before = mean(bare.key, "macs")
    ratio = before / found["macs"] if before and found["macs"] else None
    found = {"visual_tokens": found["visual_tokens"], "macs": found["macs"], "macs_ratio": ratio, **found}
    return {name: None if value is None else _short(value) for name, value in found.items()}


def _interval(gap: Difference | None) -> dict[str, float | None]:
    if gap is None:
        return {"difference": None, "low": None, "high": None}
    return {"difference": _short(gap.mean), "low": _short(gap.low), "high": _short(gap.high)}


def _said(gap: Difference) -> str:
    return f"{100 * gap.mean:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"


def _short(value: float) -> float:
    """Six digits: what lies behind them differs from machine to machine."""
    return float(f"{float(value):.6g}")
