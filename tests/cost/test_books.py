"""`Stream` and `Ledger` as data: several crops, several cuts, passes that look alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmtok.core.ledger import Event, Ledger, StageRun
from vlmtok.core.stream import Segment, Stream
from vlmtok.errors import CacheError


# ---------------------------------------------------------------------- caches
def filled() -> Stream:
    """Two segments of unlike lengths with padding and blocks; nine columns behind the picture."""
    segments = {}
    for first, length in ((0, 14), (2, 11)):
        valid = torch.arange(length).expand(2, length) >= torch.tensor([[0], [3]])
        blocks = torch.arange(length).expand(2, length) // 4
        segments[first] = Segment(first, length, valid, blocks)
    return Stream(
        1, 2, seen=16, next=torch.tensor([16, 13]), follows=torch.tensor([15, 12]), croppable=9, segments=segments
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_crops_one_after_the_other_are_one(counts):
    """A second crop goes no further than what stands behind the picture, and takes from every table."""
    stream, total = filled(), sum(counts)
    if total > 9:
        with pytest.raises(CacheError, match="stand behind a picture"):
            for count in counts:
                stream.crop(count)
        return
    for count in counts:
        stream.crop(count)
    assert (stream.seen, stream.croppable) == (16 - total, 9 - total)
    assert stream.next.tolist() == [16 - total, 13 - total] and stream.follows.tolist() == [15 - total, 12 - total]
    for first, old in filled().segments.items():
        now = stream.segments[first]
        assert now.length == old.length - total
        assert torch.equal(now.valid, old.valid[:, : now.length])
        assert torch.equal(now.blocks, old.blocks[:, : now.length])


# ---------------------------------------------------------------------- books
def test_books_of_several_cuts_in_front_of_a_language_model():
    run = StageRun("decoder", 1, 20, pictures=1)
    assert run.columns == 20
    run.events += [
        Event("features", None, "end", -1, "cut", 20, 15),
        Event("projected", None, "end", 0, "cut", 15, 9),
        Event("decoder", 2, "start", 1, "cut", 9, 4),
    ]
    assert run.columns == 9


def test_a_ledger_is_blind_only_if_a_language_model_ran():
    ledger = Ledger()
    ledger.begin(StageRun("vision", 1, 17))
    assert not ledger.blind
    ledger.begin(StageRun("decoder", 1, 8))
    assert ledger.blind
    ledger.begin(StageRun("decoder", 1, 8, pictures=1))
    assert not ledger.blind


def test_passes_of_one_shape_that_cost_another_are_told_apart():
    """What was cut, which parts ran and the steps behind a pass all belong to its kind; equal ones are counted."""
    ledger = Ledger()
    for slots in (9, 5, 9):
        run = ledger.begin(StageRun("decoder", 1, 20, pictures=1))
        ledger.visit(run, Event("projected", None, "end", 0, "cut", 20, slots))
    assert sorted((run.columns, times) for run, times in ledger.totals()) == [(5, 1), (9, 2)]
    assert ledger.fired == {("projected", None, "end", 0): 3} and ledger.passes == {"decoder": 3}
    ledger.step(1, 9)
    assert sorted((run.columns, run.steps, times) for run, times in ledger.totals()) == [
        (5, 0, 1),
        (9, 0, 1),
        (9, 1, 1),
    ]
