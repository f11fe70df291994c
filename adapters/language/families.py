"""transformers: vision-language models that feed visual embeddings to a text model. A family is a row of `VLMSpec`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UnsupportedModel
from ..method import Layout, StageLayout
from ..signals import PER_TOKEN
from . import account, hosts
from .base import Adapter, BlockRule, TowerSpec, VLMSpec, child
from .decoder import Decoder
from .hf_vit import check_bias, vision_spec
from .vit_block import Tower

if TYPE_CHECKING:
    from ..attachment import Attachment
    from ..flops import ModelShape


def _first_storing_layer(config: Any) -> int:
    """Gemma4 shares keys of its last storing layers: a cut behind the first of them would give keys of two lengths."""
    shared = int(getattr(config, "num_kv_shared_layers", 0) or 0)
    kinds = list(config.layer_types)
    storing = kinds[: len(kinds) - shared]
    if not shared:
        return len(kinds) - 1
    return min(len(storing) - 1 - storing[::-1].index(kind) for kind in set(kinds[len(storing) :]))


_BOTH = ("image_token_id", "video_token_id")
_QWEN = VLMSpec(
    tower="visual",
    projector="visual.merger",
    ids=_BOTH,
    types=hosts.MODAL_TYPES,
    positions="mrope",
    feature=None,
    parts="mrope",
    told=(hosts.IMAGE_GRIDS, hosts.CLIP_GRIDS),
    whole="all pictures share one row, whose patches are merged in squares",
)
_QWEN3 = replace(_QWEN, deepstack=(hosts.DEEPSTACK_COLUMNS, hosts.DEEPSTACK_FEATURES))
_SMOLVLM = VLMSpec(
    lm="text_model",
    tower="vision_model",
    projector="connector",
    feature=None,
    lengths="crops",
    parts="runs",
    thumbnail="last",
    tower_cut="spread",
)
_BLIP = VLMSpec(
    core="",
    tower="vision_model",
    projector="",
    feature=None,
    tower_cut="free",
    boundary="generate() hands its language model embeddings without ids, so nothing tells pictures from text",
)
_PALIGEMMA = VLMSpec(
    mask="4d",
    types=hosts.TOKEN_TYPES,
    block=BlockRule(types=(0,), runs=False, sliding="or", first_only=True),
    feature=None,
    tower_cut="slots",
)

ROWS: dict[str, VLMSpec] = {
    "llava": VLMSpec(tower_cut="slots"),
    "llava_next": VLMSpec(parts="anyres", thumbnail="first", tower_cut="spread", packs=("pack_image_features", "")),
    "llava_onevision": VLMSpec(
        ids=_BOTH,
        parts="anyres",
        thumbnail="first",
        tower_cut="spread",
        packs=("pack_image_features", "apply_pooling"),
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "glm4v": _QWEN,
    "glm46v": _QWEN,
    "paddleocr_vl": replace(_QWEN, projector="projector", ids=("image_token_id",), told=(hosts.IMAGE_GRIDS,)),
    "internvl": VLMSpec(lengths="crop", parts="chunks", thumbnail="last", tower_cut="spread"),
    "idefics3": _SMOLVLM,
    "smolvlm": _SMOLVLM,
    "mistral3": VLMSpec(
        parts="rows",
        told=(hosts.IMAGE_SIZES,),
        shapes=hosts.IMAGE_SIZES,
        whole="all pictures share one row, whose patches are merged in squares",
    ),
    "gemma3": VLMSpec(
        mask="dict", types=hosts.TOKEN_TYPES, block=BlockRule(), feature=None, parts="runs", tower_cut="spread"
    ),
    "gemma4": VLMSpec(
        projector="embed_vision",
        ids=_BOTH,
        mask="dict",
        types=hosts.MODAL_TYPES,
        block=BlockRule(types=(1, 2), full=False, when=("use_bidirectional_attention", "vision")),
        gather=(hosts.PER_LAYER,),
        layer_args=(hosts.PER_LAYER_SLICE,),
        last_cut=_first_storing_layer,
        feature=None,
        parts="runs",
        told=(hosts.IMAGE_PLACES, hosts.CLIP_PLACES),
        shapes=hosts.PIXEL_PLACES,
        whole="patches are pooled by their places",
    ),
    "paligemma": _PALIGEMMA,
    "llama4": VLMSpec(
        core="",
        lm="language_model.model",
        tower="vision_model",
        ids=("image_token_index",),
        feature=None,
        attention=False,
        projects_late=True,
        parts="runs",
        thumbnail="last",
        whole="its blocks take their input by name, with rotary tables of complex numbers",
    ),
    "aya_vision": VLMSpec(parts="runs", thumbnail="last", tower_cut="spread"),
    "cohere2_vision": VLMSpec(feature=None, parts="runs", thumbnail="last", tower_cut="spread"),
    "blip-2": _BLIP,
    "instructblip": _BLIP,
    "lfm2_vl": VLMSpec(
        feature=None,
        parts="runs",
        thumbnail="last",
        told=(hosts.PATCH_SHAPES,),
        shapes=hosts.PATCH_SHAPES,
        whole="patches are padded, and its projector joins whole squares of them",
    ),
}
"""By ``config.model_type``."""

EXAMPLES: dict[str, str] = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3_vl_moe": "Qwen/Qwen3-VL-30B-A3B-Instruct",
    "qwen3_5": "Qwen/Qwen3.5-27B",
    "qwen3_5_moe": "Qwen/Qwen3.5-35B-A3B",
    "glm4v": "zai-org/GLM-4.1V-9B-Thinking",
    "glm46v": "zai-org/GLM-4.6V",
    "paddleocr_vl": "PaddlePaddle/PaddleOCR-VL",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "mistral3": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "gemma3": "google/gemma-3-4b-it",
    "gemma4": "google/gemma-4-e2b-it",
    "paligemma": "google/paligemma-3b-pt-224",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E",
    "aya_vision": "CohereForAI/aya-vision-8b",
    "cohere2_vision": "CohereLabs/command-a-vision-07-2025",
    "blip-2": "Salesforce/blip2-opt-2.7b",
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "lfm2_vl": "LiquidAI/LFM2-VL-1.6B",
}
"""A published checkpoint of each family, by its name on the hub."""

REFUSED: dict[str, str] = {
    "mllama": "pictures enter through cross-attention, and its cache holds vision states",
    "florence2": "it is an encoder-decoder; pictures are part of the encoder's input",
    "idefics": "pictures enter through cross-attention",
    "kosmos-2": "its own generate() builds the prompt",
    "kosmos-2.5": "its own generate() builds the prompt",
    "chameleon": "pictures are discrete tokens of the vocabulary",
    "emu3": "pictures are discrete tokens of the vocabulary",
    "molmo2": "its mask is built outside the language model in a form that cannot be rebuilt",
    "gemma3n": "its layers carry four streams of hidden states",
    "ernie4_5_vl_moe": "its experts are chosen by moe_mm_token_type_ids, which a cut would have to follow",
}
"""Families that cannot be carried, with the reason."""


def discover(model: Any) -> VLMSpec:
    """The row of a family that nobody wrote one for: the standard call, found by the names of its parts.

    Most families call a text model with embeddings, a 2-D mask, positions and a cache, and nothing else.

    Args:
        model: a vision-language model of transformers.

    Raises:
        UnsupportedModel: a part is missing; the message names it.
    """
    kind = model.config.model_type
    if kind in REFUSED:
        raise UnsupportedModel(f"{type(model).__name__} cannot be compressed: {REFUSED[kind]}")
    core = "model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    inner = child(model, core)
    paths = [f"{name}{below}" for name in ("language_model", "text_model") for below in ("", ".model")]
    found = [path for path in paths if _holds_layers(inner, path)]
    ids = [
        name
        for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        if isinstance(getattr(inner.config, name, None), int)
    ]
    if not found or not ids:
        missing = "a language_model or text_model with layers" if not found else "a config field image_token_id"
        raise UnsupportedModel(f"adapter 'generic-vlm' finds no {missing} in {type(model).__name__}")
    text = child(inner, found[0]).config
    rope = getattr(text, "rope_parameters", None) or {}
    mrope = "mrope_section" in rope or any("mrope_section" in r for r in rope.values() if isinstance(r, dict))
    return VLMSpec(
        core=core,
        lm=found[0],
        projector="",
        ids=tuple(ids[:2]),
        types=hosts.MODAL_TYPES if mrope else None,
        positions="mrope" if mrope else "1d",
        parts="mrope" if mrope else "runs",
        projects_late=True,
    )


def _holds_layers(inner: nn.Module, path: str) -> bool:
    try:
        return isinstance(getattr(child(inner, path), "layers", None), nn.ModuleList)
    except UnsupportedModel:
        return False


class HFVLM(Adapter):
    """A vision-language model of transformers."""

    name = "transformers-vlm"

    def __init__(self, model: Any, spec: VLMSpec | None = None) -> None:
        super().__init__(model)
        kind = model.config.model_type
        if spec is None and kind in REFUSED:
            raise self.refuse(REFUSED[kind])
        spec = spec or ROWS.get(kind)
        if spec is None:
            raise self.refuse(
                f"no row for model type {kind!r} (rows: {', '.join(ROWS)}); adapter='generic-vlm' carries families "
                "that call their text model in the standard way"
            )
        # A bare inner model (LlavaModel) is its own core.
        inner = spec.core and hasattr(model, spec.core)
        self.core = child(model, spec.core) if inner else model
        self.spec = spec
        self.lm = None if spec.boundary else child(self.core, spec.lm)

    def tower(self) -> TowerSpec | None:
        """The tower as data, or None where tokens cannot leave in it."""
        if self.spec.tower_cut is None or not hasattr(self.core, self.spec.tower.split(".")[0]):
            return None
        tower = child(self.core, self.spec.tower)
        config = self.core.config
        index = -1 if self.spec.feature is None else getattr(config, self.spec.feature)
        if not isinstance(index, int):
            return None  # features of several layers are concatenated: they must have equal lengths
        try:
            depth = len(vision_spec(tower).blocks)
        except UnsupportedModel:
            return None
        # Hidden state 0 is the embedding, so hidden state i is the output of block i - 1.
        last = (index if index >= 0 else depth + 1 + index) - 1
        spec = vision_spec(tower, max(last, 0))
        if getattr(config, "vision_feature_select_strategy", "default") == "full" and spec.num_prefix:
            return None  # CLS would take a placeholder of its own
        if last < 0:
            return None
        spread = self.spec.tower_cut == "spread"
        return replace(spec, spread=spread, carries=PER_TOKEN if self.spec.packs else not spread)

    def layout(self) -> Layout:
        """Tower, features, projected tokens and decoder."""
        stages: dict[str, StageLayout] = {}
        tower = self.tower()
        if tower is not None:
            stages["vision"] = Tower.layout(tower)
            if self.spec.tower_cut == "slots":
                stages["features"] = StageLayout(1, tower.width, 0, 0, provides=frozenset({"protected"}))
        if self.lm is not None:
            stages.update(Decoder.layout(self.lm, self.spec))
        return Layout(f"{self.name} ({self.model.config.model_type})", stages, self._without(stages))

    def _without(self, stages: dict[str, StageLayout]) -> dict[str, str]:
        """Why stages are missing."""
        why: dict[str, str] = {}
        if self.spec.boundary:
            why.update(projected=self.spec.boundary, decoder=self.spec.boundary)
        if self.spec.whole:
            why["vision"] = self.spec.whole
        if self.spec.tower_cut == "spread":
            why["features"] = "its projector reads the whole grid"
        return {name: reason for name, reason in why.items() if name not in stages}

    def install(self, attachment: Attachment) -> None:
        """Hooks on the tower, the projector and the language model."""
        spec = self.tower()
        tower = None
        if spec is not None and (attachment.at("vision") or attachment.tapped("vision") or attachment.at("features")):
            check_bias(child(self.core, self.spec.tower), attachment)
            tower = attachment.drivers["vision"] = Tower(attachment, spec)
        if self.lm is None:
            return
        grid = None if spec is None else spec.grid
        waited = bool(self.spec.packs and attachment.tapped("vision"))
        reader = tower if self.spec.tower_cut == "slots" or waited else None
        attachment.drivers["decoder"] = Decoder(attachment, self.spec, self.model, self.core, reader, grid)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return account.of_hf_vlm(self)
