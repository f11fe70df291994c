"""`tools/mutants.py`: its tables fit the code, and it tells what was found from what lives."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from support.places import ROOT


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants_tool", ROOT / "tools" / "mutants.py")
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_row_fits_the_code(mutants):
    """A fragment that is there once, a change that compiles, tests that exist; a stale row guards nothing."""
    rows = mutants.tables()
    assert len(rows) >= 100
    for row in rows:
        row.applied((ROOT / row.file).read_text("utf-8"))
        assert "\n" not in row.old and (row.equivalent or row.tests)
        for tests in row.tests:
            assert (ROOT / tests[0].partition("::")[0]).is_file(), row.name
            assert tests[1:2] in ([], ["-k"]), row.name
    assert sum(bool(row.equivalent) for row in rows) < len(rows) // 10


def test_rows_cover_core_cost_lab_and_adapters(mutants):
    files = {row.file for row in mutants.tables()}
    core = "rows cutting grouping sequence merging signals ledger trace stream attachment view"
    cost, lab = "flops plan rehearsal assemble conventions", "comparing overlay zero_shot suite runners"
    wings = {"core": core, "cost": cost, "forecast": "estimate budget", "lab": lab}
    assert {f"vlmtok/{wing}/{name}.py" for wing, names in wings.items() for name in names.split()} <= files
    assert sum(file.startswith("adapters/") for file in files) >= 10


CODE = """\
def add(a, b):
    return a + b


def largest(values):
    return max(values, default=0)


def forever(n):
    while n > 0:
        n -= 1
    return n
"""
TESTS = """\
from small import add, forever, largest


def test_add():
    assert add(2, 3) == 5


def test_largest():
    assert largest([1, 2]) == 2


def test_forever():
    assert forever(3) == 0
"""
TABLE = """\
# A comment.
killed-one
  file small.py
  - return a + b
  + return a - b
  test test_small.py -k add

lives
  file small.py
  - return max(values, default=0)
  + return max(values, default=1)
  test test_small.py -k add
  test test_small.py -k largest
same
  file small.py
  - while n > 0:
  + while n >= 1:
  equivalent n is a whole number
gone
  file small.py
  - return a * b
  + return a
  test test_small.py
twice
  file small.py
  - return
  + raise
  test test_small.py
broken
  file small.py
  - return a + b
  + return a +
  test test_small.py
untested
  file small.py
  - return a + b
  + return b
  test test_small.py -k nothing_is_called_so
hangs
  file small.py
  - n -= 1
  + n -= 0
  test test_small.py -k forever
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "small.py").write_text(CODE)
    (tree / "test_small.py").write_text(TESTS)
    return tree


def test_killed_is_told_from_survived(mutants, small, tmp_path):
    rows, log = mutants.read(TABLE), tmp_path / "log.jsonl"
    found = {one.name: one for one in mutants.run(rows[:-1], small, log=log, imported=())}
    found |= {one.name: one for one in mutants.run(rows[-1:], small, timeout=1.0, log=log, imported=())}
    assert {name: one.state for name, one in found.items()} == {
        "killed-one": "killed",
        "lives": "survived",
        "same": "equivalent",
        "gone": "stale",
        "twice": "stale",
        "broken": "stale",
        "untested": "stale",
        "hangs": "killed",
    }
    assert "0 times" in found["gone"].why and "3 times" in found["twice"].why and "compile" in found["broken"].why
    assert "test_add" in found["killed-one"].why and "stopped after" in found["hangs"].why
    assert found["same"].why == "n is a whole number"
    assert (small / "small.py").read_text() == CODE, "the tree itself is never changed"
    assert sorted(path.name for path in small.iterdir()) == ["small.py", "test_small.py"]
    # What was found is found again without a run, until the file or its tests change.
    known = mutants.known(log)
    assert {one.name for one in known.values()} == {"killed-one", "lives", "same", "hangs"}
    rows = [row for row in rows if row.name in ("killed-one", "lives")]
    assert all(mutants.fingerprint(row, small) in known for row in rows)
    (small / "test_small.py").write_text(TESTS + "\n\ndef test_nothing_largest():\n    assert largest([]) == 0\n")
    assert not any(mutants.fingerprint(row, small) in known for row in rows)
    again = {one.name: one.state for one in mutants.run(rows[1:], small, log=log, imported=())}
    assert again == {"lives": "killed"}


def test_tests_that_fail_by_themselves_kill_nothing(mutants, small):
    (small / "test_small.py").write_text(TESTS.replace("== 5", "== 6"))
    rows = [row for row in mutants.read(TABLE) if row.name in ("killed-one", "hangs")]
    assert [one.state for one in mutants.controls(rows, small, imported=())] == ["stale", "passed"]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("  file small.py\n", "is no line of a mutant"),
        ("one\n  fil small.py\n", "is no line of a mutant"),
        ("one\n  file small.py\n  - a\n  + b\n", "either tests or a reason"),
        ("one\n  file small.py\n  - a\n  + a\n  test t.py\n", "needs a file, a change"),
        ("one\n  file small.py\n  - a\n  + b\n  test t.py\n  equivalent both\n", "either tests or a reason"),
    ],
)
def test_tables_that_cannot_be_read(mutants, table, says):
    with pytest.raises(ValueError, match=says):
        mutants.read(table)


def test_the_command_line(mutants, monkeypatch, capsys, small):
    rows = mutants.read(TABLE)
    monkeypatch.setattr(mutants, "tables", lambda: rows)
    monkeypatch.setattr(mutants, "ROOT", small)
    monkeypatch.setattr(mutants, "IMPORTED", ())
    assert mutants.main(["--list"]) == 0 and "killed-one" in capsys.readouterr().out
    assert mutants.main(["--only", "killed"]) == 0 and "1 killed" in capsys.readouterr().out
    assert mutants.main(["--only", "same"]) == 0 and mutants.main(["--only", "gone"]) == 1
    with pytest.raises(SystemExit):
        mutants.main(["--file", "nowhere.py"])
