"""Tiny random vision models, one for every class and architecture that a tower's adapter carries, built in code.

Weights are drawn anew, large enough for every token to matter: with a library's own initialisation a cut changes the
output by less than the tolerances of the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIDE, PATCH, DEPTH, WIDTH, HEADS = 48, 8, 4, 32, 4
PATCHES = (SIDE // PATCH) ** 2
CLASSES = 10


def randomize(model: nn.Module, seed: int = 0, gain: float = 1.3) -> nn.Module:
    """Draws every parameter anew; layer scales, norms and gates stay near what they are for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "logit_scale":
                continue
            if "norm" in name or "ln_" in name or leaf.startswith(("gamma", "lambda")):
                p.copy_(normal(p, 0.2) + (0 if leaf == "bias" else 1))
            elif p.dim() == 1:
                p.copy_(normal(p, 0.2))
            elif any(word in name for word in ("token", "embed", "latent", "query", "probe")) and "proj" not in name:
                p.copy_(normal(p, 0.7))
            else:
                fan_in = p.shape[0] if leaf in ("proj", "text_projection") else p[0].numel()
                p.copy_(normal(p, gain / fan_in**0.5))
    return model.eval()


@dataclass(frozen=True)
class Tower:
    """A model whose vision tower is tested.

    Attributes:
        name: row of the matrix.
        build: makes it, always the same.
        run: from the model and pixels, what its user gets.
        tokens: from the model and pixels, the tokens that the last block leaves, normed where the library does so,
            `[B, N, C]`.
        prefix: protected tokens.
        size: height and width of the pictures.
    """

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[Any, Tensor], Tensor]
    tokens: Callable[[Any, Tensor], Tensor]
    prefix: int
    size: tuple[int, int] = (SIDE, SIDE)

    def pictures(self, count: int = 3, seed: int = 1) -> Tensor:
        """Random pixels of the size that it takes, `[count, 3, H, W]`."""
        return pictures(count, seed, self.size)


def pictures(count: int, seed: int = 1, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """Random pixels with some structure: every picture has patches that look alike."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    coarse = torch.randn(count, 3, height // 16, width // 16, generator=generator)
    fine = torch.randn(count, 3, height, width, generator=generator)
    return nn.functional.interpolate(coarse, size=size) + 0.5 * fine


# ---------------------------------------------------------------------- timm
def timm_vit(name: str, **changes: Any) -> nn.Module:
    """A small ViT of timm with random weights.

    Args:
        name: of timm's model.
        **changes: to its arguments.
    """
    import timm

    torch.manual_seed(0)
    given: dict[str, Any] = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
        **changes,
    }
    return randomize(timm.create_model(name, pretrained=False, **given))


def short_vit() -> nn.Module:
    """Two blocks, for what is slow."""
    return timm_vit("vit_tiny_patch16_224", depth=2)


def _logits(model: Any, x: Tensor) -> Tensor:
    return model(x)


def _features(model: Any, x: Tensor) -> Tensor:
    return model.forward_features(x)


def _timm_tower(row: str, name: str, prefix: int, size: tuple[int, int] = (SIDE, SIDE), **changes: Any) -> Tower:
    return Tower(row, functools.partial(timm_vit, name, **changes), _logits, _features, prefix, size)


TIMM = (
    _timm_tower("timm ViT", "vit_tiny_patch16_224", 1),
    # Larger pictures than the model was made for, and pictures that are no square.
    _timm_tower("timm AugReg", "vit_small_patch16_224.augreg_in1k", 1, (SIDE, 64), dynamic_img_size=True),
    _timm_tower("timm DeiT", "deit_tiny_patch16_224", 1, (64, 32), img_size=(64, 32)),
    _timm_tower("timm DeiT distilled", "deit_tiny_distilled_patch16_224", 2),
    _timm_tower("timm DeiT-3", "deit3_small_patch16_224", 1, init_values=0.5),
    _timm_tower("timm DINOv2 registers", "vit_small_patch14_reg4_dinov2", 5),
    _timm_tower("timm SigLIP", "vit_base_patch16_siglip_224", 0),
    _timm_tower("timm MAE average", "vit_base_patch16_224.mae", 1, global_pool="avg"),
    _timm_tower("timm CLIP", "vit_base_patch16_clip_224", 1),
    _timm_tower("timm EVA", "eva_giant_patch14_224", 1),
    _timm_tower("timm EVA-02", "eva02_base_patch14_224", 1),
    _timm_tower("timm PE", "vit_pe_core_tiny_patch16_384", 1),
    _timm_tower("timm DINOv3", "vit_small_patch16_dinov3", 5),
    _timm_tower("timm NaFlexVit", "naflexvit_base_patch16_gap", 4, pos_embed_grid_size=(SIDE // PATCH, SIDE // PATCH)),
    _timm_tower("timm NaFlexVit rope", "naflexvit_base_patch16_map", 1, rope_type="axial", pos_embed_grid_size=(6, 6)),
)


# ---------------------------------------------------------------------- open_clip
_TEXT = {"context_length": 12, "vocab_size": 64, "width": WIDTH, "heads": HEADS, "layers": 2}
_VISION = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": WIDTH // HEADS}


def _open_clip(kind: str) -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    if kind == "CLIP":
        made = open_clip.CLIP(embed_dim=24, vision_cfg=_VISION, text_cfg=_TEXT)
    elif kind == "visual":
        made = open_clip.CLIP(embed_dim=24, vision_cfg=_VISION, text_cfg=_TEXT).visual
    elif kind == "CustomTextCLIP":
        made = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg={**_VISION, "ls_init_value": 0.5}, text_cfg=_TEXT)
    elif kind == "TimmModel":
        import timm

        tower = {
            "timm_model_name": "vit_tiny_patch16_224",
            "image_size": 224,
            "timm_pool": "token",
            "timm_proj": "linear",
        }
        made = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=tower, text_cfg=_TEXT)
        # The configuration has no word for a smaller trunk.
        made.visual.trunk = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=SIDE, patch_size=PATCH, depth=DEPTH, num_classes=0
        )
    else:
        made = open_clip.CoCa(
            embed_dim=24,
            multimodal_cfg={"width": WIDTH, "context_length": 12, "vocab_size": 64, "heads": HEADS, "layers": 1},
            text_cfg={**_TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg=dict(**_VISION, attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
        )
    return randomize(made)


def _encode(model: Any, x: Tensor) -> Tensor:
    return model.encode_image(x)


def _open_clip_tokens(model: Any, x: Tensor) -> Tensor:
    """What the last block gives."""
    visual = getattr(model, "visual", model)
    return visual.transformer(visual._embeds(x))


OPEN_CLIP = (
    Tower("open_clip VisionTransformer", lambda: _open_clip("visual"), _logits, _open_clip_tokens, 1),
    Tower("open_clip CLIP", lambda: _open_clip("CLIP"), _encode, _open_clip_tokens, 1),
    Tower("open_clip CustomTextCLIP", lambda: _open_clip("CustomTextCLIP"), _encode, _open_clip_tokens, 1),
    Tower("open_clip CoCa", lambda: _open_clip("CoCa"), _encode, _open_clip_tokens, 1),
    Tower(
        "open_clip TimmModel",
        lambda: _open_clip("TimmModel"),
        _encode,
        lambda model, x: model.visual.trunk.forward_features(x),
        1,
    ),
)


# ---------------------------------------------------------------------- transformers
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _hf(kind: str, attention: str = "sdpa") -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    own = {"attn_implementation": attention}
    text = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    if kind == "CLIPVisionModel":
        made = tf.CLIPVisionModel(tf.CLIPVisionConfig(**SIZES, **own))
    elif kind == "SiglipVisionModel":
        made = tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZES, **own))
    elif kind == "ViTModel":
        made = tf.ViTModel(tf.ViTConfig(**SIZES, **own))
    elif kind == "ViTForImageClassification":
        made = tf.ViTForImageClassification(tf.ViTConfig(**SIZES, **own, num_labels=CLASSES))
    elif kind == "Dinov2Model":
        sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
        made = tf.Dinov2Model(tf.Dinov2Config(**sizes, **own, layerscale_value=0.5))
    elif kind == "Blip2VisionModel":
        made = tf.Blip2VisionModel(tf.Blip2VisionConfig(**SIZES, **own))
    elif kind == "CLIPModel":
        made = tf.CLIPModel(tf.CLIPConfig(vision_config=SIZES, text_config=text, projection_dim=24, **own))
    else:
        made = tf.SiglipModel(tf.SiglipConfig(vision_config=SIZES, text_config=text, **own))
    return randomize(made)


def _last(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).last_hidden_state


def _pooled(model: Any, x: Tensor) -> Tensor:
    return model(pixel_values=x).pooler_output


def _image_features(model: Any, x: Tensor) -> Tensor:
    return model.get_image_features(pixel_values=x).pooler_output


def _below(model: Any, x: Tensor) -> Tensor:
    return model.vision_model(pixel_values=x).last_hidden_state


HF = (
    Tower("HF CLIP vision", lambda: _hf("CLIPVisionModel"), _pooled, _last, 1),
    Tower("HF CLIP vision eager", lambda: _hf("CLIPVisionModel", "eager"), _pooled, _last, 1),
    Tower("HF SigLIP vision", lambda: _hf("SiglipVisionModel"), _pooled, _last, 0),
    Tower("HF ViT", lambda: _hf("ViTModel"), _pooled, _last, 1),
    Tower(
        "HF ViT classifier",
        lambda: _hf("ViTForImageClassification"),
        lambda model, x: model(pixel_values=x).logits,
        lambda model, x: model.vit(pixel_values=x).last_hidden_state,
        1,
    ),
    Tower("HF DINOv2", lambda: _hf("Dinov2Model"), _pooled, _last, 1),
    Tower("HF BLIP-2 vision", lambda: _hf("Blip2VisionModel"), _pooled, _last, 1),
    Tower("HF CLIPModel", lambda: _hf("CLIPModel"), _image_features, _below, 1),
    Tower("HF SiglipModel", lambda: _hf("SiglipModel"), _image_features, _below, 0),
)

TOWERS = {tower.name: tower for tower in (*TIMM, *OPEN_CLIP, *HF)}
