"""Which adapter carries a class: a table, read without importing any library."""

from __future__ import annotations

import importlib

from torch import nn

from ..errors import UnsupportedModel
from .base import Adapter, Host
from .refused import REFUSED

_TIMM = "towers.timm_vit"
_OPEN_CLIP = "towers.open_clip_vit"
_HF = "towers.hf_vit"

ROWS: dict[tuple[str, str], str] = {
    ("timm.models.vision_transformer", "VisionTransformer"): f"{_TIMM}:TimmViT",
    ("timm.models.eva", "Eva"): f"{_TIMM}:TimmEva",
    ("timm.models.naflexvit", "NaFlexVit"): "towers.timm_naflex:TimmNaFlex",
    ("open_clip.model", "CLIP"): f"{_OPEN_CLIP}:OpenClip",
    ("open_clip.model", "CustomTextCLIP"): f"{_OPEN_CLIP}:OpenClip",
    ("open_clip.coca_model", "CoCa"): f"{_OPEN_CLIP}:OpenClip",
    ("open_clip.transformer", "VisionTransformer"): f"{_OPEN_CLIP}:OpenClipVision",
    ("open_clip.timm_model", "TimmModel"): f"{_OPEN_CLIP}:OpenClipTimm",
    ("transformers.models.clip.modeling_clip", "CLIPVisionModel"): f"{_HF}:HFVision",
    ("transformers.models.clip.modeling_clip", "CLIPVisionModelWithProjection"): f"{_HF}:HFVision",
    ("transformers.models.clip.modeling_clip", "CLIPModel"): f"{_HF}:HFDual",
    ("transformers.models.clip.modeling_clip", "CLIPForImageClassification"): f"{_HF}:HFVision",
    ("transformers.models.siglip.modeling_siglip", "SiglipVisionModel"): f"{_HF}:HFVision",
    ("transformers.models.siglip.modeling_siglip", "SiglipModel"): f"{_HF}:HFDual",
    ("transformers.models.siglip.modeling_siglip", "SiglipForImageClassification"): f"{_HF}:HFVision",
    ("transformers.models.vit.modeling_vit", "ViTModel"): f"{_HF}:HFVision",
    ("transformers.models.vit.modeling_vit", "ViTForImageClassification"): f"{_HF}:HFVision",
    ("transformers.models.dinov2.modeling_dinov2", "Dinov2Model"): f"{_HF}:HFVision",
    ("transformers.models.dinov2.modeling_dinov2", "Dinov2ForImageClassification"): f"{_HF}:HFVision",
    ("transformers.models.blip_2.modeling_blip_2", "Blip2VisionModel"): f"{_HF}:HFVision",
    ("transformers.models.instructblip.modeling_instructblip", "InstructBlipVisionModel"): f"{_HF}:HFVision",
}


def unwrap(model: Host) -> nn.Module:
    """The model below wrappers: DistributedDataParallel, torch.compile, PEFT."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            model = model.module
        elif type(model).__module__.startswith("peft.") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def class_names(model: nn.Module) -> list[tuple[str, str]]:
    """Module and qualified name of a model's class and of those that it inherits from, the most derived first."""
    return [(cls.__module__, cls.__qualname__) for cls in type(model).__mro__]


def load_class(where: str) -> type[Adapter]:
    """The adapter that a row of `ROWS` names."""
    module, _, name = where.partition(":")
    found: type[Adapter] = getattr(importlib.import_module(f".{module}", __package__), name)
    return found


def listed(model: nn.Module) -> Adapter | None:
    """The adapter of a class in `ROWS`, or None where the table says nothing of it.

    Args:
        model: without wrappers.

    Raises:
        UnsupportedModel: its class is in `REFUSED`, or the adapter does not take it.
    """
    for known in class_names(model):
        if known in ROWS:
            return load_class(ROWS[known])(model)
        if known in REFUSED:
            raise UnsupportedModel(f"{type(model).__name__} cannot be compressed: {REFUSED[known]}")
    return None
