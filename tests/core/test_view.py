"""Views: what they say in one line, what they refuse, and signals that are made when first asked."""

from __future__ import annotations

import pytest
import torch

import vlmtok
from vlmtok import Counts, Site, TokenView
from vlmtok.errors import (
    MissingSignal,
    ParameterError,
)


def test_a_view_in_one_line():
    x = torch.randn(2, 6, 4)
    view = TokenView(x)
    assert (view.site, view.layer, view.num_prefix, view.entered, view.size) == (Site("vision", 0), 0, 0, 6, None)
    assert view.counts == Counts(Site("vision", 0), 6, 6)
    assert view.part.tolist() == [[0] * 6] * 2
    assert TokenView(x, entered=9).counts.entered == 9, "a view behind a cut"
    assert TokenView(x, num_prefix=1).columns.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    assert vlmtok.ToMe(r=2).reduce(TokenView(x, size=torch.ones(2, 6), num_prefix=1, signals={"keys": x})).slots == 4
    pitome = vlmtok.PiToMe(ratio=0.5, margin=0.75)
    reduced = [pitome.reduce(TokenView(x, Site("vision", i, "mid"), depth=12, signals={"keys": x})) for i in (0, 11)]
    assert torch.equal(reduced[0].keep, reduced[1].keep), "a plain number for a schedule holds for every layer"
    assert vlmtok.ToDRE(keep=2, tau=None, pivot="center").reduce(TokenView(x, Site("projected"))).slots == 2
    assert vlmtok.Random(keep=0.5).reduce(TokenView(x)).slots == 3


def test_views_that_cannot_be():
    with pytest.raises(ParameterError, match=r"tokens must be \[B, N, C\], got \[6, 4\]"):
        TokenView(torch.randn(6, 4))
    with pytest.raises(ParameterError, match=r"size must be \[B, N\] = \[2, 6\], got \[2, 5\]"):
        TokenView(torch.randn(2, 6, 4), size=torch.ones(2, 5))


def test_signals_are_made_when_first_asked():
    asked = []

    def keys():
        asked.append(1)
        return torch.ones(1, 3, 2)

    view = TokenView(torch.randn(1, 3, 4), signals={"keys": keys, "text": None})
    assert not asked
    assert view.signal("keys") is view.signal("keys")
    assert asked == [1]
    assert view.has("text") and view.maybe("text") is None
    with pytest.raises(
        MissingSignal, match=r"signal 'text' does not exist at vision layer 0 end; this view has: keys, text"
    ):
        view.signal("text")
    with pytest.raises(MissingSignal, match="signal 'cls_attention'"):
        view.signal("cls_attention")
