"""Means over requests, from the books of batches."""

import pytest

import vlmtok
from vlmtok.harness.figures import Figures


def report(spec, batch):
    return vlmtok.estimate("llava-1.5-7b", spec, batch=batch, text_tokens=40)


def test_batches_count_by_their_requests():
    figures = Figures()
    for batch in (3, 1):
        figures.cost(report("divprune:keep=64", batch), batch)
        figures.answered(batch, 1, 2.0, 0.1)
    one = report("divprune:keep=64", 1)
    found = figures.metrics()
    assert found["visual_tokens"] == 64 and found["visual_tokens_bare"] == 576
    assert found["kv_bytes"] == one.cache.after.high and found["kv_bytes_bare"] == one.cache.before
    assert found["macs"] == pytest.approx(one.macs.after.high) and found["macs_bare"] == one.macs.before
    assert found["silent_share"] == 0.5 and found["pruner_time_share"] == pytest.approx(0.05)


def test_layers_that_see_more_count():
    """FastV's first layers see all tokens: (2 x 576 + 30 x 144) / 32."""
    figures = Figures()
    figures.cost(report("fastv:K=2:keep=144", 1), 1)
    assert figures.metrics()["visual_tokens"] == pytest.approx((2 * 576 + 30 * 144) / 32)


def test_parts_of_a_run_add_up_and_what_is_not_counted_is_left_out():
    assert Figures().metrics() == {}
    one, other, whole = Figures(), Figures(), Figures()
    one.cost(report("divprune:keep=64", 2), 2)
    other.cost(report("divprune:keep=192", 1), 1)
    for part in (one, other):
        whole.add(part)
    assert whole.metrics()["visual_tokens"] == pytest.approx((2 * 64 + 192) / 3)
    pictureless = Figures()
    pictureless.answered(1, 0, 1.0, 0.0)
    assert pictureless.metrics() == {"silent_share": 0, "pruner_time_share": 0}
    whole.add(pictureless)
    assert whole.metrics()["visual_tokens"] == pytest.approx((2 * 64 + 192) / 3)
