"""Contract 8: selection in fp32, in half precision too; ties and NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from support import models
from support.cells import RUNS, ids, made, subject_of
from support.checks import Subject, watched
from support.methods import METHODS, cuts

import vlmtok
from vlmtok import TokenView
from vlmtok.core.signals import ENTRIES, MASSES


@pytest.mark.parametrize(("method", "model"), RUNS, ids=ids(RUNS))
def test_selection_runs_in_fp32_whatever_surrounds_it(method, model):
    """8: autocast is off inside `reduce`, matrix products are exact, and half-precision models run."""
    subject = subject_of(method, model)
    methods = made(method)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            watched(methods) as seen,
            vlmtok.compress(subject.model, methods),
        ):
            subject.out()
        assert torch.get_float32_matmul_precision() == "medium", "the user's precision was not put back"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen
    assert not any(s.autocast or s.grad for s in seen)
    assert {s.precision for s in seen} == {"highest"}
    for s in seen:
        if s.reduction is not None and s.reduction.keep_weight is not None:
            assert s.reduction.keep_weight.dtype == torch.float32


HALF = [cell for cell in RUNS if cell[1] in ("timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIP vision", "HF LLaVA")]


@pytest.mark.parametrize(("method", "model"), HALF, ids=ids(HALF))
def test_half_precision_models_run(method, model):
    half = copy.deepcopy(models.shared(model)).to(torch.bfloat16)
    methods = made(method)
    if model in models.TOWERS:
        tower = models.TOWERS[model]
        pictures = tower.pictures(2).to(torch.bfloat16)
        run_it = lambda: tower.tokens(half, pictures)  # noqa: E731
    else:
        run_it = Subject(model, half).out
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(half, methods):
        found = run_it()
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
    assert seen and any(s.reduction is not None for s in seen) == cuts(method)
    assert all(s.view.size is None or s.view.size.dtype == torch.float32 for s in seen)


BLIND = {"random", "grid", "kv_random", "streaming"}
"""They look at nothing."""
DEALT = {"vispruner"}
"""Equal tokens are dealt into halves in turn; its own test says which of them stay."""
CLIPS = {"vidcom2": 1}
"""Frames of the view, for methods with a budget for each: ties are within a frame there."""
PRUNERS = [name for name in METHODS if vlmtok.method_class(name).__module__.startswith("vlmtok.pruners") and cuts(name)]


@pytest.mark.parametrize("method", [name for name in PRUNERS if name not in BLIND | DEALT])
def test_ties_go_to_the_lowest_index(method):
    """8: where all tokens are equal, the first ones stay."""
    for kept, n in everything_equal(method):
        assert kept == list(range(len(kept))), f"of {n} equal tokens {kept} were kept"


@pytest.mark.parametrize("method", [name for name in PRUNERS if name not in BLIND])
def test_a_token_with_nan_is_not_kept(method):
    """8: NaN loses, wherever it comes from, as long as another token is left."""
    for kept, n in everything_equal(method, nan_at=0):
        assert 0 not in kept, f"of {n} tokens the first has NaN everywhere, and {kept} were kept"


def everything_equal(method, nan_at=None, n=12):
    """(kept tokens, n) at each site of a pruner that sees n equal tokens, one of them with NaN in all it has."""
    subject = Subject("HF LLaVA")
    methods = made(method)
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(subject.model, methods):
        subject.out(row=0)
    found, views = [], []
    state: dict = {}
    row: dict = {}
    for s in seen:
        signals = {}
        length = n + 8
        for name, value in s.signals.items():
            if value is None:
                signals[name] = None
                continue
            # Every axis that had the view's tokens, or the row's, has the new numbers; values are one number.
            sizes = {s.view.tokens.shape[1]: n}
            plain = name.partition("@")[0]
            shape = [1 if at == 0 else sizes.get(size, size) for at, size in enumerate(value.shape)]
            if plain in ("transition", "attention_logits"):
                shape = (
                    [1, *value.shape[1:-1], length] if plain == "transition" else [1, value.shape[1], length, length]
                )
            made_up = torch.full(shape, 0.05)
            if nan_at is not None and plain != "text":
                axis = {name: len(shape) - 1 for name in (*MASSES, "attention_rows")}.get(plain, 1)
                axis = {name: len(shape) - 2 for name in ENTRIES}.get(plain, axis)
                axis = {"cls_attention": 2, "text_attention": 3, "last_attention": 2, "transition": 3}.get(plain, axis)
                if plain == "attention_logits":
                    axis = 3
                at = nan_at + (4 if plain in ("transition", "attention_logits") else 0)
                made_up.index_fill_(axis, torch.tensor([at]), float("nan"))
            signals[name] = made_up
        tokens = torch.full((1, n, 8), 0.5)
        if nan_at is not None:
            tokens[:, nan_at] = float("nan")
        if "text" in signals and signals["text"] is not None:
            signals["text"] = torch.full((1, 5, 8), 0.25)
        view = TokenView(
            tokens,
            s.view.site,
            depth=s.view.depth,
            entered=n,
            columns=torch.arange(4, 4 + n)[None],
            signals=signals,
            state=state,
            row=row,
            grid=(3, 4),
            frames=CLIPS.get(method, 3),
        )
        views.append((s.method, view))
    methods[0].plan([view for _, view in views if view.site.stage == "cache"])
    for asked, view in views:
        with torch.no_grad():
            reduction = asked.reduce(view)
        if reduction is None:
            continue
        assert asked.count(view.counts) in (None, reduction.slots)
        kept = reduction.keep[0] if reduction.valid is None else reduction.keep[0][reduction.valid[0]]
        if len(kept) < n:
            found.append((sorted(kept.tolist()), n))
    assert found, f"{method} cut nothing"
    return found
