"""Calls that people make of vision-language models: what passes a cut, what is padding, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.build import FAMILIES
from families.harness import MODES
from families.methods import compressed
from support import models
from torch import Tensor, nn
from vlmtok.adapters.base import child
from vlmtok.adapters.host_faults import fault_of
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok.errors import CacheError, PassError, UnsupportedModel

NAMES = [
    name
    for name, family in FAMILIES.items()
    if fault_of(name) is None and ROWS.get(name, ROWS["llava"]).boundary is None
]
CUT = MODES["both+half"]


def run(model: nn.Module, given: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**given, **more)


# ---------------------------------------------------------------------- what passes
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", ["labels", "shift_labels", "mm_token_type_ids", "token_type_ids"])
def test_what_does_not_concern_tokens_passes_a_cut(name: str, extra: str) -> None:
    """Where the bare model takes an argument and computes the same with it, the compressed one does."""
    family = FAMILIES[name]
    model, given = family.build(family.attentions[0]), family.batch(*family.rows).inputs()
    if extra in given or extra == family.types:
        return  # the family's own, which every test gives
    more = {
        extra: given["input_ids"].clone().clamp(max=900) if "labels" in extra else torch.zeros_like(given["input_ids"])
    }
    if extra == "shift_labels":
        more["labels"] = more[extra]
    try:
        bare = run(model, given, **more)
    except (TypeError, ValueError, RuntimeError):
        return  # the bare model does not take it
    with compressed(model, CUT):
        plain, found = run(model, given), run(model, given, **more)
    assert torch.equal(found.logits, plain.logits) and found.logits.shape == bare.logits.shape
    if bare.loss is not None:
        assert found.loss is not None and bool(found.loss.isfinite())


def test_a_loss_is_that_of_the_logits() -> None:
    model, given = models.llava(depth=4), models.Batch.of("^3I5").inputs()
    labels = given["input_ids"].masked_fill(given["input_ids"] == models.IMAGE, -100)
    with vlmtok.compress(model, "divprune:keep=0.5"):
        found = run(model, given, labels=labels)
    wanted = torch.nn.functional.cross_entropy(found.logits[0, :-1], labels[0, 1:])
    assert torch.allclose(found.loss, wanted, atol=1e-6)


# ---------------------------------------------------------------------- what a mask hides
def _hide(given: dict[str, Any], row: int, columns: slice) -> dict[str, Any]:
    mask = given["attention_mask"].clone()
    mask[row, columns] = 0
    return {**given, "attention_mask": mask}


@pytest.mark.parametrize("hidden", ["first half", "last half", "all", "behind it too"])
@pytest.mark.parametrize(
    "method", ["todre:keep=1.0:tau=none:pivot=farthest", "fastv:K=1:keep=1.0", "divprune:keep=1.0"]
)
def test_hidden_placeholders_are_padding(hidden: str, method: str) -> None:
    """A cut that keeps all that is seen leaves the bare answer, where the mask lets it be read."""
    model, batch = models.llava(depth=4), models.Batch.of("^3I5", "^2I3I4")
    given = batch.inputs()
    at = (given["input_ids"][1] == models.IMAGE).nonzero()[:, 0][: models.PLACEHOLDERS].tolist()
    half = len(at) // 2
    spans = {
        "first half": slice(at[0], at[half]),
        "last half": slice(at[half], at[-1] + 1),
        "all": slice(at[0], at[-1] + 1),
        "behind it too": slice(at[half], at[-1] + 2),
    }
    given = _hide(given, 1, spans[hidden])
    bare = run(model, given).logits
    seen = given["attention_mask"].bool()
    with vlmtok.compress(model, method):
        found = run(model, given).logits
    assert torch.allclose(found[seen], bare[seen], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_placeholders_on_every_family(name: str) -> None:
    """The first tokens of a picture are hidden: the model runs, or says why not; no other error reaches the user."""
    family = FAMILIES[name]
    model, batch = family.build(family.attentions[0]), family.batch(*family.rows)
    given = batch.inputs()
    where = (given["input_ids"][0] == batch.prompts[0].pictures[0].shot.placeholder).nonzero()[:, 0].tolist()
    given = _hide(given, 0, slice(where[0], where[2]))
    try:
        run(model, given)
    except RuntimeError:
        return  # M-RoPE hosts count positions of what is seen, and fail bare
    for method in ("divprune:keep=0.5", "fastv:K=1:keep=0.5", "tome:r=1"):
        try:
            with vlmtok.compress(model, method):
                found = run(model, given)
        except vlmtok.errors.VlmtokError as refusal:
            assert any(word in str(refusal) for word in ("hides", "tower", "vision", "signal"))
        else:
            assert found.logits.shape[1] == given["input_ids"].shape[1] and bool(found.logits.isfinite().any())


def test_hidden_placeholders_and_cuts_of_the_tower_are_refused() -> None:
    model, given = models.llava(depth=4), _hide(models.Batch.of("^3I5").inputs(), 0, slice(5, 8))
    with vlmtok.compress(model, "tome:r=2"), pytest.raises(CacheError, match="hides 3 of the 16"):
        run(model, given)


# ---------------------------------------------------------------------- packed rows
def _packed(patterns: tuple[str, ...]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Several prompts in one row, and each alone."""
    alone = [models.Batch.of(pattern, seed=seed).inputs(mask=False) for seed, pattern in enumerate(patterns)]
    joined = {name: torch.cat([one[name] for one in alone], 0 if "pixel" in name else 1) for name in alone[0]}
    places = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])[None]
    return {**joined, "position_ids": places}, alone


@pytest.mark.parametrize(
    "method",
    [
        "divprune:keep=0.5",
        "todre:keep=0.5:tau=none:positions=keep",
        "tome:r=2",
        "visionzip:keep=6",
        "fastv:K=1:keep=0.5",
    ],
)
def test_packed_prompts_are_refused_where_something_is_cut(method: str) -> None:
    model, (given, _) = models.llava(depth=4), _packed(("^3I5", "^2I4"))
    with vlmtok.compress(model, method), pytest.raises(UnsupportedModel, match="packed in one row"):
        run(model, given, use_cache=False)


def test_packed_prompts_run_where_nothing_is_cut() -> None:
    model, (given, alone) = models.llava(depth=4), _packed(("^3I5", "^2I4"))
    with vlmtok.compress(model, "divprune:keep=1.0"):
        found = run(model, given, use_cache=False).logits[0]
    wanted = torch.cat([run(model, one, use_cache=False).logits[0] for one in alone])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_positions_that_go_on_by_one_are_not_packed() -> None:
    model, given = models.llava(depth=4), models.Batch.of("^3I5").inputs(mask=False)
    places = torch.arange(given["input_ids"].shape[1])[None]
    with vlmtok.compress(model, "divprune:keep=0.5"):
        plain = run(model, given, use_cache=False).logits
        assert torch.equal(run(model, given, position_ids=places, use_cache=False).logits, plain)


# ---------------------------------------------------------------------- features
@pytest.mark.parametrize(
    "method",
    ["todre:keep=0.4:tau=none", "prumerge", "visionzip:keep=0.5", "scope:keep=0.4", "tome:r=2", "divprune:keep=0.4"],
)
def test_features_of_another_call_are_right_or_refused(method: str) -> None:
    model = models.llava(depth=4)
    one, other = (models.Batch.of("^3I5", seed=seed).inputs() for seed in (1, 2))

    def encode(given: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            return model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)

    def answer(given: dict[str, Tensor], features: Any) -> Tensor:
        text = {name: value for name, value in given.items() if name != "pixel_values"}
        return run(model, text, mm_encoder_outputs={"image": features}).logits

    bare = encode(one)
    with vlmtok.compress(model, method):
        wanted = run(model, one).logits
        assert torch.equal(answer(one, encode(one)), wanted), "encode, then ask"
        stale = [(encode(one), encode(other))[0], (bare, encode(other))[0]]
        for features in stale:
            if method.startswith("divprune"):
                assert torch.equal(answer(one, features), wanted), "nothing of the tower is on its way"
                continue
            with pytest.raises(CacheError, match="earlier call"):
                answer(one, features)


def test_features_that_a_host_scales_or_rounds_are_known_again() -> None:
    model, given = models.llava(depth=4), models.Batch.of("^3I5").inputs()
    with torch.no_grad(), vlmtok.compress(model, "visionzip:keep=0.5"):
        features = model.get_image_features(pixel_values=given.pop("pixel_values"), return_dict=True)
        wanted = run(model, given, mm_encoder_outputs={"image": features}).logits
        rounded = copy.copy(features)
        rounded.pooler_output = [part.bfloat16().float() for part in features.pooler_output]
        found = run(model, given, mm_encoder_outputs={"image": rounded}).logits
    assert torch.allclose(found, wanted, atol=0.5) and not torch.equal(found, wanted)


# ---------------------------------------------------------------------- parts of a model
@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "paligemma", "smolvlm", "aya_vision"])
def test_a_tower_inside_a_language_model_is_refused_with_the_cure(name: str) -> None:
    model = FAMILIES[name].build(FAMILIES[name].attentions[0])
    spec = ROWS[model.config.model_type]
    tower = child(child(model, spec.core), spec.tower)
    with pytest.raises(UnsupportedModel, match=f"part of a {type(model).__name__}.*compress the whole|no adapter"):
        vlmtok.compress(tower, "tome:r=1")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_tower_of_its_own_is_carried() -> None:
    model = models.llava(depth=2)
    with pytest.raises(UnsupportedModel, match="compress the whole"):
        vlmtok.compress(model.model.vision_tower, "tome:r=2")
    alone = copy.deepcopy(model.model.vision_tower)
    with torch.no_grad(), vlmtok.compress(alone, "tome:r=2"):
        assert alone(models.pictures(1, size=(32, 32))).last_hidden_state.shape[1] < 17


def test_a_projector_that_is_called_alone_is_refused() -> None:
    model, given = models.llava(depth=2), models.Batch.of("^3I5").inputs()
    with torch.no_grad(), vlmtok.compress(model, "tome:r=2"):
        left = model.model.vision_tower(given["pixel_values"]).last_hidden_state[:, 1:]
        model.model.multi_modal_projector(left)
        with pytest.raises(PassError, match="without a pass of the tower"):
            model.model.multi_modal_projector(left)


# ---------------------------------------------------------------------- recorded states
@pytest.mark.parametrize("name", NAMES)
def test_recorded_states_stand_in_the_columns_of_the_prompt(name: str) -> None:
    """Each has a row for every token; the last one is the last hidden state; uncut ones equal the bare model's."""
    family = FAMILIES[name]
    model, given = family.build(family.attentions[0]), family.batch(*family.rows).inputs()
    bare = run(model, given, output_hidden_states=True)
    with compressed(model, MODES["half"]):  # cuts at the start of layer 2
        found = run(model, given, output_hidden_states=True)
    seen = given["attention_mask"].bool()
    assert len(found.hidden_states) == len(bare.hidden_states)
    for index, (one, other) in enumerate(zip(found.hidden_states, bare.hidden_states)):
        assert one.shape == other.shape
        if index <= 2:
            assert torch.equal(one[seen], other[seen]), f"layer {index} is not cut"
    with compressed(model, MODES["boundary"]):
        found = run(model, given, output_hidden_states=True)
    assert all(one.shape == other.shape for one, other in zip(found.hidden_states, bare.hidden_states))


def test_the_last_recorded_state_is_the_last_hidden_state() -> None:
    model, given = models.llava(depth=4), models.Batch.of("^3I5", "^2I1I4").inputs(side="right")
    last = given["attention_mask"].sum(1) - 1
    for method in ("divprune:keep=0.4", "visionzip:keep=0.5", "fastv:K=2:keep=0.5"):
        with torch.no_grad(), vlmtok.compress(model, method):
            found = model.model(**given, output_hidden_states=True)
        rows = range(len(last))
        assert torch.equal(found.last_hidden_state[rows, last], found.hidden_states[-1][rows, last])


@pytest.mark.parametrize(
    "cuts", ["divprune:keep=0.6+fastv:K=2:keep=0.5", "divprune:keep=0.6+fastv:K=1:keep=6+todre:keep=0.9:tau=0.5"]
)
def test_recorded_states_behind_several_cuts(cuts: str) -> None:
    """Each has a row for every token, and behind the last picture those that its own layer gave."""
    model, given = models.llava(depth=5), models.Batch.of("^3I5", "2I1I4").inputs()
    columns, raw = given["input_ids"].shape[1], []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, out: raw.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad(), vlmtok.compress(model, cuts):
        found = model(**given, output_hidden_states=True).hidden_states
    assert len(found) == 6 and len({one.shape[1] for one in raw}) >= 2
    assert all(one.shape[1] == columns for one in found)
    for index, one in enumerate(raw[:-1]):  # the last one stands behind the norm
        assert torch.equal(found[index + 1][:, -4:], one[:, -4:]), f"layer {index}"
