"""Every family: what methods for its key-value cache cost, and how many bytes stay, with what torch and tensors say."""

from __future__ import annotations

import pytest
import torch
from support.cached import Held
from support.counted import bytes_of
from support.hosts_of import cache_of

import vlmtok

from .harness import batch, generate
from .test_counts import COUNTED, built, held_to_the_counter

WITHOUT_ROWS = ("muse_glimmer", "muse_spark", "step3p7", "lfm3_vl")
"""Families of which some layer's attention is of a form that shows no rows; entries are there all the same."""


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("scope", ["picture", "head"])
def test_a_cache_that_loses_entries_is_counted_exactly(name, scope):
    """Layers of windows, those that read others' keys and recurrent ones hold what they held."""
    by = "keys_cached" if name in WITHOUT_ROWS else "attention_mass"
    model, method, caches = built(name), Held(0.5, odd=0.25, of=scope, by=by), []
    with vlmtok.kernels.use("torch"):
        held_to_the_counter(model, method, lambda: generate(model, batch(name).inputs()))
        with torch.no_grad(), vlmtok.compress(model, method) as run:
            caches.append(cache_of(model(**batch(name).inputs())))
            report = run.report()
            with run.paused():
                caches.append(cache_of(model(**batch(name).inputs())))
    assert [report.cache.after.low, report.peak.after.low] == [bytes_of(cache) for cache in caches]
    assert report.cache.after.low < report.peak.after.low == report.cache.before
