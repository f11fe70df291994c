"""The tiny models on disk with their processors, as `vlmtok run` loads them. Nothing is downloaded.

A tokenizer is made whose marks have the ids that the models know; everything else is the library's own processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from .build import FAMILIES, PINPOINTS, TOWER_ONLY, shared
from .prompts import AUDIO, BOS, END, IMAGE, MARK, PAD, START, VIDEO, VOCAB
from .shots import GLM_VIDEO, SIDE

WORDS = ["what", "color", "is", "the", "circle", "?", "describe", "picture"]
TEMPLATE = """\
{%- for message in messages -%}
{%- for part in message.content if part.type == 'image' -%}{{ ' IMAGE ' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Reader:
    """A family's processor.

    Attributes:
        make: from the tokenizer and options (the chat template), the processor.
        marks: ids of the tokens that are not words.
        names: tokens that the processor asks the tokenizer for, by attribute.
        shown: what a chat template writes where a picture stands.
    """

    make: Callable[..., Any]
    marks: Mapping[str, int]
    names: Mapping[str, str] = field(default_factory=dict)
    shown: str = "<image>"


def tokenizer(reader: Reader) -> tf.PreTrainedTokenizerFast:
    """One word for each id; marks where the model has them."""
    names = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **{5 + i: word for i, word in enumerate(WORDS)}}
    names |= {number: mark for mark, number in reader.marks.items()}
    vocab = {names.get(i, f"w{i}"): i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    asked = set(reader.names.values())
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=names[PAD],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[mark for mark in reader.marks if mark not in asked],
        model_specific_special_tokens=dict(reader.names),
        padding_side="left",
        model_max_length=1024,
    )


def save(name: str, folder: Path) -> Path:
    """Saves a family's model and processor."""
    reader = READERS[name]
    model = shared(name, {**FAMILIES, **TOWER_ONLY}[name].attentions[0])
    model.save_pretrained(folder)
    made = reader.make(tokenizer(reader), chat_template=TEMPLATE.replace("IMAGE", reader.shown))
    made.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- processors
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
EDGES = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
QWEN_MARKS = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
GLM_MARKS = {
    "<|image|>": IMAGE,
    "<|video|>": VIDEO,
    "<|begin_of_image|>": START,
    "<|end_of_image|>": END,
    "<|begin_of_video|>": GLM_VIDEO[0],
    "<|end_of_video|>": GLM_VIDEO[1],
}
TILE_MARKS = {f"<row_{i}_col_{j}>": MARK + 2 * i + j - 2 for i in (1, 2) for j in (1, 2)}


def _qwen(processor: type, video: type) -> Callable[..., Any]:
    def make(words: Any, **more: Any) -> Any:
        return processor(
            tf.Qwen2VLImageProcessor(**PATCHES, **EDGES), words, video_processor=video(**PATCHES, **EDGES), **more
        )

    return make


def _onevision(words: Any, **more: Any) -> Any:
    pictures = tf.LlavaOnevisionImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS)
    clips = tf.LlavaOnevisionVideoProcessor(**SQUARE)
    return tf.LlavaOnevisionProcessor(
        pictures, words, clips, num_image_tokens=16, vision_feature_select_strategy="full", **more
    )


def _glm(processor: type, pictures: type, clips: type) -> Callable[..., Any]:
    def make(words: Any, **more: Any) -> Any:
        sizes = {"size": {"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 64 * 64}}
        return processor(pictures(**PATCHES, **sizes), words, clips(**PATCHES, **sizes), **more)

    return make


def _paddle(words: Any, **more: Any) -> Any:
    sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    return tf.PaddleOCRVLProcessor(tf.PaddleOCRVLImageProcessor(**sizes), words, **more)


def _internvl(words: Any, **more: Any) -> Any:
    pictures = tf.GotOcr2ImageProcessor(**SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    return tf.InternVLProcessor(pictures, words, tf.InternVLVideoProcessor(**SQUARE), image_seq_length=16, **more)


def _qianfan(words: Any, **more: Any) -> Any:
    pictures = tf.GotOcr2ImageProcessor(**SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    return tf.QianfanOCRProcessor(pictures, words, image_seq_length=16, **more)


def _vipllava(words: Any, **more: Any) -> Any:
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return tf.LlavaProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **more,
    )


def _mistral(words: Any, **more: Any) -> Any:
    pictures = tf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    return tf.PixtralProcessor(pictures, words, patch_size=8, spatial_merge_size=2, **more)


def _gemma3(words: Any, **more: Any) -> Any:
    return tf.Gemma3Processor(tf.Gemma3ImageProcessor(**SQUARE), words, image_seq_length=16, **more)


def _gemma4(words: Any, **more: Any) -> Any:
    sizes = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    return tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(),
        tf.Gemma4ImageProcessor(**sizes),
        words,
        tf.Gemma4VideoProcessor(**sizes),
        **more,
    )


def _llama4(words: Any, **more: Any) -> Any:
    pictures = tf.Llama4ImageProcessor(**SQUARE, max_patches=4)
    return tf.Llama4Processor(pictures, words, patch_size=4, **more)


def _aya(words: Any, **more: Any) -> Any:
    pictures = tf.GotOcr2ImageProcessor(**SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
    return tf.AyaVisionProcessor(pictures, words, patch_size=4, img_size=SIDE, downsample_factor=2, **more)


def _cohere(words: Any, **more: Any) -> Any:
    pictures = tf.Cohere2VisionImageProcessor(
        **SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, patch_size=4
    )
    return tf.Cohere2VisionProcessor(pictures, words, **more)


def _lfm(words: Any, **more: Any) -> Any:
    pictures = tf.Lfm2VlImageProcessor(
        downsample_factor=2,
        tile_size=32,
        encoder_patch_size=4,
        min_image_tokens=4,
        max_image_tokens=16,
        max_num_patches=64,
        min_tiles=2,
        max_tiles=4,
    )
    return tf.Lfm2VlProcessor(pictures, words, **more)


def _blip(words: Any, **more: Any) -> Any:
    return tf.Blip2Processor(tf.BlipImageProcessor(**SQUARE), words, num_query_tokens=8)


def _instructblip(words: Any, **more: Any) -> Any:
    return tf.InstructBlipProcessor(tf.BlipImageProcessor(**SQUARE), words, words, num_query_tokens=8)


READERS: dict[str, Reader] = {
    "llava_onevision": Reader(_onevision, {"<image>": IMAGE, "<video>": VIDEO}),
    **{
        name: Reader(_qwen(processor, video), QWEN_MARKS, shown="<|vision_start|> <|image_pad|> <|vision_end|>")
        for name, processor, video in (
            ("qwen2_vl", tf.Qwen2VLProcessor, tf.Qwen2VLVideoProcessor),
            ("qwen2_5_vl", tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor),
            ("qwen3_vl", tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
            ("qwen3_vl_moe", tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
            ("qwen3_5", tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
            ("qwen3_5_moe", tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
        )
    },
    "glm4v": Reader(
        _glm(tf.Glm4vProcessor, tf.Glm4vImageProcessor, tf.Glm4vVideoProcessor),
        GLM_MARKS,
        shown="<|begin_of_image|> <|image|> <|end_of_image|>",
    ),
    "glm46v": Reader(
        _glm(tf.Glm46VProcessor, tf.Glm46VImageProcessor, tf.Glm46VVideoProcessor),
        GLM_MARKS,
        shown="<|begin_of_image|> <|image|> <|end_of_image|>",
    ),
    "glm4v_moe": Reader(
        _glm(tf.Glm4vProcessor, tf.Glm4vImageProcessor, tf.Glm4vVideoProcessor),
        GLM_MARKS,
        shown="<|begin_of_image|> <|image|> <|end_of_image|>",
    ),
    "vipllava": Reader(_vipllava, {"<image>": IMAGE}, {"image_token": "<image>"}),
    "qianfan_ocr": Reader(
        _qianfan,
        {"<img>": START, "</img>": END, "<ctx>": IMAGE},
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<ctx>"},
        "<image>",
    ),
    "paddleocr_vl": Reader(
        _paddle, {"<|image|>": IMAGE, "<|start|>": START, "<|end|>": END}, {"image_token": "<|image|>"}, "<|image|>"
    ),
    "internvl": Reader(
        _internvl,
        {"<img>": START, "</img>": END, "<ctx>": IMAGE, "<video>": VIDEO},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<ctx>",
            "video_token": "<video>",
        },
        "<ctx>",
    ),
    "mistral3": Reader(_mistral, {"[IMG]": IMAGE, "[IMG_BREAK]": START, "[IMG_END]": END}, shown="[IMG]"),
    "gemma3": Reader(
        _gemma3,
        {"<image>": IMAGE, "<boi>": START, "<eoi>": END},
        {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        "<boi>",
    ),
    "gemma4": Reader(
        _gemma4,
        {
            "<image>": IMAGE,
            "<|video|>": VIDEO,
            "<boi>": START,
            "<eoi>": END,
            "<audio>": AUDIO,
            "<boa>": MARK,
            "<eoa>": MARK + 1,
        },
        {f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")},
    ),
    "llama4": Reader(
        _llama4,
        {
            "<|image|>": MARK,
            "<|image_start|>": START,
            "<|image_end|>": END,
            "<|patch|>": IMAGE,
            "<|tile_x_separator|>": MARK + 1,
            "<|tile_y_separator|>": MARK + 2,
        },
        shown="<|image|>",
    ),
    "aya_vision": Reader(
        _aya,
        {
            "<image>": MARK,
            "<|START_OF_IMG|>": START,
            "<|END_OF_IMG|>": END,
            "<|IMG_PATCH|>": IMAGE,
            **{f"TILE_{i}": MARK + i for i in range(1, 6)},
            "TILE_GLOBAL": MARK + 6,
        },
    ),
    "cohere2_vision": Reader(
        _cohere,
        {"<image>": IMAGE, "<boi>": START, "<eoi>": END, "<break>": MARK},
        {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "img_line_break_token": "<break>"},
    ),
    "lfm2_vl": Reader(
        _lfm,
        {
            "<image>": IMAGE,
            "<|image_start|>": START,
            "<|image_end|>": END,
            "<|img_thumbnail|>": MARK,
            **{
                f"<|img_row_{i}_col_{j}|>": MARK + 4 * i + j
                for i in (1, 2, 3, 4)
                for j in (1, 2, 3, 4)
                if 4 * i + j < 20
            },
        },
    ),
    "blip-2": Reader(_blip, {"<image>": IMAGE}),
    "instructblip": Reader(_instructblip, {"<image>": IMAGE}),
}
"""By name of the family; those of `tests/support/checkpoints.py` have checkpoints of their own."""

WITHOUT = {
    "smolvlm": "its processor wants the package num2words",
    **dict.fromkeys(("cosmos3_omni", "glm_ocr", "fast_vlm"), "transformers names no processor for it"),
    **dict.fromkeys(
        (
            *("deepseek_vl", "deepseek_vl_hybrid", "janus", "lighton_ocr", "hyperclovax_vision_v2", "exaone4_5"),
            *("glmga", "llava_next_video", "ovis2", "got_ocr2", "pp_chart2table", "perception_lm", "granite_docling"),
            *("cosmos3_edge", "lfm3_vl", "muse_glimmer", "muse_spark", "cohere_compass", "kimi_k25", "step3p7"),
            *("gemma4_unified", "instructblipvideo", "aria", "idefics2"),
        ),
        "its processor is not set up here for pictures of a few patches and a vocabulary of words",
    ),
}
"""Families without a checkpoint here, and why."""
