"""A Hugging Face cache in a folder, so that pages of the docs run as they stand, without a network.

The checkpoints have the names, classes, depths and grids of the real ones, and random weights; all but timm's are
narrow. Counts of tokens are those of the real models, answers mean nothing, and MACs are timm's alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
import torch
import transformers as tf

from . import checkpoints

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WORDS = "a photo of cat dog car what is on in this the picture mat how many are there and it where ? . : red blue"
TEMPLATE = """\
{%- for message in messages -%}
{{ message.role.upper() }}:{%- if message.content is string -%}{{ ' ' + message.content }}{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{ ' IMAGE\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}{{ ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def tokenizer(*special: str, end: bool = False) -> tf.PreTrainedTokenizerFast:
    """The words of the pages; CLIP takes an end of text with the id 2 for a config of old, so here it is 3."""
    first = ("<pad>", "<s>", "<unk>", "</s>")
    return checkpoints.tokenizer(*special, words=WORDS, first=first, end=end, length=77 if end else 4096)


def _llava(folder: Path) -> None:
    """CLIP-L/14 at 336 px (24 x 24 patches) in front of 32 layers."""
    size = {"side": 336, "patch": 14, "layers": 32, "width": 32, "blocks": 24}
    checkpoints.llava_of(folder, tokenizer("<image>"), TEMPLATE, **size, names=WORDS.split())


def _qwen(folder: Path) -> None:
    """Pictures at their own size, squares of 2 x 2 patches merged, 28 layers with M-RoPE."""
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(*marks)
    ids = words.convert_tokens_to_ids(marks)
    vision = {
        "depth": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=checkpoints.text_config(words, 28, rope_parameters=rope),
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(**sizes, size=edges),
        words,
        tf.Qwen2VLVideoProcessor(**sizes, size=edges),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    checkpoints.save(folder, tf.Qwen2_5_VLForConditionalGeneration(config), processor, names=WORDS.split())


def _clip(folder: Path) -> None:
    """A dual encoder: 7 x 7 patches, 12 layers each."""
    words = tokenizer(end=True)
    text = dict(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        image_size=224,
        patch_size=32,
    )
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    size = {"shortest_edge": 224}
    pictures = tf.CLIPImageProcessor(size=size, crop_size={"height": 224, "width": 224})
    checkpoints.save(folder, tf.CLIPModel(config), tf.CLIPProcessor(pictures, words), gain=2.0)


def _timm(name: str) -> Callable[[Path], None]:
    """A timm model as the hub holds it: the real widths too."""

    def save(folder: Path) -> None:
        import timm

        model = timm.create_model(name)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
        config = {key: value for key, value in model.pretrained_cfg.items() if isinstance(value, (str, int, float))}
        (folder / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": config}))

    return save


REPOSITORIES: Mapping[str, Callable[[Path], None]] = {
    "llava-hf/llava-1.5-7b-hf": _llava,
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen,
    "openai/clip-vit-base-patch32": _clip,
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": _timm("vit_base_patch16_224"),
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k": _timm("vit_tiny_patch16_224"),
}
"""By id, what saves the repository's files."""


def fill(home: Path) -> None:
    """Makes `home` a folder for HF_HOME that holds every one of `REPOSITORIES`."""
    for name, save in REPOSITORIES.items():
        place = home / "hub" / f"models--{name.replace('/', '--')}"
        shutil.rmtree(place, ignore_errors=True)
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        torch.manual_seed(0)
        save(place / "snapshots" / COMMIT)


def pictures(folder: Path) -> None:
    """The pictures that pages open, by the names they use."""
    checkpoints.picture(640, 480).save(folder / "picture.jpg")
    checkpoints.picture(480, 640).save(folder / "other.jpg")
