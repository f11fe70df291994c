"""Committed results of sweeps, as they are read back: one row a task, model, way, budget and kind of question."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ParameterError
from ..loading.names import DATA
from ..loading.problems import LoadError, line_of

ALL = "all"
"""Kind of a row about all questions of a task together."""

NEEDED = ("task", "model", "method", "spec", "keep", "kind", "questions", "quality", "difference", "low", "high")
"""Columns without which a file tells nothing; others may be there or not."""


@dataclass(frozen=True)
class Measured:
    """What a way kept of the answers at one budget.

    Attributes:
        task: by which it was measured.
        model: that answered.
        method: plain name of the way.
        spec: spec string that ran.
        keep: share of the visual tokens that was asked for; 1 for the uncompressed model, 0 where it is not written.
        kind: of question, or `ALL`.
        questions: how many.
        quality: share of right answers, in [0, 1].
        difference: quality less that of the uncompressed model, in [-1, 1].
        low: lower end of its interval.
        high: upper end.
        visual_tokens: that were left, or None.
        macs_ratio: MACs of the uncompressed model over those of the way, or None.
        problem: why there are no figures; empty where there are.
        device: on which it ran, as written.
        asked: spec string from which it was set to the budget; empty where it is not written.
        convention: what its budget counts; empty where it is not written.
    """

    task: str
    model: str
    method: str
    spec: str
    keep: float
    kind: str
    questions: int
    quality: float
    difference: float
    low: float
    high: float
    visual_tokens: float | None = None
    macs_ratio: float | None = None
    problem: str = ""
    device: str = ""
    asked: str = ""
    convention: str = ""

    @property
    def half(self) -> float:
        """Half the width of the interval of the difference."""
        return (self.high - self.low) / 2


def read(paths: Iterable[str | os.PathLike[str]] | None = None) -> list[Measured]:
    """Results of sweeps.

    Args:
        paths: CSV files, or None for those that ship with the package.

    Raises:
        LoadError: a file is missing, or none ships.
        ParameterError: a file is no table of results.
    """
    files: Sequence[Path]
    if paths is None:
        folder = DATA / "results"
        files = sorted(folder.glob("*.csv"))
        if not files:
            raise LoadError(
                "this installation ships no results: there is no CSV file in vlmtok/data/results; measure with "
                "`vlmtok eval TASK --out FOLDER` and give results=FOLDER/TASK.csv"
            )
    else:
        files = [Path(path) for path in paths]
    return [row for file in files for row in _rows(file)]


def _rows(path: Path) -> list[Measured]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or (), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise LoadError(f"cannot read results {str(path)!r}: {line_of(problem)}") from None
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise ParameterError(f"{str(path)!r} is no table of results: it has no column {', '.join(missing)}")
    return [_row(path, number, row) for number, row in enumerate(rows, 2)]


def _row(path: Path, number: int, row: dict[str, str]) -> Measured:
    """One line; a way without figures has a problem instead of them."""
    problem = row.get("problem") or ""

    def figure(name: str, missing: float | None = None) -> float | None:
        text = row.get(name) or ""
        if not text:
            return missing
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise ParameterError(f"{str(path)!r}, line {number}: {name} is {text!r}, which is no number")
        return found

    def needed(name: str) -> float:
        found = figure(name, math.nan if problem else None)
        if found is None:
            raise ParameterError(f"{str(path)!r}, line {number}: there is no {name}, and no problem that says why")
        return found

    bare = row["method"] == "none"  # it has no difference to itself

    def away(name: str) -> float:
        return (figure(name, 0.0) if bare else needed(name)) or 0.0

    return Measured(
        row["task"],
        row["model"],
        row["method"],
        row["spec"],
        figure("keep", 1.0 if bare else 0.0) or 0.0,
        row["kind"],
        int(figure("questions", 0) or 0),
        needed("quality"),
        away("difference"),
        away("low"),
        away("high"),
        figure("visual_tokens"),
        figure("macs_ratio"),
        problem,
        row.get("device") or "",
        row.get("asked") or "",
        row.get("convention") or "",
    )


def source_for(rows: Sequence[Measured], name: str, visual: int) -> str:
    """The model whose figures count: the same, or the one with the nearest number of visual tokens, else the most.

    Args:
        rows: with figures.
        name: of the model that is asked about.
        visual: its visual tokens of a picture; 0 where that depends on the picture.
    """
    names = sorted({row.model for row in rows})
    if name in names:
        return name
    sizes = {
        one: max((row.visual_tokens / row.keep for row in rows if row.model == one and row.visual_tokens), default=0.0)
        for one in names
    }
    if visual:
        return min(names, key=lambda one: (abs(math.log(max(sizes[one], 1e-9) / visual)), one))
    return max(names, key=lambda one: (sizes[one], one))
