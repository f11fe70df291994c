"""Ways to generate: sampling, beams, drafts, chunks, other options, and loops written by hand."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from support import models, oracle
from support.checks import assert_differs, assert_equal
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import BOTH, CUTS, ROWS, SPECIAL, STEPS, Top, decider, generated, llava
from support.models import Batch

import vlmtok
from vlmtok.errors import CacheError


# ---------------------------------------------------------------------- ways to generate
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
