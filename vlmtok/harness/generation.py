"""A task's settings for generation as those of transformers, and what is read off the new tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 1024
"""New tokens where a task does not say how many."""
TAKEN = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
)
SAMPLING = ("temperature", "top_p", "top_k")
READ = (*TAKEN, *SAMPLING, "do_sample", "until")
"""Settings that count; tasks carry some that are for single models (``image_aspect_ratio``)."""
IMPLICIT = "\n\n"
"""What lmms-eval puts into ``until`` of tasks that say nothing; its chat models stop at nothing either."""


def settings_for(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate``; sampling only where a temperature above 0 is asked.

    Args:
        asked: the task's ``generation_kwargs``.
    """
    made = {name: asked[name] for name in TAKEN if asked.get(name) is not None}
    made.setdefault("max_new_tokens", LONGEST)
    drawn = float(asked.get("temperature") or 0) > 0 and asked.get("do_sample") is not False
    # None takes away what a checkpoint's own configuration sets, of which transformers warns in greedy runs.
    made |= {name: asked.get(name) if drawn else None for name in SAMPLING}
    return {**made, "do_sample": drawn}


def stops(asked: Mapping[str, Any]) -> list[str]:
    """Strings at which an answer ends."""
    until = asked.get("until") or []
    return [one for one in ([until] if isinstance(until, str) else until) if one and one != IMPLICIT]


def cut(text: str, at: Sequence[str]) -> str:
    """An answer up to the first of the strings."""
    for one in at:
        text = text.partition(one)[0]
    return text


def length(ids: Sequence[int], ends: set[int], pad: int | None) -> tuple[int, bool]:
    """How long a row's answer is.

    Args:
        ids: new tokens of the row, padding behind the end of sequence.
        ends: ids that end a sequence.
        pad: id of padding.

    Returns:
        Tokens up to the end of sequence, itself included, and whether anything stands before it.
    """
    for place, one in enumerate(ids):
        if one in ends:
            return place + 1, place > 0
    real = [one for one in ids if one != pad]
    return len(real), bool(real)
