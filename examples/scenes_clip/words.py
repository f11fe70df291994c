"""The processor: the words of the captions, pictures of 128 px."""

from __future__ import annotations

from functools import cache

from tiny_llava.tower import MEAN, STD
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

from vlmtok.evaluation.scenes.captioned import RELATIONS, SIDE
from vlmtok.evaluation.scenes.page import COLUMNS, ROWS
from vlmtok.evaluation.scenes.painting import COLORS, SHAPES

PAD, BOS, UNKNOWN, EOS = "<pad>", "<s>", "<unk>", "</s>"
LENGTH = 28
"""Tokens of a caption at most, with its begin and end."""
_FRAME = "a picture of small large at the with and"


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token; the end is the last, since CLIP's text towers read at the highest id."""
    phrases = (_FRAME, *RELATIONS, *ROWS, *COLUMNS, *COLORS, *SHAPES)
    return (PAD, BOS, UNKNOWN, *sorted({word for phrase in phrases for word in phrase.split()}), EOS)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that lower-cases and reads British spelling as American."""
    words = vocabulary()
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("centre", "center")]
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(word, words.index(word)) for word in (BOS, EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=LENGTH,
    )


def build_processor() -> CLIPProcessor:
    """The processor that belongs to the checkpoint."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    return CLIPProcessor(image_processor=pictures, tokenizer=tokenizer())
