"""Estimates and budgets of methods for key-value caches, on models that are not there."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
from support.cached import Forgetting, Held, Planned

from vlmtok import FastV, PyramidDrop, Random, budget, estimate
from vlmtok.core.site import Site
from vlmtok.cost.lines import Span
from vlmtok.cost.reports import Reports
from vlmtok.errors import ParameterError, SiteError, TargetError
from vlmtok.forecast.presets import preset

LLAVA = "llava-1.5-7b"
LAYERS, HEADS, D, VISUAL, TEXT = 32, 32, 128, 576, 64
ENTRY = 2 * HEADS * D * 2
"""Bytes of an entry in one layer, in half precision."""


def _bytes(*held):
    return sum(held) * ENTRY


# ---------------------------------------------------------------------- what an estimate says
def test_a_preset_offers_its_cache():
    stage = preset(LLAVA).layout.stages["cache"]
    assert (stage.depth, stage.width, stage.heads, stage.last) == (LAYERS, HEADS * D, HEADS, LAYERS - 1)
    assert preset(LLAVA).layout.cached_layers() == list(range(LAYERS))
    grouped = preset("qwen2.5-vl-7b").layout.stages["cache"]
    assert (grouped.width, grouped.heads) == (4 * 128, 4)


@pytest.mark.parametrize("scope", ["picture", "sample", "part", "head"])
def test_entries_that_leave_cost_no_prefill_and_save_bytes_and_steps(scope):
    report, bare = estimate(LLAVA, Held(0.5, odd=0.25, of=scope)), estimate(LLAVA, "random:keep=1.0")
    assert report.line("prefill") == bare.line("prefill") and report.step.before == bare.step.before
    assert report.cache.after == Span(*[_bytes(*[64 + 288, 64 + 144] * 16)] * 2)
    assert report.peak.after == Span(*[_bytes(*[640] * 32)] * 2) and report.peak.before == report.cache.before
    saved = 2 * HEADS * D * 16 * (288 + 432)
    assert report.step.before - report.step.after.low == saved
    signals = 32 * HEADS * D * 640 * 640
    assert report.line("signals").after.low == signals
    width, rows = (D, HEADS) if scope == "head" else (HEADS * D, 1)
    assert report.line("method").after.low == 32 * rows * VISUAL * VISUAL * width
    held = [line.held for line in report.layers if line.stage == "decoder"]
    assert held == [Span(352, 352), Span(208, 208)] * 16 and report.layers[0].held is None
    assert not report.open and not any("missing" in note for note in report.notes)


@pytest.mark.parametrize(("mass", "queries"), [("attention_mass", 640), ("text_mass", 63), ("recent_mass", 32)])
def test_attention_that_is_summed_costs_a_second_product_of_queries_and_keys(mass, queries):
    report = estimate(LLAVA, Held(0.5, by=mass, window=32, layers=(0, 9)), text_tokens=(1, 63), batch=3)
    assert report.line("signals").after.low == 3 * 2 * HEADS * D * queries * 640


def test_caches_behind_a_cut_hold_and_show_what_reached_their_layers():
    report = estimate(LLAVA, [FastV(K=3, keep=0.5), Held(0.25)])
    assert report.peak.after.low == _bytes(*[640] * 3, *[352] * 29)
    assert report.cache.after.low == _bytes(*[64 + 144] * 3, *[64 + 72] * 29)
    both = [FastV(K=3, keep=0.5), replace(Held(0.25), layers=(5,))]
    alone = estimate(LLAVA, FastV(K=3, keep=0.5)).line("signals").after.low
    assert estimate(LLAVA, both).line("signals").after.low == alone + HEADS * D * 352 * 352
    assert estimate(LLAVA, [Random(keep=0.5), Held(0.25)]).cache.after.low == _bytes(*[64 + 72] * 32)


def test_what_a_cut_drops_leaves_caches_before_it_where_it_says_so():
    report, kept = estimate(LLAVA, Forgetting(K=20, keep=0.25)), estimate(LLAVA, FastV(K=20, keep=0.25))
    assert report.macs == kept.macs and report.peak == kept.peak
    assert report.cache.after.low == _bytes(*[208] * 32) and kept.cache.after.low == _bytes(*[640] * 20, *[208] * 12)
    assert kept.cache.after == kept.peak.after and not kept.evicts and report.evicts
    assert report.step.after.low < kept.step.after.low
    lines = [(str(line.site), line.before, line.after.low, line.visits) for line in report.sites]
    assert lines[0] == ("decoder layer 19 end", 640, 208, 1)
    assert lines[1:] == [(f"cache layer {layer} end", 640, 208, 0) for layer in range(20)]
    assert "none, with its cut" in str(report)


@dataclass(eq=False)
class Forgetful(PyramidDrop):
    """PyramidDrop of which one cut alone is followed by the caches before it."""

    at: int = 0

    def sites(self, layout):
        found = super().sites(layout)
        return [replace(site, forget=i == self.at) for i, site in enumerate(found)]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_each_of_several_cuts_is_followed_by_itself(at):
    rows, report = [640, 352, 208, 136], estimate(LLAVA, Forgetful(at=at))
    bare = [rows[layer // 8] for layer in range(LAYERS)]
    lost = rows[at] - rows[at + 1]
    held = [n - lost if layer < 8 * (at + 1) else n for layer, n in enumerate(bare)]
    assert [line.held.low for line in report.layers if line.stage == "decoder"] == held
    assert report.peak.after.low == _bytes(*bare) and report.cache.after.low == _bytes(*held)


def test_methods_see_what_is_not_forgotten_yet_and_sums_are_of_all_that_was_there():
    report = estimate(LLAVA, [Forgetting(K=20, keep=0.25), Held(0.5, layers=(4,))])
    assert [line.held.low for line in report.layers if line.stage == "decoder"][3:6] == [208, 64 + 72, 208]
    extra = report.line("signals").after.low - estimate(LLAVA, FastV(K=20, keep=0.25)).line("signals").after.low
    assert extra == HEADS * D * 640 * 640
    assert report.line("method").after.low == 144 * 144 * HEADS * D


def test_what_content_decides_is_a_range_unless_it_is_told():
    report = estimate(LLAVA, Held(0.5, told=False))
    assert report.cache.after == Span(_bytes(*[64] * 32), _bytes(*[640] * 32))
    assert report.peak.after == Span(_bytes(*[640] * 32), _bytes(*[640] * 32))
    assert len(report.open) == 32 and report.open[0] == "Held at cache layer 0 end"
    assert report.step.after.low < report.step.after.high == report.step.before
    told = estimate(LLAVA, Held(0.5, told=False, layers=(3,)), counts={"cache layer 3 end": 100})
    assert told.cache.after == Span(*[_bytes(*[640] * 31, 164)] * 2) and not told.open


def test_a_plan_over_layers_runs_without_data_and_costs():
    report = estimate(LLAVA, Planned(0.5, layers=(1, 2, 5), of="head"), batch=2, counts=estimate(LLAVA, Held(0.5)))
    rows = 2 * HEADS
    own = 3 * rows * VISUAL * VISUAL * D + rows * 3 * rows
    assert report.line("method").after.high == own and not any("missing" in note for note in report.notes)


def test_layers_that_fail_alike_without_data_are_one_note():
    class Broken(Held):
        def reduce(self, view):
            raise RuntimeError("no data")

    notes = [note for note in estimate(LLAVA, Broken(0.5)).notes if "missing" in note]
    assert notes == ["Broken does not run without data at cache layers 0 - 31 end, its cost there is missing: no data"]


# ---------------------------------------------------------------------- how it reads
def test_every_form_of_a_report_tells_what_is_held_and_the_peak():
    report = estimate(LLAVA, Held(0.5, odd=0.25))
    text = str(report)
    for words in ("key-value cache, peak", "held behind", "cache layers 0 - 31 end", "640 -> 208 .. 352", "1 each"):
        assert words in text
    made = json.loads(report.to_json())
    assert made["cache_bytes"]["after"] == report.cache.after.low
    assert made["cache_peak_bytes"]["after"] == report.peak.after.low
    assert made["layers"][-1]["held"] == 208 and made["layers"][-1]["held_before"] == 640
    records = {(one["name"], one["layer"]): one["after_high"] for one in report.to_records()}
    assert records["key-value cache, peak", None] == report.peak.after.low and records["decoder held", 31] == 208
    table = Reports((report, estimate(LLAVA, FastV()))).to_records()
    assert [row["cache_peak_bytes_high"] for row in table] == [report.peak.after.high, table[1]["cache_bytes_high"]]


def test_reports_of_cuts_alone_read_as_ever():
    report = estimate(LLAVA, FastV())
    assert "peak" not in str(report) and "held" not in str(report)
    assert not any("peak" in one["name"] or "held" in one["name"] for one in report.to_records())
    assert [line.name for line in report.others()] == ["key-value cache"]


# ---------------------------------------------------------------------- budgets
@pytest.mark.parametrize(
    ("method", "asked"),
    [(Held(), 0.5), (Held(of="head"), 100 << 20), (Held(odd=0.9), 0.7), (Forgetting(K=20), 0.3), (Forgetting(), 0.5)],
)
def test_a_budget_of_bytes_is_met_by_what_stays(method, asked):
    made = budget(method, LLAVA, kv_bytes=asked)
    report = estimate(LLAVA, made)
    target = asked * report.cache.before if isinstance(asked, float) else asked
    assert abs(report.cache.after.high - target) <= 0.01 * target
    assert made.budget.reached == report.cache.after.high and report.peak.after.high > report.cache.after.high


def test_budgets_that_a_cache_cannot_meet_say_what_is_possible():
    with pytest.raises(TargetError, match=r"the nearest is 32\.00 MiB"):
        budget(Held(), LLAVA, kv_bytes=0.01)
    with pytest.raises(TargetError, match="tokens"):
        budget(Held(), LLAVA, tokens=64)
    with pytest.raises(ParameterError, match="no key-value cache"):
        budget("tome", "vit-b-16", kv_bytes=0.5)


def test_a_tower_has_no_cache_to_choose_from():
    class Named(Held):
        def sites(self, layout):
            return [Site("cache", 0)]

    with pytest.raises(SiteError, match="stage 'cache', which vit-b-16 does not offer"):
        estimate("vit-b-16", Named())


# ---------------------------------------------------------------------- what layers keep together
@dataclass(eq=False)
class Together(Planned):
    """Of which it is known what all layers keep, and not how many each does."""

    def together(self, counts):
        assert [one.layer for one in counts] == list(range(LAYERS)) and counts[0].depth == LAYERS
        return round(self.keep * sum(one.n for one in counts))


def test_bytes_are_known_where_layers_keep_a_number_together():
    report = estimate(LLAVA, [FastV(K=2, keep=0.5), Together(0.37)])
    total = round(0.37 * (2 * VISUAL + 30 * VISUAL // 2))
    assert report.cache.after == Span(*[_bytes(32 * TEXT, total)] * 2) and not report.open
    assert report.step.after.fixed and report.macs.after.fixed
    held = [line.held.low - TEXT for line in report.layers if line.stage == "decoder"]
    assert sum(held) == total and all(
        abs(n - 0.37 * (VISUAL if i < 2 else VISUAL // 2)) < 1 for i, n in enumerate(held)
    )
    assert any("Together: what caches keep together is known, how much each" in note for note in report.notes)
    made = budget(Together(), LLAVA, kv_bytes=0.4)
    assert abs(made.budget.reached - 0.4 * made.budget.bare) <= 0.01 * 0.4 * made.budget.bare


def test_prefixkv_can_be_set_to_bytes_without_a_profile():
    made = budget("prefixkv", LLAVA, kv_bytes=0.3)
    assert abs(estimate(LLAVA, made).cache.share.high - 0.3) < 0.003


def test_layers_that_content_decides_are_one_in_the_note():
    note = next(note for note in estimate(LLAVA, Held(told=False)).notes if "depends on content" in note)
    assert note.startswith("Held at cache layers 0 - 31 end depends on content: figures go")
