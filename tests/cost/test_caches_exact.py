"""Reports of methods for key-value caches: what torch counts, what the cache's tensors hold, what an estimate says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import models, referee
from support.cached import Forgetting, Held, Planned
from support.counted import bytes_of, generating, model_of
from support.hosts_of import cache_of, with_cache

import vlmtok
from vlmtok import EMSStyle, FastV, KVNorm, PrefixKV, PyramidDrop, Random, SnapKV, estimate
from vlmtok.cost.lines import Span

pytestmark = pytest.mark.usefixtures("counted_paths")


class Several(Held):
    """Asks for masses that are made together, and keeps by one of them."""

    def sites(self, layout):
        more = ("recent_mass", "text_mass", *(("attention_mass",) if self.by == "attention_mass" else ()))
        return [replace(site, needs=("values_cached", *more)) for site in super().sites(layout)]


METHODS = {
    "pictures": lambda: Held(0.5, odd=0.25),
    "samples": lambda: Held(0.5, of="sample"),
    "heads": lambda: Held(0.4, of="head"),
    "text": lambda: Held(0.4, by="text_mass"),
    "text, heads": lambda: Held(0.4, odd=0.8, by="text_mass", of="head"),
    "window": lambda: Held(0.4, by="recent_mass", window=3),
    "window of all": lambda: Held(0.4, by="recent_mass", window=99),
    "all masses": lambda: Several(0.4, window=3),
    "text and window": lambda: Several(0.4, by="text_mass", window=3),
    "nothing stays": lambda: Held(0.0),
    "all stays": lambda: Held(1.0),
    "some layers": lambda: Held(0.3, layers=(0, 3, 4, -1)),
    "ragged": lambda: Held(0.6, ragged=True),
    "planned": lambda: Planned(0.5, odd=0.3),
    "planned, heads": lambda: Planned(0.5, of="head"),
    "behind FastV": lambda: [FastV(keep=0.5), Held(0.5, odd=0.3)],
    "behind FastV, planned": lambda: [FastV(keep=0.5), Planned(0.5)],
    "behind two": lambda: [Random(keep=0.7), PyramidDrop(), Held(0.5, of="head")],
    "forgotten": lambda: Forgetting(K=5, keep=0.4),
    "forgotten and chosen": lambda: [Forgetting(K=5, keep=0.6), Held(0.5, odd=0.3)],
    "PrefixKV": lambda: PrefixKV(keep=0.4),
    "SnapKV": lambda: SnapKV(keep=0.4),
    "EMS": lambda: EMSStyle(keep=0.4),
    "key norms behind cuts that are forgotten": lambda: [PyramidDrop(forget=True), KVNorm(keep=0.5)],
}


def _inputs(*rows):
    return models.Batch.of(*(rows or ("^3I4", "^1I2I5", "6", "^2I"))).inputs()


@pytest.mark.parametrize("method", METHODS)
def test_generate_is_counted_exactly_and_each_step_sees_what_is_held(method):
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, METHODS[method]()) as run:
        with referee.counter() as counter:
            generating(model)()
        report = run.report(total=True)
        assert 2 * report.macs.after.low == counter.get_total_flops() and report.macs.after.fixed
        with run.paused(), referee.counter() as counter:
            generating(model)()
        assert 2 * report.macs.before == counter.get_total_flops()
        assert not any("cost there is missing" in note for note in run.report().notes)


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2, "steps": 6, "rows": ("^3I4",)}])
@pytest.mark.parametrize("method", ["pictures", "heads", "forgotten and chosen"])
def test_ways_to_generate_are_counted_exactly(method, way):
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, METHODS[method]()) as run:
        with referee.counter() as counter:
            generating(model, **way)()
        assert 2 * run.report(total=True).macs.after.low == counter.get_total_flops()


WRITING = {
    "each step": lambda: Held(0.8, every=1),
    "every second, heads": lambda: Held(0.7, odd=0.9, every=2, of="head"),
    "text": lambda: Held(0.7, every=2, by="text_mass", layers=(0, 1, 5)),
    "window": lambda: Held(0.7, every=2, by="recent_mass", window=3),
    "all masses": lambda: Several(0.7, every=2, window=3),
    "text and window": lambda: Several(0.7, every=2, by="text_mass", window=3),
    "entries alone": lambda: Held(0.7, every=1, by="keys_cached"),
    "planned": lambda: Planned(0.8, every=3),
    "behind a cut": lambda: [FastV(keep=0.6), Held(0.8, every=2)],
}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("method", WRITING)
def test_entries_that_leave_while_an_answer_is_written_are_counted_exactly(method, options):
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, WRITING[method]()) as run:
        with referee.counter() as counter:
            generating(model, 7, **options)()
        report = run.report(total=True)
        assert 2 * report.macs.after.low == counter.get_total_flops() and report.macs.after.fixed


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_tensors_before_and_behind(method):
    """Slots that padding takes are in; rows of different lengths are as long as the longest of a layer."""
    model, inputs = model_of("HF LLaVA"), _inputs()
    with torch.no_grad(), vlmtok.compress(model, METHODS[method]()) as run:
        cache = cache_of(model(**inputs))
        report = run.report()
        assert [report.cache.after.low, report.cache.after.high] == [bytes_of(cache)] * 2
        layers = [line for line in report.layers if line.stage == "decoder"]
        assert [line.held.low for line in layers] == [layer.keys.shape[2] for layer in cache.layers]
        with run.paused():
            bare = bytes_of(cache_of(model(**inputs)))
        assert report.cache.before == report.peak.before == bare
        inside = [{site.stage for site in one.sites(run.layout)} for one in run.methods]
        cuts = [one for one, stages in zip(run.methods, inside) if stages != {"cache"}]
    if not any(isinstance(one, Forgetting) or getattr(one, "forget", False) for one in cuts):
        # The peak is what the same cuts leave without the method for caches.
        if cuts:
            with torch.no_grad(), vlmtok.compress(model, cuts):
                bare = bytes_of(cache_of(model(**inputs)))
        assert report.peak.after == Span(bare, bare)


BY_CONTENT = ("forgotten", "ragged", "PrefixKV")
BEHIND_CUTS = [name for name, made in METHODS.items() if isinstance(made(), list) or name in BY_CONTENT]
"""Where two pictures of a row keep what content says, the books do not tell how many each keeps."""


@pytest.mark.parametrize(
    ("method", "row"),
    [(name, "^3I4") for name in METHODS] + [(name, "^1I2I5") for name in METHODS if name not in BEHIND_CUTS],
)
def test_an_estimate_says_what_a_run_says(method, row):
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, METHODS[method]()) as run:
        generating(model, 3, (row, row))()
        ran = run.report().to_dict()
        given = {"text_tokens": _words(row), "pictures": row.count("I"), "batch": 2, "counts": run}
        told = estimate(model, run.methods, **given).to_dict()
    for name in ("macs", "total_macs", "decode_step_macs", "cache_bytes", "cache_peak_bytes", "layers"):
        assert told[name] == ran[name], name
    sites = [[(site["site"], site["before"], site["after"]) for site in found["sites"]] for found in (told, ran)]
    assert sites[0] == sites[1]


@pytest.mark.parametrize("by", ["attention_mass", "text_mass"])
def test_an_estimate_knows_rows_that_are_kept_one_by_one(by):
    """Of a prefill; what steps sum later is a run's to tell."""
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, Several(0.4, by=by, window=3, every=2)) as run:
        model(**_inputs("^3I4", "^3I4"))
        ran = run.report().to_dict()
    told = estimate(model, run.methods, text_tokens=_words("^3I4"), pictures=1, batch=2, counts=run).to_dict()
    assert told["macs"]["signals"] == ran["macs"]["signals"] and ran["macs"]["signals"]["after"]


def test_what_two_pictures_of_a_row_keep_by_content_is_not_made_up():
    model = model_of("HF LLaVA")
    with torch.no_grad(), vlmtok.compress(model, METHODS["ragged"]()) as run:
        generating(model, 3, ("^1I2I5",))()
        ran = run.report()
        given = {"text_tokens": _words("^1I2I5"), "pictures": 2, "counts": run}
        told = estimate(model, run.methods, **given)
    assert told.open and told.cache.after.low < ran.cache.after.low < told.cache.after.high == told.cache.before


def _words(row):
    """Text tokens before, between and behind the pictures of a row; ^ is one, a digit so many."""
    return [sum(1 if mark == "^" else int(mark) for mark in piece) for piece in row.split("I")]


def test_a_later_turn_sees_what_segments_hold():
    from transformers import DynamicCache

    model, later = model_of("HF LLaVA"), models.prompt("5", 7)[None]
    inputs = models.Batch.of("^3I4").inputs(mask=False)

    def turns():
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, **with_cache(model, cache), logits_to_keep=1)
        model(input_ids=later, **with_cache(model, cache), logits_to_keep=1)
        model(input_ids=later[:, :1], **with_cache(model, cache))
        return cache

    for made in (*METHODS.values(), *WRITING.values()):
        with torch.no_grad(), vlmtok.compress(model, made()) as run:
            with referee.counter() as counter:
                turns()
            assert 2 * run.report(total=True).macs.after.low == counter.get_total_flops()
