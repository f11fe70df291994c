"""Seeded one-line faults ("mutants") of the package, each of which some test must find: ``tools/mutants/*.txt``.

    python tools/mutants.py                          # all, a quarter of an hour on one core; exit code 1 if one lives
    python tools/mutants.py --list                   # names, files and the tests that are asked
    python tools/mutants.py --file vlmtok/core/rows.py    # those of one file; --only NAME for one
    python tools/mutants.py --log mutants.jsonl      # writes what is found, and goes on from there the next time
    python tools/mutants.py --control                # the same tests without a mutant, which all must pass

A mutant changes one fragment of one line in a copy of the tree, never the tree itself, and runs the tests that its row
names until the first fails. It was ``killed`` if one did (or hung), it ``survived`` if all passed. Its row is ``stale``
where the fragment is not in the file exactly once, the result does not compile, or its tests cannot be run. An
``equivalent`` mutant changes no result that can be seen, for the reason that its row gives, and is not run.

A row of a table:

    name-of-the-mutant
      file vlmtok/core/rows.py
      - the fragment as it is
      + what it becomes
      test tests/core/test_rows.py -k "words of pytest"
      equivalent why nothing can be seen (instead of a test)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = Path(__file__).with_suffix("")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "notebooks")
"""What no test of a mutant needs in the copy."""
TIMEOUT = 120.0
"""Seconds after which the tests of one mutant are stopped; a mutant that makes them hang is killed."""
BAD = ("survived", "stale")
IMPORTED = ("pytest", "hypothesis", "torch", "torchvision", "transformers", "timm", "open_clip")
"""What is imported once for all tests."""


@dataclass
class Mutant:
    """A row of a table.

    Attributes:
        name: unique.
        file: path in the tree.
        old: a fragment of one line, exactly once in the file.
        new: what it becomes.
        tests: arguments of pytest, one list for each run.
        equivalent: why no test can see it, or empty.
    """

    name: str
    file: str = ""
    old: str = ""
    new: str = ""
    tests: list[list[str]] = field(default_factory=list)
    equivalent: str = ""

    def applied(self, text: str) -> str:
        """The file's text with the mutant in it.

        Raises:
            ValueError: it cannot be applied, and why.
        """
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.file} has {self.old!r} {found} times, where it must be there exactly once")
        changed = text.replace(self.old, self.new)
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as problem:
            raise ValueError(f"{self.file} does not compile with {self.new!r}: {problem}") from None
        return changed


@dataclass
class Outcome:
    """What became of a mutant: ``killed``, ``survived``, ``equivalent`` or ``stale``, and more words about it."""

    name: str
    state: str
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.state:10} {self.name:48} {self.seconds:5.0f} s  {self.why}".rstrip()


# ---------------------------------------------------------------------- tables
def read(text: str, where: str = "table") -> list[Mutant]:
    """The rows of a table.

    Args:
        text: of the table.
        where: its name, for errors.

    Raises:
        ValueError: a line is none of a row, or a row lacks something.
    """
    rows: list[Mutant] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            rows.append(Mutant(line.strip()))
            continue
        key, _, value = line.strip().partition(" ")
        if not rows or key not in ("file", "-", "+", "test", "equivalent"):
            raise ValueError(f"{where}, line {number}: {line.strip()!r} is no line of a mutant")
        if key == "test":
            rows[-1].tests.append(shlex.split(value))
        else:
            setattr(rows[-1], {"-": "old", "+": "new"}.get(key, key), value)
    for row in rows:
        if not row.file or not row.old or row.old == row.new or bool(row.tests) == bool(row.equivalent):
            raise ValueError(f"{where}: {row.name} needs a file, a change, and either tests or a reason")
    return rows


def tables(folder: Path = TABLES) -> list[Mutant]:
    """All rows, in the order of the tables.

    Raises:
        ValueError: two have one name, or a table cannot be read.
    """
    rows = [row for path in sorted(folder.glob("*.txt")) for row in read(path.read_text("utf-8"), path.name)]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names that stand for two mutants: {', '.join(twice)}")
    return rows


# ---------------------------------------------------------------------- running
class Copy:
    """A copy of the tree in which mutants are tried one after the other."""

    def __init__(self, root: Path, into: Path, imported: Sequence[str] = IMPORTED) -> None:
        self.path = into
        self.clock = int(time.time())
        shutil.copytree(root, into, ignore=LEFT_OUT, dirs_exist_ok=True)
        command = [sys.executable, str(TABLES / "nursery.py"), *imported]
        self.nursery = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
        )

    def write(self, file: str, text: str) -> None:
        """Writes a file; no two versions have one time, by which Python tells whether its bytecode is old."""
        self.clock += 2
        target = self.path / file
        target.write_text(text, "utf-8")
        os.utime(target, (self.clock, self.clock))

    def ask(self, tests: list[str], timeout: float) -> tuple[int | None, str]:
        """Runs pytest until the first failure: its exit code (None where it was stopped), and its last line."""
        assert self.nursery.stdin is not None and self.nursery.stdout is not None
        request = {"tests": tests, "folder": str(self.path), "timeout": timeout}
        self.nursery.stdin.write(json.dumps(request) + "\n")
        self.nursery.stdin.flush()
        line = self.nursery.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that runs tests ended with exit code {self.nursery.wait()}")
        found = json.loads(line)
        if found["code"] is None:
            return None, f"stopped after {timeout:g} s"
        lines = found["lines"]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return found["code"], (failed or lines or [""])[-1][:200]

    def close(self) -> None:
        """Ends the process in which tests run."""
        self.nursery.communicate()

    def try_out(self, mutant: Mutant, timeout: float) -> Outcome:
        """Applies a mutant, asks its tests, and takes it back."""
        began = time.monotonic()
        original = (self.path / mutant.file).read_text("utf-8") if (self.path / mutant.file).is_file() else ""
        try:
            changed = mutant.applied(original)
        except ValueError as problem:
            return Outcome(mutant.name, "stale", str(problem))
        if mutant.equivalent:
            return Outcome(mutant.name, "equivalent", mutant.equivalent)
        self.write(mutant.file, changed)
        state, why = "survived", ""
        try:
            for tests in mutant.tests:
                code, why = self.ask(tests, timeout)
                if code != 0:
                    state = "killed" if code in (None, 1) else "stale"
                    break
        finally:
            self.write(mutant.file, original)
        return Outcome(mutant.name, state, why, time.monotonic() - began)

    def control(self, tests: list[str], timeout: float) -> Outcome:
        """Asks tests without a mutant: those that fail by themselves would kill any."""
        began = time.monotonic()
        code, why = self.ask(tests, timeout)
        return Outcome(shlex.join(tests), "passed" if code == 0 else "stale", why, time.monotonic() - began)


def fingerprint(mutant: Mutant, root: Path) -> str:
    """Changes with the row, the file and the tests that it names."""
    files = [mutant.file, *(word.partition("::")[0] for tests in mutant.tests for word in tests)]
    texts = [(root / file).read_bytes() for file in dict.fromkeys(files) if (root / file).is_file()]
    return hashlib.sha256(b"\0".join([repr(mutant).encode(), *texts])).hexdigest()[:16]


def known(log: Path | None) -> dict[str, Outcome]:
    """Outcomes of an earlier run, by fingerprint."""
    if log is None or not log.is_file():
        return {}
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return {row.pop("fingerprint"): Outcome(**row) for row in rows}


def run(
    mutants: Iterable[Mutant],
    root: Path = ROOT,
    jobs: int = 1,
    timeout: float = TIMEOUT,
    log: Path | None = None,
    imported: Sequence[str] = IMPORTED,
) -> Iterator[Outcome]:
    """Tries mutants.

    Args:
        mutants: the rows.
        root: the tree; it is copied, and never changed.
        jobs: how many at once, each in a copy of its own.
        timeout: seconds for each of a mutant's tests.
        log: where outcomes are added, and taken from where nothing has changed since.
        imported: what is imported once for all tests.

    Yields:
        Outcomes as they come.
    """
    before = known(log)
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
    waiting: dict[str, str] = {}
    for mutant in mutants:
        mark = fingerprint(mutant, root)
        if mark in before:
            yield before[mark]
        else:
            waiting[mutant.name] = mark
            todo.put(mutant)

    def work(place: Path) -> None:
        try:
            with closing(Copy(root, place, imported)) as copy:
                while True:
                    done.put(copy.try_out(todo.get_nowait(), timeout))
        except queue.Empty:
            return
        except BaseException as problem:
            done.put(problem)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for index in range(min(jobs, len(waiting))):
            threading.Thread(target=work, args=(Path(folder) / f"tree{index}",), daemon=True).start()
        for _ in range(len(waiting)):
            outcome = done.get()
            if isinstance(outcome, BaseException):
                raise outcome
            if log is not None and outcome.state != "stale":
                with log.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"fingerprint": waiting[outcome.name], **vars(outcome)}) + "\n")
            yield outcome


def controls(
    mutants: Iterable[Mutant], root: Path = ROOT, timeout: float = TIMEOUT, imported: Sequence[str] = IMPORTED
) -> Iterator[Outcome]:
    """Asks every test that some mutant names without one."""
    asked = {shlex.join(tests): tests for mutant in mutants for tests in mutant.tests}
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        closing(Copy(root, Path(folder) / "tree", imported)) as copy,
    ):
        for tests in asked.values():
            yield copy.control(tests, timeout)


def main(given: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutant (or those that begin so)")
    parser.add_argument("--file", metavar="PATH", action="append", help="mutants of this file")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (default: 1)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each mutant's tests")
    parser.add_argument("--log", type=Path, help="file to which outcomes are added, and from which a run goes on")
    parser.add_argument("--list", action="store_true", help="name them and run nothing")
    parser.add_argument("--control", action="store_true", help="run their tests without a mutant")
    args = parser.parse_args(given)
    rows = tables()
    if args.only:
        rows = [row for row in rows if row.name.startswith(tuple(args.only))]
    if args.file:
        rows = [row for row in rows if row.file in args.file]
    if not rows or args.jobs < 1:
        parser.error("no mutant is named so" if not rows else f"--jobs {args.jobs}: at least 1")
    if args.list:
        for row in rows:
            asked = "; ".join(map(shlex.join, row.tests)) or f"equivalent: {row.equivalent}"
            print(f"{row.name:48} {row.file:32} {asked}")
        return 0
    if args.control:
        tried = controls(rows, ROOT, args.timeout, IMPORTED)
    else:
        tried = run(rows, ROOT, args.jobs, args.timeout, args.log, IMPORTED)
    found: list[Outcome] = []
    for outcome in tried:
        print(outcome, flush=True)
        found.append(outcome)
    states = [outcome.state for outcome in found]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    return int(any(state in BAD for state in states))


if __name__ == "__main__":
    sys.exit(main())
