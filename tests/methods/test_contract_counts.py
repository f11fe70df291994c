"""Contract 6: a report counts what torch counts, and the estimate says the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support import models, referee
from support.cells import RUNS, ids, made
from support.checks import Subject
from support.methods import on_caches

import vlmtok


@contextlib.contextmanager
def countable(model):
    """Torch definitions, no fused fast path, no leaf that wants a gradient: what torch's counter can follow."""
    fast, wanting = torch.backends.mha.get_fastpath_enabled(), [p for p in model.parameters() if p.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    model.requires_grad_(False)
    try:
        with torch.no_grad(), vlmtok.kernels.use("torch"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in wanting:
            parameter.requires_grad_(True)


WORDS = 12


def read(subject):
    """Calls the text tower of a dual encoder, which reports and estimates cover too."""
    call = getattr(subject.model, "encode_text", None) or getattr(subject.model, "get_text_features", None)
    if call is not None:
        call(torch.arange(1, 1 + WORDS)[None])


def first_input(subject):
    """What `estimate` is told of it."""
    if subject.tower is not None:
        height, width = subject.tower.size
        return {"visual_tokens": (height // models.PATCH) * (width // models.PATCH), "text_tokens": WORDS}
    before, after = 4, 5  # "^3I5"
    return {"text_tokens": (before, after), "logits": "all"}


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_the_report_counts_what_ran_and_the_estimate_agrees(method, model):
    """6: signals and the method's own cost included; `estimate` is told what stays where content decides."""
    subject = Subject(model)
    with countable(subject.model), vlmtok.compress(subject.model, made(method)) as run:
        with referee.counter() as counter:
            subject.out()
        whole = run.report()
        subject.out(row=0)
        read(subject)
        report = run.report()
        planned = vlmtok.estimate(subject.model, made(method), counts=run, **first_input(subject))
    assert whole.macs.after.fixed
    assert 2 * whole.macs.after.low == counter.get_total_flops()
    own = sum(line.after.low for line in whole.lines if not line.before)
    least = whole.macs.before + own
    assert whole.macs.after.low == least if on_caches(method) else whole.macs.after.low < least
    assert [(line.name, line.before, line.after) for line in planned.lines] == [
        (line.name, line.before, line.after) for line in report.lines
    ]
