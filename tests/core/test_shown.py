"""Handles and traces show themselves: HTML in notebooks, a line as repr; a picture's trace is a table as str."""

import pytest
import torch
from support.checkpoints import picture
from support.tables import cells

import vlmtok
from vlmtok.core.site import Site
from vlmtok.core.trace import MOST, PictureTrace, Trace
from vlmtok.lab import prompts


@pytest.fixture(scope="module")
def model():
    return vlmtok.load()


def rows(shown):
    """Cells of the tables that a notebook shows, row by row."""
    return cells(shown._repr_html_())


def one_line(shown):
    return "\n" not in repr(shown) and len(repr(shown)) < 200 and repr(shown).startswith("<")


def test_a_handle_shows_methods_sites_and_visits(model):
    inputs = prompts.encode_prompt(model, picture(), "what is this ?")
    with vlmtok.compress(model.model, "pitome:ratio=0.9") as tower, vlmtok.compress(model.model, "fastv") as run:
        assert one_line(run) and "fastv" in repr(run) and "active" in repr(run)
        assert rows(run)[5:] == ["fastv", "decoder layer 1 end", "last_attention", "sample", "0"]
        assert rows(tower)[5:] == ["pitome", "vision layers 0 - 4 mid", "keys", "picture", "0 each"]
        model.model.generate(**inputs, max_new_tokens=2)
        assert rows(run)[5:][-1] == "1" and rows(tower)[5:][-1] == "1 each"
        assert "decoder layer 1 end" in run.sheet().text() and "pitome" not in run.sheet().text()
    assert str(run) == repr(run) and "removed" in str(run) and rows(run)[5:][-1] == "1"


def test_a_method_that_is_asked_at_one_layer_of_a_run_has_a_row_of_its_own(model):
    with vlmtok.compress(model.model, "pyramiddrop:layers=(3;4;9)") as run:
        places = rows(run)[6::5]
        assert places == ["decoder layers 3 - 4 start", "decoder layer 9 start"]
        model.model.generate(**prompts.encode_prompt(model, picture(), "what ?"), max_new_tokens=1)
        assert cells(run._repr_html_())[9::5] == ["1 each", "1"]


def trace(*owners):
    steps = [(Site("vision", i, "mid"), torch.tensor(owner)) for i, owner in enumerate(owners)]
    return PictureTrace(torch.tensor(owners[-1]), tuple(steps), (2, 2))


def test_a_trace_shows_what_is_left_behind_each_cut():
    found = trace([0, 0, 2, 3], [0, 0, 2, -1])
    assert repr(found) == "<PictureTrace: 2 tokens left of 4 patches on a grid of 2 x 2, 2 cuts>"
    assert rows(found) == [
        *("behind", "tokens", "merged away", "patches dropped"),
        *("all", "4", "0", "0"),
        *("vision layer 0 mid", "3", "1", "0"),
        *("vision layer 1 mid", "2", "1", "1"),
    ]
    alone = Trace([found])
    assert repr(alone) == "<Trace of 1 picture: 2 of 4>" and rows(alone) == rows(found)
    assert str(alone) == repr(alone) and "vision layer 1 mid" in str(found) and "\x1b" not in str(found)


def test_a_trace_of_several_pictures_has_a_column_each_or_the_ends():
    other = trace([0, 1, 2, 3], [0, 1, 2, 2])
    two = Trace([trace([0, 0, 2, 3], [0, 0, 2, -1]), other])
    assert rows(two)[:3] == ["behind", "tokens of picture 0", "tokens of picture 1"]
    assert rows(two)[3:] == [
        *("all", "4", "4"),
        *("vision layer 0 mid", "3", "4"),
        *("vision layer 1 mid", "2", "3"),
    ]
    assert repr(two) == "<Trace of 2 pictures: 2 of 4, 3 of 4>"
    many = Trace([*two.pictures] * MOST)
    assert rows(many)[:3] == ["behind", "tokens, least", "tokens, most"]
    assert rows(many)[-3:] == ["vision layer 1 mid", "2", "3"] and f"{2 * MOST} pictures" in str(many)
