"""After the first prefill: loops written by hand, beams, second turns, and placeholder ids that were written.

Wherever the host can do it alone, ``bare`` is the control.
"""

import pytest
import torch
import transformers as tf
from support.hosts_of import cache_of, with_cache
from support.sweep import some

from vlmtok.errors import CacheError

from .build import FAMILIES, shared
from .harness import MODES, STEPS, ask, batch, expected, generate
from .methods import compressed
from .oracle import oracle
from .prompts import IMAGE, padded

COUNTED = [name for name, family in FAMILIES.items() if family.positions == "1d"]
TURNED = [name for name, family in FAMILIES.items() if family.positions == "mrope"]
PREFIXED = [name for name, family in FAMILIES.items() if family.prefix]
"""PaliGemma has one prefix: a later turn cannot bring a picture."""
LATER = [name for name in FAMILIES if name not in PREFIXED]
LOOPS = ("bare", "boundary", "both")


def model_of(name):
    return shared(name, FAMILIES[name].attentions[0])


def positions_of(name, prompts, more):
    """Position ids of a left-padded batch and `more` columns behind it, `[B, S]` or `[3, B, S]`."""
    asked = oracle(name, shared(name, "eager"))
    rows = [asked.positions(prompt, more) for prompt in prompts]
    table = torch.stack([padded([row[axis] for row in rows]) for axis in range(len(rows[0]))])
    return table[0] if len(table) == 1 else table


def step_through(model, inputs, tokens, positions=None, cache=None):
    """Prefill, then one column of `tokens` at a time: logits `[B, steps, V]` and the cache."""
    length, mask = inputs["input_ids"].shape[1], inputs.get("attention_mask")
    at = {} if positions is None else {"position_ids": positions[..., :length]}
    with torch.no_grad():
        out = model(**inputs, **at, use_cache=True, **({} if cache is None else with_cache(model, cache)))
        found = [out.logits[:, -1]]
        for step in range(tokens.shape[1] - 1):
            given = {"input_ids": tokens[:, step : step + 1], **with_cache(model, cache_of(out))}
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                given["attention_mask"] = mask
            if positions is not None:
                given["position_ids"] = positions[..., length + step : length + step + 1]
            out = model(**given, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1), cache_of(out)


# ---------------------------------------------------------------------- loops
@pytest.mark.parametrize(("name", "mode", "own"), some([*FAMILIES], [*LOOPS], [False, True], every=2))
def test_a_loop_with_positions(name, mode, own):
    wanted, model = expected(name, MODES[mode]), model_of(name)
    positions = positions_of(name, batch(name).prompts, STEPS)
    cache = tf.DynamicCache(config=model.config.get_text_config()) if own else None
    with compressed(model, MODES[mode]):
        logits, _ = step_through(model, batch(name).inputs(), wanted.tokens, positions, cache)
    wanted.check(wanted.tokens, logits)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for name in FAMILIES for mode in LOOPS if mode != "bare" or name in COUNTED],
)
def test_a_loop_without_positions(name, mode):
    """The host counts from the length of the cache, which a cut made shorter.

    Alone, families with positions in three dimensions cannot do this with a mask at all.
    """
    wanted, model = expected(name, MODES[mode]), model_of(name)
    with compressed(model, MODES[mode]):
        logits, _ = step_through(model, batch(name).inputs(), wanted.tokens)
    wanted.check(wanted.tokens, logits)


@pytest.mark.parametrize(("name", "mode"), some([*FAMILIES], [*LOOPS], every=2))
def test_a_loop_without_positions_or_mask(name, mode):
    model = model_of(name)
    for row, prompt in enumerate(batch(name).prompts):
        wanted = ask(name, (prompt,), MODES[mode])
        with compressed(model, MODES[mode]):
            logits, _ = step_through(model, batch(name).alone(row).inputs(mask=False), wanted.tokens)
        wanted.check(wanted.tokens, logits)


@pytest.mark.parametrize("mode", ["bare", "boundary", "both"])
def test_a_loop_behind_a_clip_goes_on_from_the_largest_position(mode):
    """Frames lie seconds apart, so time can be ahead of the text behind a clip; then loops and generate differ."""
    model, clip = shared("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].batch("3V2")
    asked = oracle("qwen2_5_vl", shared("qwen2_5_vl", "eager"))
    asked.follows = "most"
    tokens, wanted = asked.generate(clip.prompts[0], MODES[mode])
    generated = ask("qwen2_5_vl", clip.prompts, MODES[mode], forced=tokens[None]).logits[0]
    assert (wanted - generated).abs().max() > 1e-3
    with compressed(model, MODES[mode]):
        logits, _ = step_through(model, clip.inputs(mask=False), tokens[None])
    torch.testing.assert_close(logits[0], wanted, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- ids of placeholders
@pytest.mark.parametrize(("name", "mode"), some([*FAMILIES], [*LOOPS], every=2))
def test_a_placeholder_that_was_written_is_text(name, mode):
    """Nothing brings features with it, so it is a token like any other, cut or not."""
    tokens = expected(name, MODES[mode]).tokens.clone()
    tokens[:, 1] = IMAGE
    wanted, model = ask(name, batch(name).prompts, MODES[mode], forced=tokens), model_of(name)
    positions = positions_of(name, batch(name).prompts, STEPS)
    with compressed(model, MODES[mode]):
        logits, _ = step_through(model, batch(name).inputs(), tokens, positions)
    wanted.check(tokens, logits)


# ---------------------------------------------------------------------- beams
def beams(model, inputs, **options):
    given = {
        "num_beams": 3,
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    out = model.generate(**inputs, **given, **options)
    return out.sequences[:, -4:], out.sequences_scores


@pytest.mark.parametrize("mode", ["bare", "boundary", "both+half"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.beams])
def test_beams(name, mode):
    """With a cache, without one, and row by row: the same."""
    model, rows = model_of(name), batch(name)
    with compressed(model, MODES[mode]):
        tokens, scores = beams(model, rows.inputs())
        found = [beams(model, rows.inputs(), use_cache=False)]
        alone = [beams(model, rows.alone(row).inputs(mask=False)) for row in range(len(rows))]
    found.append(tuple(torch.cat(parts) for parts in zip(*alone)))
    for other, score in found:
        torch.testing.assert_close(score, scores, atol=1e-4, rtol=0)
        assert torch.equal(other, tokens)


# ---------------------------------------------------------------------- second turns
@pytest.mark.parametrize(("name", "mode"), some([*FAMILIES], ["bare", "boundary", "both+half"], every=2))
def test_a_second_turn_of_text(name, mode):
    """Several new tokens at once on a filled cache."""
    first = expected(name, MODES[mode])
    asked = torch.stack([FAMILIES[name].prompt("5", 7 + row).ids for row in range(2)])
    said = torch.cat([first.tokens[:, :4], asked], 1)
    forced = torch.cat([said, said[:, :1]], 1)  # the last one is not read
    wanted, model = ask(name, batch(name).prompts, MODES[mode], forced.shape[1], forced), model_of(name)
    positions = positions_of(name, batch(name).prompts, said.shape[1])
    inputs = batch(name).inputs()
    length = inputs["input_ids"].shape[1]
    with compressed(model, MODES[mode]), torch.no_grad():
        _, cache = step_through(model, inputs, said[:, :4], positions)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1)
        out = model(
            input_ids=said[:, 3:],
            attention_mask=mask,
            position_ids=positions[..., length + 3 :],
            **with_cache(model, cache),
            use_cache=True,
        )
    torch.testing.assert_close(out.logits, wanted.logits[:, 4:], atol=1e-4, rtol=0)


class Turns:
    """Two turns of a batch with a picture in each, rows of the second of equal length.

    Attributes:
        first: the batch of the first turn.
        written: what was said to it, int64 `[B, 4]`.
        new: prompts of the second turn, the last written token in front.
        whole: both turns as one prompt a row.
    """

    def __init__(self, name, cuts):
        family, self.first = FAMILIES[name], batch(name)
        self.name = name
        self.written = expected(name, cuts).tokens[:, :4]
        self.new = tuple(family.prompt("2I3", 50 + row) for row in range(2))
        self.whole = tuple(p.then(q, w) for p, q, w in zip(self.first.prompts, self.new, self.written))
        self.wanted = ask(name, self.whole, cuts)

    def second(self):
        """Arguments of the second turn: new ids, a mask of the full length, new pictures."""
        family = FAMILIES[self.name]
        new = family.collect(*self.new).inputs(mask=False)
        new["input_ids"] = torch.cat([self.written[:, -1:], new["input_ids"]], 1)
        full = family.collect(*self.whole).inputs()
        new["attention_mask"] = full["attention_mask"]
        if family.types is not None:
            new[family.types] = full[family.types]
        return new


@pytest.mark.parametrize(
    ("name", "mode"),
    some(LATER, ["bare", "boundary", "half", "both+half"], every=2),
)
def test_a_second_turn_with_a_picture(name, mode):
    """By hand, with positions."""
    turns, model = Turns(name, MODES[mode]), model_of(name)
    inputs, second = turns.first.inputs(), turns.second()
    start = inputs["input_ids"].shape[1] + 3
    positions = positions_of(name, turns.whole, STEPS)
    if FAMILIES[name].positions == "mrope":
        second.pop(FAMILIES[name].types)
    with compressed(model, MODES[mode]), torch.no_grad():
        _, cache = step_through(model, inputs, turns.written, positions_of(name, turns.first.prompts, 3))
        end = start + second["input_ids"].shape[1]
        out = model(**second, position_ids=positions[..., start:end], **with_cache(model, cache), use_cache=True)
        found, mask = [out.logits[:, -1]], second["attention_mask"]
        for step in range(STEPS - 1):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = model(
                input_ids=turns.wanted.tokens[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions[..., end + step : end + step + 1],
                **with_cache(model, cache_of(out)),
                use_cache=True,
            )
            found.append(out.logits[:, -1])
    turns.wanted.check(turns.wanted.tokens, torch.stack(found, 1))


@pytest.mark.parametrize(("name", "mode"), some([*FAMILIES], ["bare", "boundary", "both+half"], every=2))
def test_a_second_turn_of_text_by_generate(name, mode):
    """With the new ids only and a mask of the full length."""
    first, rows, model = expected(name, MODES[mode]), batch(name), model_of(name)
    asked = torch.stack([FAMILIES[name].prompt("5", 7 + row).ids for row in range(2)])
    said = torch.cat([first.tokens[:, :4], asked], 1)
    with compressed(model, MODES[mode]):
        out = model.generate(**rows.inputs(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        mask = torch.cat([rows.inputs()["attention_mask"], torch.ones_like(said)], 1)
        found = generate(
            model, {"input_ids": said[:, 3:], "attention_mask": mask}, 3, **with_cache(model, cache_of(out))
        )
    wanted = ask(name, rows.prompts, MODES[mode], said.shape[1] + 3, torch.cat([said, found[0]], 1))
    torch.testing.assert_close(found[1], wanted.logits[:, -3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "mode"),
    some(LATER, ["bare", "boundary", "half", "both+half"], every=2),
)
def test_a_second_turn_by_generate(name, mode):
    """With the new ids only and a mask of the full length; positions in three dimensions must come along."""
    turns, model = Turns(name, MODES[mode]), model_of(name)
    with compressed(model, MODES[mode]):
        out = model.generate(
            **turns.first.inputs(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
        assert torch.equal(out.sequences[:, -4:], turns.written)
        second = turns.second()
        if FAMILIES[name].positions == "mrope":
            counted = second["attention_mask"].cumsum(1) - 1
            second["position_ids"] = torch.cat([counted[None], positions_of(name, turns.whole, 0)])
        found = generate(model, second, **with_cache(model, cache_of(out)))
    turns.wanted.check(*found)


@pytest.mark.parametrize("mode", ["boundary", "both+half"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_turn_with_all_ids_is_refused(name, mode):
    """Hosts slice full ids by the length of the cache: with a cut one they would feed tokens twice."""
    model, rows = model_of(name), batch(name)
    with compressed(model, MODES[mode]):
        out = model.generate(**rows.inputs(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        mask = torch.cat([rows.inputs()["attention_mask"], out.sequences.new_ones(2, 4)], 1)
        with pytest.raises(CacheError, match="new ids"):
            model.generate(
                input_ids=out.sequences, attention_mask=mask, **with_cache(model, cache_of(out)), max_new_tokens=2
            )
