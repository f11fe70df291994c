"""LLaVA 1.5 under cuts in its tower, at its boundary and between its layers, against the oracle."""

from __future__ import annotations

import copy
import functools
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from support import models, oracle
from support.checks import Subject, assert_differs, assert_equal, assert_same, gap, hooks
from support.hosts_of import cache_of, checkpoint, with_cache
from support.models import PLACEHOLDERS, Batch
from support.player import Player
from vlmtok.adapters.host_objects import checkpoints_whole_calls

import vlmtok
from vlmtok import Reduction, Site, ToDRE
from vlmtok.core.view import TokenView
from vlmtok.errors import CacheError, MissingSignal, PassError, SiteError, UnsupportedModel

STEPS = 4
SPECIAL = list(range(models.IMAGE, models.VOCAB))
# Text around a picture, a picture first, two pictures, none, a picture last, two pictures side by side.
ROWS = ("^3I5", "2I2", "^2I1I4", "6", "^4I", "^1II3")


class Top(vlmtok.Random):
    """Keeps the longest tokens, wherever it is put; slots fall in length if `ordered` is off."""

    def __init__(self, keep, stage="projected", layer=2, point="start", positions=None, scope="picture", ordered=True):
        super().__init__(keep=keep)
        self.place = (stage, layer, point, positions, scope, ordered)

    def sites(self, layout):
        stage, layer, point, positions, scope, _ = self.place
        if stage in ("projected", "features"):
            return [Site(stage, positions=positions, scope=scope)]
        return [Site(stage, layer, point, positions=positions, scope=scope)]

    def reduce(self, view):
        best = view.tokens.float().norm(dim=-1).argsort(dim=1, descending=True, stable=True)
        best = best[:, : self.count(view.counts)]
        return Reduction(best.sort(1).values if self.place[-1] else best)

    def __str__(self):
        return "top"


def decider(methods, run):
    memory = {at: run.memory(at) for at in range(len(methods))}
    return lambda: Player(methods, run.layout, memory)


def generated(model, batch, **more):
    given = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**batch.inputs(), **{**given, **more})
    return found.sequences[:, batch.inputs()["input_ids"].shape[1] :], torch.stack(found.logits, 1)


@functools.cache
def llava(attention="sdpa", depth=6):
    return models.llava(attention, depth=depth)


def assert_generates_as_the_oracle(model, batch, methods, cached=True, **more):
    bare = generated(model, batch, use_cache=cached, **more)[1]
    with vlmtok.compress(model, methods) as run:
        tokens, logits = generated(model, batch, use_cache=cached, **more)
    reference = oracle.Llava(model)
    methods = run.methods
    for row in range(len(batch)):
        ids, wanted = reference.generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, again=not cached, row=row
        )
        assert tokens[row].tolist() == ids.tolist(), f"tokens of row {row}"
        assert_equal(logits[row], wanted, what=f"logits of row {row}")
    assert_differs(logits, bare)


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
CUTS = {
    "boundary renumbered": [Top(0.5)],
    "boundary kept": [Top(0.5, positions="keep")],
    "boundary of the sample": [Top(0.4, scope="sample")],
    "boundary in slot order": [Top(0.5, ordered=False)],
    "boundary in slot order, kept": [Top(0.5, positions="keep", ordered=False)],
    "sample in slot order": [Top(0.5, scope="sample", ordered=False)],
    "features": [Top(0.5, "features", ordered=False)],
    "decoder kept": [Top(0.25, "decoder")],
    "decoder renumbered": [Top(0.25, "decoder", positions="renumber")],
    "decoder end": [Top(0.25, "decoder", 1, "end", ordered=False)],
    "decoder twice": [Top(0.5, "decoder", 1), Top(0.5, "decoder", 4, positions="renumber")],
    "decoder twice, kept last": [Top(0.5, "decoder", 1, positions="renumber"), Top(0.5, "decoder", 4)],
    "one boundary between layers": [Top(0.5, "decoder", 2, "end"), Top(0.5, "decoder", 3, "start")],
    "two in one place": [Top(0.5, "decoder", 2), Top(0.5, "decoder", 2, scope="sample", positions="renumber")],
    "boundary and decoder": [Top(0.5), Top(0.5, "decoder", 2)],
    "boundary kept, decoder renumbered": [Top(0.5, positions="keep"), Top(0.5, "decoder", 2, positions="renumber")],
    "everything": [
        *vlmtok.parse_methods("pitome:ratio=0.8"),
        Top(0.8, "features"),
        Top(0.7, scope="sample", ordered=False),
        Top(0.6, "decoder", 1, "end"),
        Top(0.5, "decoder", 4, positions="renumber"),
    ],
}


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


# ---------------------------------------------------------------------- ways to generate
BOTH = [Top(0.5), Top(0.5, "decoder", 2, positions="renumber")]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_sampling_follows_the_oracle_and_the_seed(cached):
    """Logits are the oracle's for the tokens that were drawn, and those are what the seed draws from these logits."""
    model, batch, temperature = llava(), Batch.of(*ROWS), 1.5
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "suppress_tokens": SPECIAL}
    with vlmtok.compress(model, BOTH) as run:
        torch.manual_seed(5)
        tokens, logits = generated(model, batch, use_cache=cached, **sampled)
    torch.manual_seed(5)
    for step in range(STEPS):
        scores = logits[:, step].index_fill(1, torch.tensor(SPECIAL), float("-inf"))
        drawn = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0]
        assert torch.equal(tokens[:, step], drawn), f"step {step}: somebody else drew from the generator"
    reference = oracle.Llava(model)
    for row in range(len(batch)):
        _, wanted = reference.generate(
            batch.rows[row],
            batch.pixels[row],
            decider(BOTH, run),
            STEPS,
            again=not cached,
            row=row,
            given=tokens[row],
        )
        assert_equal(logits[row], wanted)


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder kept", "everything"])
def test_several_answers_for_one_prompt(cut):
    """num_return_sequences repeats rows, and the tower's pictures with them."""
    model, batch, methods = llava(), Batch.of("^3I5", "^2I1I4"), CUTS[cut]
    with vlmtok.compress(model, methods) as run:
        torch.manual_seed(3)
        sampled = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3, "suppress_tokens": SPECIAL}
        tokens, logits = generated(model, batch, **sampled)
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    reference = oracle.Llava(model)
    for row in range(6):
        _, wanted = reference.generate(
            batch.rows[row // 3], batch.pixels[row // 3], decider(methods, run), STEPS, given=tokens[row]
        )
        assert_equal(logits[row], wanted, what=f"answer {row}")


@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder renumbered", "decoder kept", "everything"]
)
def test_beams_equal_without_cache_alone_and_by_the_oracle(cut):
    model, batch, methods = llava(), Batch.of("^3I5", "2I2", "^2I1I4", "6"), CUTS[cut]
    beams = {"num_beams": 3, "output_scores": True, "length_penalty": 0.0}
    more = dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, **beams)
    with vlmtok.compress(model, methods) as run:
        cached = model.generate(**batch.inputs(), **more)
        uncached = model.generate(**batch.inputs(), use_cache=False, **more)
        alone = [model.generate(**batch.alone(row).inputs(mask=False), **more) for row in range(len(batch))]
    bare = model.generate(**batch.inputs(), **more)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_equal(cached.sequences_scores, uncached.sequences_scores)
    reference = oracle.Llava(model)
    for row in range(len(batch)):
        found = cached.sequences[row, -STEPS:]
        assert found.tolist() == alone[row].sequences[0, -STEPS:].tolist()
        _, logits = reference.generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, row=row, given=found
        )
        score = logits.log_softmax(-1)[torch.arange(STEPS), found].sum()
        assert_equal(cached.sequences_scores[row], score, what=f"score of row {row}")
    assert_differs(cached.sequences_scores, bare.sequences_scores)


@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder renumbered", "decoder kept", "everything"]
)
def test_prompt_lookup_equals_greedy(cut):
    """Assisted decoding crops the cache; what was cut before must survive it."""
    model, methods = llava(), CUTS[cut]
    cropped = 0
    from transformers import DynamicCache

    original = DynamicCache.crop

    def crop(self, *given, **more):
        nonlocal cropped
        cropped += 1
        return original(self, *given, **more)

    for pattern, seed in (("^3I5", 0), ("^2I1I4", 1), ("2I9", 2)):
        batch = Batch.of(pattern, seed=seed)
        # Text that repeats, so that there is something to look up.
        row = torch.cat([batch.rows[0], batch.rows[0][-2:], batch.rows[0][-2:]])
        batch = Batch((row,), batch.pixels)
        given = {"max_new_tokens": 12, "do_sample": False}
        with vlmtok.compress(model, methods):
            greedy = model.generate(**batch.inputs(), **given)
            DynamicCache.crop = crop
            try:
                looked = model.generate(
                    **batch.inputs(), prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **given
                )
            finally:
                DynamicCache.crop = original
        assert greedy.tolist() == looked.tolist()
    assert cropped, "nothing was ever taken back: this test did not try what it is for"


SCORED_BY_TEXT = (
    "fastv:K=1:keep=0.4",
    "pyramiddrop",
    "sparsevlm",
    "transprune",
    "aim",
    "cdpruner:keep=0.4",
    "todre:keep=none:tau=1.0",
    "todre:keep=0.6+fastv:K=1:keep=0.5",
)


@pytest.mark.parametrize("pattern", ["^3I5", "^3I", "2I3I2"])
@pytest.mark.parametrize("spec", SCORED_BY_TEXT)
def test_drafts_of_speculative_decoding_do_not_decide(spec, pattern, monkeypatch):
    """The first forward brings drafts behind the prompt, which are no text yet and not its last token."""
    from vlmtok.core.attachment import Attachment

    model, chosen, widths = llava(depth=18), [], []
    decide = Attachment.decide

    def noted(self, entry, view):
        reduction = decide(self, entry, view)
        chosen[-1].append(None if reduction is None else (reduction.keep, reduction.valid))
        return reduction

    monkeypatch.setattr(Attachment, "decide", noted)
    core = model.model.language_model
    hook = core.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = Batch.of(pattern, seed=3)
    row, ways = batch.rows[0], [{}, {"assistant_model": models.llava(depth=2)}]
    if pattern != "^3I":  # behind a picture, prompt lookup drafts placeholders, and the host itself raises
        row = torch.cat([row, row[-1:], row[-2:-1], row[-1:]])
        ways.append({"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1})
    batch = Batch((row,), batch.pixels)
    with vlmtok.compress(model, spec):
        for more in ways:
            chosen.append([])
            widths.append(0)
            found = model.generate(**batch.inputs(), max_new_tokens=8, min_new_tokens=8, do_sample=False, **more)
            if not more:
                greedy = found
            assert found.tolist() == greedy.tolist()
    hook.remove()
    firsts = [width for before, width in pairwise(widths) if before == 0]
    assert firsts[0] == len(row) and max(firsts) > len(row), "no draft was in any first forward"
    # Without text behind the picture ToDRE has nothing to ask.
    assert any(one is not None for one in chosen[0]) or (pattern, spec[:5]) == ("^3I", "todre")
    for other in chosen[1:]:
        assert len(other) == len(chosen[0])
        for one, two in zip(chosen[0], other):
            assert (one is None) == (two is None)
            for a, b in zip(one or (), two or ()):
                assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("cut", ["boundary renumbered", "boundary kept", "decoder kept"])
def test_assisted_generation_equals_greedy(cut):
    model, batch = llava(), Batch.of("^3I5")
    assistant = models.llava(depth=2)
    with vlmtok.compress(model, CUTS[cut]):
        greedy = model.generate(**batch.inputs(), max_new_tokens=8, do_sample=False)
        try:
            found = model.generate(**batch.inputs(), max_new_tokens=8, do_sample=False, assistant_model=assistant)
        except (ValueError, TypeError, AttributeError, RuntimeError, CacheError) as refusal:
            with warnings.catch_warnings(), vlmtok.compress(llava(depth=5), "random:keep=1.0"):
                warnings.simplefilter("ignore")
            pytest.fail(f"assisted generation: {refusal!r}")
    assert greedy.tolist() == found.tolist()


@pytest.mark.parametrize("size", [4, 7, 19, 24, 200])
@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder kept", "features", "everything"])
def test_prefill_in_chunks_is_right_or_refused(cut, size):
    model, batch = llava(), Batch.of("^3I5")
    methods = CUTS[cut]
    with vlmtok.compress(model, methods):
        tokens, logits = generated(model, batch)
        try:
            chunked = generated(model, batch, prefill_chunk_size=size)
        except CacheError as refusal:
            assert "chunk" in str(refusal)
            assert size < 200, "one chunk holds everything"
            return
    bare = generated(model, batch, prefill_chunk_size=size)
    assert_equal(bare[1], generated(model, batch)[1], what="the bare host in chunks")
    assert tokens.tolist() == chunked[0].tolist()
    assert_equal(chunked[1], logits)


@pytest.mark.parametrize(
    "more",
    [
        {"output_hidden_states": True},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 3},
        {"logits_to_keep": 1},
        {"num_beams": 2, "num_return_sequences": 2},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "quantized"},
    ],
    ids=str,
)
def test_other_options_do_what_they_do_bare_or_say_why_not(more):
    model, batch = llava(), Batch.of("^3I5")
    given = dict(max_new_tokens=3, do_sample=False, **more)

    def attempt():
        try:
            return model.generate(**batch.inputs(), **given, return_dict_in_generate=True).sequences.shape
        except CacheError as refusal:
            return refusal
        except Exception as other:
            return type(other)

    bare = attempt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with vlmtok.compress(model, [Top(0.5), Top(0.5, "decoder", 2)]):
            found = attempt()
    assert found == bare or isinstance(found, CacheError), f"bare: {bare}, compressed: {found}"


# ---------------------------------------------------------------------- plain forwards
def text_places(batch, row):
    """Columns of the text of a row, places in the row without padding."""
    return (batch.rows[row] != models.IMAGE).nonzero()[:, 0]


def expected_logits(model, batch, row, methods, run):
    """Logits of the text columns of a row, by the oracle."""
    reference = oracle.Llava(model)
    hidden, kept = reference.forward(batch.rows[row], batch.pixels[row], decider(methods, run)(), row)
    at = {int(place): i for i, place in enumerate(kept.place.tolist())}
    return model.lm_head(hidden[[at[int(c)] for c in text_places(batch, row)]])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "everything"]
)
def test_a_plain_forward_returns_the_original_length(cut, attention, side):
    """Every text column has the logits that the shortened row gives it, with left and right padding."""
    model, batch, methods = llava(attention), Batch.of("^3I5", "2I2", "^2I1I4", "6", "^1II3"), CUTS[cut]
    given = batch.inputs(side=side)
    with torch.no_grad():
        bare = model(**given).logits
        with vlmtok.compress(model, methods) as run:
            found = model(**given)
    assert found.logits.shape == bare.shape
    changed = 0.0
    for row in range(len(batch)):
        length = len(batch.rows[row])
        whole = found.logits[row, -length:] if side == "left" else found.logits[row, :length]
        before = bare[row, -length:] if side == "left" else bare[row, :length]
        with torch.no_grad():
            wanted = expected_logits(model, batch, row, methods, run)
        assert_equal(whole[text_places(batch, row)], wanted, what=f"row {row}")
        changed = max(changed, gap(whole[text_places(batch, row)], before[text_places(batch, row)]))
    assert changed > 1e-3


@pytest.mark.parametrize("cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered"])
def test_a_forward_without_mask_and_cache_is_no_packed_sequence(cut):
    """transformers reads a jump in position_ids, without mask and cache, as a new sequence."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    given = batch.inputs(mask=False)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        plain = model(**given, use_cache=False).logits
        cached = model(**given, use_cache=True).logits
        masked = model(**given, attention_mask=torch.ones_like(given["input_ids"]), use_cache=False).logits
    with torch.no_grad():
        wanted = expected_logits(model, batch, 0, methods, run)
    for found in (plain, cached, masked):
        assert_equal(found[0, text_places(batch, 0)], wanted)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_loss_and_gradients_equal_the_oracle(cut, train):
    """Labels keep the original length; pictures carry no labels, as every processor has it."""
    model = models.llava(depth=6).train(train)
    batch, methods = Batch.of("^3I5", "2I2", "^2I1I4"), CUTS[cut]
    given = batch.inputs(side="right")
    labels = given["input_ids"].masked_fill((given["input_ids"] == models.IMAGE) | (given["attention_mask"] == 0), -100)
    with vlmtok.compress(model, methods) as run:
        found = model(**given, labels=labels, use_cache=False)
        found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = 0.0, 0
    reference = oracle.Llava(model)
    for row in range(len(batch)):
        ids = batch.rows[row]
        hidden, kept = reference.forward(ids, batch.pixels[row], decider(methods, run)(), row)
        # Column i predicts i + 1: the last one kept before it stands for a column that left.
        place = kept.place
        for target in range(1, len(ids)):
            if ids[target] == models.IMAGE:
                continue
            at = int((place < target).nonzero()[-1])
            total = total + F.cross_entropy(model.lm_head(hidden[at]), ids[target], reduction="sum")
            count += 1
    loss = total / count
    loss.backward()
    assert_equal(found.loss.detach(), loss.detach())
    assert any("vision_tower" in name for name in gradients)
    assert any("projector" in name for name in gradients)
    for name, p in model.named_parameters():
        if p.grad is not None and float(p.grad.abs().max()) > 0:
            assert_equal(gradients[name], p.grad, 2e-5, f"gradient of {name}")


@pytest.mark.parametrize("cut", ["boundary renumbered", "everything"])
def test_gradient_checkpointing_of_the_language_model(cut):
    """Layers that autograd runs again get the rows of their own forward."""
    model = models.llava(depth=6).train()
    batch, methods = Batch.of("^3I5", "^2I1I4"), CUTS[cut]
    given = batch.inputs(side="right")
    labels = given["input_ids"].masked_fill(given["input_ids"] == models.IMAGE, -100)
    found = []
    for again in (False, True):
        if again:
            checkpoint(model)
            if cut == "everything" and checkpoints_whole_calls(model.model.language_model.layers[0]):
                with vlmtok.compress(model, methods), pytest.raises(UnsupportedModel, match=r"5\.23"):
                    model(**given, labels=labels, use_cache=False)
                return
        model.zero_grad()
        with vlmtok.compress(model, methods):
            model(**given, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        assert_equal(found[1][name], value, 2e-5, f"gradient of {name}")


def test_embeddings_instead_of_ids():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    given = batch.inputs()
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    by_embeds = {"inputs_embeds": embeds, **{k: v for k, v in given.items() if k != "input_ids"}}
    with torch.no_grad(), vlmtok.compress(model, CUTS["everything"]):
        wanted = model(**given).logits
        assert_equal(model(**by_embeds).logits, wanted)
        tokens = model.generate(**given, max_new_tokens=3, do_sample=False)[:, -3:]
        by_embeds_tokens = model.generate(**by_embeds, max_new_tokens=3, do_sample=False)[:, -3:]
    assert tokens.tolist() == by_embeds_tokens.tolist()


def test_text_only_calls_are_bit_identical():
    model, batch = llava(), Batch.of("6", "^9")
    given = batch.inputs()
    with torch.no_grad():
        bare, answer = model(**given).logits, generated(model, batch)[1]
        with vlmtok.compress(model, CUTS["everything"]) as run:
            assert_same(model(**given).logits, bare)
            assert_same(generated(model, batch)[1], answer)
            generated(model, Batch.of("^3I5"))
            assert_same(model(**given).logits, bare, "text after a picture")
            assert run.active


def test_the_inner_model_alone():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    with torch.no_grad():
        with vlmtok.compress(model, CUTS["everything"]):
            wanted = model(**batch.inputs()).logits
        with vlmtok.compress(model.model, CUTS["everything"]):
            hidden = model.model(**batch.inputs()).last_hidden_state
    assert_same(model.lm_head(hidden).detach(), wanted)


# ---------------------------------------------------------------------- loops by hand
def loop(model, batch, positions, mask, cache):
    """Greedy decoding written by hand; returns tokens and logits."""
    given = batch.inputs()
    real = given["attention_mask"]
    ids = given["input_ids"]
    if positions:
        given["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    if not mask:
        del given["attention_mask"]
    tokens, logits = [], []
    past = cache
    with torch.no_grad():
        out = model(**given, **with_cache(model, past), use_cache=True)
        past = cache_of(out)
        following = real.sum(1, keepdim=True)
        for step in range(STEPS):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            real = torch.cat([real, torch.ones_like(tokens[-1])], 1)
            more = {}
            if positions:
                more["position_ids"] = following + step
            if mask:
                more["attention_mask"] = real
            out = model(input_ids=tokens[-1], **with_cache(model, past), use_cache=True, **more)
    assert ids.shape[1] + STEPS == real.shape[1]
    return torch.cat(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize("born", ["outside", "inside"])
@pytest.mark.parametrize("positions", [True, False], ids=["position_ids", "no position_ids"])
@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "everything"]
)
def test_decode_loops_written_by_hand(cut, positions, born):
    """Also where the cache is born inside the language model, and where nobody gives positions."""
    from transformers import DynamicCache

    model, methods = llava(), CUTS[cut]
    for batch, mask in ((Batch.of("^3I5"), False), (Batch.of("^3I5"), True), (Batch.of("^3I5", "^2I1I4"), True)):
        if len(batch) > 1 and not positions:
            continue  # hosts count from the padded length then, bare ones too
        cache = DynamicCache(config=model.config.text_config) if born == "outside" else None
        with vlmtok.compress(model, methods) as run:
            tokens, logits = loop(model, batch, positions, mask, cache)
        for row in range(len(batch)):
            ids, wanted = oracle.Llava(model).generate(
                batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, row=row
            )
            assert tokens[row].tolist() == ids.tolist()
            assert_equal(logits[row], wanted, what=f"row {row}, mask {mask}")


# ---------------------------------------------------------------------- turns
def first_turn(model, batch, **more):
    return model.generate(**batch.inputs(), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, **more)


TURNS = ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "decoder twice", "everything"]


@pytest.mark.parametrize("cut", TURNS)
def test_a_follow_up_turn_with_new_ids_only(cut):
    """New ids and a mask of the full length on a returned cache equal the whole conversation from scratch."""
    model, batch, methods = llava(), Batch.of("^3I5", "^2I1I4", "6"), CUTS[cut]
    question = models.prompt("5", seed=9).expand(3, -1)
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        seen = torch.cat([batch.inputs()["attention_mask"], torch.ones(3, STEPS + 5 - 1, dtype=torch.int64)], 1)
        # The last token that was generated has not been fed yet.
        fresh = torch.cat([one.sequences[:, -1:], question], 1)
        mask = torch.cat([seen, torch.ones(3, 1, dtype=torch.int64)], 1)
        out = model(
            input_ids=fresh,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -6:],
            **with_cache(model, cache_of(one)),
            use_cache=True,
        )
    reference = oracle.Llava(model)
    for row in range(3):
        plan = oracle.Plan()
        ids, _ = reference.generate(
            batch.rows[row], batch.pixels[row], decider(methods, run), STEPS, row=row, plan=plan
        )
        assert ids.tolist() == one.sequences[row, -STEPS:].tolist()
        whole = torch.cat([batch.rows[row], ids, question[row]])
        with torch.no_grad():
            hidden, _ = reference.forward(whole, batch.pixels[row], decider(methods, run)(), row, plan)
            wanted = model.lm_head(hidden[-6:])
        assert_equal(out.logits[row].detach(), wanted, what=f"row {row}")


@pytest.mark.parametrize("cut", TURNS)
def test_a_second_turn_through_generate(cut):
    """generate() with the new ids, the returned cache and a mask of the full length."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    question = models.prompt("5", seed=9)[None]
    with vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        fresh = torch.cat([one.sequences[:, -1:], question], 1)
        full = torch.ones(1, one.sequences.shape[1] + 5, dtype=torch.int64)
        try:
            two = model.generate(
                input_ids=fresh,
                attention_mask=full,
                **with_cache(model, cache_of(one)),
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        except CacheError as refusal:
            pytest.fail(f"new ids and a full mask are the documented way, and were refused: {refusal}")
    reference, plan = oracle.Llava(model), oracle.Plan()
    reference.generate(batch.rows[0], batch.pixels[0], decider(methods, run), STEPS, plan=plan)
    whole = torch.cat([one.sequences[0], question[0]])
    ids, wanted = reference.generate(whole, batch.pixels[0], decider(methods, run), 3, plan=plan)
    assert two.sequences[0, -3:].tolist() == ids.tolist()
    assert_equal(torch.stack(two.logits, 1)[0], wanted)


@pytest.mark.parametrize("cut", TURNS)
def test_full_ids_on_a_returned_cache_are_refused(cut):
    """Hosts slice full ids by the length of the cut cache: silently wrong without a check."""
    model, batch = llava(), Batch.of("^3I5")
    with vlmtok.compress(model, CUTS[cut]):
        one = first_turn(model, batch)
        full = torch.cat([one.sequences, models.prompt("5", seed=9)[None]], 1)
        given = {**with_cache(model, cache_of(one)), "max_new_tokens": 2, "do_sample": False}
        if "decoder" in cut and cut != "decoder twice" and model.model.language_model.layers:
            pass
        length = cache_of(one).get_seq_length()
        if length == full.shape[1] - 6:
            # The first layers are uncut: the host slices right, and the result must be right too.
            fresh = model.generate(input_ids=full, attention_mask=torch.ones_like(full), **given)
            assert fresh.shape[1] == full.shape[1] + 2
            return
        with pytest.raises(CacheError, match="new ids"):
            model.generate(input_ids=full, attention_mask=torch.ones_like(full), **given)
        one = first_turn(model, batch)
        given.update(with_cache(model, cache_of(one)))
        with pytest.raises(CacheError, match="new ids"):
            model.generate(input_ids=full, **given)


@pytest.mark.parametrize(
    "cut", ["boundary renumbered", "boundary kept", "decoder kept", "decoder renumbered", "decoder twice"]
)
def test_a_second_turn_with_a_new_picture(cut):
    assert_two_turns_equal_the_oracle(CUTS[cut], Batch.of("^3I5"), Batch.of("2I4", seed=7))


class Bright(Top):
    """As `Top`, for pictures whose tokens are above 0 in the first channel; others keep all."""

    def reduce(self, view):
        assert len(view.tokens) == 1
        return super().reduce(view) if view.tokens[:, :, 0].mean() > 0 else None


CUT_LATER = {
    "kept": [Top(6), Bright(3, "decoder", 1)],
    "renumbered": [Top(6), Bright(3, "decoder", 1, positions="renumber")],
    "between two": [Top(6), Bright(4, "decoder", 1, positions="renumber"), Top(3, "decoder", 4)],
    "between two, renumbered": [
        Top(6),
        Bright(4, "decoder", 1, positions="renumber"),
        Top(3, "decoder", 4, positions="renumber"),
    ],
}


@pytest.mark.parametrize("cut", CUT_LATER)
def test_a_second_turn_is_the_first_that_cuts_inside(cut):
    """Layers that part from the others in the second turn go on from the positions of the first."""
    assert_two_turns_equal_the_oracle(CUT_LATER[cut], Batch.of("^3I5"), Batch.of("2I4", seed=2))
    with torch.no_grad(), vlmtok.compress(llava(), CUT_LATER[cut]) as run:
        left = []
        for batch in (Batch.of("^3I5"), Batch.of("2I4", seed=2)):
            llava()(**batch.inputs())
            left.append([layer.visual.high for layer in run.report().layers if layer.stage == "decoder"][1])
    assert left[0] == 6 and left[1] < 6


def assert_two_turns_equal_the_oracle(methods, batch, more):
    """A prompt, its answer, a second prompt with pictures of its own that ends in four words, and one token more."""
    model = llava()
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        one = first_turn(model, batch)
        fresh = torch.cat([one.sequences[:, -1:], more.rows[0][None]], 1)
        full = torch.ones(1, one.sequences.shape[1] + len(more.rows[0]), dtype=torch.int64)
        start = full.shape[1] - fresh.shape[1]
        out = model(
            input_ids=fresh,
            attention_mask=full,
            pixel_values=more.pixels[0],
            position_ids=torch.arange(start, full.shape[1])[None],
            **with_cache(model, cache_of(one)),
            use_cache=True,
        )
        # And a token more, on the twice-cut cache.
        answer = out.logits[:, -1].argmax(-1, keepdim=True)
        again = model(
            input_ids=answer,
            attention_mask=torch.ones(1, full.shape[1] + 1, dtype=torch.int64),
            position_ids=torch.tensor([[full.shape[1]]]),
            **with_cache(model, cache_of(out)),
        )
    reference, plan = oracle.Llava(model), oracle.Plan()
    reference.generate(batch.rows[0], batch.pixels[0], decider(methods, run), STEPS, plan=plan)
    whole = torch.cat([one.sequences[0], more.rows[0]])
    pixels = torch.cat([batch.pixels[0], more.pixels[0]])
    with torch.no_grad():
        hidden, kept = reference.forward(whole, pixels, decider(methods, run)(), 0, plan)
        assert len(kept.h) < len(whole) - 8
        assert_equal(out.logits[0, -4:], model.lm_head(hidden[-4:]), what="the second question")
        hidden, _ = reference.forward(torch.cat([whole, answer[0]]), pixels, decider(methods, run)(), 0, plan)
        assert_equal(again.logits[0, -1], model.lm_head(hidden[-1]), what="its answer")


def test_a_picture_after_a_text_only_turn():
    """A cache that was filled without any cut."""
    model, methods = llava(), CUTS["decoder renumbered"] + [Top(0.5)]
    one, two = Batch.of("^7"), Batch.of("2I4", seed=7)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        out = model(**one.inputs(), use_cache=True)
        full = torch.ones(1, len(one.rows[0]) + len(two.rows[0]), dtype=torch.int64)
        found = model(
            input_ids=two.rows[0][None],
            attention_mask=full,
            pixel_values=two.pixels[0],
            **with_cache(model, cache_of(out)),
        )
    with torch.no_grad():
        whole = torch.cat([one.rows[0], two.rows[0]])
        hidden, _ = oracle.Llava(model).forward(whole, two.pixels[0], decider(methods, run)())
        assert_equal(found.logits[0, -4:], model.lm_head(hidden[-4:]))


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_a_copied_cache_goes_on_by_itself(cut):
    """Prefill once, ask twice."""
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    questions = [models.prompt("4", seed=seed)[None] for seed in (11, 12)]
    length = len(batch.rows[0])
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        cache = cache_of(model(**batch.inputs(), use_cache=True))
        found = []
        for question in questions:
            out = model(
                input_ids=question,
                attention_mask=torch.ones(1, length + 4, dtype=torch.int64),
                **with_cache(model, copy.deepcopy(cache)),
            )
            found.append(out.logits)
    reference = oracle.Llava(model)
    with torch.no_grad():
        for question, logits in zip(questions, found):
            plan = oracle.Plan()
            reference.forward(batch.rows[0], batch.pixels[0], decider(methods, run)(), 0, plan)
            whole = torch.cat([batch.rows[0], question[0]])
            hidden, _ = reference.forward(whole, batch.pixels[0], decider(methods, run)(), 0, plan)
            assert_equal(logits[0], model.lm_head(hidden[-4:]))


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered", "everything"])
def test_a_cropped_cache_goes_on_where_it_was_cropped(cut):
    model, batch, methods = llava(), Batch.of("^3I5"), CUTS[cut]
    length = len(batch.rows[0])
    with torch.no_grad(), vlmtok.compress(model, methods):
        out = model(**batch.inputs(), use_cache=True)
        cache = cache_of(out)
        more = models.prompt("6", seed=4)[None]
        mask = torch.ones(1, length + 6, dtype=torch.int64)
        wanted = model(input_ids=more, attention_mask=mask, **with_cache(model, copy.deepcopy(cache))).logits
        wrong = models.prompt("6", seed=5)[None]
        first = torch.cat([more[:, :2], wrong[:, :4]], 1)
        model(input_ids=first, attention_mask=mask, **with_cache(model, cache))
        cache.crop(-4)
        found = model(input_ids=more[:, 2:], attention_mask=mask, **with_cache(model, cache)).logits
    assert_equal(found[0], wanted[0, 2:])


@pytest.mark.parametrize("cut", ["boundary renumbered", "decoder renumbered"])
def test_a_cache_cropped_into_what_was_cut_is_refused(cut):
    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, CUTS[cut]):
        cache = cache_of(model(**batch.inputs(), use_cache=True))
        cache.crop(-12)
        with pytest.raises((CacheError, PassError)):
            model(input_ids=models.prompt("3")[None], **with_cache(model, cache))


# ---------------------------------------------------------------------- caches that do not fit
def test_caches_of_others_are_refused():
    model, batch = llava(), Batch.of("^3I5")
    more = {"input_ids": models.prompt("3")[None]}
    with torch.no_grad():
        with vlmtok.compress(model, CUTS["boundary renumbered"]):
            cache = cache_of(model(**batch.inputs(), use_cache=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its hooks have nothing to do
            with (
                vlmtok.compress(model, CUTS["boundary kept"]),
                pytest.raises(CacheError, match="another compression"),
            ):
                model(**more, **with_cache(model, cache))
        with vlmtok.compress(model, CUTS["boundary renumbered"]) as run:
            cache = cache_of(model(**batch.inputs(), use_cache=True))
            with run.paused():
                model(**more, **with_cache(model, cache))
            with pytest.raises(CacheError, match="paused"):
                model(**more, **with_cache(model, cache))
            cache = cache_of(model(**batch.inputs(), use_cache=True))
            cache.batch_repeat_interleave(2)
            with pytest.raises(CacheError, match=r"1 rows.*2"):
                model(input_ids=models.prompt("3").expand(2, -1), **with_cache(model, cache))
            two = Batch.of("^3I5", "^3I5", seed=2)
            cache = cache_of(model(**two.inputs(), use_cache=True))
            cache.batch_select_indices(torch.tensor([1]))
            with pytest.raises(CacheError, match=r"2 rows.*1"):
                model(**more, **with_cache(model, cache))


def test_a_cache_that_was_reset_starts_anew():
    from transformers import DynamicCache

    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, BOTH):
        wanted = model(**batch.inputs(), use_cache=True).logits
        cache = DynamicCache(config=model.config.text_config)
        for _ in range(2):
            assert_same(model(**batch.inputs(), **with_cache(model, cache)).logits, wanted)
            cache.reset()


def test_static_caches_and_dense_masks_are_refused():
    from transformers import StaticCache

    model, batch = llava(), Batch.of("^3I5")
    length = len(batch.rows[0])
    bare = generated(model, batch)[1]
    with vlmtok.compress(model, CUTS["boundary renumbered"]):
        with pytest.raises(CacheError, match=r"(?i)static|4-D|2-D"):
            model.generate(**batch.inputs(), max_new_tokens=2, cache_implementation="static")
        static = StaticCache(config=model.config.text_config, max_cache_len=64)
        with torch.no_grad(), pytest.raises(CacheError, match="StaticCache"):
            model(**batch.inputs(), **with_cache(model, static))
        dense = torch.zeros(1, 1, length, length)
        given = {**batch.inputs(), "attention_mask": dense}
        with torch.no_grad(), pytest.raises(CacheError, match="4-D"):
            model(**given)
        good = generated(model, batch)[1]
    assert_differs(good, bare)
    assert_same(generated(model, batch)[1], bare)


def test_what_cannot_fit_is_said():
    model, batch = llava(), Batch.of("^3I5")
    with vlmtok.compress(model, "pitome:ratio=0.8"), pytest.raises(PassError, match="feature layer"), torch.no_grad():
        model(**batch.inputs(), vision_feature_layer=-3)
    with pytest.raises(SiteError, match=r"stage 'text', which .* does not offer"):
        vlmtok.compress(model, Unknown())
    with pytest.raises(MissingSignal, match="has not run"):
        vlmtok.compress(model, Early())
    assert not hooks(model)


class Unknown(vlmtok.Random):
    def sites(self, layout):
        return [Site("text", 0)]


class Early(vlmtok.Random):
    def sites(self, layout):
        return [Site("decoder", 2, "end", ("text_attention@decoder:4",))]


def test_an_exception_while_pictures_are_encoded_leaves_nothing_behind():
    """The pictures of a call that failed must not be taken for those of the next one."""
    model, batch = llava(), Batch.of("^3I5")
    other = Batch.of("^2I1I4", seed=3)
    with torch.no_grad(), vlmtok.compress(model, CUTS["everything"]):
        good = model(**other.inputs()).logits
        text = model(**Batch.of("6").inputs()).logits

        def boom(*_):
            raise RuntimeError("made to fail")

        for victim in (model.model.multi_modal_projector, model.model.language_model.layers[3]):
            handle = victim.register_forward_hook(boom)
            with pytest.raises(RuntimeError, match="made to fail"):
                model(**batch.inputs())
            handle.remove()
            embeds = model.get_input_embeddings()(Batch.of("6").rows[0][None])
            direct = model.model.language_model(inputs_embeds=embeds).last_hidden_state
            assert_same(model.lm_head(direct), text, "the language model called by itself")
            assert_same(model(**other.inputs()).logits, good)
        # Too few placeholders: the host refuses, and goes on.
        wrong = {**batch.inputs(), "input_ids": batch.rows[0][None, :-10]}
        wrong["attention_mask"] = torch.ones_like(wrong["input_ids"])
        with pytest.raises((ValueError, RuntimeError, CacheError)):
            model(**wrong)
        assert_same(model(**other.inputs()).logits, good)


# ---------------------------------------------------------------------- views in a language model
def test_views_show_the_rows_without_padding():
    """columns, entered, text and sizes of every view, row by row against the oracle's."""
    from support.checks import watched

    model, batch = llava(), Batch.of("^3I5", "2I2", "^2I1I4", "6")
    methods = vlmtok.parse_methods("pitome:ratio=0.8+sparsevlm:tokens=192:layers=(2;4):budgets=(5;3)")
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(model, methods) as run:
        model(**batch.inputs())
    found = {}
    for s in seen:
        if s.view.site.stage == "vision":
            continue
        for g in range(s.view.tokens.shape[0]):
            found.setdefault(str(s.view.site), []).append((s, g))
    expected = {}
    with torch.no_grad():
        for row in range(len(batch)):
            player = decider(methods, run)()
            oracle.Llava(model).forward(batch.rows[row], batch.pixels[row], player, row)
            for note in player.notes:
                if note.view.site.stage != "vision":
                    expected.setdefault(str(note.view.site), []).append(note.view)
    assert set(found) == set(expected)
    for site, views in expected.items():
        rest = list(found[site])
        assert len(rest) == len(views)
        for view in views:
            match = [
                (s, g)
                for s, g in rest
                if s.view.tokens.shape[1] == view.tokens.shape[1] and gap(s.view.tokens[g], view.tokens[0]) < 1e-5
            ]
            assert len(match) == 1, f"no view of {site} holds these tokens"
            s, g = match[0]
            rest.remove((s, g))
            assert s.view.entered == view.entered
            assert s.view.depth == view.depth
            assert s.view.columns[g].tolist() == view.columns[0].tolist()
            sizes = torch.ones(view.tokens.shape[1]) if view.size is None else view.size[0]
            mine = torch.ones(view.tokens.shape[1]) if s.view.size is None else s.view.size[g]
            assert_equal(mine, sizes, 0)
            for name, value in s.signals.items():
                other = view.maybe(name)
                assert (value is None) == (other is None), name
                if value is not None:
                    assert_equal(value[g], other[0], what=name)


def test_users_signals_reach_every_stage():
    model, batch = llava(), Batch.of("^3I5")

    class Mine(vlmtok.Random):
        def sites(self, layout):
            return [Site("projected", needs=("mine",)), Site("decoder", 2, "start", ("mine",))]

        def reduce(self, view):
            score = view.signal("mine")
            best = score.argsort(dim=1, stable=True)[:, : view.tokens.shape[1] // 2]
            return Reduction(best.sort(dim=1).values)

    caught = []

    def mine(view):
        assert isinstance(view, TokenView)
        caught.append(view.site.stage)
        return -view.columns.float()

    with torch.no_grad(), vlmtok.compress(model, Mine(), signals={"mine": mine}, trace=True) as run:
        model(**batch.inputs())
        owner = run.trace()[0].owner
    assert caught == ["projected", "decoder"]
    assert (owner >= 0).tolist() == [False] * 12 + [True] * 4


def test_traces_equal_the_oracle():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    methods = vlmtok.parse_methods("pitome:ratio=0.8+random:keep=0.6+random:keep=0.5:stage=decoder:layer=3")
    with torch.no_grad(), vlmtok.compress(model, methods, trace=True) as run:
        model(**batch.inputs())
        trace = run.trace()
    assert len(trace) == 3
    at = 0
    with torch.no_grad():
        for row in range(2):
            for index in range(len(batch.pixels[row])):
                player = decider(methods, run)()
                _, kept = oracle.Llava(model).forward(batch.rows[row], batch.pixels[row], player, row)
                tower = oracle.run_tower(
                    oracle.Llava(model).vision, batch.pixels[row][index : index + 1], decider(methods[:1], run)()
                )
                left = kept.rank[kept.picture == index].tolist()
                wanted = [slot in left for slot in tower.source.tolist()]
                assert (trace[at].owner >= 0).tolist() == wanted
                assert trace[at].kept == len(left)
                groups = {}
                for patch, slot in enumerate(tower.source.tolist()):
                    groups.setdefault(slot, set()).add(int(trace[at].owner[patch]))
                assert all(len(owners) == 1 for owners in groups.values())
                at += 1


def test_placeholders_that_were_generated_are_text():
    """Only placeholders that come with features are pictures."""
    model, batch = llava(), Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, CUTS["boundary renumbered"]):
        out = model(**batch.inputs(), use_cache=True)
        ids = torch.tensor([[5, models.IMAGE, 7]])
        mask = torch.ones(1, len(batch.rows[0]) + 3, dtype=torch.int64)
        found = model(input_ids=ids, attention_mask=mask, **with_cache(model, cache_of(out))).logits
    assert found.shape[1] == 3
    assert bool(found.isfinite().all())


def test_half_precision_generates():
    model = models.llava(depth=6, dtype=torch.bfloat16)
    batch = Batch.of("^3I5", "^2I1I4")
    given = batch.inputs()
    given["pixel_values"] = given["pixel_values"].to(torch.bfloat16)
    with vlmtok.compress(model, "pitome:ratio=0.8+todre:keep=0.5:tau=0.9:check_layer=3+fastv:K=2:keep=0.5"):
        assert model.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, given["input_ids"].shape[1] + 3)


def test_features_are_padded_for_the_host_and_zeros_never_reach_the_language_model():
    """get_image_features keeps the number of placeholders; what is empty leaves at the boundary."""
    model = llava()
    x = models.pictures(2, size=(32, 32))
    with torch.no_grad(), vlmtok.compress(model, "pitome:ratio=0.6"):
        features = torch.stack(model.get_image_features(x).pooler_output)
        assert features.shape[1] == PLACEHOLDERS
        empty = (features == 0).all(-1)
        assert bool(empty.any())
        seen = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        model(**Batch.of("^3I5").inputs())
        handle.remove()
    assert seen
    assert not bool((seen[0] == 0).all(-1).any())


def test_the_contract_subjects_are_what_they_say():
    """The batch of test_contract.py has padding, two pictures, one, and none."""
    batch = Subject("HF LLaVA").batch
    assert sorted(0 if p is None else len(p) for p in batch.pixels) == [0, 1, 1, 2]
    assert len({len(row) for row in batch.rows}) == 4
