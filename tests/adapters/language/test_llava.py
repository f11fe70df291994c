"""LLaVA 1.5 under cuts in its tower, at its boundary and between its layers, against the oracle."""

from __future__ import annotations

import pytest
import torch
from support import models, oracle
from support.checks import assert_differs, assert_equal, assert_same
from support.llava_by_oracle import CUTS, ROWS, STEPS, Top, assert_generates_as_the_oracle, decider, generated, llava
from support.models import Batch
from support.player import Player

import vlmtok
from vlmtok import ToDRE
from vlmtok.errors import SiteError


# ---------------------------------------------------------------------- control
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_oracle_is_the_bare_model(attention):
    model, batch = llava(attention), Batch.of(*ROWS)
    reference = oracle.Llava(model)
    for cached in (True, False):
        tokens, logits = generated(model, batch, use_cache=cached)
        assert int(tokens.max()) < models.IMAGE, "a placeholder was generated"
        for row in range(len(batch)):
            nobody = lambda: Player([], vlmtok.Layout("none"))  # noqa: E731
            ids, wanted = reference.generate(batch.rows[row], batch.pixels[row], nobody, STEPS, row=row)
            assert tokens[row].tolist() == ids.tolist()
            assert_equal(logits[row], wanted)


# ---------------------------------------------------------------------- cuts of every kind
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cut", CUTS)
def test_generate_equals_the_oracle(cut, attention, cached):
    assert_generates_as_the_oracle(llava(attention), Batch.of(*ROWS), CUTS[cut], cached)


PUBLISHED = [
    "pitome:preset=llava:ratio=0.8+todre:keep=0.5:tau=none+fastv:K=2:keep=0.5",
    "tome:r=2+transprune:layers=(3;4;5):accumulate=none+divprune:keep=0.6",
    "visionzip:keep=0.5+pyramiddrop:layers=(2;4):ratios=(0.6;0.3)",
    "prumerge:keep=none+fastv:K=2:keep=0.5",
    "crossget:preset=llava:rv=3+sparsevlm:tokens=192:layers=(2;4):budgets=(5;3)",
    "scope:keep=0.6+aim:passes=1:first=2:last=4",
    "averagepool:output_size=(2;2)+random:keep=0.5:stage=decoder:layer=3",
    "cdpruner:keep=0.6+todre:keep=0.8:tau=0.9",
    "random:keep=0.7:stage=vision:layer=0+random:keep=0.5",
]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("spec", PUBLISHED)
def test_methods_in_tower_boundary_and_decoder_at_once_equal_the_oracle(spec, cached):
    batch = Batch.of("^3I5", "2I2", "^2I1I4", "6", "^1II3")
    assert_generates_as_the_oracle(llava(), batch, vlmtok.parse_methods(spec), cached)


def test_tower_boundary_and_decoder_in_one_report():
    """ToMe in the tower, ToDRE at the language model's input, FastV inside it: 16 -> 12 -> 6 -> 3 visual tokens."""
    model, batch = llava(), Batch.of("^3I5")
    methods = [vlmtok.ToMe(r=2), ToDRE(keep=0.5, tau=None), vlmtok.FastV(K=3, keep=0.5)]
    assert_generates_as_the_oracle(model, batch, methods)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False)
        report = run.report()
    assert report.methods == ["tome:r=2", "todre:keep=0.5:tau=none", "fastv:K=3"]
    # The tower's last block is not read, so that it is not cut.
    assert [(str(line.site), line.method.partition(":")[0], line.visits) for line in report.sites] == [
        ("vision layer 0 mid", "tome", 1),
        ("vision layer 1 mid", "tome", 1),
        ("projected", "todre", 1),
        ("decoder layer 2 end", "fastv", 1),
    ]
    tower = [(line.attention.low, line.mlp.low) for line in report.layers if line.stage == "vision"]
    assert tower == [(17, 15), (15, 13), (13, 13)]
    decoder = [(line.before, line.attention.low, line.visual.low) for line in report.layers if line.stage == "decoder"]
    assert decoder == [(25, 15, 6)] * 3 + [(25, 12, 3)] * 3
    shown = str(report)
    assert all(name in shown for name in ("tome", "todre", "fastv", "projected"))
    # Asked for one behind the other they are the same; two at one site only fit into one list.
    first = vlmtok.compress(model, methods[1])
    second = vlmtok.compress(model, [methods[2], methods[0]])
    try:
        with pytest.raises(SiteError, match="pass both in one list"):
            vlmtok.compress(model, vlmtok.DivPrune(keep=0.5))
        with torch.no_grad():
            model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False)
        assert [line.after for line in second.report().lines] == [line.after for line in report.lines]
    finally:
        second.remove()
        first.remove()
    assert_generates_as_the_oracle(model, batch, [methods[1], vlmtok.DivPrune(keep=0.5)])


def test_the_order_of_pitome_goes_all_the_way_into_the_language_model():
    """Slots fill the placeholders in slot order: spatial order would give other answers."""
    model, batch = llava(), Batch.of("^3I5")
    method = vlmtok.PiToMe.preset("llava", ratio=0.6)
    caught = []

    def look(module, args, kwargs):
        if not caught:
            caught.append(kwargs["inputs_embeds"].clone())

    with torch.no_grad(), vlmtok.compress(model, method) as run:
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(args[0].clone()), with_kwargs=True
        )
        model(**batch.inputs())
        handle.remove()
    reference = oracle.Llava(model)
    with torch.no_grad():
        row = reference.embed(batch.rows[0], batch.pixels[0], decider([method], run)(), 0)
    assert_equal(caught[0][0], row.h)
    who = row.carried[0]
    assert who
    assert caught[0].shape[1] < len(batch.rows[0])


def test_a_tower_that_is_cut_everywhere_leaves_one_token():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    assert_generates_as_the_oracle(model, batch, [Top(1)])
    assert_generates_as_the_oracle(model, batch, [Top(1, "features"), Top(1, "decoder", 3)])


# ---------------------------------------------------------------------- ToDRE's second stage
def tau_between(model, batch, layer):
    """A threshold that splits the rows: text-to-picture mass by the formula of todre.md 3.1, dense."""
    found = []
    for row in range(len(batch)):
        if batch.pixels[row] is None:
            continue
        to_vision, to_text = masses(model, batch.rows[row], batch.pixels[row], layer)
        found.append(max(to_vision, to_text))
    found.sort()
    return (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2


@torch.no_grad()
def masses(model, ids, pixels, layer):
    """(a_tv, a_vt) of one prompt at the end of a layer, from its dense attention."""
    reference = oracle.Llava(model)
    run = reference.embed(ids, pixels, Player([], vlmtok.Layout("none")), 0)
    h = run.h
    for part in reference.layers[: layer + 1]:
        h, logits, _ = part.run(h, run.positions)
    rows = logits.softmax(-1)
    visual = (run.picture >= 0).nonzero()[:, 0]
    text = ((run.picture < 0) & (torch.arange(len(ids)) > visual[0])).nonzero()[:, 0]
    to_vision = rows[:, text][:, :, visual].sum(-1).mean()
    return float(to_vision), float(rows[:, visual][:, :, text].sum(-1).mean())


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_todre_stage_two_equals_masking(attention, cached):
    """todre.md 3.4: the late layers of rows that drop get a mask that forbids pictures; positions stay."""
    model, batch, layer = llava(attention), Batch.of("^3I5", "2I2", "^2I1I4", "6", "^1I9"), 2
    tau = tau_between(model, batch, layer)
    bare = generated(model, batch, use_cache=cached)[1]
    with vlmtok.compress(model, ToDRE(keep=None, tau=tau, check_layer=layer)):
        tokens, logits = generated(model, batch, use_cache=cached)
    nobody = lambda: Player([], vlmtok.Layout("none"))  # noqa: E731
    reference, dropped = oracle.Llava(model), []
    for row in range(len(batch)):
        pixels, ids = batch.pixels[row], batch.rows[row]
        for step in range(STEPS):
            # Without a cache the prompt is looked at anew, with what was generated as text.
            seen = torch.cat([ids, tokens[row, :step]]) if not cached else ids
            drop = pixels is not None and max(masses(model, seen, pixels, layer)) < tau
            whole = torch.cat([ids, tokens[row, :step]])
            hidden, _ = reference.forward(whole, pixels, nobody(), mask_from=layer + 1 if drop else None)
            wanted = model.lm_head(hidden[-1])
            assert_equal(logits[row, step], wanted.detach(), what=f"row {row}, step {step}")
            assert int(wanted.argmax()) == int(tokens[row, step])
        dropped.append(drop)
    assert True in dropped
    assert False in dropped[:3] + dropped[4:]
    assert_differs(logits, bare)


def test_todre_stage_two_never_drops_without_text():
    model, batch = llava(), Batch.of("^4I")
    bare = generated(model, batch)[1]
    with vlmtok.compress(model, ToDRE(keep=None, tau=1.0, check_layer=2)):
        assert_same(generated(model, batch)[1], bare)
    # With text behind the picture the same threshold drops.
    batch = Batch.of("^4I2")
    bare = generated(model, batch)[1]
    with vlmtok.compress(model, ToDRE(keep=None, tau=1.0, check_layer=2)):
        assert_differs(generated(model, batch)[1], bare)
