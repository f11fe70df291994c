"""transformers: CLIP, SigLIP, ViT, DINOv2 and BLIP-2 vision models, alone or in a dual encoder. A family is a row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from ...core.site import Layout
from ..base import Adapter, TowerSpec
from . import tower_account
from .hf_rows import check_bias, pools_of, text_spec, vision_spec
from .text_tower import TextTower
from .tower import Tower

if TYPE_CHECKING:
    from ...core.attachment import Attachment
    from ...core.model_shape import ModelShape


class HFVision(Adapter):
    """A vision model of transformers."""

    name = "transformers-vision"
    is_part = True
    targets: ClassVar[tuple[tuple[str, str], ...]] = (
        ("transformers.models.clip.modeling_clip", "CLIPVisionModel"),
        ("transformers.models.siglip.modeling_siglip", "SiglipVisionModel"),
        ("transformers.models.vit.modeling_vit", "ViTModel"),
        ("transformers.models.dinov2.modeling_dinov2", "Dinov2Model"),
        ("transformers.models.blip_2.modeling_blip_2", "Blip2VisionModel"),
        ("transformers.models.instructblip.modeling_instructblip", "InstructBlipVisionModel"),
    )

    def tower(self) -> TowerSpec:
        """The tower as data."""
        return replace(vision_spec(self.vision()), pools=pools_of(self.model, self.vision()))

    def vision(self) -> nn.Module:
        """The module that holds the blocks."""
        return self.model

    def layout(self) -> Layout:
        """One stage: vision."""
        return Layout(self.name, {"vision": Tower.layout(self.tower())})

    def install(self, attachment: Attachment) -> None:
        """Hooks on the blocks."""
        check_bias(self.tower(), attachment)
        attachment.drivers["vision"] = Tower(attachment, self.tower())

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return tower_account.of_hf_vision(self)


class HFDual(HFVision):
    """CLIPModel and SiglipModel: the tower below `vision_model`, and CLIP's text tower."""

    name = "transformers-dual"
    targets = (
        ("transformers.models.clip.modeling_clip", "CLIPModel"),
        ("transformers.models.siglip.modeling_siglip", "SiglipModel"),
    )

    def vision(self) -> nn.Module:
        """The vision tower."""
        tower: nn.Module = self.model.vision_model
        return tower

    def layout(self) -> Layout:
        """The stages of the towers."""
        stages = dict(super().layout().stages)
        text = text_spec(self.model)
        if text is not None:
            stages["text"] = TextTower.text_layout(text)
        return Layout(self.name, stages)

    def install(self, attachment: Attachment) -> None:
        """Hooks on the towers."""
        super().install(attachment)
        text = text_spec(self.model)
        if text is not None:
            attachment.drivers["text"] = TextTower(attachment, text)
