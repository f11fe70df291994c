"""Adapters: one file per model family, found by the name of the model's class, so that no library is imported.

`ROWS` names every class that an adapter carries or refuses. Third parties add theirs through the entry-point group
``vlmtok.adapters`` (an `Adapter` subclass with `targets`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import warnings

from torch import nn

from ..errors import UnsupportedModel, VlmtokWarning
from .base import Adapter, Host

_TIMM = "timm_vit"
_OPEN_CLIP = "open_clip_vit"
_HF = "hf_vit"

ROWS: dict[tuple[str, str], str] = {
    ("timm.models.vision_transformer", "VisionTransformer"): f"{_TIMM}:TimmViT",
    ("timm.models.eva", "Eva"): f"{_TIMM}:TimmEva",
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
}

REFUSED: dict[tuple[str, str], str] = {
    ("timm.models.beit", "Beit"): "its relative position bias is a fixed table over all patches",
    ("timm.models.swin_transformer", "SwinTransformer"): "its shifted windows need the whole grid of patches",
    ("timm.models.swin_transformer_v2", "SwinTransformerV2"): "its shifted windows need the whole grid of patches",
    ("timm.models.vision_transformer_sam", "VisionTransformerSAM"): (
        "its windowed attention and its neck need the whole grid of patches"
    ),
    ("timm.models.vision_transformer_relpos", "VisionTransformerRelPos"): (
        "its relative position bias is a fixed table over all patches"
    ),
    ("timm.models.naflexvit", "NaFlexVit"): "its attention masks and its pooling follow the padded patches by position",
    ("timm.models.hiera", "Hiera"): "its stages pool the grid of patches",
    ("timm.models.cait", "Cait"): "its talking heads and its class attention take no bias",
    ("timm.models.xcit", "Xcit"): "its attention runs over channels and its convolutions need the grid",
    ("torch.nn.parallel.data_parallel", "DataParallel"): (
        "its replicas share hooks across threads; use one process a device"
    ),
}


def _vlm(model: nn.Module) -> Adapter | None:
    """A vision-language model of transformers: told by its config, so that a family is a row in one file."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(kind, str) or not any(name.startswith("transformers.") for name, _ in _names(model)):
        return None
    from . import hf_vlm

    if kind in hf_vlm.ROWS or kind in hf_vlm.REFUSED:
        return hf_vlm.HFVLM(model)
    return None


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


def _names(model: nn.Module) -> list[tuple[str, str]]:
    return [(cls.__module__, cls.__qualname__) for cls in type(model).__mro__]


def _load(where: str) -> type[Adapter]:
    module, _, name = where.partition(":")
    found: type[Adapter] = getattr(importlib.import_module(f".{module}", __name__), name)
    return found


def _third_parties() -> dict[tuple[str, str], type[Adapter]]:
    found: dict[tuple[str, str], type[Adapter]] = {}
    for entry in importlib.metadata.entry_points(group="vlmtok.adapters"):
        try:
            adapter = entry.load()
            found.update(dict.fromkeys(adapter.targets, adapter))
        except Exception as problem:
            warnings.warn(f"adapter plug-in {entry.name!r} does not load: {problem!r}", VlmtokWarning, stacklevel=3)
    return found


def adapter_for(model: nn.Module, name: str | None = None) -> Adapter:
    """The adapter that carries a model.

    Args:
        model: any module; wrappers are looked through.
        name: None, or ``"generic-vlm"`` for a vision-language model of transformers that no row describes.

    Returns:
        The adapter, holding the unwrapped model.

    Raises:
        UnsupportedModel: nothing carries it; the message names the reason, or what was looked at.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"compress() takes a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    if name is not None:
        return _named(model, name)
    names = _names(model)
    for known in names:  # the most derived class comes first
        if known in ROWS:
            return _load(ROWS[known])(model)
        if known in REFUSED:
            raise UnsupportedModel(f"{type(model).__name__} cannot be compressed: {REFUSED[known]}")
    found = _vlm(model)
    if found is not None:
        return found
    others = _third_parties()
    for known in names:
        if known in others:
            return others[known](model)
    carried = sorted({qualified for _, qualified in ROWS})
    near = difflib.get_close_matches(type(model).__name__, carried, 3, 0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise UnsupportedModel(
        f"no adapter carries {type(model).__module__}.{type(model).__name__}.{hint} Carried: {', '.join(carried)}, "
        f"and the vision-language models {', '.join(vlm_families())}. A vision-language model of transformers with the "
        "standard layout may run with adapter='generic-vlm'; CONTRIBUTING.md says how to write an adapter."
    )


def vlm_families() -> list[str]:
    """Model types of transformers that a row describes."""
    from . import hf_vlm

    return sorted(hf_vlm.ROWS)


def _named(model: nn.Module, name: str) -> Adapter:
    from . import hf_vlm

    if name != "generic-vlm":
        raise UnsupportedModel(f"adapter {name!r} cannot be asked for by name; 'generic-vlm' can")
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise UnsupportedModel(f"adapter 'generic-vlm' takes models of transformers, got {type(model).__name__}")
    return hf_vlm.HFVLM(model, hf_vlm.discover(model))


__all__ = ["REFUSED", "ROWS", "Adapter", "adapter_for", "unwrap"]
