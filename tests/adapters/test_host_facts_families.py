"""What the rows of vision-language families lean on in transformers, one sentence a fact.

Each family's tiny model generates two tokens and runs one plain forward, with hooks of torch alone looking on. A row is
data about its host, so most sentences are filled in from the row: an upgrade that moves a module, renames an argument
or changes an order of calls fails with the sentence that no longer holds.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families.build import shared
from support.family_facts import TINY, Fact, Host, first, given, host, order
from support.hosts_of import cache_name, caches_in
from torch import Tensor, nn
from transformers import masking_utils
from vlmtok.adapters import hosts
from vlmtok.adapters.base import child
from vlmtok.adapters.host_faults import there
from vlmtok.adapters.language import attention, shapes
from vlmtok.adapters.language.checks import KNOWN
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.masks import RECURRENT
from vlmtok.adapters.language.spec import VLMSpec
from vlmtok.adapters.towers.hf_rows import vision_spec
from vlmtok.adapters.towers.packed_spec import packed_spec

FACTS: list[Fact] = []


def fact(sentence: str, concerns: Callable[[VLMSpec], bool] = lambda spec: spec.boundary is None) -> Callable[..., Any]:
    """Registers a check under its sentence; without `concerns`, of all families with a language model that is cut."""

    def register(holds: Callable[[Host], bool]) -> Callable[[Host], bool]:
        FACTS.append(Fact(sentence, concerns, holds))
        return holds

    return register


def derived(spec: VLMSpec) -> bool:
    """Families of whose attention rows are derived."""
    return spec.boundary is None and spec.attends


def everywhere(spec: VLMSpec) -> bool:
    return True


# what there is
@fact("the inner model is at '{spec.core}', its vision tower at '{spec.tower}'", everywhere)
def _(at: Host) -> bool:
    return isinstance(child(at.core, at.spec.tower), nn.Module)


@fact("its projector is at '{spec.projector}'", lambda spec: bool(spec.projector))
def _(at: Host) -> bool:
    return isinstance(child(at.core, at.spec.projector), nn.Module)


@fact("its text model is at '{spec.lm}', with its decoder layers in a ModuleList `layers`")
def _(at: Host) -> bool:
    return (
        child(at.core, at.spec.lm) is at.lm
        and isinstance(at.lm.layers, nn.ModuleList)
        and len(at.lm.layers) == at.text.num_hidden_layers
    )


@fact("its config holds the ids of placeholders in {spec.ids}")
def _(at: Host) -> bool:
    return all(isinstance(getattr(at.config, name, None), int) for name in at.spec.ids)


@fact("its config says in '{spec.feature}' which hidden state the projector reads", lambda spec: bool(spec.feature))
def _(at: Host) -> bool:
    return hasattr(at.config, at.spec.feature or "")


@fact("every layer type of its text config has a mask function, or keeps no keys")
def _(at: Host) -> bool:
    return set(at.kinds) <= {*masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, *RECURRENT}


@fact(
    "its text config has the field {spec.block.when}, by which tokens of a picture look both ways",
    lambda spec: spec.block is not None and spec.block.when is not None,
)
def _(at: Host) -> bool:
    return hasattr(at.text, at.spec.block.when[0])


@fact("its text config counts the layers that share keys", lambda spec: spec.last_cut is not None)
def _(at: Host) -> bool:
    return 0 < at.text.num_kv_shared_layers < len(at.lm.layers)


@fact("the inner model keeps the embedding behind each row of crops as `image_newline`", lambda s: s.parts == "anyres")
def _(at: Host) -> bool:
    vision = at.config.vision_config
    return at.core.image_newline.shape == (at.text.hidden_size,) and vision.image_size % vision.patch_size == 0


@fact("its tower is of a class whose blocks can be cut", lambda spec: spec.tower_cut is not None)
def _(at: Host) -> bool:
    tower = child(at.core, at.spec.tower)
    packed = packed_spec(tower, at.config) if at.spec.patches is not None else None
    return len((packed or vision_spec(tower)).blocks) > 0


# the inner model
@fact(
    "the inner model names its arguments input_ids, inputs_embeds, attention_mask, position_ids, and a Cache under one "
    "of its names"
)
def _(at: Host) -> bool:
    names = inspect.signature(type(at.core).forward).parameters
    known = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", cache_name(type(at.core).forward)}
    return known <= set(names)


@fact("generate() encodes pictures before its loop, so that the tower runs before the inner model is called")
def _(at: Host) -> bool:
    return order(at.generated, "tower", "core", "text", "layer 0")


@fact("generate() hands the inner model mm_encoder_outputs['image'] and no pixels")
def _(at: Host) -> bool:
    got = first(at.generated, "core").bound
    return got["mm_encoder_outputs"].get("image") is not None and got.get("pixel_values") is None


@fact("what generate() hands over holds, as pooler_output, the features of each picture in the order of the prompts")
def _(at: Host) -> bool:
    encoded = first(at.generated, "core").bound["mm_encoder_outputs"]["image"]
    features = getattr(encoded, "pooler_output", None)
    if features is None:  # the projector runs later
        return order(at.generated, "core", "projector", "text")
    counts = [len(picture.columns) for prompt in at.prompts for picture in prompt.pictures]
    lengths = [len(part) for part in features]
    return lengths == counts if at.spec.lengths_of == "picture" else sum(lengths) == sum(counts)


@fact("with a cache, later steps bring neither features nor pixels")
def _(at: Host) -> bool:
    last = [call for call in at.generated if call.of == "core"][-1].bound
    return not last.get("mm_encoder_outputs") and last.get("pixel_values") is None and last["input_ids"].shape[1] == 1


@fact("a plain forward hands pixels to the inner model, which calls the tower, then the text model")
def _(at: Host) -> bool:
    got = first(at.forward, "core").bound
    return got.get("pixel_values") is not None and order(at.forward, "core", "tower", "text")


@fact("a plain forward tells the inner model its {spec.grid_arguments[0]}", lambda spec: bool(spec.grid_arguments))
def _(at: Host) -> bool:
    value = given(first(at.forward, "core").bound, at.spec.grid_arguments[0])
    return value is not None and shapes.read(at.spec.grid_arguments[0], value, at.config).tolist() == _grids(at)


@fact("the tower gets the {spec.tower_size_argument} of its pictures", lambda spec: bool(spec.tower_size_argument))
def _(at: Host) -> bool:
    value = given(first(at.generated, "tower").bound, at.spec.tower_size_argument)
    return value is not None and shapes.read(at.spec.tower_size_argument, value, at.config).tolist() == _grids(at)


def _grids(at: Host) -> list[list[int]]:
    return [list(grid) for prompt in at.prompts for picture in prompt.pictures for grid in picture.shot.grids]


@fact("{spec.types} reach the inner model", lambda spec: bool(spec.types))
def _(at: Host) -> bool:
    return all(given(first(calls, "core").bound, at.spec.types) is not None for calls in (at.generated, at.forward))


@fact("the projector maps one row for each picture or crop, [P, N, C]", lambda spec: spec.tower_cut == "slots")
def _(at: Host) -> bool:
    return first(at.generated, "projector").output.dim() == 3


# the text model
@fact(
    "the inner model calls its text model by name: inputs_embeds, attention_mask, position_ids, and a Cache under one "
    "of its names"
)
def _(at: Host) -> bool:
    names = {"inputs_embeds", "attention_mask", "position_ids", cache_name(type(at.lm).forward)}
    return all(
        not call.args and names <= set(call.kwargs) for call in (*at.generated, *at.forward) if call.of == "text"
    )


@fact("the text model gets a mask as the row says: {spec.mask}")
def _(at: Host) -> bool:
    mask = first(at.generated, "text").kwargs["attention_mask"]
    if at.spec.mask == "2d":
        return isinstance(mask, Tensor) and mask.dim() == 2
    if at.spec.mask == "dict" or len(set(at.kinds)) > 1:
        return isinstance(mask, dict) and set(mask) == set(at.kinds)
    return isinstance(mask, Tensor) and mask.dim() == 4


@fact("generate() counts positions as the row says: {spec.positions}")
def _(at: Host) -> bool:
    positions = first(at.generated, "text").kwargs["position_ids"]
    if positions is None:  # the text model counts them itself, in one dimension
        return at.spec.positions == "1d"
    return positions.dim() == 2 if at.spec.positions == "1d" else positions.dim() == 3 and len(positions) in (3, 4)


@fact("the text model gets {spec.gather[0]} with one entry for each token", lambda spec: bool(spec.gather))
def _(at: Host) -> bool:
    got = first(at.generated, "text").kwargs
    return all(given(got, role).shape[:2] == got["inputs_embeds"].shape[:2] for role in at.spec.gather)


@fact(
    "deepstack comes as {spec.deepstack[0]} and {spec.deepstack[1]}, one for each of the first layers",
    lambda s: s.deepstack,
)
def _(at: Host) -> bool:
    where, what = (given(first(at.generated, "text").kwargs, role) for role in at.spec.deepstack)
    return where.dtype == torch.bool and {len(feature) for feature in what} == {int(where.sum())}


@fact("the text model gets nothing else with one entry for each token")
def _(at: Host) -> bool:
    got = first(at.generated, "text").kwargs
    shape = got["inputs_embeds"].shape[:2]
    each = {name for name, value in got.items() if isinstance(value, Tensor) and value.shape[:2] == shape}
    roles = (*KNOWN, *at.spec.gather, *(at.spec.deepstack or ()), *([at.spec.types] if at.spec.types else []))
    return each <= {name for role in roles for name in role.names}


@fact("the text model gives back last_hidden_state, one row for each column, and the cache that it filled")
def _(at: Host) -> bool:
    call = first(at.forward, "text")
    same = call.output[0].shape[:2] == call.kwargs["inputs_embeds"].shape[:2]
    return same and call.output[0] is call.output.last_hidden_state and len(caches_in(call.output)) == 1


@fact("logits have the length of the input", everywhere)
def _(at: Host) -> bool:
    return at.output.logits.shape[1] == max(len(prompt.ids) for prompt in at.prompts)


# its layers
@fact("a layer gets hidden states as its first argument, and attention_mask and position_embeddings by name")
def _(at: Host) -> bool:
    size = first(at.generated, "text").kwargs["inputs_embeds"].shape
    calls = [first(at.generated, f"layer {i}") for i in range(len(at.lm.layers))]
    named = all({"attention_mask", "position_embeddings"} <= set(call.kwargs) for call in calls)
    return named and calls[0].args[0].shape == size and all(call.args[0].shape[::2] == size[::2] for call in calls)


@fact("a layer gets the {spec.layer_args[0]}, which has one entry for each token", lambda s: bool(s.layer_args))
def _(at: Host) -> bool:
    call = first(at.generated, "layer 0")
    return all(given(call.bound, role).shape[:2] == call.args[0].shape[:2] for role in at.spec.layer_args)


@fact("position embeddings, where layers get any, are a pair, or one tensor, of one row for each column")
def _(at: Host) -> bool:
    call = first(at.generated, "layer 0")
    got = call.kwargs["position_embeddings"]
    if got is None:
        return True
    parts = [got] if isinstance(got, Tensor) else list(got)
    return len(parts) in (1, 2) and all(part.shape[1] == call.args[0].shape[1] for part in parts)


@fact("a layer gives back its hidden states, alone or first")
def _(at: Host) -> bool:
    call = first(at.generated, "layer 0")
    out = call.output[0] if isinstance(call.output, tuple) else call.output
    return out.shape == call.args[0].shape


@fact("rotary embeddings come from `rotary_emb` of hidden states and positions")
def _(at: Host) -> bool:
    names = list(inspect.signature(type(at.lm.rotary_emb).forward).parameters)
    return names[1:3] == ["x", "position_ids"] and names[3:] in ([], ["layer_type"])


@fact(
    "attention has q_proj, k_proj, head_dim and scaling, behind input_layernorm, or no norm at all",
    derived,
)
def _(at: Host) -> bool:
    named = ("q_proj", "k_proj", "head_dim", "scaling")
    norms = "operator_norm" if at.model.config.model_type == "lfm2_vl" else "input_layernorm"
    normed = at.text.model_type not in attention._UNNORMED
    shares = getattr(at.text, "num_kv_shared_layers", 0)
    own = at.attentions()[: len(at.lm.layers) - shares]
    return all(hasattr(attn, name) for attn in own for name in named) and hasattr(at.lm.layers[0], norms) == normed


@fact("its rotary function stands beside its attention under the name that is looked up", derived)
def _(at: Host) -> bool:
    names = ((attn, attention.COMPLEX.get(type(attn).__name__, attention.ROTARY)) for attn in at.attentions())
    return all(hasattr(sys.modules[type(attn).__module__], name) for attn, name in names)


@fact("its attention says where it turns and how it warms up", lambda s: s is ROWS["llama4"])
def _(at: Host) -> bool:
    named = ("use_rope", "attn_temperature_tuning", "floor_scale", "attn_scale")
    return all(hasattr(attn, name) for attn in at.attentions() for name in named)


@fact("its cache is a DynamicCache with `layers`, and counts columns by the first layer that keeps keys")
def _(at: Host) -> bool:
    probe = next(i for i, kind in enumerate(at.kinds) if kind not in RECURRENT)
    columns = first(at.generated, "text").kwargs["inputs_embeds"].shape[1] + 1
    same = at.cache.get_seq_length() == at.cache.layers[probe].get_seq_length() == columns
    return type(at.cache) is transformers.DynamicCache and same


@fact(
    "generate() never calls its top forward: its language model gets embeddings alone", lambda spec: bool(spec.boundary)
)
def _(at: Host) -> bool:
    return all(call.of != "core" for call in at.generated) and any(call.of == "core" for call in at.forward)


CASES = [
    pytest.param(name, each, id=f"{name}: {each.sentence.format(spec=spec)}")
    for name in TINY
    for spec in (ROWS["paligemma" if name == "paligemma2" else name],)
    for each in FACTS
    if each.concerns(spec)
]


@pytest.mark.parametrize(("name", "each"), CASES)
def test_the_host_is_as_its_row_says(name: str, each: Fact) -> None:
    at = host(name)
    sentence = each.sentence.format(spec=at.spec)
    assert each.holds(at), f"no longer true of {name} in transformers {transformers.__version__}: {sentence}"


def test_every_row_is_looked_at() -> None:
    looked = {shared(name, TINY[name].attentions[0]).config.model_type for name in filter(there, TINY)}
    assert looked == set(filter(there, ROWS)), "a row of the family table has no tiny model, or the other way round"


WRONG: list[dict[str, Any]] = [
    {"lm": "text_model"},
    {"tower": "visual"},
    {"projector": "connector"},
    {"ids": ("image_token",)},
    {"feature": "feature_layer"},
    {"mask": "dict"},
    {"types": hosts.TOKEN_TYPES},
    {"positions": "mrope"},
    {"gather": (hosts.PER_LAYER,)},
    {"layer_args": (hosts.PER_LAYER_SLICE,)},
    {"deepstack": (hosts.DEEPSTACK_COLUMNS, hosts.DEEPSTACK_FEATURES)},
    {"parts": "anyres"},
    {"grid_arguments": (hosts.IMAGE_SIZES,)},
    {"tower_size_argument": hosts.IMAGE_SIZES},
    {"boundary": "embeddings come without ids"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "".join(wrong))
def test_a_row_that_is_wrong_is_noticed(wrong: dict[str, Any]) -> None:
    """Every field of a row is looked at: with a wrong one, LLaVA's host breaks a sentence."""
    at = host("llava")
    spec = dataclasses.replace(at.spec, **wrong)
    changed = dataclasses.replace(at, spec=spec)
    assert any(_broken(each, changed) for each in FACTS if each.concerns(spec))


def _broken(each: Fact, at: Host) -> bool:
    try:
        return not each.holds(at)
    except (AttributeError, KeyError, IndexError, TypeError):
        return True
