"""The operations that every method is built from.

Each op has a plain torch definition in `reference`, which is also the path on CPU, and a fused Triton kernel. Which of
the two runs is `VLMTOK_KERNELS` or `use`: ``auto`` (a table), ``torch`` or ``triton``. Importing this module does not
import triton.
"""

from .dispatch import MODES, KernelError, mode, ran, use
from .exact import exact
from .flop_formulas import register_flop_formulas
from .ops import (
    attention_rows,
    bipartite_match,
    causal_column_sums,
    complete_match,
    drop_duplicates,
    energy,
    energy_match,
    greedy_cover,
    greedy_cover_cosine,
    greedy_determinant,
    greedy_select,
    guided_match,
    match_max,
    merge_rows,
    merge_rows_biased,
    received_attention,
    transition_stats,
)
from .reference import key_bias, pair_weights, per_key_head, query_cosine, row_bias, take_rows, unit_rows

__all__ = [
    "MODES",
    "KernelError",
    "attention_rows",
    "bipartite_match",
    "causal_column_sums",
    "complete_match",
    "drop_duplicates",
    "energy",
    "energy_match",
    "exact",
    "greedy_cover",
    "greedy_cover_cosine",
    "greedy_determinant",
    "greedy_select",
    "guided_match",
    "key_bias",
    "match_max",
    "merge_rows",
    "merge_rows_biased",
    "mode",
    "pair_weights",
    "per_key_head",
    "query_cosine",
    "ran",
    "received_attention",
    "register_flop_formulas",
    "row_bias",
    "take_rows",
    "transition_stats",
    "unit_rows",
    "use",
]
