"""Sites on layers without attention rows act at the next layer that has some; where two cuts meet, the last stays."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vlmtok import AIM, Counts, FastV, Layout, Method, PyramidDrop, Site, StageLayout, ToDRE, TransPrune
from vlmtok.core.attachment import Attachment
from vlmtok.core.placing import place
from vlmtok.core.signals import DECODER_SIGNALS
from vlmtok.errors import MissingSignal, SiteError

POINTS = frozenset({"start", "end"})
SEEN = (3, 7, 11, 15)


def layout(depth=16, seen=SEEN, last_cut=None):
    blind = {i: "linear attention" for i in range(depth) if i not in seen}
    decoder = StageLayout(depth, 8, 2, depth - 1, POINTS, frozenset(DECODER_SIGNALS), blind=blind, last_cut=last_cut)
    return Layout("hybrid", {"projected": StageLayout(1, 8, 0, 0), "decoder": decoder})


@dataclass(eq=False)
class Cuts(Method):
    """Names its layers one by one, and counts by the layer that it named."""

    layers: tuple[int, ...] = (2, 9)
    needs: tuple[str, ...] = ("last_attention",)
    point: str = "end"

    def sites(self, layout):
        return [Site("decoder", layer, self.point, self.needs) for layer in self.layers]

    def count(self, counts):
        return 100 - counts.layer


def at(method, where, user=frozenset()):
    return [(one.site.layer, one.asked.layer) for one in place(method, where, user)[0]]


def test_a_site_moves_to_the_next_layer_that_has_attention():
    assert at(Cuts((2, 9)), layout()) == [(3, 2), (11, 9)]
    assert at(Cuts((3, 11)), layout()) == [(3, 3), (11, 11)]
    assert at(Cuts((13,), point="start"), layout()) == [(15, 13)]
    with pytest.raises(MissingSignal, match=r"'last_attention' at decoder layer 13 end.*\(linear attention\).*later"):
        place(Cuts((13,)), layout())
    with pytest.raises(MissingSignal, match="nor at any later layer"):
        place(Cuts((5,), point="start"), layout(last_cut=6))


@pytest.mark.parametrize("needs", [(), ("transition",), ("mine",), ("last_attention",)])
def test_only_sites_that_ask_for_attention_rows_move(needs):
    user = frozenset({"mine", "last_attention"})
    assert at(Cuts((2, 9), needs), layout(), user) == [(2, 2), (9, 9)]


def test_methods_see_the_layer_that_they_named():
    attachment = Attachment([Cuts((2, 9))], layout())
    assert [entry.site.layer for entry in attachment.entries] == [3, 11]
    assert [entry.method.count(Counts(entry.asked, 100, 100)) for entry in attachment.entries] == [98, 91]


def test_cuts_that_would_meet_are_refused_unless_the_method_joins_them():
    for layers in ((1, 2), (2, 3), (8, 9, 10)):
        with pytest.raises(SiteError, match=r"Cuts: decoder layers? .* no attention rows .*name layers that are"):
            place(Cuts(layers), layout())

    class Joins(Cuts):
        joins_cuts = True

    assert at(Joins((1, 2)), layout()) == [(3, 2)]
    assert at(Joins((2, 3, 9)), layout()) == [(3, 3), (11, 9)]
    said = place(Joins((1, 2, 6, 7)), layout())[1]
    assert said == [
        "joins: decoder layers 1, 2 have no attention rows (linear attention); it acts at decoder layer 3 end, once, "
        "as it would at decoder layer 2 end",
        "joins: decoder layer 6 has no attention rows (linear attention); what would leave there leaves at decoder "
        "layer 7 end",
    ]


def test_a_cut_never_passes_a_later_one():
    """AIM's last site drops everything and needs no score, so it stays; those that would pass it are gone."""
    method = AIM(passes=0, first=8, last=10)
    assert at(method, layout()) == [(7, 7), (9, 9)]
    said = place(method, layout())[1]
    assert said == ["aim: decoder layer 8 has no attention rows (linear attention); what would leave there leaves at "
                    "decoder layer 9 end"]  # fmt: skip


def test_what_only_looks_neither_moves_nor_stops_a_cut():
    found = at(TransPrune(layers=(6, 9), ratios=(0.5, 0.25)), layout())
    assert found == [(6, 6), (7, 7), (8, 8), (9, 9), (10, 10), (7, 6), (11, 9)]
    stays = at(TransPrune(layers=(7, 9), ratios=(0.5, 0.25)), layout())
    assert stays == [(6, 6), (7, 7), (8, 8), (9, 9), (10, 10), (7, 7), (11, 9)]
    named = at(TransPrune(layers=(6, 9), ratios=(0.5, 0.25), accumulate=(4, 8)), layout())
    assert named == [(4, 4), (8, 8), (7, 6), (11, 9)]
    assert at(TransPrune(layers=(6, 9), ratios=(0.5, 0.25), alpha=1.0), layout())[-2:] == [(6, 6), (9, 9)]


def test_a_signal_of_a_decoder_layer_is_for_that_layer_only():
    with pytest.raises(MissingSignal, match=r"'text_attention@decoder:3' at decoder layer 7 end, but a decoder layer"):
        place(Cuts((7,), ("text_attention@decoder:3",)), layout())


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        (PyramidDrop(), "pyramiddrop:layers=(3;7;10)"),
        (AIM(), "aim:first=7:last=10"),
        (ToDRE(tau=0.2), "todre:tau=0.2:check_layer=11"),
    ],
)
def test_a_schedule_behind_the_last_cut_is_refused_with_one_that_fits(method, spec):
    short = layout(35, range(35), last_cut=13)
    with pytest.raises(SiteError, match="last place is decoder layer 13 start") as problem:
        place(method, short)
    assert str(problem.value).endswith(f"; {spec} spreads its schedule over the layers before that")
    with pytest.raises(SiteError, match="start$"):
        place(PyramidDrop(layers=(3, 7, 14)), short)
    with pytest.raises(SiteError, match="start$"):
        place(FastV(K=14), short)
    with pytest.raises(SiteError, match="start$"):  # what would fit finds no attention there
        place(method, layout(35, range(14, 35), last_cut=13))
