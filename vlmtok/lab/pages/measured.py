"""What we have measured of a method, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.spec import parse_methods
from ...errors import VlmtokError
from ..tables import table

Row = Mapping[str, Any]


class ResultsError(VlmtokError):
    """A folder of results in which a file is missing."""


@dataclass(frozen=True)
class Measured:
    """Rows of the committed results.

    Attributes:
        answers: of ``tiny_llava.json``: how many questions a method leaves answered.
        suite: of ``suite_h200.json``: how much faster whole models run.
        towers: of ``towers_h200.json``: towers as they are called, and as CUDA graphs.
    """

    answers: Sequence[Row]
    suite: Sequence[Row]
    towers: Sequence[Row]

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """The results of a folder.

        Raises:
            ResultsError: a file is missing.
        """

        def rows(name: str) -> list[Row]:
            if not (folder / name).is_file():
                raise ResultsError(f"{folder} has no {name}; pages of methods quote it")
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return list(found["rows"] if isinstance(found, dict) else found)

        suite = [row for row in rows("suite_h200.json") if row["speedup"] is not None]
        return cls(rows("tiny_llava.json"), suite, rows("towers_h200.json"))

    def section(self, name: str) -> str:
        """All that is known of a method, as markdown.

        Args:
            name: in the registry.

        Returns:
            Tables with what they are; a sentence where nothing has been measured.
        """
        parts = [part for part in (self._answers(name), self._suite(name), self._towers(name)) if part]
        return "\n\n".join(parts) or "Nothing has been measured yet."

    def _answers(self, name: str) -> str:
        own = list(_of(self.answers, name))
        if not own:
            return ""
        (bare,) = (row for row in self.answers if row["method"] == "bare")
        chance = {row["budget"]: row["right"]["all"] for row in self.answers if row["method"] == "random"}
        rows = [
            (
                f"`{row['spec']}`",
                f"{row['layer_average_tokens']:g}",
                _percent(row["right"]["all"]),
                _percent(chance[row["budget"]]),
            )
            for row in own
        ]
        said = (
            f"tiny-llava, {bare['questions']:,} held-out questions, share right to the letter (bare: "
            f"{bare['layer_average_tokens']:g} tokens, {_percent(bare['right']['all'])}); `random` at the same budget. "
            "It says what a method keeps of little pictures of shapes and digits, not how it does on photographs."
        )
        return f"{said}\n\n{table(('setting', 'visual tokens a layer', 'right', '`random`'), rows)}"

    def _suite(self, name: str) -> str:
        own = list(_of(self.suite, name))
        if not own:
            return ""
        rows = [
            (
                row["model"],
                row["stage"],
                str(row["batch"]),
                f"`{row['method']}`",
                row["kernels"],
                f"{row['mac_ratio']:.2f}",
                f"{row['speedup']:.2f}",
                str(row["rounds"]),
            )
            for row in own
        ]
        heads = ("model", "stage", "batch", "setting", "kernels", "MACs, times fewer", "times as fast", "rounds")
        return f"Time of models with random weights, {_machine(own[0])}; below 1 is slower.\n\n{table(heads, rows)}"

    def _towers(self, name: str) -> str:
        own = list(_of(self.towers, name))
        if not own:
            return ""
        bare = {(row["model"], row["batch"]): row for row in self.towers if row["method"] is None}
        rows = []
        for row in own:
            beside = bare[row["model"], row["batch"]]
            times = [f"{row[way]:.2f} ({beside[way]:.2f})" for way in ("eager_ms", "graph_ms")]
            rows.append((row["model"], str(row["batch"]), f"`{row['method']}`", row["kernels"], *times))
        said = f"Milliseconds of a tower (in brackets: bare), {_machine(own[0])}, medians of {own[0]['median_of']}."
        heads = ("model", "batch", "setting", "kernels", "as called", "as a CUDA graph")
        return f"{said}\n\n{table(heads, rows)}"


def _of(rows: Sequence[Row], name: str) -> Iterator[Row]:
    """Rows in whose spec a method stands; those that could not be measured have none."""
    for row in rows:
        spec = row["spec"] if "spec" in row else row["method"]
        if spec and name in (one.spec_name() for one in parse_methods(spec)):
            yield row


def _machine(row: Row) -> str:
    return f"{row['device']}, driver {row['driver']}, torch {row['torch']}, {row['dtype']}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
