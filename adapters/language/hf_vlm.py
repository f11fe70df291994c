"""The adapter of transformers' vision-language models, and how a family without a row is found out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ...core.signals import PER_TOKEN
from ...core.site import Layout, StageLayout
from ...errors import UnsupportedModel
from .. import hosts
from ..base import Adapter, TowerSpec, child
from ..towers.hf_rows import check_bias, vision_spec
from ..towers.tower import Tower
from . import account
from .decoder import Decoder
from .families import REFUSED, ROWS
from .layout import language_layout
from .spec import VLMSpec

if TYPE_CHECKING:
    from ...core.attachment import Attachment
    from ...core.model_shape import ModelShape


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
        grid = self.spec.tower_cut == "spread"
        return replace(spec, returns_grid=grid, carries=PER_TOKEN if self.spec.packing_methods else not grid)

    def layout(self) -> Layout:
        """Tower, features, projected tokens and decoder."""
        stages: dict[str, StageLayout] = {}
        tower = self.tower()
        if tower is not None:
            stages["vision"] = Tower.layout(tower)
            if self.spec.tower_cut == "slots":
                stages["features"] = StageLayout(1, tower.width, 0, 0, provides=frozenset({"protected"}))
        if self.lm is not None:
            stages.update(language_layout(self.lm, self.spec))
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
        waited = bool(self.spec.packing_methods and attachment.tapped("vision"))
        reader = tower if self.spec.tower_cut == "slots" or waited else None
        attachment.drivers["decoder"] = Decoder(attachment, self.spec, self.model, self.core, reader, grid)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return account.of_hf_vlm(self)
