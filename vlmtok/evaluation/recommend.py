"""`recommend()`: two or three methods for a model and a budget, by what was measured, none that the model refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..core.settings import check_keep
from ..errors import ParameterError
from ..guard import guarded
from ..sheet import Sheet, Shown
from ..tabular import Table
from .fitting import Target, target_of
from .results import ALL, Measured, read, source_for
from .ways import IN_CACHES

MOST = 3
"""Methods that are named."""


@dataclass(frozen=True)
class Need:
    """What a use of a model asks of a method.

    Attributes:
        task: whose results decide.
        kinds: of its questions that decide together.
        shown: kinds that are shown besides.
    """

    task: str
    kinds: tuple[str, ...] = (ALL,)
    shown: tuple[str, ...] = ()


TASKS = {
    "ocr": Need("scenes-vqa", ("number", "fine print", "table", "chart")),
    "chat": Need("scenes-vqa", shown=("where", "second turn")),
    "classification": Need("scenes-clip"),
}
"""Uses by name: reading what is printed, questions of all kinds in several turns, towers that classify and retrieve."""

WAYS = ("random", "downsample")
"""What every method has to beat; named apart."""


@dataclass(frozen=True)
class Standing:
    """A way at the budget, over the kinds that decide.

    Attributes:
        method: its name.
        spec: spec string that ran.
        quality: share of right answers.
        difference: to the uncompressed model; with several kinds the mean over their questions.
        low: lower end of its interval.
        high: upper end.
        rows: what was measured: the kinds that decide, then those that are shown.
        here: spec string that meets the budget on the model that was asked about; empty where that cannot be told.
        where: stages at which tokens leave or merge in that model.
        notes: what the method chooses by itself there.
    """

    method: str
    spec: str
    quality: float
    difference: float
    low: float
    high: float
    rows: tuple[Measured, ...]
    here: str = ""
    where: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why it is named, in one sentence."""
        decided = [row for row in self.rows if row.macs_ratio is not None]
        macs = f", MACs 1 / {decided[0].macs_ratio:.2g}" if decided else ""
        acts = f"; acts at {', '.join(self.where)}" if self.where else ""
        return (
            f"{self.quality:.3f} right, {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] to the uncompressed "
            f"model{macs}{acts}"
        )


@dataclass(frozen=True, eq=False)
class Recommendation(Shown):
    """What `recommend` found.

    Attributes:
        model: that was asked about.
        task: the use, a key of `TASKS`.
        asked: share of the visual tokens that may stay.
        measured: the nearest share that was measured, of which all figures are.
        source: the model that the figures were measured on.
        kinds: of questions that decided.
        picks: methods, the best first.
        baselines: random choice and downsampling where they were measured and the model takes them.
        verdict: whether methods beat them, in words.
        refused: methods that the model refuses, each with the reason.
        notes: what limits this.
    """

    model: str
    task: str
    asked: float
    measured: float
    source: str
    kinds: tuple[str, ...]
    picks: tuple[Standing, ...]
    baselines: tuple[Standing, ...]
    verdict: str
    refused: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        """Spec strings of the picks for this model and budget, the best first; as measured where nothing is known."""
        return [one.here or one.spec for one in self.picks]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        found = asdict(self)
        for name in ("picks", "baselines"):
            for said, one in zip(found[name], getattr(self, name)):
                said["reason"] = one.reason
        return found

    def sheet(self) -> Sheet:
        """The picks, what they have to beat, and the rows behind them."""
        lines = [self.verdict, *(f"{one.here or one.spec}: {one.reason}" for one in self.picks)]
        standings = (*self.picks, *self.baselines)
        tables = [Table(_HEAD, [_cells(one, row) for one in standings for row in one.rows])]
        kinds = "all questions" if self.kinds == (ALL,) else ", ".join(self.kinds)
        title = (
            f"for {self.task} on {self.model} at {self.asked:.3g} of the visual tokens: measured at "
            f"{self.measured:.3g} on {self.source}, {kinds}"
        )
        refused = [f"refused: {name}: {reason}" for name, reason in self.refused.items()]
        return Sheet(title, lines, tables, [*self.notes, *refused])

    def __repr__(self) -> str:
        return f"<Recommendation for {self.model}, {self.task} at {self.asked:.3g}: {', '.join(self.methods)}>"


_HEAD = ("method", "kind", "questions", "right", "difference", "interval", "visual tokens")


def _cells(one: Standing, row: Measured) -> list[str]:
    tokens = "" if row.visual_tokens is None else f"{row.visual_tokens:.6g}"
    interval = f"[{row.low:+.3f}, {row.high:+.3f}]"
    return [one.spec, row.kind, str(row.questions), f"{row.quality:.3f}", f"{row.difference:+.3f}", interval, tokens]


@guarded
def recommend(
    model: Any = None,
    budget: float | int = 0.25,
    task: str | None = None,
    *,
    results: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    adapter: str | None = None,
) -> Recommendation:
    """Names two or three methods for a model and a budget, with the reason and the measured rows behind it.

    Methods are tried on the model, without its weights, with the settings that were measured; one that it refuses is
    never named. Nothing is interpolated: figures are those of the nearest measured budget. They were measured on the
    small models of the package, so that they rank methods and say nothing of how much a large model loses.

    Args:
        model: as for `estimate`: a name, a preset, a model, one from `load`; None for the shipped checkpoint.
        budget: visual tokens that may stay: a float in (0, 1] as a share, or a number where the model says how many a
            picture has.
        task: a key of `TASKS`; None is ``chat`` for models that answer and ``classification`` for towers.
        results: CSV files of `vlmtok eval`, or None for those that ship with the package.
        adapter: as for `vlmtok.compress`.

    Raises:
        ParameterError: no such task or budget, a task that the model does not do, or results without rows for it.
        LoadError: the model cannot be had, or there are no results.
        UnsupportedModel: no adapter carries the model.
    """
    if task is not None and task not in TASKS:
        raise ParameterError(f"recommend: task={task!r} is none of {', '.join(TASKS)}")
    check_keep(budget, "recommend", "budget")
    paths = [results] if isinstance(results, (str, os.PathLike)) else results
    measured = read(paths)
    target = target_of(model, adapter)
    chosen = task or ("chat" if target.language else "classification")
    if (chosen == "classification") == target.language:
        does = "ocr and chat" if target.language else "classification"
        raise ParameterError(f"recommend: task={chosen!r} is nothing that {target.name} does; {does} are possible")
    share = _share(budget, target)
    return _Ranking(target, chosen, share, measured).run()


def _share(budget: float | int, target: Target) -> float:
    if isinstance(budget, float):
        return budget
    if not target.visual:
        raise ParameterError(
            f"recommend: budget={budget} is a number of tokens, and how many a picture has in {target.name} depends on "
            "its size; give a share in (0, 1]"
        )
    return min(1.0, budget / target.visual)


class _Ranking:
    """The ways that were measured for a use, at the nearest budget."""

    def __init__(self, target: Target, task: str, share: float, measured: Sequence[Measured]) -> None:
        self.target, self.task, self.share, self.need = target, task, share, TASKS[task]
        told = [row for row in measured if row.task == self.need.task and row.method != "none"]
        # Entries that leave caches save memory and no MACs: at equal shares such methods would always stand first.
        every = [row for row in told if row.convention != IN_CACHES]
        self.of_caches = sorted({row.method for row in told if row.convention == IN_CACHES})
        rows = [row for row in every if not row.problem]
        if not rows:
            there = ", ".join(sorted({row.task for row in measured})) or "none"
            raise ParameterError(f"recommend: the results have no figures of {self.need.task} (tasks in them: {there})")
        self.source = source_for(rows, target.name, target.visual)
        rows = [row for row in rows if row.model == self.source and row.keep > 0]
        # Settings that were chosen for the measured model may be wrong for another; published ones are for all.
        self.tuned = (
            sorted({row.asked for row in rows if ":" in row.asked} - {""}) if target.name != self.source else []
        )
        rows = [row for row in rows if row.asked not in self.tuned]
        budgets = _common_budgets(rows)
        self.budget = min(budgets, key=lambda keep: (abs(math.log(keep / share)), keep))
        self.others = [keep for keep in budgets if keep != self.budget]
        self.rows = [row for row in rows if row.keep == self.budget]
        self.without = {
            row.spec: row.problem
            for row in every
            if row.problem and row.model == self.source and row.keep in (self.budget, 0.0)
            if row.asked not in self.tuned
        }

    def run(self) -> Recommendation:
        """Ranks methods that the model takes."""
        standings: list[Standing] = []
        refused: dict[str, str] = {}
        lacking: list[str] = []
        where: tuple[str, ...]
        notes: tuple[str, ...]
        for method in dict.fromkeys(row.method for row in self.rows):
            for spec in dict.fromkeys(row.spec for row in self.rows if row.method == method):
                standing = self._standing(method, spec)
                if standing is None:
                    lacking.append(spec)
                    continue
                # Settings by layer fit the measured model alone, so that the method's own for this budget come first.
                asked = standing.rows[0].asked or spec
                here, reason = ("", "") if method in WAYS else self.target.fits(asked, self.share)
                where, notes = (), ()
                if not reason:
                    where, notes, reason = self.target.tries(method, here or spec)
                if reason:
                    refused[spec] = reason
                else:
                    standings.append(replace(standing, here=here, where=where, notes=notes))
        ranked = sorted(standings, key=lambda one: one.quality, reverse=True)
        methods = _one_each(one for one in ranked if one.method not in WAYS)
        baselines = tuple(_one_each(one for one in ranked if one.method in WAYS))
        if not methods:
            raise ParameterError(
                f"recommend: {self.target.name} takes none of the methods that were measured for {self.need.task}: "
                + "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            )
        picks = _picks(methods)
        return Recommendation(
            self.target.name,
            self.task,
            self.share,
            self.budget,
            self.source,
            self.need.kinds,
            picks,
            baselines,
            _verdict(picks[0], baselines),
            refused,
            tuple(self._notes(picks, baselines, refused, lacking)),
        )

    def _standing(self, method: str, spec: str) -> Standing | None:
        """A way over the kinds that decide; None where one of them was not measured."""
        found = {row.kind: row for row in self.rows if row.method == method and row.spec == spec}
        if any(kind not in found for kind in self.need.kinds):
            return None
        deciding = [found[kind] for kind in self.need.kinds]
        shown = [found[kind] for kind in self.need.shown if kind in found]
        return Standing(method, spec, *pooled(deciding), rows=(*deciding, *shown))

    def _notes(
        self,
        picks: Sequence[Standing],
        baselines: Sequence[Standing],
        refused: dict[str, str],
        lacking: Sequence[str],
    ) -> list[str]:
        """What limits this."""
        devices = ", ".join(sorted({row.device for one in picks for row in one.rows if row.device}))
        notes = [
            f"measured by {self.need.task} on {self.source}{f' ({devices})' if devices else ''}, a small model: it "
            "ranks methods; how much a larger model loses is for a run on that model (vlmtok eval) to say"
        ]
        if self.budget != self.share:
            others = ", ".join(f"{keep:.3g}" for keep in self.others)
            notes.append(
                f"{self.share:.3g} was not measured: all figures are those of {self.budget:.3g}"
                + (f" (also measured: {others})" if others else "")
            )
        if len(self.need.kinds) > 1:
            notes.append("intervals of several kinds together are made of theirs, whose questions differ")
        known = {*(one.method for one in baselines), *(spec.partition(":")[0] for spec in refused)}
        loose = ", ".join(one.spec for one in picks if not one.here)
        if loose:
            notes.append(
                f"with the settings that were measured: {loose}; vlmtok.budget(METHOD, MODEL, layer_average_tokens="
                f"{self.share:.3g}, image_size=(W, H)) sets a method for pictures of your size"
            )
        if self.tuned:
            notes.append(f"left out, for their settings were chosen for {self.source}: {', '.join(self.tuned)}")
        if self.of_caches:
            notes.append(
                "not ranked, for entries of caches leave by them and no tokens, which saves bytes and no MACs of the "
                f"prompt: {', '.join(self.of_caches)}; vlmtok.budget(METHOD, MODEL, kv_bytes=...) sets one"
            )
        notes += [f"{way} was not measured at this budget" for way in WAYS if way not in known]
        notes += [f"not every kind that decides was measured of {spec}" for spec in lacking]
        notes += [f"no figures of {spec}: {problem}" for spec, problem in self.without.items()]
        notes += [f"{one.spec}: {note}" for one in picks for note in one.notes]
        return notes


# ---------------------------------------------------------------------- rules
def pooled(rows: Sequence[Measured]) -> tuple[float, float, float, float]:
    """Quality, difference and the ends of its interval over kinds of questions, each weighted by its questions.

    Kinds have questions of their own, so that their errors are independent and half widths add as squares.

    Args:
        rows: of one way, one a kind.
    """
    if len(rows) == 1:
        return rows[0].quality, rows[0].difference, rows[0].low, rows[0].high
    total = sum(row.questions for row in rows) or len(rows)
    weights = [(row.questions or 1) / total for row in rows]
    quality = sum(weight * row.quality for weight, row in zip(weights, rows))
    difference = sum(weight * row.difference for weight, row in zip(weights, rows))
    half = math.sqrt(sum((weight * row.half) ** 2 for weight, row in zip(weights, rows)))
    return quality, difference, max(-1.0, difference - half), min(1.0, difference + half)


def _common_budgets(rows: Sequence[Measured]) -> list[float]:
    """Budgets at which ways can be compared: stacks and methods that ran as written have budgets of their own."""
    ways: dict[float, set[str]] = {}
    for row in rows:
        ways.setdefault(row.keep, set()).add(row.method)
    most = max(map(len, ways.values()))
    return sorted(keep for keep, names in ways.items() if 2 * len(names) >= most)


def _one_each(ranked: Iterable[Standing]) -> list[Standing]:
    """The best spec of each method."""
    best: dict[str, Standing] = {}
    for one in ranked:
        best.setdefault(one.method, one)
    return list(best.values())


def _picks(methods: Sequence[Standing]) -> tuple[Standing, ...]:
    """The best two, and the third where the best one's interval holds it."""
    return tuple(one for place, one in enumerate(methods[:MOST]) if place < 2 or one.difference >= methods[0].low)


def _verdict(best: Standing, baselines: Sequence[Standing]) -> str:
    """Whether the best method beats what it has to."""
    if not baselines:
        return "random choice and downsampling are not among the rows: nothing says that a method is needed here"
    level = [one.method for one in baselines if one.difference >= best.low]
    if not level:
        return f"{best.spec} beats {' and '.join(one.method for one in baselines)} here: they lie below its interval"
    ahead = [one.method for one in baselines if one.difference > best.difference]
    said = f"no method beats {' or '.join(level)} here: within the interval of the best, {best.spec}"
    return said + (f"; {' and '.join(ahead)} got more right than it" if ahead else "")
