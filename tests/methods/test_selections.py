"""`Method.version` goes up with every change of what a method chooses: engines keep pictures by keys that hold it."""

import json

import pytest
from support import selections
from support.methods import METHODS

from vlmtok import DivPrune, Reduction

RUN = "run python -m support.selections in tests/"
COMMITTED = selections.committed()


def test_every_method_is_in_the_table():
    assert sorted(COMMITTED) == METHODS, f"methods came or went: {RUN}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_chooses_as_its_version_did(name):
    now, before = selections.row_of(name), COMMITTED[name]
    wrong = selections.problem(name, now, before)
    assert wrong is None, wrong
    assert type(now["version"]) is int and now["version"] >= 1
    assert now["version"] == before["version"], f"{name} has version {now['version']}: {RUN}"
    assert list(now["choices"]) == list(before["choices"]), f"settings of {name} came or went: {RUN}"


def test_hardly_a_choice_hangs_on_rounding():
    digests = [digest for row in COMMITTED.values() for digest in row["choices"].values()]
    assert digests.count(None) <= 0.01 * len(digests)
    assert all(row["choices"][name] is not None for name, row in COMMITTED.items())  # of the defaults none does


def test_inputs_are_the_same_everywhere():
    """Made of integers: these numbers are what any machine and release gives."""
    assert selections.mixed("an example", 4).tolist() == [
        0.15707902610301971,
        -0.18017004430294037,
        -0.7866371870040894,
        -0.7912533283233643,
    ]


def test_another_choice_wants_another_version(monkeypatch, tmp_path):
    def backwards(self, view):
        reduction = chosen(self, view)
        return None if reduction is None else Reduction(reduction.keep.flip(1))

    chosen = DivPrune.reduce
    monkeypatch.setattr(selections, "TABLE", tmp_path / "selections.json")
    monkeypatch.setattr(selections.vlmtok, "list_methods", lambda: ["divprune"])
    before = COMMITTED["divprune"]
    selections.TABLE.write_text(json.dumps({"divprune": before}))
    monkeypatch.setattr(DivPrune, "reduce", backwards)
    said = selections.problem("divprune", selections.row_of("divprune"), before)
    assert said is not None and f"raise Method.version of divprune (it is 1), and {RUN}" in said
    with pytest.raises(SystemExit, match=r"raise Method\.version of divprune"):
        selections.main()
    assert selections.committed()["divprune"] == before
    assert "went down" in selections.problem("divprune", before | {"version": 0}, before)
    monkeypatch.setattr(DivPrune, "version", 2)
    selections.main()
    after = selections.committed()["divprune"]
    assert after["version"] == 2 and after["choices"].keys() == before["choices"].keys()
    assert after["choices"]["divprune"] != before["choices"]["divprune"]
    assert after["choices"]["divprune:keep=1.0"] == before["choices"]["divprune:keep=1.0"]  # nothing leaves
