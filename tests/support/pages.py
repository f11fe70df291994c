"""Python blocks of Markdown pages, run in order in one process a page, and what stands below them as printed.

As a program it reads `[[place, code], ...]` from standard input and writes what each block printed, as JSON, to the
file that it is given.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
REST = "..."


@dataclass(frozen=True)
class Block:
    """A Python block of a page.

    Attributes:
        line: where it begins.
        code: what it says.
        runs: whether it is run.
        shown: the text block behind it, or None.
    """

    line: int
    code: str
    runs: bool = True
    shown: str | None = None


def blocks_of(text: str) -> list[Block]:
    """The Python blocks of a page, in order.

    Raises:
        ValueError: a block's info is none of ``python`` and ``python no-run``, or no reason is given.
    """
    found: list[Block] = []
    end = None
    for fence in _FENCE.finditer(text):
        kind, _, info = fence["info"].strip().partition(" ")
        line = text.count("\n", 0, fence.start()) + 1
        if kind == "python":
            if info not in ("", "no-run"):
                raise ValueError(f"line {line}: a block of Python is ```python or ```python no-run, not {info!r}")
            if info and not fence["body"].startswith("# not run: "):
                raise ValueError(f"line {line}: a block that is not run says why in its first line: # not run: ...")
            found.append(Block(line, fence["body"], not info))
            end = fence.end()
        elif kind == "text" and end is not None and not text[end : fence.start()].strip():
            last = found[-1]
            found[-1] = Block(last.line, last.code, last.runs, fence["body"])
            end = None
    return found


def differs(shown: str, printed: str) -> str | None:
    """How a text block differs from what was printed, or None.

    A line that is ``...`` stands for any lines, also none; ``...`` within a line for any characters.
    """
    wanted = [line.rstrip() for line in shown.strip("\n").splitlines()]
    given = [line.rstrip() for line in printed.strip("\n").splitlines()]
    reached = {0}
    for number, line in enumerate(wanted):
        if line == REST:
            reached = set(range(min(reached), len(given) + 1))
            continue
        pattern = re.compile(".*".join(map(re.escape, line.split(REST))))
        fits = {at + 1 for at in reached if at < len(given) and pattern.fullmatch(given[at])}
        if not fits:
            near = given[min(reached)] if min(reached) < len(given) else "nothing more"
            return f"line {number + 1} says {line!r}, printed is {near!r}"
        reached = fits
    if len(given) not in reached:
        return f"more is printed than is shown: {given[max(reached)]!r}"
    return None


def run(blocks: Sequence[Block], name: str, folder: Path, home: Path, root: Path, timeout: float) -> list[str]:
    """Runs blocks in one fresh process.

    Args:
        blocks: of one page.
        name: of the page, for tracebacks.
        folder: where it runs.
        home: Hugging Face's folder.
        root: of the package.
        timeout: seconds.

    Returns:
        What each printed.

    Raises:
        AssertionError: a block failed; the message is what it wrote on standard error.
    """
    answer = folder / "printed.json"
    given = json.dumps([[f"{name}:{block.line}", block.code] for block in blocks])
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(root),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(answer)],
        input=given,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{name} fails:\n{done.stderr[-4000:]}"
    return json.loads(answer.read_text(encoding="utf-8"))


def _outputs(pairs: Sequence[Sequence[str]]) -> Iterator[str]:
    """Runs code in one namespace, as a program would."""
    import __main__

    space = vars(__main__)
    for place, code in pairs:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * (int(place.rpartition(":")[2])) + code, place, "exec"), space)
        yield out.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(list(_outputs(json.load(sys.stdin)))), encoding="utf-8")
