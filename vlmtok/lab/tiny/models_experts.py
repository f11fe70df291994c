"""Tiny random models of `further_families` whose language models choose among experts; a family is a function."""

from __future__ import annotations

from torch import nn

from .models_1d import FINE, WINDOWED
from .prompts import AUDIO, IMAGE, VIDEO
from .sizes import TEXT, TOWER, VISION_IDS, WIDTH


def step3p7() -> nn.Module:
    """Step 3.7: windows, experts, crops in front of the whole picture."""
    import transformers as tf

    vision = {k: v for k, v in FINE.items() if k != "intermediate_size"}
    return tf.Step3p7ForConditionalGeneration(
        tf.Step3p7Config(
            vision_config=dict(**{**vision, "image_size": 64}, intermediate_size=64, max_position_embeddings=256),
            text_config=dict(
                **TEXT,
                head_dim=16,
                sliding_window=8,
                num_sliding_attention_heads=4,
                layer_types=["full_attention", "sliding_attention"] * 2,
                mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
                moe_intermediate_size=32,
                n_routed_experts=4,
                num_experts_per_tok=2,
                share_expert_dim=32,
                mtp_layer_types=[],
                mtp_mlp_layer_types=[],
            ),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )


def aria() -> nn.Module:
    """Aria: queries read the tower, experts."""
    import transformers as tf

    return tf.AriaForConditionalGeneration(
        tf.AriaConfig(
            vision_config=dict(FINE, model_type="idefics3_vision"),
            text_config=dict(
                **TEXT, head_dim=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, model_type="aria_text"
            ),
            image_token_index=IMAGE,
            projector_patch_to_query_dict={64: 16},
            tie_word_embeddings=False,
        )
    )


def kimi_k25() -> nn.Module:
    """Kimi K2.5: MoonViT's tower, latent attention, experts."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    return tf.Kimi_K25ForConditionalGeneration(
        tf.Kimi_K25Config(
            vision_config=dict(**{**vision, "patch_size": 4}, pos_emb_height=8, pos_emb_width=8),
            text_config=dict(
                **{**TEXT, "num_key_value_heads": 4},
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                first_k_dense_replace=1,
            ),
            projection_hidden_size=32,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
            **VISION_IDS,
        )
    )


def muse_spark() -> nn.Module:
    """Muse Spark: Muse Glimmer with experts and gates between the branches, beside an encoder of sound."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    text = {**TEXT, **{k: v for k, v in WINDOWED.items() if k != "query_pre_attn_scalar"}}
    return tf.MuseSparkForConditionalGeneration(
        tf.MuseSparkConfig(
            vision_config=dict(**{**vision, "patch_size": 4}, pos_emb_height=8, pos_emb_width=8),
            text_config=dict(
                **text,
                layer_rope_theta=[1e4, 0, 1e4, 1e4],
                rms_norm_eps=0.3,
                moe_intermediate_size=32,
                moe_hidden_size=32,
                num_local_experts=4,
                num_experts_per_tok=2,
            ),
            audio_config={
                "depths": [1, 1, 1, 1],
                "hidden_sizes": [8, 8, 8, 8],
                "num_hidden_layers": 4,
                "out_hidden_size": WIDTH,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            out_hidden_size=128,
            projector_hidden_size=64,
            tie_word_embeddings=False,
        )
    )
