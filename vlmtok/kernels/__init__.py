"""The operations that every method is built from.

Each op has a plain torch definition in `reference`; that definition is also the path on CPU.
"""

from .reference import (
    attention_rows,
    energy,
    greedy_select,
    match_max,
    merge_rows,
    received_attention,
    transition_stats,
    unit_rows,
)

__all__ = [
    "attention_rows",
    "energy",
    "greedy_select",
    "match_max",
    "merge_rows",
    "received_attention",
    "transition_stats",
    "unit_rows",
]
