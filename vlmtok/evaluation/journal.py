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

_BEGINS = b'{"head": {'
"""How every journal begins."""


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
        content = path.read_bytes() if path.exists() else b""
        end = content.rfind(b"\n") + 1
        try:
            self._read(content[:end].splitlines(), content[end:])
        except ParameterError:
            raise
        except (ValueError, KeyError, TypeError):
            raise ParameterError(
                f"{str(path)!r} is no journal of a sweep; move it away or give another folder"
            ) from None
        if end < len(content):  # it is ours: what a kill cut short may go
            with open(path, "r+b") as file:
                file.truncate(end)
        if not end:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write([{"head": self.head}])

    def _read(self, lines: Sequence[bytes], cut: bytes) -> None:
        """Takes whole lines in.

        Raises:
            ParameterError: the head is another.
            ValueError, KeyError, TypeError: they are no journal's; without any, what was cut is no beginning of one.
        """
        if not lines and not (_BEGINS.startswith(cut) or cut.startswith(_BEGINS)):
            raise ValueError
        for number, line in enumerate(lines):
            told = json.loads(line)
            if number == 0:
                self._check(told["head"])
            else:
                self._take(told)

    def _check(self, found: Any) -> None:
        if found == self.head:
            return
        if not isinstance(found, dict):
            raise TypeError
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
