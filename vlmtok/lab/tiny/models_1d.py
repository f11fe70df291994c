"""Tiny random vision-language models whose text model counts positions in one dimension; a family is a function."""

from __future__ import annotations

from typing import Any

from torch import nn

from .prompts import AUDIO, BOS, END, IMAGE, PAD, START, VIDEO, VOCAB
from .shots import SIDE
from .sizes import TEXT, TOWER, WIDTH


def llava() -> nn.Module:
    """LLaVA 1.5: a CLIP tower, one linear map after another, a Llama."""
    import transformers as tf

    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava_next() -> nn.Module:
    """LLaVA-NeXT: crops on a canvas, a Mistral."""
    import transformers as tf

    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.MistralConfig(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def llava_onevision(aspect: str = "anyres_max_9") -> nn.Module:
    """LLaVA-OneVision: crops and clips, a SigLIP tower without its head, a Qwen2.

    Args:
        aspect: ``vision_aspect_ratio``: how many crops a picture is cut into at most.
    """
    import transformers as tf

    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=aspect,
        )
    )


def internvl() -> nn.Module:
    """InternVL: tiles, a pixel shuffle."""
    import transformers as tf

    vision = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(**vision),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


FINE = {**TOWER, "patch_size": 4}


def smolvlm() -> nn.Module:
    """SmolVLM: tiles by sample."""
    import transformers as tf

    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(
            vision_config=dict(FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
    )


def idefics3() -> nn.Module:
    """Idefics 3: tiles by sample."""
    import transformers as tf

    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            vision_config=dict(FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
    )


def mistral3() -> nn.Module:
    """Mistral Small 3.1: a Pixtral tower, a break behind every row of patches."""
    import transformers as tf

    return tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            vision_config=tf.PixtralVisionConfig(**{**TOWER, "image_size": 64}, head_dim=8),
            text_config=tf.MistralConfig(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )


WINDOWED = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 16,
}


def gemma3() -> nn.Module:
    """Gemma 3: windows, and picture tokens that see each other both ways."""
    import transformers as tf

    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=dict(**FINE, vision_use_head=False),
            text_config=tf.Gemma3TextConfig(**TEXT, **WINDOWED),
            image_token_id=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
        )
    )


def gemma4(bidirectional: str | None = "vision") -> nn.Module:
    """Gemma 4: windows, inputs for each layer, late layers that share keys.

    Args:
        bidirectional: which tokens see each other both ways: ``vision``, or None for none.
    """
    import transformers as tf

    text = {
        **TEXT,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "use_bidirectional_attention": bidirectional,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    return tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            vision_config=tf.Gemma4VisionConfig(**vision),
            text_config=tf.Gemma4TextConfig(**text),
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=START,
            eoi_token_id=END,
            tie_word_embeddings=False,
        )
    )


def paligemma(second: bool = False) -> nn.Module:
    """PaliGemma: the prompt sees itself both ways; the second one has windows.

    Args:
        second: whether it is PaliGemma 2.
    """
    import transformers as tf

    text = tf.Gemma2Config(**TEXT, **WINDOWED) if second else tf.GemmaConfig(**TEXT, head_dim=16)
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            vision_config=dict(**TOWER, projection_dim=WIDTH, model_type="siglip_vision_model", vision_use_head=False),
            text_config=text,
            image_token_id=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            tie_word_embeddings=False,
        )
    )


def llama4(floor_scale: int = 8192) -> nn.Module:
    """Llama 4: attention in chunks, experts, layers without positions.

    Args:
        floor_scale: tokens after which attention warms up.
    """
    import transformers as tf

    vision = {
        **FINE,
        "intermediate_size": 128,
        "vision_output_dim": WIDTH,
        "projector_input_dim": WIDTH,
        "projector_output_dim": WIDTH,
    }
    text = dict(
        **TEXT,
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        floor_scale=floor_scale,
    )
    return tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(
            vision_config=tf.Llama4VisionConfig(**vision),
            text_config=tf.Llama4TextConfig(**text),
            image_token_id=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )


def aya_vision() -> nn.Module:
    """Aya Vision: windows, a SigLIP tower."""
    import transformers as tf

    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(
            vision_config=tf.SiglipVisionConfig(**FINE, vision_use_head=False),
            text_config=tf.Cohere2Config(**text),
            image_token_id=IMAGE,
            downsample_factor=2,
            tie_word_embeddings=False,
        )
    )


def cohere2_vision() -> nn.Module:
    """Command A Vision: windows, a SigLIP tower."""
    import transformers as tf

    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return tf.Cohere2VisionForConditionalGeneration(
        tf.Cohere2VisionConfig(
            vision_config=tf.SiglipVisionConfig(**FINE, vision_use_head=False),
            text_config=tf.Cohere2Config(**text),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
            tie_word_embeddings=False,
        )
    )


def lfm2_vl() -> nn.Module:
    """LFM2-VL: every second decoder layer is a convolution."""
    import transformers as tf

    vision = {**TOWER, "num_patches": 64, "patch_size": 4, "vision_use_head": False}
    vision.pop("image_size")
    text = {**TEXT, "layer_types": ["conv", "full_attention"] * 2}
    return tf.Lfm2VlForConditionalGeneration(
        tf.Lfm2VlConfig(
            vision_config=tf.Siglip2VisionConfig(**vision),
            text_config=tf.Lfm2Config(**text),
            image_token_id=IMAGE,
            projector_hidden_size=WIDTH,
            downsample_factor=2,
            tie_word_embeddings=False,
        )
    )


def _queries(model: Any, config: Any, vision: Any, qformer: Any, text: Any) -> nn.Module:
    return model(
        config(
            vision_config=vision(**TOWER, initializer_range=0.02).to_dict(),
            qformer_config=qformer(
                vocab_size=VOCAB,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                encoder_hidden_size=32,
                hidden_dropout_prob=0.0,
            ).to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=8,
            image_token_index=IMAGE,
        )
    )


def blip_2() -> nn.Module:
    """BLIP-2: a Q-Former, an OPT."""
    import transformers as tf

    text = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return _queries(tf.Blip2ForConditionalGeneration, tf.Blip2Config, tf.Blip2VisionConfig, tf.Blip2QFormerConfig, text)


def instructblip() -> nn.Module:
    """InstructBLIP: a Q-Former that reads the question, a Llama."""
    import transformers as tf

    return _queries(
        tf.InstructBlipForConditionalGeneration,
        tf.InstructBlipConfig,
        tf.InstructBlipVisionConfig,
        tf.InstructBlipQFormerConfig,
        tf.LlamaConfig(**TEXT),
    )
