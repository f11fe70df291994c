"""What has been answered so far, line by line on disk, so that a sweep that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ParameterError
from .task import Item, Outcome


class Journal:
    """A file of JSON lines: a head that says what is measured, then answers and costs in the order in which they came.

    A line that a kill cut short is thrown away; what it told is done again.

    Args:
        path: the file; made where there is none.
        head: settings that answers depend on.

    Raises:
        ParameterError: the file tells of something else; the message names what differs.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, int], dict[str, Outcome]] = defaultdict(dict)
        self.costs: dict[tuple[str, str], dict[str, Any]] = {}
        self.head = json.loads(json.dumps(head))
        lines = self._whole_lines()
        if lines:
            self._check(lines[0])
            for line in lines[1:]:
                self._take(line)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([{"head": self.head}])

    def _whole_lines(self) -> list[dict[str, Any]]:
        """The lines that are whole; the file ends behind the last of them from now on."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(end)
        try:
            return [json.loads(line) for line in content[:end].splitlines()]
        except ValueError:
            raise ParameterError(
                f"{str(self.path)!r} is no journal of a sweep; move it away or give another folder"
            ) from None

    def _check(self, first: dict[str, Any]) -> None:
        found = first.get("head")
        if found == self.head:
            return
        if not isinstance(found, dict):
            raise ParameterError(f"{str(self.path)!r} is no journal of a sweep; move it away or give another folder")
        names = [name for name in {**found, **self.head} if found.get(name) != self.head.get(name)]
        said = "; ".join(f"{name}: {found.get(name)!r} there, {self.head.get(name)!r} now" for name in sorted(names))
        raise ParameterError(
            f"{str(self.path)!r} holds answers of another sweep ({said}); give another folder, or delete it"
        )

    def _take(self, line: dict[str, Any]) -> None:
        if "cost" in line:
            self.costs[line["way"], line["kind"]] = line["cost"]
        else:
            outcome = Outcome(line["quality"], line["answer"], line.get("measures", {}))
            self.outcomes[line["way"], line["repeat"]][line["id"]] = outcome

    # ------------------------------------------------------------------ writing
    def add_answers(self, way: str, repeat: int, items: Sequence[Item], outcomes: Sequence[Outcome]) -> None:
        """Writes a batch of answers."""
        lines = []
        for item, outcome in zip(items, outcomes):
            line = {"way": way, "repeat": repeat, "id": item.id, "quality": outcome.quality, "answer": outcome.answer}
            lines.append({**line, "measures": dict(outcome.measures)} if outcome.measures else line)
        self._write(lines)
        for line in lines:
            self._take(line)

    def add_cost(self, way: str, kind: str, cost: Mapping[str, Any]) -> None:
        """Writes what a kind of question costs under a way, or why it has no figures."""
        line = {"way": way, "kind": kind, "cost": dict(cost)}
        self._write([line])
        self._take(line)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
