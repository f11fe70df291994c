"""The processor: the words of the pages' questions, pictures of 192 px, two pictures named first and second."""

from __future__ import annotations

from functools import cache

from tiny_llava.processor import ASSISTANT, BOS, EOS, IMAGE, PAD, UNKNOWN, USER, build_tokenizer
from tiny_llava.processor import build_processor as build_tiny
from tokenizers import pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from vlmtok.evaluation.scenes.page import COLUMNS, ROWS, SIZE
from vlmtok.evaluation.scenes.painting import COLORS, DIGITS, SHAPES
from vlmtok.evaluation.scenes.questions import ORDINALS, PLURALS

POSITIONS = 2048
STEPS = ("1st", "2nd", "3rd")
"""What the printed digits of a number say of their order."""
_SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
_FRAME = """what which where how many high color number small shape shapes thing is are there the a of on in at and
shows picture plate bar column row cell swatch ? :"""

# As LLaVA 1.5's, but that several pictures of a message have names.
CHAT_TEMPLATE = """\
{%- set names = ['first', 'second', 'third', 'fourth'] -%}
{%- for message in messages -%}
  {%- if message.role != 'system' -%}{{ message.role.upper() + ':' }}{%- endif -%}
  {%- if message.content is string -%}{{ ' ' + message.content }}
  {%- else -%}
    {%- set pictures = message.content | selectattr('type', 'equalto', 'image') | list -%}
    {%- for part in pictures -%}
      {{ (' ' + names[loop.index0] + ' picture:' if pictures | length > 1 else '') + ' <image>\n' }}
    {%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}
      {{ ('' if loop.first and pictures else ' ') + part.text }}
    {%- endfor -%}
  {%- endif -%}
  {{ '</s>' if message.role == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token, special ones first."""
    phrases = (_FRAME, *SHAPES, *PLURALS.values(), *DIGITS, *COLORS, *ROWS, *COLUMNS, *ORDINALS, *STEPS)
    return (*_SPECIAL, *sorted({word for phrase in phrases for word in phrase.split()}))


@cache
def index() -> dict[str, int]:
    """From words to ids."""
    return {word: i for i, word in enumerate(vocabulary())}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of tiny-llava with other words, reading numbers digit by digit."""
    made = build_tokenizer(vocabulary(), POSITIONS)
    parts = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return made


@cache
def ids(text: str) -> tuple[int, ...]:
    """The ids of a text, without special ones that are not in it."""
    return tuple(tokenizer()(text, add_special_tokens=False).input_ids)


def build_processor() -> LlavaProcessor:
    """The processor that belongs to the checkpoint."""
    return build_tiny(tokenizer(), SIZE, CHAT_TEMPLATE)
