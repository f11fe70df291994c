"""Tiny random checkpoints on disk, with their processors, as `vlmtok run` loads them. Nothing is downloaded.

`llava` has the layout of the checkpoint that ships with the package (96 px pictures, 144 visual tokens, 16 layers);
`FAMILIES` are other vision-language models whose processors can be built offline; `vit` is a tower with class names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers as tf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    "what which where how many color shape digit is are there the of at in ? "
    "red green blue circle square 1 2 3 top left"
)
TEMPLATE = """\
{%- for message in messages -%}
USER:{%- for part in message.content if part.type == 'image' -%}{{ ' IMAGE\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""


def picture(width: int = 120, height: int = 90) -> Image.Image:
    """Shapes on a ground, so that patches differ."""
    image = Image.new("RGB", (width, height), (240, 236, 226))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.1, height * 0.1, width * 0.4, height * 0.5), fill=(200, 30, 30))
    pen.rectangle((width * 0.6, height * 0.5, width * 0.9, height * 0.9), fill=(30, 60, 200))
    return image


def tokenizer(
    *special: str,
    words: str = WORDS,
    first: Sequence[str] = ("<pad>", "<s>", "</s>", "<unk>"),
    end: bool = False,
    length: int = 1024,
) -> tf.PreTrainedTokenizerFast:
    """A vocabulary of whole words.

    Args:
        special: marks of pictures and the like.
        words: the words that it knows.
        first: the tokens with the lowest ids, in their order.
        end: a text ends with ``</s>`` and is padded behind, as CLIP's is.
        length: tokens that a text may have.
    """
    marks = [*first, "USER:", "ASSISTANT:", *special]
    names = [*marks, *words.split()]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if end else "<s> $A"
    ends = [(mark, names.index(mark)) for mark in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["USER:", "ASSISTANT:", *special],
        padding_side="right" if end else "left",
        model_max_length=length,
    )


def text_config(
    words: tf.PreTrainedTokenizerFast, layers: int = 4, width: int = 64, **more: object
) -> dict[str, object]:
    """Settings of a language model for a vocabulary of `tokenizer`."""
    return dict(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=words.model_max_length,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        tie_word_embeddings=False,
        **more,
    )


def save(
    folder: Path,
    model: torch.nn.Module,
    processor: object,
    gain: float = 4.0,
    names: Sequence[str] = tuple(WORDS.split()),
) -> Path:
    """Saves both; greater weights make the picture matter, and `names`, the last of the vocabulary, are all it says."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                if parameter.min() == parameter.max():
                    parameter.normal_(std=0.1, generator=generator)
                parameter.mul_(gain)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            head.weight[: -len(names)] = 0  # placeholders and marks are never written
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava(folder: Path, *, template: bool = True, layers: int = 16) -> Path:
    """LLaVA with the layout of the embedded checkpoint: 12 x 12 patches of 8 px."""
    return llava_of(folder, tokenizer("<image>"), TEMPLATE if template else None, side=96, patch=8, layers=layers)


def llava_of(
    folder: Path,
    words: tf.PreTrainedTokenizerFast,
    template: str | None,
    *,
    side: int,
    patch: int,
    layers: int,
    width: int = 64,
    blocks: int = 5,
    names: Sequence[str] = tuple(WORDS.split()),
) -> Path:
    """A LLaVA-1.5 on disk.

    Args:
        folder: where it goes.
        words: its vocabulary, which knows ``<image>``.
        template: of a chat, in which IMAGE stands for the mark, or None.
        side: of a picture, in pixels.
        patch: side of a patch.
        layers: of the language model.
        width: of the tower.
        blocks: of the tower.
        names: the words that it may say.
    """
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            image_size=side,
            patch_size=patch,
        ),
        text_config=tf.LlamaConfig(**text_config(words, layers)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=None if template is None else template.replace("IMAGE", "<image>"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return save(folder, tf.LlavaForConditionalGeneration(config), processor, names=names)


def llava_next(folder: Path) -> Path:
    """A thumbnail and a canvas of crops, whose width follows the picture's."""
    torch.manual_seed(0)
    words = tokenizer("<image>")
    points = [[32, 64], [64, 32], [64, 64]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=tf.LlamaConfig(**text_config(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=points,
    )
    pictures = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=points
    )
    processor = tf.LlavaNextProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return save(folder, tf.LlavaNextForConditionalGeneration(config), processor)


def qwen2_5_vl(folder: Path) -> Path:
    """Pictures at their own size, patches in one row, rotary positions in three dimensions."""
    torch.manual_seed(0)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(*marks)
    ids = words.convert_tokens_to_ids(marks)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text_config(words, rope_parameters=rope),
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
    )
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    edges = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    processor = tf.Qwen2_5_VLProcessor(
        tf.Qwen2VLImageProcessor(**sizes, size=edges),
        words,
        tf.Qwen2VLVideoProcessor(**sizes, size=edges),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return save(folder, tf.Qwen2_5_VLForConditionalGeneration(config), processor)


def paligemma(folder: Path) -> Path:
    """No chat template; picture and prompt look at each other both ways."""
    torch.manual_seed(0)
    words = tokenizer("<image>", *(f"<loc{i:04}>" for i in range(4)))
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=64,
        ),
        text_config=dict(**text_config(words), model_type="gemma", head_dim=16),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=64,
    )
    pictures = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16
    return save(folder, tf.PaliGemmaForConditionalGeneration(config), tf.PaliGemmaProcessor(pictures, words))


def idefics3(folder: Path) -> Path:
    """Crops with marks of their own between them, the whole picture last."""
    torch.manual_seed(0)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words = tokenizer(*marks, *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)))
    config = tf.Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=tf.LlamaConfig(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    pictures = tf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = tf.Idefics3Processor(
        pictures, words, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    return save(folder, tf.Idefics3ForConditionalGeneration(config), processor)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "paligemma": paligemma,
    "idefics3": idefics3,
}


def vit(folder: Path) -> Path:
    """A classifier of transformers."""
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "fish"}
    config = tf.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    pictures = tf.ViTImageProcessor(size={"height": 48, "width": 48})
    return save(folder, tf.ViTForImageClassification(config), pictures)
