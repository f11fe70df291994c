"""Tiny random models of the families of `further_families`; a family is a function."""

from __future__ import annotations

from typing import Any

from torch import nn

from .prompts import END, IMAGE, START, VIDEO
from .shots import GLM_VIDEO, SIDE
from .sizes import MROPE, PACKED, TEXT, TOWER, VISION_IDS, WIDTH


# ---------------------------------------------------------------------- positions in one dimension
def deepseek_vl() -> nn.Module:
    """DeepSeek-VL: a SigLIP tower whose last layer the projector reads, a Llama."""
    import transformers as tf

    return tf.DeepseekVLForConditionalGeneration(
        tf.DeepseekVLConfig(
            vision_config=dict(**TOWER, vision_use_head=False),
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )


def vipllava() -> nn.Module:
    """ViP-LLaVA: the projector reads several layers of a CLIP tower side by side."""
    import transformers as tf

    field = next(
        name for name in ("vision_feature_layer", "vision_feature_layers") if hasattr(tf.VipLlavaConfig(), name)
    )
    return tf.VipLlavaForConditionalGeneration(
        tf.VipLlavaConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            **{field: [-2, 1]},
        )
    )


def qianfan_ocr() -> nn.Module:
    """Qianfan-OCR: InternVL's tower and pixel shuffle, a Qwen3."""
    import transformers as tf

    vision = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
    return tf.QianfanOCRForConditionalGeneration(
        tf.QianfanOCRConfig(
            vision_config=vision,
            text_config=dict(**TEXT, head_dim=16),
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


def lighton_ocr() -> nn.Module:
    """LightOnOCR: a Pixtral tower, a Qwen3."""
    import transformers as tf

    return tf.LightOnOcrForConditionalGeneration(
        tf.LightOnOcrConfig(
            vision_config=dict(**{**TOWER, "image_size": 64}, head_dim=8, model_type="pixtral"),
            text_config=dict(**TEXT, head_dim=16, model_type="qwen3"),
            image_token_id=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )


def janus() -> nn.Module:
    """Janus: a SigLIP-like tower, a Llama; what draws pictures stands beside."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "intermediate_size"}
    drawing = {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_embeddings": 16,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
        "num_patches": 4,
    }
    return tf.JanusForConditionalGeneration(
        tf.JanusConfig(
            vision_config=dict(**vision, mlp_ratio=2.0, projection_dim=WIDTH, num_image_tokens=16),
            vq_config=drawing,
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )


def hyperclovax_vision_v2() -> nn.Module:
    """HyperCLOVA X Vision: Qwen2.5-VL's tower, a text model with positions in one dimension."""
    import transformers as tf

    return tf.HyperCLOVAXVisionV2ForConditionalGeneration(
        tf.HyperCLOVAXVisionV2Config(
            vision_config=dict(**PACKED, window_size=16, fullatt_block_indexes=[1]),
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
        )
    )


def exaone4_5() -> nn.Module:
    """EXAONE 4.5: a tower with windows and shared keys, a text model with windows."""
    import transformers as tf

    text = {**TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return tf.Exaone4_5_ForConditionalGeneration(
        tf.Exaone4_5_Config(
            vision_config=dict(**PACKED, num_key_value_heads=2, window_size=16, fullatt_block_indexes=[1]),
            text_config=dict(**text, model_type="exaone4"),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        )
    )


# ---------------------------------------------------------------------- positions in three dimensions
def cosmos3_omni() -> nn.Module:
    """Cosmos 3: Qwen3-VL's parts."""
    import transformers as tf

    return tf.Cosmos3OmniForConditionalGeneration(
        tf.Cosmos3OmniConfig(
            vision_config=dict(**PACKED, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            text_config=dict(**TEXT, head_dim=16, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def _glm(model: Any, **text: Any) -> nn.Module:
    return model(
        model.config_class(
            vision_config={**PACKED, "image_size": SIDE},
            text_config={**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}, **text},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=GLM_VIDEO[0],
            video_end_token_id=GLM_VIDEO[1],
        )
    )


def glm4v_moe() -> nn.Module:
    """GLM-4.5V: a mixture of experts behind a first dense layer."""
    import transformers as tf

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1}
    return _glm(tf.Glm4vMoeForConditionalGeneration, **experts)


def glm_ocr() -> nn.Module:
    """GLM-OCR: norms on queries and keys in the tower."""
    import transformers as tf

    return _glm(tf.GlmOcrForConditionalGeneration)
