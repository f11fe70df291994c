"""The journal of a sweep: whatever byte a kill leaves it at it goes on, and nothing that is another's is touched."""

import json

import pytest

from vlmtok.errors import ParameterError
from vlmtok.evaluation import journal
from vlmtok.evaluation.journal import Journal
from vlmtok.evaluation.task import Item, Outcome

HEAD = {"task": "tiny", "seed": 0, "weights": "ab"}
ITEMS = [Item("a", "x"), Item("b", "y"), Item("c", "x")]
SAID = [Outcome(1.0, "red"), Outcome(0.0, 'say "é"\n{[', {"kl": 0.25}), Outcome(0.5, "")]
COST = {"visual_tokens": 3.5, "macs": None, "kv_bytes": 12}


def go_on(path, head=HEAD):
    """What a sweep does: whatever is not there is answered and written."""
    found = Journal(path, head)
    asked = 0
    for way, repeat in (("none", 0), ("random @ 0.5", 0), ("random @ 0.5", 1)):
        for batch in ([0, 1], [2]):
            if not all(ITEMS[i].id in found.outcomes[way, repeat] for i in batch):
                found.add_answers(way, repeat, [ITEMS[i] for i in batch], [SAID[i] for i in batch])
                asked += 1
        if (way, "x") not in found.costs:
            found.add_cost(way, "x", COST)
            asked += 1
    return found, asked


def held(found):
    return {key: value for key, value in found.outcomes.items() if value}, found.costs


def test_it_goes_on_from_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(journal.os, "fsync", lambda number: None)  # thousands of them take long
    path = tmp_path / "there" / "whole.jsonl"
    whole, asked = go_on(path)
    assert asked == 8 and len(held(whole)[0]) == 3 and whole.outcomes["none", 0]["b"] == SAID[1]
    content = path.read_bytes()
    seen = set()
    for length in range(len(content) + 1):
        cut = tmp_path / f"{length}.jsonl"
        cut.write_bytes(content[:length])
        found, again = go_on(cut)
        assert held(found) == held(whole)
        assert held(Journal(cut, HEAD)) == held(whole)  # what is on disk says the same
        assert json.loads(cut.read_bytes().splitlines()[0]) == {"head": HEAD}
        seen.add(again)
    assert seen == set(range(9))


def test_a_whole_one_is_left_as_it_is(tmp_path):
    path = tmp_path / "journal.jsonl"
    go_on(path)
    content = path.read_bytes()
    found, asked = go_on(path)
    assert asked == 0 and path.read_bytes() == content
    assert found.costs["none", "x"] == COST and found.outcomes["random @ 0.5", 1]["b"].measures == {"kl": 0.25}


def test_a_line_is_on_disk_once_it_is_added(tmp_path, monkeypatch):
    path, synced = tmp_path / "journal.jsonl", []
    monkeypatch.setattr(journal.os, "fsync", synced.append)
    begun = Journal(path, HEAD)
    assert len(path.read_text().splitlines()) == len(synced) == 1
    begun.add_answers("none", 0, ITEMS, SAID)
    assert len(synced) == 2
    assert [json.loads(line).get("id") for line in path.read_text("utf-8").splitlines()] == [None, "a", "b", "c"]


@pytest.mark.parametrize("tail", [b"", b'{"way": "none", "rep'])
@pytest.mark.parametrize(
    "head, said",
    [
        ({**HEAD, "seed": 1}, "seed: 0 there, 1 now"),
        ({**HEAD, "weights": "cd", "seed": 2}, "seed: 0 there, 2 now; weights: 'ab' there, 'cd' now"),
        ({**HEAD, "batch": 8}, "batch: None there, 8 now"),
        ({"task": "tiny", "seed": 0}, "weights: 'ab' there, None now"),
    ],
)
def test_another_sweep_is_refused_and_stays(tmp_path, head, said, tail):
    path = tmp_path / "journal.jsonl"
    go_on(path)
    content = path.read_bytes() + tail
    path.write_bytes(content)
    with pytest.raises(ParameterError) as caught:
        Journal(path, head)
    assert f"answers of another sweep ({said}); give another folder" in str(caught.value) and str(path) in str(
        caught.value
    )
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"notes without an end",
        b"notes\n",
        b"task,model\n1,2\n",
        b'{"rows": []}\n',
        b'{"head": 3}\n',
        b"[1, 2]\n",
        b"5\n",
        b"null\n",
        b"\n",
        b"\xff\xfe\n",
        b'{"he4d',
        json.dumps({"head": HEAD}).encode() + b"\n[]\n",
        json.dumps({"head": HEAD}).encode() + b'\n{"way": "none"}\n',
        json.dumps({"head": HEAD}).encode() + b'\n{"way": "none", "kind"\n{"way": "none", "kind": "x", "cost": {}}\n',
    ],
)
def test_what_is_no_journal_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=r"journal\.jsonl' is no journal of a sweep; move it away"):
        Journal(path, HEAD)
    assert path.read_bytes() == content


def test_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"")
    assert not Journal(path, HEAD).costs and json.loads(path.read_text()) == {"head": HEAD}
