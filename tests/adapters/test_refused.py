"""Classes of timm that cannot be carried say why, before anything is changed; relatives of ViT that are carried."""

from __future__ import annotations

import importlib
import inspect

import pytest
import timm
import torch
from torch import nn
from vlmtok.adapters import REFUSED, ROWS, adapter_for

import vlmtok
from vlmtok.errors import UnsupportedModel

SMALL = {
    "beit:Beit": "beit_base_patch16_224",
    "vision_transformer_relpos:VisionTransformerRelPos": "vit_relpos_small_patch16_224",
    "levit:Levit": "levit_256d",
    "levit:LevitDistilled": "levit_128s",
    "convit:ConVit": "convit_tiny",
    "swin_transformer:SwinTransformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2:SwinTransformerV2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr:SwinTransformerV2Cr": "swinv2_cr_tiny_224",
    "vision_transformer_sam:VisionTransformerSAM": "samvit_base_patch16",
    "hieradet_sam2:HieraDet": "hieradet_small",
    "twins:Twins": "twins_svt_small",
    "davit:DaVit": "davit_tiny",
    "gcvit:GlobalContextVit": "gcvit_xxtiny",
    "tiny_vit:TinyVit": "tiny_vit_5m_224",
    "maxxvit:MaxxVit": "coatnet_0_224",
    "nest:Nest": "nest_tiny",
    "volo:VOLO": "volo_d1_224",
    "hiera:Hiera": "hiera_tiny_224",
    "mvitv2:MultiScaleVit": "mvitv2_tiny",
    "pit:PoolingVisionTransformer": "pit_ti_224",
    "pvt_v2:PyramidVisionTransformerV2": "pvt_v2_b0",
    "coat:CoaT": "coat_tiny",
    "cait:Cait": "cait_xxs24_224",
    "xcit:Xcit": "xcit_nano_12_p16_224",
    "crossvit:CrossVit": "crossvit_tiny_240",
    "tnt:TNT": "tnt_s_patch16_224",
    "focalnet:FocalNet": "focalnet_tiny_srf",
    "mlp_mixer:MlpMixer": "mixer_s32_224",
    "sequencer:Sequencer2d": "sequencer2d_s",
    "efficientvim:EfficientViM": "efficientvim_m1",
    "visformer:Visformer": "visformer_tiny",
    "nextvit:NextViT": "nextvit_small",
    "fastvit:FastVit": "fastvit_t8",
    "metaformer:MetaFormer": "caformer_s18",
    "edgenext:EdgeNeXt": "edgenext_xx_small",
    "efficientformer:EfficientFormer": "efficientformer_l1",
    "efficientformer_v2:EfficientFormerV2": "efficientformerv2_s0",
    "efficientvit_mit:EfficientVit": "efficientvit_b0",
    "efficientvit_msra:EfficientVitMsra": "efficientvit_m0",
    "iformer:IFormer": "iformer_t",
    "lowformer:LowFormer": "lowformer_b0",
    "shvit:SHViT": "shvit_s1",
    "swiftformer:SwiftFormer": "swiftformer_xs",
    "gemma4_vit:Gemma4VitEncoder": "gemma4_vit_167m_enc",
    "gemma4_vit:Gemma4VitClassifier": "gemma4_vit_167m",
    "qwen3_vit:Qwen3VitClassifier": "qwen3_vit_88m",
    "deepseek_vit:DeepseekVitEncoder": "deepseek_vit_412m_enc",
    "deepseek_vit:DeepseekVitClassifier": "deepseek_vit_412m",
}
"""A small model of each class."""


def without_data(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


@pytest.mark.parametrize(("where", "name"), SMALL.items())
def test_what_cannot_be_carried_says_why(where: str, name: str) -> None:
    module, _, qualified = where.partition(":")
    model = without_data(name)
    assert (type(model).__module__, type(model).__qualname__) == (f"timm.models.{module}", qualified)
    with pytest.raises(UnsupportedModel) as caught:
        vlmtok.compress(model, "random:keep=0.5:stage=vision:layer=1")
    assert str(caught.value) == f"{qualified} cannot be compressed: {REFUSED[f'timm.models.{module}', qualified]}"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_every_row_is_a_class_and_none_is_carried_too() -> None:
    for module, qualified in REFUSED:
        assert inspect.isclass(getattr(importlib.import_module(module), qualified))
    assert not set(REFUSED) & set(ROWS)


@pytest.mark.parametrize(
    ("name", "adapter"),
    {
        "deit_tiny_distilled_patch16_224": "timm-vit",
        "flexivit_small": "timm-vit",
        "vit_tiny_r_s16_p8_224": "timm-vit",
        "vit_base_patch16_rope_reg1_gap_256": "timm-eva",
        "vit_small_patch16_dinov3": "timm-eva",
        "naflexvit_base_patch16_par_gap": "timm-naflex",
        "naflexvit_so150m2_patch16_reg1_map": "timm-naflex",
    }.items(),
)
def test_relatives_of_vit_that_are_carried(name: str, adapter: str) -> None:
    assert adapter_for(without_data(name)).name == adapter


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "eva02_enormous_patch14_clip_224": "EvaBlockPostNorm",
        "vit_5b_patch16_sapiens2": "groups queries",
        "vit_base_patch16_xp_224": "ParallelScalingBlock",
    }.items(),
)
def test_variants_of_what_is_carried_that_are_not(name: str, why: str) -> None:
    with pytest.raises(UnsupportedModel, match=why):
        adapter_for(without_data(name))
