"""Tiny random vision-language models with positions in three dimensions (M-RoPE); a family is a function."""

from __future__ import annotations

from typing import Any

from torch import nn

from .prompts import END, IMAGE, START, VIDEO
from .shots import GLM_VIDEO, SIDE
from .sizes import MROPE, PACKED, TEXT, TOWER, VISION_IDS, WIDTH


def qwen2_vl() -> nn.Module:
    """Qwen2-VL: pictures of any shape in one row."""
    import transformers as tf

    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "hidden_size": WIDTH}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            vision_config=vision,
            text_config=dict(**TEXT, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def qwen2_5_vl() -> nn.Module:
    """Qwen2.5-VL: a tower with windows."""
    import transformers as tf

    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            vision_config=dict(**PACKED, window_size=16, fullatt_block_indexes=[1]),
            text_config=dict(**TEXT, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def qwen3_vl(experts: bool = False) -> nn.Module:
    """Qwen3-VL: features of lower tower layers go to the first decoder layers (deepstack).

    Args:
        experts: whether its language model is a mixture of experts.
    """
    import transformers as tf

    model = tf.Qwen3VLMoeForConditionalGeneration if experts else tf.Qwen3VLForConditionalGeneration
    return model(
        model.config_class(
            vision_config=dict(**PACKED, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            text_config=dict(**TEXT, **(EXPERTS if experts else {}), head_dim=16, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def qwen3_5(experts: bool = False) -> nn.Module:
    """Qwen3.5: every second decoder layer is recurrent.

    Args:
        experts: whether its language model is a mixture of experts.
    """
    import transformers as tf

    model = tf.Qwen3_5MoeForConditionalGeneration if experts else tf.Qwen3_5ForConditionalGeneration
    recurrent = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    if experts:
        recurrent |= {**EXPERTS, "shared_expert_intermediate_size": 64}
    return model(
        model.config_class(
            vision_config=dict(**PACKED, num_position_embeddings=64),
            text_config=dict(**TEXT, **recurrent, head_dim=16, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def _glm(model: Any, config: Any) -> nn.Module:
    return model(
        config(
            vision_config={**PACKED, "image_size": SIDE, "model_type": "glm4v_vision"},
            text_config={
                **TEXT,
                "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
                "model_type": "glm4v_text",
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=GLM_VIDEO[0],
            video_end_token_id=GLM_VIDEO[1],
        )
    )


def glm4v() -> nn.Module:
    """GLM-4.1V."""
    import transformers as tf

    return _glm(tf.Glm4vForConditionalGeneration, tf.Glm4vConfig)


def glm46v() -> nn.Module:
    """GLM-4.6V."""
    import transformers as tf

    return _glm(tf.Glm46VForConditionalGeneration, tf.Glm46VConfig)


def glmga() -> nn.Module:
    """GLM-4.6V under another model type."""
    import transformers as tf

    return _glm(tf.Glm46VForConditionalGeneration, tf.CONFIG_MAPPING["glmga"])


def paddleocr_vl() -> nn.Module:
    """PaddleOCR-VL."""
    import transformers as tf

    return tf.PaddleOCRVLForConditionalGeneration(
        tf.PaddleOCRVLConfig(
            vision_config=dict(TOWER),
            text_config=dict(**TEXT, head_dim=16, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
            **VISION_IDS,
        )
    )
