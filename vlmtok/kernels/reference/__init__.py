"""Plain torch definitions of the ops: what each means, and the path on CPU.

Selection maths is fp32 with autocast and TF32 off. Ties go to the lowest index; NaN loses. Arguments are checked by the
public functions of `vlmtok.kernels`, not here.
"""

from .attention import attention_rows, key_bias, log_size, received_attention
from .columns import causal_column_sums, per_key_head, row_bias
from .coverage import greedy_cover, greedy_cover_cosine
from .determinant import greedy_determinant
from .duplicates import drop_duplicates
from .energies import energy
from .matching import bipartite_match, complete_match, energy_match, guided_match, match_max, query_cosine
from .merging import merge_rows, merge_rows_biased, merge_rows_grad, pair_weights
from .rows import take_rows, unit_rows
from .selection import greedy_select, most_isolated
from .transition import transition_stats

__all__ = [
    "attention_rows",
    "bipartite_match",
    "causal_column_sums",
    "complete_match",
    "drop_duplicates",
    "energy",
    "energy_match",
    "greedy_cover",
    "greedy_cover_cosine",
    "greedy_determinant",
    "greedy_select",
    "guided_match",
    "key_bias",
    "log_size",
    "match_max",
    "merge_rows",
    "merge_rows_biased",
    "merge_rows_grad",
    "most_isolated",
    "pair_weights",
    "per_key_head",
    "query_cosine",
    "received_attention",
    "row_bias",
    "take_rows",
    "transition_stats",
    "unit_rows",
]
