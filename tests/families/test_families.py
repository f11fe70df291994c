"""Every family with cuts at the language model's input, between its layers, and both: equal to the oracle.

The method keeps the tokens of largest norm; rows show different pictures, are padded on the left, and differ in length.
"""

import dataclasses

import pytest
import torch
from support.hosts_of import cache_of
from support.sweep import some

import vlmtok
from vlmtok.errors import SiteError, VlmtokError, VlmtokWarning

from .build import FAMILIES, gemma4, llama4, shared
from .harness import BY_SAMPLE, GAP, LAYER, MERGED, MODES, PAIRS, RENUMBERED, Expected, batch, expected, generate
from .methods import Look, Top, compressed
from .oracle import Cut, oracle

CACHED = (True, False)
PARTS = (Cut(0.3, scope="part"),)
COUNTED = [name for name, family in FAMILIES.items() if family.positions == "1d"]
TURNED = [name for name, family in FAMILIES.items() if family.positions == "mrope"]
WITH_CLIPS = [name for name, family in FAMILIES.items() if family.clips]


@pytest.mark.parametrize(
    ("name", "attention", "mode", "cached"),
    [(*pair, mode, cached) for pair, mode, cached in some(PAIRS, [m for m in MODES if m != "bare"], CACHED, every=2)],
)
def test_cuts_equal_the_oracle(name, attention, mode, cached):
    wanted, model = expected(name, MODES[mode]), shared(name, attention)
    with compressed(model, MODES[mode]):
        found = generate(model, batch(name).inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize(("name", "mode", "cached"), some([*FAMILIES], [*MERGED], CACHED, every=2))
def test_merges_equal_the_oracle(name, mode, cached):
    """Values are means by size; all else that a token has is that of the one it joins."""
    wanted, model = expected(name, MERGED[mode]), shared(name, FAMILIES[name].attentions[0])
    with compressed(model, MERGED[mode]):
        found = generate(model, batch(name).inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma4"])
def test_a_cut_at_other_layers(name, layer):
    """In front of windows, chunks and recurrent layers, and before deepstack is through."""
    cuts = (Cut(0.5), Cut(0.25, layer))
    wanted, model = expected(name, cuts), shared(name, FAMILIES[name].attentions[0])
    with compressed(model, cuts):
        found = generate(model, batch(name).inputs())
    wanted.check(*found)


@pytest.mark.parametrize("bidirectional", ["vision", None])
def test_layers_that_share_keys_end_the_cuts(bidirectional):
    """Gemma 4 keeps the keys of layers 2 and 3 for the last two: behind layer 2 they would be of two lengths."""
    family = dataclasses.replace(FAMILIES["gemma4"], make=lambda: gemma4(bidirectional))
    model, rows, cuts = family.build(), batch("gemma4"), (Cut(0.5), Cut(0.5, 1), Cut(0.5, LAYER))
    asked = oracle("gemma4", model)
    wanted = Expected(*(torch.stack(parts) for parts in zip(*(asked.generate(p, cuts) for p in rows.prompts))))
    assert asked.gap > GAP
    with compressed(model, cuts):
        found = generate(model, rows.inputs())
    wanted.check(*found)
    for layer in (3, 4, 5):
        with pytest.raises(VlmtokError, match="layer"):
            vlmtok.compress(model, Top(Cut(0.5, layer)))


@pytest.mark.runs("llama4")
def test_temperature_by_the_tokens_left():
    """Llama 4 warms up attention by a token's place among those that are left; hosts count padding: rows are alone."""
    model, cuts = dataclasses.replace(FAMILIES["llama4"], make=lambda: llama4(4)).build(), MODES["both+half"]
    asked = oracle("llama4", model)
    plain = expected("llama4", cuts).logits
    for row, prompt in enumerate(batch("llama4").prompts):
        tokens, logits = asked.generate(prompt, cuts)
        assert (logits[0] - plain[row, 0]).abs().max() > 1e-2
        with compressed(model, cuts):
            found = generate(model, batch("llama4").alone(row).inputs(mask=False))
        Expected(tokens[None], logits[None]).check(*found)


@pytest.mark.parametrize(("name", "mode", "cached"), some([*COUNTED], [*RENUMBERED], CACHED, every=2))
def test_positions_can_become_contiguous(name, mode, cached):
    cuts = RENUMBERED[mode]
    wanted, model = expected(name, cuts), shared(name, FAMILIES[name].attentions[0])
    with compressed(model, cuts):
        found = generate(model, batch(name).inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("name", TURNED)
def test_positions_of_a_grid_are_kept(name, layer):
    """Where a position is a place in a picture there is nothing to renumber; that is said before a hook is placed."""
    model = shared(name)
    with pytest.raises(SiteError, match="Top: positions='renumber' at .* places in a picture"):
        vlmtok.compress(model, Top(Cut(0.5, layer, positions="renumber")))
    assert not any(module._forward_pre_hooks for module in model.modules())


RENUMBERING = {
    "pyramiddrop": "pyramiddrop:layers=(1;3):ratios=(0.6;0.3)",
    "transprune": "transprune:layers=(2;3):ratios=(0.6;0.3)",
    "sparsevlm": "sparsevlm:layers=(1;2):budgets=(0.5;0.3)",
}
"""Methods that renumber as released."""


HYBRID = ("qwen3_5", "qwen3_5_moe")
"""Families of which only every fourth layer gives attention rows: the last one here."""


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in TURNED for method in RENUMBERING if name not in HYBRID or method == "pyramiddrop"],
)
def test_methods_that_renumber_keep_positions_of_a_grid_and_say_so(name, method):
    model, inputs = shared(name), batch(name).inputs()
    spec = "pyramiddrop:layers=(3;):ratios=(0.5;)" if name in HYBRID else RENUMBERING[method]
    found = []
    for asked in (spec, f"{spec}:positions=keep"):
        with vlmtok.compress(model, asked) as run:
            found.append(generate(model, inputs, 3))
            notes = [note for note in run.report().notes if "keeps position ids" in note]
        assert len(notes) == (asked == spec), notes
    assert all(torch.equal(one, two) for one, two in zip(*found))
    assert not torch.equal(found[0][1], generate(model, inputs, 3)[1])
    with pytest.raises(SiteError, match="places in a picture"):
        vlmtok.compress(model, f"{spec}:positions=renumber")


@pytest.mark.parametrize("spec", RENUMBERING.values(), ids=RENUMBERING)
def test_methods_that_renumber_do_so_where_positions_are_numbers(spec):
    name = COUNTED[0]
    with vlmtok.compress(shared(name), spec) as run:
        default = generate(shared(name), batch(name).inputs(), 3)[1]
        assert not any("keeps position ids" in note for note in run.report().notes)
    for positions, same in (("renumber", True), ("keep", False)):
        with vlmtok.compress(shared(name), f"{spec}:positions={positions}"):
            assert torch.equal(generate(shared(name), batch(name).inputs(), 3)[1], default) == same


@pytest.mark.parametrize(
    ("name", "mode", "cached"), some([*FAMILIES], [mode for mode in BY_SAMPLE if mode != "bare"], CACHED, every=2)
)
def test_several_pictures_and_a_text_row(name, mode, cached):
    """Rows with two pictures, some of them cut into crops, one picture, and none."""
    cuts = BY_SAMPLE[mode]
    wanted, model = expected(name, cuts, "several"), shared(name, FAMILIES[name].attentions[0])
    with compressed(model, cuts):
        found = generate(model, batch(name, "several").inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize(
    ("name", "mode", "cached"), some([*WITH_CLIPS], [mode for mode in BY_SAMPLE if mode != "bare"], CACHED, every=2)
)
def test_clips(name, mode, cached):
    cuts = BY_SAMPLE[mode]
    wanted, model = expected(name, cuts, "clips"), shared(name)
    with compressed(model, cuts):
        found = generate(model, batch(name, "clips").inputs(), use_cache=cached)
    wanted.check(*found)


@pytest.mark.parametrize(
    ("name", "attention", "mode"),
    [(*pair, mode) for pair, mode in some(PAIRS, ["boundary", "half", "both+half"], every=2)],
)
def test_a_row_alone(name, attention, mode):
    """Without padding there is no mask; hosts take other paths then."""
    cuts, model = MODES[mode], shared(name, attention)
    wanted = expected(name, cuts)
    for row in range(2):
        with compressed(model, cuts):
            tokens, logits = generate(model, batch(name).alone(row).inputs(mask=False))
        Expected(wanted.tokens[row : row + 1], wanted.logits[row : row + 1]).check(tokens, logits)


@pytest.mark.parametrize(
    ("name", "mode", "cached"), some([*FAMILIES], ["boundary", "half", "both"], [None, True, False], every=3)
)
def test_a_plain_forward(name, mode, cached):
    """Pixels arrive at the inner model itself; outputs have the length of the input."""
    cuts, model = MODES[mode], shared(name, FAMILIES[name].attentions[0])
    wanted, inputs = expected(name, cuts).logits[:, 0], batch(name).inputs()
    with compressed(model, cuts), torch.no_grad():
        logits = model(**inputs, use_cache=cached).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(logits[:, -1], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["boundary", "both"])
@pytest.mark.parametrize(
    ("name", "which"), [(name, "several") for name in FAMILIES] + [(name, "clips") for name in WITH_CLIPS]
)
def test_a_plain_forward_cuts_what_generate_cuts(name, which, mode):
    """Nothing is encoded before; pictures and clips are told apart all the same."""
    cuts, model = MODES[mode], shared(name, FAMILIES[name].attentions[0])
    inputs = batch(name, which).inputs()
    with compressed(model, cuts), torch.no_grad():
        wanted = generate(model, inputs, 1)[1][:, 0]
        logits = model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_forward_tells_crops_apart(name):
    """As `generate` does, which sees what the encoder made of each."""
    model, inputs, cuts = shared(name, FAMILIES[name].attentions[0]), batch(name, "several").inputs(), PARTS
    with compressed(model, cuts), torch.no_grad():
        wanted = generate(model, inputs, 1)[1][:, 0]
        logits = model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_changes_nothing(name, layer):
    """Bit for bit, whether the method says so with None or with all the tokens."""
    model, inputs = shared(name, FAMILIES[name].attentions[0]), batch(name).inputs()
    bare = generate(model, inputs, 2)
    for method in (Look(layer=layer), Top(Cut(1.0, layer))):
        with vlmtok.compress(model, method):
            found = generate(model, inputs, 2)
        assert torch.equal(found[0], bare[0]) and torch.equal(found[1], bare[1])
    again = generate(model, inputs, 2)
    assert torch.equal(again[1], bare[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_changes_nothing(name):
    family = FAMILIES[name]
    model, inputs = shared(name, family.attentions[0]), family.batch("^7", "4").inputs()
    bare = generate(model, inputs, 3)
    with pytest.warns(VlmtokWarning, match="no prompt had a picture"), compressed(model, MODES["both+half"]):
        found = generate(model, inputs, 3)
    assert torch.equal(found[0], bare[0]) and torch.equal(found[1], bare[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_caches_are_shorter(name):
    """Every layer holds what is left of the rows: the cut is real."""
    cuts, model, rows = MODES["both"], shared(name, FAMILIES[name].attentions[0]), batch(name)
    with compressed(model, cuts):
        out = model.generate(**rows.inputs(), max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    after = [_longest(rows.prompts, cuts[:1]), _longest(rows.prompts, cuts)]
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    for layer, held in enumerate(cache_of(out).layers):
        kind = "full_attention" if kinds is None else kinds[layer]
        if kind == "full_attention" and hasattr(held, "get_seq_length"):  # others share keys, or see a window
            assert held.get_seq_length() == after[layer >= 2]


def _longest(prompts, cuts):
    """Tokens of the longest row after cuts at the same unit."""
    lengths = []
    for prompt in prompts:
        left = [len(picture.columns) for picture in prompt.pictures]
        for cut in cuts:
            left = [int(cut.keep * count + 0.5) for count in left]
        lengths.append(int((prompt.owner < 0).sum()) + sum(left))
    return max(lengths)
