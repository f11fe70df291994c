"""`Method.count` refuses wherever `reduce` would, for every method: serving engines ask the count alone."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import drawn_settings
from support.asking import USER, Asking, dual, empty, llava
from support.methods import METHODS

import vlmtok
from vlmtok import AveragePool, Method, ToDRE
from vlmtok.core.attachment import Attachment
from vlmtok.core.placing import looks_on, place
from vlmtok.core.site import Counts, Site
from vlmtok.errors import ParameterError, VlmtokError
from vlmtok.kernels import dispatch
from vlmtok.mergers.tca import TCA

LAYOUTS = (llava(), dual())
SIDE = 9


@st.composite
def asked(draw, name: str):
    """A method with some settings, how many tokens enter it, and their grid: one that fits, another, or none."""
    method = vlmtok.create_method(name)
    choices = drawn_settings.values(name)
    for setting in draw(st.lists(st.sampled_from(sorted(choices)), max_size=3, unique=True)):
        value = draw(st.sampled_from(choices[setting]))
        method = drawn_settings.variant(method, **{setting: value}) or method
    grid = draw(st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)))
    fits = draw(st.sampled_from((True, True, True, False)))
    n = grid[0] * grid[1] if fits else draw(st.integers(1, SIDE * SIDE))
    return method, n, draw(st.sampled_from((grid, grid, None)))


def answers(method, layout, n, grid):
    """What count and reduce say at each site, until one refuses: slots, None where content decides, or the refusal."""
    asking = Asking(method, layout, empty)
    with dispatch.use("torch"), torch.no_grad():
        for view in asking.views(n, grid):
            counted = answer(method.count, view.counts)
            found = answer(method.reduce, view)
            arrived = view.counts.n
            if not isinstance(found, str):
                asking.leave(found, arrived)
                found = arrived if found is None else found.slots if found.valid is None else None
            yield view.counts, counted, found
            if isinstance(found, str):
                return


def answer(ask, of):
    """What a method says, or the words of its refusal."""
    try:
        return ask(of)
    except ParameterError as refusal:
        return str(refusal)


def placed(method, layout):
    """Whether a method runs on a layout."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            place(method, layout, USER)
    except VlmtokError:
        return False
    return True


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=30)
@given(data=st.data())
def test_count_refuses_where_reduce_does_and_else_tells_its_slots(name, data):
    method, n, grid = data.draw(asked(name))
    for layout in LAYOUTS:
        if not placed(method, layout):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for counts, counted, found in answers(method, layout, n, grid):
                where = f"{method} at {counts}"
                if isinstance(found, str) and counts.grid is None and not isinstance(counted, str):
                    assert "grid" in found, f"{where}: {found}"  # all that a count may not know
                elif isinstance(found, str) or isinstance(counted, str):
                    assert counted == found, f"{where}: count says {counted!r}, reduce {found!r}"
                elif counted is not None:
                    assert counted == found, f"{where}: count says {counted}, reduce leaves {found}"


@pytest.mark.parametrize("name", METHODS)
def test_each_setting_by_itself_is_asked(name):
    """Whatever chance draws; and what a spec string says is what it is read as."""
    seen = 0
    for spec in drawn_settings.specs(name):
        (method,) = vlmtok.parse_methods(spec)
        assert str(method) == spec
        for layout in filter(lambda one: placed(method, one), LAYOUTS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for counts, counted, found in answers(method, layout, 54, (6, 9)):
                    seen += 1
                    assert counted in (None, found), f"{spec} at {counts}: count {counted!r}, reduce {found!r}"
    assert seen, f"{name} was asked nowhere"


def test_what_is_refused_is_named():
    """The refusals that this is about, by name, so that the sweep above is known to meet some."""
    with pytest.raises(ParameterError, match="cannot be divided into 5 x 5 equal windows"):
        AveragePool(output_size=5).count(Counts(Site("projected"), 64, 64, grid=(8, 8)))
    with pytest.raises(ParameterError, match="no longer its 8 x 8 grid"):
        AveragePool().count(Counts(Site("projected"), 16, 64, grid=(8, 8)))
    with pytest.raises(ParameterError, match="pivot=64 does not exist among 64 tokens"):
        ToDRE(pivot=64).count(Counts(Site("projected"), 64, 64))
    with pytest.raises(ParameterError, match="first=50 does not exist among 6 condensed patches"):
        TCA(first=50).count(Counts(Site("vision", 2, "mid"), 64, 64, 1, 8))
    assert ToDRE(pivot=64, keep=1.0).count(Counts(Site("projected"), 64, 64)) == 64  # nobody asks for it
    assert AveragePool(overlap=True).count(Counts(Site("projected"), 63, 63, grid=(7, 9))) == 20


def test_a_method_that_refuses_the_number_that_attaching_asks_of_is_attached():
    """Whether a method only looks is found with a number of tokens that need not be the picture's."""
    refused = [ToDRE(pivot=5000, tau=None), TCA(first=5000, reservoir_size=0)]
    attachment = Attachment(refused, LAYOUTS[0])
    assert {entry.method for entry in attachment.entries} == set(refused)
    assert not any(looks_on(entry.method, entry.asked, LAYOUTS[0]) for entry in attachment.entries)


def test_indices_for_other_layers_than_there_are_are_refused_before_anything_runs():
    assert not placed(TCA(first=(1, 2), layers=(1, 2, 3)), LAYOUTS[0])
    assert placed(TCA(first=(1, 2, 0), layers=(1, 2, 3)), LAYOUTS[0])


def test_a_method_whose_count_says_nothing_of_refusals_would_be_found(monkeypatch):
    """The comparison fails for a count that lets pass what reduce refuses."""
    method = AveragePool(output_size=5)
    monkeypatch.setattr(AveragePool, "count", Method.count)
    ((_, counted, found),) = list(answers(dataclasses.replace(method), LAYOUTS[0], 64, (8, 8)))
    assert counted == 64 and isinstance(found, str)
