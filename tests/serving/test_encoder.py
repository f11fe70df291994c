"""`Encoder` and `Counter`: what an engine is given of a picture is what the whole model gives its language model."""

import re

import pytest
import torch
from support import serving
from support.methods import METHODS, on_caches
from support.serving import counter, encoder, given_whole, hooks, letters, model, show

import vlmtok
from vlmtok.core.spec import counted_form
from vlmtok.errors import PassError, UnsupportedModel, VlmtokError
from vlmtok.lab.tiny.families import TOWER_ONLY, shared
from vlmtok.serving import Encoder, Item, Left

SMALL = {
    "averagepool": "averagepool:output_size=2",
    "cdpruner": "cdpruner:keep=5",
    "crossget": "crossget:rv=2",
    "divprune": "divprune:keep=5",
    "pitome": "pitome:ratio=0.8",
    "prumerge": "prumerge:keep=4",
    "random": "random:keep=5",
    "scope": "scope:keep=4",
    "tome": "tome:r=2",
    "visionzip": "visionzip:keep=4:contextual=2",
    "two": "pitome:ratio=0.8+divprune:keep=3",
    "behind": "visionzip:keep=6+divprune:keep=3",
}
"""Specs that leave a few of the tokens that tiny pictures have, where the defaults leave too few or too many."""
SPECS = {name: SMALL.get(name) or str(counted_form(vlmtok.create_method(name))) for name in METHODS} | SMALL
WHY_NOT = (
    "paged key-value cache|does not offer|cannot give|does not give|marks among|cannot be divided|whole grid|"
    "in front of its projector|does not hand on|"
    "time of a clip|positions=renumber|is larger than the grid|how many tokens of a crop"
    "|depends on the picture|class token"
)
"""What is refused is refused for one of these reasons."""
ROWS = [(name, which) for name in serving.NAMES for which in ("bare", *SPECS)]


def served(name, spec, item):
    """The plan of a spec and what it leaves of a picture, or None where it is refused."""
    if spec is None:
        return None, counter(name).left(None, item)
    try:
        plan = counter(name).plan(spec)
        return plan, counter(name).left(plan, item)
    except VlmtokError as refusal:
        assert re.search(WHY_NOT, str(refusal)), refusal
        return None


def encode(name, plan, shown, left):
    """What is left of a picture."""
    text = shown.text if plan is not None and plan.reads_text else None
    (made,) = encoder(name).encode(plan, [shown.item], [left], text)
    return made


def same(made, left, shown, whole):
    """Asserts that an encoder gave what a whole model gave its language model."""
    count = int(left.stays.sum())
    columns = shown.first + left.rows
    assert whole.rows.shape[1] == len(shown.prompt.ids) - len(shown.item.ids) + count
    assert len(made.rows) == left.counts[1]
    assert torch.equal(made.rows, whole.rows[0, columns])
    if made.positions is not None:
        there = whole.positions[-3:, 0]
        # An item of its own begins at 0; in the prompt it begins behind the text.
        assert torch.equal(made.positions, there[:, columns] - shown.first)
    if made.stacked is not None:
        for level, added in enumerate(made.stacked):
            behind = whole.left[level][0, columns] + added
            assert torch.equal(behind, whole.entered[level + 1][0, columns])


@pytest.mark.parametrize(("name", "which"), ROWS)
def test_rows_are_those_of_a_compressed_model(name, which):
    spec = SPECS.get(which)
    for letter in letters(name):
        shown = show(name, letter)
        found = served(name, spec, shown.item)
        if found is not None:
            same(encode(name, found[0], shown, found[1]), found[1], shown, given_whole(name, spec, shown))


NOT_SERVED = {name for name in SPECS if on_caches(name)} | {
    *("fastv", "pyramiddrop", "sparsevlm", "transprune", "ima", "corematching", "recoverable", "learned")
}
SERVED = {
    "llava": {*SPECS} - NOT_SERVED,
    "qwen3_vl": {*SPECS} - NOT_SERVED,
    "llava_next": {*SPECS} - NOT_SERVED - {"averagepool"},
    "gemma3": {*SPECS} - NOT_SERVED,
}


@pytest.mark.parametrize("name", SERVED)
def test_which_specs_the_comparison_meets(name):
    """So that it is known to compare something."""
    shown = show(name, "I")
    assert {which for which, spec in SPECS.items() if served(name, spec, shown.item)} == SERVED[name]


DEEP = ("qwen3_vl", "qwen3_vl_moe")


@pytest.mark.parametrize("name", DEEP)
def test_features_for_first_layers_come_with_the_rows(name):
    shown = show(name, "I")
    plan, left = served(name, "divprune:keep=5", shown.item)
    made = encode(name, plan, shown, left)
    assert made.stacked.shape[1:] == made.rows.shape and len(made.stacked) > 1
    assert made.stacked.abs().amin(dim=(1, 2)).shape[0] == len(made.stacked) and bool(made.stacked.any())
    assert made.positions.shape == (3, 5)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
@pytest.mark.parametrize("spec", [None, "divprune:keep=5", "visionzip:keep=4", "pitome:ratio=0.8", "random:keep=3"])
def test_pictures_of_one_pass_are_what_each_is_alone(name, spec):
    several = [show(name, "I", seed).item for seed in (1, 2, 3)]
    plan, lefts = None, []
    for item in several:
        plan, left = served(name, spec, item)
        lefts.append(left)
    together = encoder(name).encode(plan, several, lefts)
    for item, left, made in zip(several, lefts, together, strict=True):
        (alone,) = encoder(name).encode(plan, [item], [left])
        torch.testing.assert_close(made.rows, alone.rows, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0].rows, together[1].rows)


def test_text_behind_a_picture_changes_what_stays():
    shown = show("llava", "I")
    plan, left = served("llava", "cdpruner:keep=4", shown.item)
    assert plan.reads_text
    (one,) = encoder("llava").encode(plan, [shown.item], [left], shown.text)
    kept = [encoder("llava").encode(plan, [shown.item], [left], torch.tensor([word] * 4))[0] for word in range(5, 25)]
    assert any(not torch.equal(one.rows, other.rows) for other in kept)
    (none,) = encoder("llava").encode(plan, [shown.item], [left], shown.text[:0])  # diversity alone counts
    assert none.rows.shape == one.rows.shape


# ---------------------------------------------------------------------- the model
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "llava_next"])
def test_a_model_is_left_as_it_was(name):
    """Asleep between calls the hooks do nothing; closed, there are none."""
    whole, shown = model(name), show(name, "I")
    encoder(name).close()
    with torch.no_grad():
        bare = whole(**shown.inputs).logits
    before, weights = hooks(whole), [one.clone() for one in whole.state_dict().values()]
    own = Encoder(whole)
    assert hooks(whole) == before
    plan, left = served(name, "visionzip:keep=4:contextual=2", shown.item)
    (first,) = own.encode(plan, [shown.item], [left])
    assert hooks(whole) > before
    with torch.no_grad():
        assert torch.equal(whole(**shown.inputs).logits, bare)
    other, rest = served(name, "divprune:keep=5", shown.item)
    own.encode(other, [shown.item], [rest])
    (again,) = own.encode(plan, [shown.item], [left])
    assert torch.equal(first.rows, again.rows)
    own.close()
    own.close()
    assert hooks(whole) == before
    assert all(map(torch.equal, weights, whole.state_dict().values()))
    with torch.no_grad():
        assert torch.equal(whole(**shown.inputs).logits, bare)
    (back,) = own.encode(plan, [shown.item], [left])
    assert torch.equal(first.rows, back.rows)
    own.close()


def test_dtypes_and_inner_models():
    whole = vlmtok.lab.tiny.families.FAMILIES["qwen3_vl"].build().to(torch.bfloat16)
    shown = show("qwen3_vl", "I")
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in shown.item.inputs.items()}
    item = Item(shown.item.ids, inputs, shown.item.types)
    plan, left = served("qwen3_vl", "divprune:keep=5", item)
    made = [Encoder(one).encode(plan, [item], [left])[0] for one in (whole, whole.model)]
    assert made[0].rows.dtype == made[0].stacked.dtype == torch.bfloat16
    assert torch.equal(made[0].rows, made[1].rows)


def test_models_whose_pictures_go_another_way_are_refused():
    for name in TOWER_ONLY:
        with pytest.raises(UnsupportedModel, match="gets no tokens of a picture"):
            Encoder(shared(name))


# ---------------------------------------------------------------------- wrong use
def wrong(name):
    """Ways to ask for what cannot be had, and the words of the refusals."""
    one, two = (show(name, "I", seed).item for seed in (1, 2))
    reads, divides = counter(name).plan("cdpruner:keep=5"), counter(name).plan("divprune:keep=5")
    five, all_ = counter(name).left(divides, one), counter(name).left(None, one)
    text = torch.tensor([5, 6])
    smaller = Item(one.ids, {key: value[..., :16] for key, value in one.inputs.items()}, one.types)
    return {
        "encoded one by one": (reads, [one, two], [five, five], text),
        "5\\] tokens of 1 pictures where 16 were said": (
            divides,
            [one],
            [all_],
            None,
        ),
        "a bare model: the language model is given .* where 5 were said": (None, [one], [five], None),
        "2 items come with what stays of 1": (divides, [one, two], [five], None),
        "items of one pass have the same inputs": (divides, [one, smaller], [five, five], None),
    }


@pytest.mark.parametrize("words", wrong("llava"))
def test_wrong_use_is_refused_and_the_encoder_goes_on(words):
    shown = show("llava", "I", 1)
    plan = counter("llava").plan("divprune:keep=5")
    left = counter("llava").left(plan, shown.item)
    before = encode("llava", plan, shown, left)
    chosen, items, lefts, text = wrong("llava")[words]
    with pytest.raises(PassError, match=words):
        encoder("llava").encode(chosen, items, lefts, text)
    assert torch.equal(encode("llava", plan, shown, left).rows, before.rows)
    assert encoder("llava").encode(plan, [], []) == []


def test_a_compression_of_the_whole_model_and_an_encoder():
    """One that was there before is refused; one that comes and goes between calls changes nothing."""
    shown, whole = show("llava", "I"), model("llava")
    plan, left = served("llava", "divprune:keep=5", shown.item)
    own = Encoder(whole)
    with vlmtok.compress(whole, "random:keep=4"), pytest.raises(PassError, match="compressed already"):
        own.encode(plan, [shown.item], [left])
    (first,) = own.encode(plan, [shown.item], [left])
    with vlmtok.compress(whole, "random:keep=4"), torch.no_grad():
        assert whole(**shown.inputs).logits.isfinite().all()
    (again,) = own.encode(plan, [shown.item], [left])
    assert torch.equal(first.rows, again.rows)
    own.close()


def test_pictures_with_positions_of_their_own_are_encoded_one_by_one():
    one, two = (show("qwen2_vl", "I", seed).item for seed in (1, 2))
    whole = counter("qwen2_vl").left(None, one)
    with pytest.raises(PassError, match="one by one"):
        encoder("qwen2_vl").encode(None, [one, two], [whole, whole])


def test_what_a_host_refuses_leaves_the_encoder_usable():
    """An error in the tower, in the middle of a pass."""
    shown = show("llava", "I")
    plan, left = served("llava", "visionzip:keep=4", shown.item)
    before = encode("llava", plan, shown, left)
    broken = Item(shown.item.ids, {"pixel_values": torch.zeros(1, 3, 32, 24)}, shown.item.types)
    with pytest.raises((ValueError, RuntimeError)):
        encoder("llava").encode(plan, [broken], [left])
    assert torch.equal(encode("llava", plan, shown, left).rows, before.rows)


def test_what_stays_is_told_by_places():
    stays, placeholders = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([0, 1, 1, 1]).bool()
    left = Left(stays, placeholders)
    assert left.rows.tolist() == [1, 2] and left.counts == (3, 2)
