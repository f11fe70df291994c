"""The vocabulary and the chat template of the tiny checkpoints."""

from __future__ import annotations

from typing import Any

from vlmtok.loading.standins import MARKS

FIRST = ("<pad>", "<s>", "</s>", "<unk>", "USER:", "ASSISTANT:")
WORDS = [
    "what",
    "which",
    "where",
    "how",
    "many",
    "color",
    "shape",
    "digit",
    "is",
    "are",
    "there",
    "the",
    "of",
    "at",
    "in",
    "and",
    "a",
    "?",
    ".",
    ",",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "top",
    "left",
    "right",
    "bottom",
    "between",
    "picture",
    "describe",
    "compare",
]
LONGEST = 2048
"""Tokens that a prompt may have."""

TEMPLATE = """\
{%- for message in messages -%}
{{ 'USER:' if message.role == 'user' else ' ASSISTANT:' }}
{%- if message.content is string -%}{{ ' ' + message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ ' IMAGE' }}{%- else -%}{{ ' ' + part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""


def tokenizer(processor: str) -> Any:
    """A tokenizer of whole words that knows the marks of a processor.

    Args:
        processor: name of the processor's class.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    marks = MARKS[processor]
    known = [mark for mark in (marks.image, marks.video, *marks.others) if mark]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*FIRST, *known, *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", FIRST.index("<s>"))])
    asked = set(marks.names.values())
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["USER:", "ASSISTANT:", *(mark for mark in known if mark not in asked)],
        model_specific_special_tokens=dict(marks.names),
        padding_side="left",
        model_max_length=LONGEST,
    )
