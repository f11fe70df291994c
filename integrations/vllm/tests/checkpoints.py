"""Tiny random checkpoints with their processors, as an engine loads them from a folder. Nothing is downloaded.

Heads of the language models are 32 wide, the least that vLLM's attention on a CPU takes; weights are large enough that
another picture, or another choice of its tokens, gives other log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from words import LONGEST, TEMPLATE, WORDS, tokenizer

SIDE = 32
"""Pixels of a crop of the families that cut pictures into crops."""

POINTS = [[32, 64], [64, 32], [64, 64]]
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CLIP = {**TOWER, "projection_dim": 64}
PACKED: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}


@dataclass(frozen=True)
class Family:
    """A family's model and processor.

    Attributes:
        processor: name of the processor's class.
        model: the model, from the tokenizer.
        reader: the processor, from the tokenizer and options (the chat template).
        shown: what a prompt says where a picture stands.
        gain: factor on the matrices of the language model and its head, and
        tower_gain: on those of the tower and the projector.
    """

    processor: str
    model: Callable[[Any], Any]
    reader: Callable[..., Any]
    shown: str = "<image>"
    gain: float = 6.0
    tower_gain: float = 4.0


def make(family: str, folder: Path | str) -> Path:
    """Saves model and processor of a family of `FAMILIES`, always the same.

    Args:
        family: key of `FAMILIES`.
        folder: where they go; it is made.

    Returns:
        The folder.
    """
    row = FAMILIES[family]
    words = tokenizer(row.processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = row.model(words).eval()
    _enlarge(model, row)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = words.pad_token_id
    model.save_pretrained(folder)
    row.reader(words, chat_template=TEMPLATE.replace("IMAGE", row.shown)).save_pretrained(folder)
    return Path(folder)


def prompt(family: str, pictures: int, text: str = "what is in the picture ?") -> str:
    """A prompt with a mark for each picture, as a processor and an engine take it.

    Args:
        family: key of `FAMILIES`.
        pictures: how many stand before the text.
        text: words of `words.WORDS`; others are unknown to the model.
    """
    return f"USER: {' '.join([FAMILIES[family].shown] * pictures)} {text} ASSISTANT:"


def _enlarge(model: Any, row: Family) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                if parameter.min() == parameter.max():  # what the host starts from zeros or ones
                    parameter.normal_(std=0.1, generator=generator)
                text = any(part in name for part in ("language_model", "text_model", "lm_head"))
                parameter.mul_(row.gain if text else row.tower_gain)
        model.get_output_embeddings().weight[: -len(WORDS)] = 0  # marks are never written


# ---------------------------------------------------------------------- models
def _text(words: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": LONGEST,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen2(words: Any) -> dict[str, Any]:
    text = _text(words)
    del text["head_dim"]  # hidden_size / num_attention_heads there
    return text


def _id(words: Any, mark: str) -> int:
    return int(words.convert_tokens_to_ids(mark))


def _llava(tower: Any, strategy: str) -> Callable[[Any], Any]:
    def model(words: Any) -> Any:
        return tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tower,
                text_config=tf.LlamaConfig(**_text(words)),
                image_token_id=_id(words, "<image>"),
                image_seq_length=64,
                vision_feature_layer=-2,
                vision_feature_select_strategy=strategy,
            )
        )

    return model


def _llava_next(words: Any) -> Any:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**CLIP, image_size=SIDE, patch_size=8),
            text_config=tf.LlamaConfig(**_text(words)),
            image_token_id=_id(words, "<image>"),
            image_grid_pinpoints=POINTS,
        )
    )


def _llava_onevision(words: Any) -> Any:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**TOWER, image_size=SIDE, patch_size=8, vision_use_head=False),
            text_config=tf.Qwen2Config(**_qwen2(words)),
            image_token_id=_id(words, "<image>"),
            video_token_id=_id(words, "<video>"),
            image_grid_pinpoints=POINTS,
        )
    )


def _qwen_vl(model: str, config: str, vision: dict[str, Any], **more: Any) -> Callable[[Any], Any]:
    def made(words: Any) -> Any:
        return getattr(tf, model)(
            getattr(tf, config)(
                vision_config=dict(vision),
                text_config=dict(**_qwen2(words), rope_parameters=dict(MROPE), **more),
                image_token_id=_id(words, "<|image_pad|>"),
                video_token_id=_id(words, "<|video_pad|>"),
                vision_start_token_id=_id(words, "<|vision_start|>"),
                vision_end_token_id=_id(words, "<|vision_end|>"),
                tie_word_embeddings=False,
            )
        )

    return made


def _internvl(words: Any) -> Any:
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(**TOWER, image_size=[SIDE, SIDE], patch_size=[4, 4]),
            text_config=tf.Qwen2Config(**_qwen2(words)),
            image_token_id=_id(words, "<IMG_CONTEXT>"),
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


def _gemma3(words: Any) -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=dict(**TOWER, image_size=SIDE, patch_size=4, vision_use_head=False),
            text_config=tf.Gemma3TextConfig(**_text(words), **layers, query_pre_attn_scalar=32),
            image_token_id=_id(words, "<image_soft_token>"),
            boi_token_index=_id(words, "<start_of_image>"),
            eoi_token_index=_id(words, "<end_of_image>"),
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
        )
    )


def _idefics(model: str, config: str) -> Callable[[Any], Any]:
    def made(words: Any) -> Any:
        return getattr(tf, model)(
            getattr(tf, config)(
                vision_config=dict(**TOWER, image_size=SIDE, patch_size=4),
                text_config=tf.LlamaConfig(**_text(words)),
                image_token_id=_id(words, "<image>"),
                scale_factor=2,
                tie_word_embeddings=False,
            )
        )

    return made


# ---------------------------------------------------------------------- processors
def _llava_reader(pictures: Any, strategy: str, more_tokens: int) -> Callable[..., Any]:
    def reader(words: Any, **more: Any) -> Any:
        return tf.LlavaProcessor(
            pictures(),
            words,
            patch_size=6,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=more_tokens,
            **more,
        )

    return reader


def _llava_next_reader(words: Any, **more: Any) -> Any:
    square = {"shortest_edge": SIDE}
    crop = {"height": SIDE, "width": SIDE}
    return tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessor(size=square, crop_size=crop, image_grid_pinpoints=POINTS),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **more,
    )


def _llava_onevision_reader(words: Any, **more: Any) -> Any:
    square = {"size": {"height": SIDE, "width": SIDE}}
    return tf.LlavaOnevisionProcessor(
        tf.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=POINTS),
        words,
        tf.LlavaOnevisionVideoProcessor(**square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        **more,
    )


def _qwen_reader(processor: str, clips: str) -> Callable[..., Any]:
    sizes: dict[str, Any] = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
    }

    def reader(words: Any, **more: Any) -> Any:
        return getattr(tf, processor)(tf.Qwen2VLImageProcessor(**sizes), words, getattr(tf, clips)(**sizes), **more)

    return reader


def _internvl_reader(words: Any, **more: Any) -> Any:
    square = {"size": {"height": SIDE, "width": SIDE}}
    pictures = tf.GotOcr2ImageProcessor(**square, crop_to_patches=True, min_patches=1, max_patches=4)
    return tf.InternVLProcessor(pictures, words, tf.InternVLVideoProcessor(**square), image_seq_length=16, **more)


def _gemma3_reader(words: Any, **more: Any) -> Any:
    pictures = tf.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return tf.Gemma3Processor(pictures, words, image_seq_length=16, **more)


def _idefics_reader(words: Any, **more: Any) -> Any:
    pictures = tf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": SIDE})
    return tf.Idefics3Processor(pictures, words, image_seq_len=16, **more)


SQUARE = {"height": 48, "width": 48}
"""Size of LLaVA's pictures; a SigLIP processor does not crop, but LlavaProcessor counts tokens by `crop_size`."""

QWEN_SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"

FAMILIES: dict[str, Family] = {
    "llava_clip": Family(
        "LlavaProcessor",
        _llava(tf.CLIPVisionConfig(**CLIP, image_size=48, patch_size=6), "default"),
        _llava_reader(lambda: tf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE), "default", 1),
    ),
    "llava_siglip": Family(
        "LlavaProcessor",
        _llava(tf.SiglipVisionConfig(**TOWER, image_size=48, patch_size=6, vision_use_head=False), "full"),
        _llava_reader(lambda: tf.SiglipImageProcessor(size=SQUARE, crop_size=SQUARE), "full", 0),
    ),
    "llava_next": Family("LlavaNextProcessor", _llava_next, _llava_next_reader),
    "llava_onevision": Family("LlavaOnevisionProcessor", _llava_onevision, _llava_onevision_reader),
    "qwen2_vl": Family(
        "Qwen2VLProcessor",
        _qwen_vl(
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {"depth": 3, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 128},
        ),
        _qwen_reader("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
        QWEN_SHOWN,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLProcessor",
        _qwen_vl(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {**PACKED, "window_size": 16, "fullatt_block_indexes": [1]},
        ),
        _qwen_reader("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        QWEN_SHOWN,
    ),
    "qwen3_vl": Family(
        "Qwen3VLProcessor",
        _qwen_vl(
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            {**PACKED, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            head_dim=32,
        ),
        _qwen_reader("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        QWEN_SHOWN,
    ),
    "internvl": Family("InternVLProcessor", _internvl, _internvl_reader, "<IMG_CONTEXT>"),
    "gemma3": Family("Gemma3Processor", _gemma3, _gemma3_reader, "<start_of_image>"),
    "idefics3": Family(
        "Idefics3Processor", _idefics("Idefics3ForConditionalGeneration", "Idefics3Config"), _idefics_reader
    ),
}
