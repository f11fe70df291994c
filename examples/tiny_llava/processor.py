"""The processor: a word-level tokenizer, CLIP's picture processor at 96 px, and the chat template of LLaVA 1.5."""

from __future__ import annotations

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


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that lower-cases, splits off punctuation and reads British spelling as American."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=UNKNOWN))
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
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary().index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """The processor that belongs to the checkpoint."""
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
