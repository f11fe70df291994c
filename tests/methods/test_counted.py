"""`Method.counted`: settings under which a serving engine can take a method, where its defaults are not such."""

import warnings

import pytest
from support import drawn_settings
from support.asking import USER, llava
from support.methods import METHODS

import vlmtok
from vlmtok.core.placing import looks_on, place
from vlmtok.core.signals import DECODER_SIGNALS
from vlmtok.core.site import STAGES, Counts
from vlmtok.core.spec import counted_form
from vlmtok.errors import VlmtokError

ENGINE, MODEL = llava(decoder=False), llava()
BEFORE = {"vision", "features", "projected"}


def refusal(method):
    """Why an engine cannot serve a method on pictures of 24 x 24 patches, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            places, _ = place(method, ENGINE)
    except VlmtokError as problem:
        return str(problem)
    n, grid = 576, (24, 24)
    for one in sorted(places, key=lambda one: (STAGES.index(one.site.stage), one.key)):
        assert one.site.stage in BEFORE
        stage = ENGINE.stages[one.site.stage]
        n = method.count(Counts(one.asked, n, 576, stage.num_prefix, stage.depth, grid))
        if n is None:
            return f"what it keeps at {one.site} depends on content"
        assert type(n) is int
    return None


def cuts_between_layers(method):
    """Whether a method lets tokens leave between layers of a language model, or entries of their cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sites = method.sites(MODEL)
    return any(site.stage in ("decoder", "cache") and not looks_on(method, site, MODEL) for site in sites)


def reads_layers(method):
    """Whether a method decides on what layers of a language model compute, which engines do not show."""
    return any(need in DECODER_SIGNALS for site in method.sites(MODEL) for need in site.needs)


def asks_the_user(method):
    """Whether a method decides on a signal that no model gives, and engines have no way to be given."""
    return any(need in USER for site in method.sites(MODEL) for need in site.needs)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_settings_that_can_be_served_where_its_defaults_cannot(name):
    method = vlmtok.create_method(name)
    if not method.counted:
        inside = cuts_between_layers(method) or method.skip(MODEL) or reads_layers(method) or asks_the_user(method)
        assert refusal(method) is None or inside, f"{name} names none, and {refusal(method)}"
        return
    assert refusal(method) is not None, f"{name} names {method.counted!r}, and its defaults do"
    (served,) = vlmtok.parse_methods(f"{name}:{method.counted}")
    assert refusal(served) is None
    assert str(counted_form(method)) == str(served)


@pytest.mark.parametrize("name", [name for name in METHODS if refusal(vlmtok.create_method(name)) is not None])
def test_a_method_without_such_settings_has_none(name):
    """Of those that cannot be served as they are: no setting would help, or the method names one that does."""
    method = vlmtok.create_method(name)
    helps = [spec for spec in drawn_settings.specs(name) if refusal(vlmtok.parse_methods(spec)[0]) is None]
    assert bool(helps) == bool(method.counted), f"{name}: {helps}"


def test_there_are_methods_of_all_three_kinds():
    kinds = {(bool(m.counted), refusal(m) is None) for m in map(vlmtok.create_method, METHODS)}
    assert kinds == {(True, False), (False, True), (False, False)}


def test_the_other_settings_stay():
    (method,) = vlmtok.parse_methods("todre:keep=16:rule=max:tau=0.3")
    assert str(counted_form(method)) == "todre:keep=16:rule=max:tau=none"
    assert counted_form(vlmtok.create_method("divprune")).settings()["keep"] == 0.098
