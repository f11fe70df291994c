"""Tiny random models of the rarer families of `further_families`; a family is a function."""

from __future__ import annotations

import torch
from torch import nn

from .models_1d import FINE, PINPOINTS, WINDOWED
from .prompts import AUDIO, END, IMAGE, PAD, START, VIDEO
from .shots import SIDE
from .sizes import MROPE, PACKED, TEXT, TOWER, VISION_IDS, WIDTH


def llava_next_video() -> nn.Module:
    """LLaVA-NeXT-Video: LLaVA-NeXT's canvas; frames of clips are pooled in front of the projector."""
    import transformers as tf

    return tf.LlavaNextVideoForConditionalGeneration(
        tf.LlavaNextVideoConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def ovis2() -> nn.Module:
    """Ovis2: a tower that gives weights over a table of visual words."""
    import transformers as tf

    return tf.Ovis2ForConditionalGeneration(
        tf.Ovis2Config(
            vision_config=dict(**TOWER, vocab_size=40, hidden_stride=1, num_visual_indicator_tokens=2),
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[START, END],
            vocab_size=TEXT["vocab_size"],
            hidden_size=WIDTH,
            tie_word_embeddings=False,
        )
    )


def got_ocr2(kind: str = "got_ocr2") -> nn.Module:
    """GOT-OCR 2: SAM's tower with windows, two convolutions that halve its grid.

    Args:
        kind: model type; PP-Chart2Table is the same model.
    """
    import transformers as tf

    vision = {**{k: v for k, v in TOWER.items() if k != "intermediate_size"}, "image_size": 64, "patch_size": 4}
    return tf.GotOcr2ForConditionalGeneration(
        tf.CONFIG_MAPPING[kind](
            vision_config=dict(
                **vision, output_channels=16, window_size=4, global_attn_indexes=[1], mlp_dim=64, initializer_range=0.02
            ),
            text_config=dict(TEXT, model_type="qwen2"),
            image_token_index=IMAGE,
            image_seq_length=16,
            tie_word_embeddings=False,
        )
    )


def fast_vlm() -> nn.Module:
    """FastVLM: a tower of convolutions from timm."""
    import transformers as tf

    return tf.FastVlmForConditionalGeneration(
        tf.FastVlmConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "fastvit_mci0",
                "do_pooling": False,
                "hidden_size": 64,
                "initializer_range": 0.02,
                "model_args": {
                    "layers": [1, 1, 1, 1],
                    "embed_dims": [8, 16, 32, 32],
                    "mlp_ratios": [2, 2, 2, 2],
                },
            },
            text_config=dict(TEXT, model_type="qwen2"),
            image_token_index=IMAGE,
            image_seq_length=16,
        )
    )


def perception_lm() -> nn.Module:
    """Perception LM: a ViT of timm, averages over squares behind the projector."""
    import transformers as tf

    return tf.PerceptionLMForConditionalGeneration(
        tf.PerceptionLMConfig(
            vision_config={
                "model_type": "timm_wrapper",
                "architecture": "vit_pe_lang_large_patch14_448",
                "do_pooling": False,
                "initializer_range": 0.02,
                "model_args": {
                    "img_size": [SIDE, SIDE],
                    "patch_size": 4,
                    "depth": 3,
                    "embed_dim": 32,
                    "num_heads": 4,
                    "mlp_ratio": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": (8, 8),
                },
            },
            vision_use_cls_token=True,
            text_config=dict(TEXT, model_type="llama"),
            projector_pooling_ratio=2,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
        )
    )


def granite_docling() -> nn.Module:
    """Granite Docling: features of lower tower layers go to the first decoder layers."""
    import transformers as tf

    model = tf.GraniteDoclingForConditionalGeneration(
        tf.GraniteDoclingConfig(
            vision_config=dict(**FINE, out_hidden_size=WIDTH, scale_factor=2, deepstack_visual_indexes=[0, 1]),
            text_config=dict(**TEXT, embedding_multiplier=2.0, logits_scaling=1.0, attention_multiplier=0.25),
            image_token_id=IMAGE,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
    )
    # Its last norm would give all tokens of a picture the same norm.
    torch.nn.init.uniform_(model.model.vision_model.connector.ln_out.weight, 0.2, 2.0)
    return model


def deepseek_vl_hybrid() -> nn.Module:
    """DeepSeek-VL 7B: SAM's tower beside SigLIP's."""
    import transformers as tf

    sam = {k: v for k, v in TOWER.items() if k != "intermediate_size"}
    return tf.DeepseekVLHybridForConditionalGeneration(
        tf.DeepseekVLHybridConfig(
            vision_config=dict(**TOWER, vision_use_head=False),
            high_res_vision_config=dict(
                **{**sam, "image_size": 64}, output_channels=16, mlp_dim=64, window_size=4, global_attn_indexes=[1]
            ),
            text_config=dict(TEXT),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )


def instructblipvideo() -> nn.Module:
    """InstructBLIP for clips: the Q-Former reads each frame."""
    import transformers as tf

    qformer = {
        "vocab_size": TEXT["vocab_size"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return tf.InstructBlipVideoForConditionalGeneration(
        tf.InstructBlipVideoConfig(
            vision_config=dict(**TOWER, initializer_range=0.02),
            qformer_config=qformer,
            text_config=tf.LlamaConfig(**TEXT).to_dict(),
            num_query_tokens=4,
            video_token_index=VIDEO,
        )
    )


def cosmos3_edge() -> nn.Module:
    """Cosmos 3 Edge: a SigLIP2-like tower with pictures in one row, a text model without gates."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    return tf.Cosmos3EdgeForConditionalGeneration(
        tf.Cosmos3EdgeConfig(
            vision_config=dict(**{**vision, "patch_size": 4}, num_patches=64, spatial_merge_size=2),
            text_config=dict(**TEXT, head_dim=16, rope_parameters=MROPE),
            projector_hidden_size=96,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def lfm3_vl() -> nn.Module:
    """LFM3-VL: a packed tower with convolutions, every second decoder layer a convolution."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    text = {**TEXT, "head_dim": 16, "sliding_window": 8}
    return tf.Lfm3VlForConditionalGeneration(
        tf.Lfm3VlConfig(
            vision_config=dict(**{**vision, "patch_size": 4}, num_key_value_heads=2, spatial_merge_size=2),
            text_config=dict(**text, layer_types=["conv", "full_attention", "conv", "sliding_attention"]),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            projector_hidden_size=96,
            tie_word_embeddings=False,
            **VISION_IDS,
        )
    )


def gemma4_unified() -> nn.Module:
    """Gemma 4 without a tower: patches go through one map."""
    import transformers as tf

    text = {
        **TEXT,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_bidirectional_attention": "vision",
    }
    return tf.Gemma4UnifiedForConditionalGeneration(
        tf.Gemma4UnifiedConfig(
            vision_config={
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 64,
                "output_proj_dims": 32,
            },
            text_config=text,
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=START,
            eoi_token_id=END,
            tie_word_embeddings=False,
        )
    )


def cohere_compass() -> nn.Module:
    """North Micro Vision: windows, features of lower tower layers for the first decoder layers."""
    import transformers as tf

    return tf.CohereCompassForConditionalGeneration(
        tf.CohereCompassConfig(
            vision_config=dict(**PACKED, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            text_config=dict(
                **TEXT,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"] * 2,
                rope_parameters={"sliding_attention": dict(MROPE), "full_attention": None},
            ),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def muse_glimmer() -> nn.Module:
    """Muse Glimmer: windows, layers without positions, gates."""
    import transformers as tf

    vision = {k: v for k, v in TOWER.items() if k != "image_size"}
    text = {**TEXT, **{k: v for k, v in WINDOWED.items() if k != "query_pre_attn_scalar"}}
    return tf.MuseGlimmerForConditionalGeneration(
        tf.MuseGlimmerConfig(
            vision_config=dict(**{**vision, "patch_size": 4}, pos_emb_height=8, pos_emb_width=8),
            text_config=dict(**text, layer_rope_theta=[1e4, 0, 1e4, 1e4], rms_norm_eps=0.3),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            out_hidden_size=128,
            projector_hidden_size=64,
            tie_word_embeddings=False,
        )
    )


def idefics2() -> nn.Module:
    """Idefics 2: latents read the tower."""
    import transformers as tf

    model = tf.Idefics2ForConditionalGeneration(
        tf.Idefics2Config(
            vision_config=dict(FINE),
            perceiver_config={
                "hidden_size": WIDTH,
                "resampler_n_latents": 16,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            text_config=dict(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
            tie_word_embeddings=False,
        )
    )
    # Its last norm would give all tokens of a picture the same norm.
    torch.nn.init.uniform_(model.model.connector.perceiver_resampler.norm.weight, 0.2, 2.0)
    return model
