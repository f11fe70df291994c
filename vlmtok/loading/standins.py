"""Tokenizers that know a family's marks and no words: what a processor needs to lay out a prompt without a checkpoint.

How many tokens a picture becomes does not depend on the vocabulary; a processor asks its tokenizer for marks alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

END = "</s>"


@dataclass(frozen=True)
class Marks:
    """The marks of a family.

    Attributes:
        image: placeholder of a picture's tokens, which has the model's own id.
        video: the same for clips, or None.
        others: marks that are one token each.
        names: attributes under which a processor asks the tokenizer for marks.
    """

    image: str
    video: str | None = None
    others: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)


_QWEN = Marks("<|image_pad|>", "<|video_pad|>", ("<|vision_start|>", "<|vision_end|>"))
_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9))
_IDEFICS = Marks("<image>", None, ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILES))
_INTERNVL = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}

MARKS: dict[str, Marks] = {
    "LlavaProcessor": Marks("<image>"),
    "LlavaNextProcessor": Marks("<image>"),
    "LlavaOnevisionProcessor": Marks("<image>", "<video>"),
    "Qwen2VLProcessor": _QWEN,
    "Qwen2_5_VLProcessor": _QWEN,
    "Qwen3VLProcessor": _QWEN,
    "InternVLProcessor": Marks(
        "<IMG_CONTEXT>", "<video>", ("<img>", "</img>"), {**_INTERNVL, "video_token": "<video>"}
    ),
    "Gemma3Processor": Marks("<image_soft_token>", None, ("<start_of_image>", "<end_of_image>"), _GEMMA),
    "Idefics3Processor": _IDEFICS,
    "SmolVLMProcessor": _IDEFICS,
}
"""By class of the processor."""


def tokenizer(marks: Marks, image: int, video: int | None) -> Any:
    """A tokenizer of transformers that knows these marks.

    Args:
        marks: of the family.
        image: id of the placeholder of pictures.
        video: id of the placeholder of clips, or None.
    """
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    fixed = {marks.image: image}
    if marks.video is not None:
        fixed[marks.video] = image + 1 if video is None else video
    free = (number for number in range(10**6) if number not in fixed.values())
    vocab = {**{name: next(free) for name in ("<pad>", "<s>", END, "<unk>", *marks.others)}, **fixed}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    # Words, single digits and single signs: what most vocabularies make of a time stamp.
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s*[^\W\d]+|\d|[^\w\s]|\s+"), "isolated")
    asked = set(marks.names.values())
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=END,
        unk_token="<unk>",
        extra_special_tokens=[mark for mark in (marks.image, marks.video, *marks.others) if mark and mark not in asked],
        model_specific_special_tokens=dict(marks.names),
    )
