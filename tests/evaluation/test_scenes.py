"""The rendered world: splits, determinism, and that every answer is the one that the page gives."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok.evaluation.scenes import KINDS, exam
from vlmtok.evaluation.scenes.layouts import LAYOUTS, sample_page
from vlmtok.evaluation.scenes.page import SIZE
from vlmtok.evaluation.scenes.painting import COLORS, SHAPES
from vlmtok.evaluation.scenes.questions import LAYOUT_OF, PLURALS, ask, ask_turns, ask_two

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.sampled_from(LAYOUTS), st.sampled_from(["train", "held-out"]))
@settings(max_examples=60, deadline=None)
def test_pages_are_of_their_split_and_marks_lie_on_them(seed, layout, split):
    page = sample_page(split, layout, seed)
    assert page.split == split and page.layout == layout
    assert page == sample_page(split, layout, seed)
    for mark in page.marks:
        room = 10 if mark.kind == "cell" else 0  # only its number is drawn
        assert mark.x - mark.width / 2 + room >= 0 and mark.x + mark.width / 2 - room <= SIZE, mark
        assert mark.y - mark.height / 2 >= 0 and mark.y + mark.height / 2 <= SIZE, mark
    for i, one in enumerate(page.marks):
        for other in page.marks[:i]:
            apart = abs(one.x - other.x) >= (one.width + other.width) / 2 - 0.2
            apart |= abs(one.y - other.y) >= (one.height + other.height) / 2 - 0.2
            assert apart, (one, other)


def test_a_page_is_drawn_the_same_twice_and_every_mark_shows():
    for layout in LAYOUTS:
        page = sample_page("train", layout, 3)
        drawn = np.asarray(page.draw(), int)
        assert drawn.shape == (SIZE, SIZE, 3) and np.array_equal(drawn, np.asarray(page.draw(), int))
        for mark in page.marks:
            if mark.color and mark.kind != "cell":
                box = drawn[
                    int(mark.y - mark.height / 2) : int(mark.y + mark.height / 2) + 1,
                    int(mark.x - mark.width / 2) : int(mark.x + mark.width / 2) + 1,
                ]
                assert np.abs(box - COLORS[mark.color]).sum(-1).min() < 40, mark


def _look_up(page, question):
    """The answer by another way: the words of the question, one by one, against what stands on the page."""
    words = question.text.rstrip("?").lower().split()
    shapes = [mark for mark in page.marks if mark.is_shape]
    colors = [word for word in words if word in COLORS]
    kinds = [word for word in words if word in SHAPES]
    fitting = [m for m in shapes if m.color in (colors or COLORS) and m.kind in (kinds or SHAPES)]
    if words[:2] == ["how", "many"]:
        singular = {plural: kind for kind, plural in PLURALS.items()}
        kinds = [singular[word] for word in words if word in singular]
        return {str(sum(m.color in (colors or COLORS) and m.kind in (kinds or SHAPES) for m in shapes))}
    if "plate" in words:
        return {" ".join(m.text) for m in page.marks if m.kind == "plate" and m.color == colors[0]}
    if "row" in words:
        return {" ".join(m.text) for m in page.marks if (m.row, m.color) == (kinds[0], colors[0])}
    if "bar" in words:
        return {m.text for m in page.marks if m.kind == "bar" and m.color == colors[0]}
    if "small" in words:
        fitting = [m for m in fitting if m.small]
    if words[0] == "where":
        return {m.place for m in fitting}
    return {m.color if "color" in words else m.kind for m in fitting}


@given(SEEDS, st.sampled_from(list(LAYOUT_OF)))
@settings(max_examples=150, deadline=None)
def test_the_answer_is_what_the_page_shows_and_no_other_fits(seed, kind):
    page = sample_page("train", LAYOUT_OF[kind], seed)
    question = ask(page, kind, random.Random(seed))
    if question is not None:
        assert _look_up(page, question) == {question.answer}, (question, page)
        assert question.marks and all(0 <= i < len(page.marks) for i in question.marks)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_questions_about_two_pages_need_the_right_one(seed):
    pages = (sample_page("train", "scene", seed, 0), sample_page("train", "scene", seed, 1))
    found = ask_two(pages, random.Random(seed))
    if found is None:
        return
    which, question = found
    words = question.text.rstrip("?").split()
    if words[:3] == ["Which", "picture", "shows"]:
        showing = [any((m.color, m.kind) == (words[4], words[5]) for m in page.marks) for page in pages]
        assert showing == [which == 0, which == 1] and question.answer == ("first", "second")[which]
    else:
        assert words[-3:] == ["the", ("first", "second")[which], "picture"]
        assert {m.color for m in pages[which].marks if m.kind == words[4]} == {question.answer}


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_second_turn_asks_elsewhere(seed):
    page = sample_page("train", "scene", seed)
    pair = ask_turns(page, random.Random(seed))
    if pair is not None:
        assert not set(pair[0].marks) & set(pair[1].marks)


def test_an_exam_is_held_out_and_the_same_every_time():
    asked = exam(60)
    assert asked == exam(60) and asked != exam(60, seed="another")
    assert exam(24) == asked[:24]
    assert Counter(one.kind for one in asked) == dict.fromkeys(KINDS, 5)
    assert len({one.id for one in asked}) == 60
    assert all(page.split == "held-out" for one in asked for page in one.pictures)
    assert {len(one.pictures) for one in asked if one.kind == "two pictures"} == {2}
    assert all(bool(one.turns) == (one.kind == "second turn") for one in asked)
    assert [one.kind for one in exam(3, ["chart"])] == ["chart"] * 3


def test_counts_of_an_exam_reach_where_they_say():
    few = {one.answer for one in exam(60, ["count"])}
    many = {one.answer for one in exam(60, ["count many"])}
    assert few == set("12345") and many == set("6789")


@pytest.mark.parametrize("split, layout", [("test", "scene"), ("train", "map")])
def test_pages_that_do_not_exist_are_refused(split, layout):
    with pytest.raises(ValueError, match="pages are of a split in "):
        sample_page(split, layout, 0)


@pytest.mark.parametrize("kinds", [["colour"], []])
def test_an_exam_of_unknown_kinds_is_refused(kinds):
    with pytest.raises(ValueError, match="kinds must be some of color, "):
        exam(3, kinds)
