"""transformers: vision-language models that feed visual embeddings to a text model. A family is a row of `VLMSpec`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..method import Layout, StageLayout
from .base import Adapter, TowerSpec, VLMSpec, child
from .decoder import Decoder
from .hf_vit import check_bias, vision_spec
from .vit_block import Tower

if TYPE_CHECKING:
    from ..attachment import Attachment

ROWS: dict[str, VLMSpec] = {
    "llava": VLMSpec(tower_cut="slots"),
}
"""By ``config.model_type``."""


class HFLlava(Adapter):
    """A vision-language model of transformers."""

    name = "transformers-vlm"
    targets = (
        ("transformers.models.llava.modeling_llava", "LlavaForConditionalGeneration"),
        ("transformers.models.llava.modeling_llava", "LlavaModel"),
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        spec = ROWS.get(model.config.model_type)
        if spec is None:
            raise self.refuse(f"no row for model type {model.config.model_type!r}; rows: {', '.join(ROWS)}")
        self.spec = spec
        # A bare inner model (LlavaModel) is its own core.
        self.core = child(model, spec.core) if hasattr(model, spec.core or "_") else model
        self.lm = child(self.core, spec.lm)

    def tower(self) -> TowerSpec | None:
        """The tower as data, or None where tokens cannot leave in it."""
        if self.spec.tower_cut is None:
            return None
        tower = child(self.core, self.spec.tower)
        config = self.core.config
        index = -1 if self.spec.feature is None else getattr(config, self.spec.feature)
        if not isinstance(index, int):
            return None  # features of several layers are concatenated: they must have equal lengths
        depth = len(vision_spec(tower).blocks)
        # Hidden state 0 is the embedding, so hidden state i is the output of block i - 1.
        last = (index if index >= 0 else depth + 1 + index) - 1
        spec = vision_spec(tower, max(last, 0))
        if getattr(config, "vision_feature_select_strategy", "default") == "full" and spec.num_prefix:
            return None  # CLS would take a placeholder of its own
        return spec if last >= 0 else None

    def layout(self) -> Layout:
        """Tower, features, projected tokens and decoder."""
        stages: dict[str, StageLayout] = {}
        tower = self.tower()
        if tower is not None:
            stages["vision"] = Tower.layout(tower)
            stages["features"] = StageLayout(1, tower.width, 0, 0, provides=frozenset({"protected"}))
        stages.update(Decoder.layout(self.lm))
        return Layout(f"{self.name} ({self.model.config.model_type})", stages)

    def install(self, attachment: Attachment) -> None:
        """Hooks on the tower, the projector and the language model."""
        spec = self.tower()
        tower = None
        if spec is not None and (attachment.at("vision") or attachment.tapped("vision") or attachment.at("features")):
            check_bias(child(self.core, self.spec.tower), attachment)
            tower = attachment.drivers["vision"] = Tower(attachment, spec)
        grid = None if spec is None else spec.grid
        attachment.drivers["decoder"] = Decoder(attachment, self.spec, self.core, tower, grid)
