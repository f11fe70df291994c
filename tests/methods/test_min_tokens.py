"""``min_tokens``: what enters a stage with no more tokens is left whole, by every method, and what is larger is not."""

from dataclasses import replace

import pytest
import torch
from support.asking import Asking, dual, llava
from support.matrix import spec_of
from support.methods import METHODS, cuts
from support.selections import mixed

import vlmtok
from vlmtok import Counts, Site, TokenView
from vlmtok.core.attachment import Attachment
from vlmtok.core.placing import looks_on
from vlmtok.errors import ParameterError, VlmtokError
from vlmtok.lab.tiny.families import FAMILIES

N, GRID = 36, (6, 6)


def asked(method):
    """(view, reduction, count) at each site of a method on the layouts that take it."""
    found = []
    for layout in (llava(), dual()):
        try:
            asking = Asking(method, layout, mixed)
        except VlmtokError:
            continue
        with torch.no_grad():
            for view in asking.views(N, GRID):
                reduction = method.reduce(view)
                asking.leave(reduction, view.counts.n)
                found.append((view, reduction, method.count(view.counts)))
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if cuts(name)])
def test_a_small_picture_is_left_whole(name):
    plain = vlmtok.parse_methods(spec_of(name))[0]
    visits = asked(replace(plain, min_tokens=N))
    assert visits
    for view, reduction, count in visits:
        assert reduction is None and count == view.counts.n
        assert replace(plain, min_tokens=N).insert(view) is None
    larger = asked(replace(plain, min_tokens=1))
    for (view, one, count), (_, other, before) in zip(larger, asked(plain), strict=True):
        assert (one is None) == (other is None) and count == before, view.site
        assert one is None or torch.equal(one.keep, other.keep)
    assert any(reduction is not None for _, reduction, _ in larger)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_a_setting_like_any_other(name):
    made = vlmtok.parse_methods(f"{name}:min_tokens=9")[0]
    assert made.min_tokens == 9 and list(made.settings())[-1] == "min_tokens"
    assert str(made) == f"{name}:min_tokens=9"
    for wrong in (-1, 0.5, True, None, "few"):
        with pytest.raises(ParameterError, match="min_tokens"):
            vlmtok.create_method(name, min_tokens=wrong)
    with pytest.raises(ParameterError, match="min_tokens"):
        made.min_tokens = -1


def test_work_that_is_left_out_knows_no_pictures():
    with pytest.raises(ParameterError, match="by layers and not by pictures"):
        Attachment([vlmtok.IMA(min_tokens=9)], llava())


def test_a_large_bound_makes_no_observer():
    """Whether a method decides at a site is asked of a picture that is large enough."""
    method = vlmtok.DivPrune(min_tokens=10_000)
    assert not looks_on(method, method.sites(llava())[0], llava())


def test_entered_tokens_count_not_those_that_are_left():
    method = vlmtok.DivPrune(keep=4, min_tokens=8)
    x = torch.randn(1, 6, 3)
    assert method.reduce(TokenView(x, Site("projected"), entered=9)).slots == 4
    assert method.reduce(TokenView(x, Site("projected"), entered=8)) is None
    assert method.count(Counts(Site("projected"), 6, 9)) == 4


def test_in_a_model_small_pictures_stay_and_large_ones_do_not():
    """LLaVA-NeXT's pictures differ in their number of crops; the bound holds picture by picture."""
    family = FAMILIES["llava_next"]
    model, batch = family.build(), family.batch(*family.several)
    method = vlmtok.DivPrune(keep=4, min_tokens=60)
    with vlmtok.compress(model, method, trace=True) as run, torch.no_grad():
        model.generate(**batch.inputs(), max_new_tokens=1)
        found = {(one.patches, one.kept) for one in run.trace().pictures}
    assert {n <= 60 for n, _ in found} == {True, False}, found
    assert all(kept == (n if n <= 60 else 4) for n, kept in found)
