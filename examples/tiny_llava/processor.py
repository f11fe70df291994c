"""The processor: a word-level tokenizer, CLIP's picture processor at 96 px, and the chat template of LLaVA 1.5."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tiny_llava.scenes import COLORS, KINDS, PLACES, PLURALS, SIZE
from tiny_llava.tower import MEAN, PATCH, STD

PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"
_SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
_FRAME = "what which where how many color shape digit thing things shown is are there the of at in ?"

# USER: <image>\n{question} ASSISTANT:{answer}</s>, pictures first, as the template of LLaVA 1.5 has it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message.role != 'system' -%}{{ message.role.upper() + ':' }}{%- endif -%}
  {%- if message.content is string -%}{{ ' ' + message.content }}
  {%- else -%}
    {%- for part in message.content if part.type == 'image' -%}{{ ' <image>\n' }}{%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}
      {{ ('' if loop.first and message.content | selectattr('type', 'equalto', 'image') | list else ' ') + part.text }}
    {%- endfor -%}
  {%- endif -%}
  {{ '</s>' if message.role == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def vocabulary() -> list[str]:
    """Every token, special ones first."""
    phrases = (_FRAME, *KINDS, *COLORS, *PLURALS.values(), *PLACES)
    return [*_SPECIAL, *sorted({word for phrase in phrases for word in phrase.split()})]


def build_tokenizer(words: Sequence[str] | None = None, positions: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer that lower-cases, splits off punctuation and reads British spelling as American.

    Args:
        words: Its tokens in order, special ones first; by default `vocabulary()`.
        positions: The longest row it is for.
    """
    words = vocabulary() if words is None else words
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("colour", "color"),
            normalizers.Replace("centre", "center"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=positions,
    )


def build_processor(
    tokenizer: PreTrainedTokenizerFast | None = None, size: int = SIZE, template: str = CHAT_TEMPLATE
) -> LlavaProcessor:
    """The processor that belongs to the checkpoint, or one for other words and larger pictures."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer() if tokenizer is None else tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
