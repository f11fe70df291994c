"""What methods cost for a single picture, where that was measured: rows that ship with the package."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "costs" / "batch_one.csv"
"""Made by ``tools/batch_one.py`` from the committed results of benchmarks."""


@dataclass(frozen=True)
class Cost:
    """One measured time at batch 1.

    Attributes:
        method: name in the registry.
        spec: the method as it was set.
        what: what was timed, in words.
        tokens: visual tokens without the method.
        times: time with the method over time without it.
        selection: time of the choice itself, as a share of what the cut saves; None where it was not timed apart.
        basis: ``"measured"``, or what of it is modelled.
        device: on what.
        dtype: in which dtype.
        versions: of torch and vlmtok.
    """

    method: str
    spec: str
    what: str
    tokens: int
    times: float
    selection: float | None
    basis: str
    device: str
    dtype: str
    versions: str

    @property
    def loses(self) -> bool:
        """Whether the method costs more than it saves."""
        return self.times > 1.0

    @property
    def verdict(self) -> str:
        """That in words."""
        chosen = f"; the choice is {self.selection:.2%} of that" if self.selection is not None else ""
        return "costs more than it saves" if self.loses else f"saves {1 - self.times:.0%}{chosen}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {**asdict(self), "costs_more_than_it_saves": self.loses}


def costs(method: str) -> list[Cost]:
    """What is on record of a method, the worst first; empty where nothing is.

    Args:
        method: name in the registry.
    """
    with open(FILE, encoding="utf-8", newline="") as file:
        found = [_cost(row) for row in csv.DictReader(file) if row["method"] == method]
    return sorted(found, key=lambda cost: -cost.times)


def _cost(row: dict[str, str]) -> Cost:
    return Cost(
        **{
            **row,
            "tokens": int(row["tokens"]),
            "times": float(row["times"]),
            "selection": float(row["selection"]) if row["selection"] else None,
        }  # type: ignore[arg-type]
    )
