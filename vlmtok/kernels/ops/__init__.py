"""The public ops: check the arguments, choose the path, run."""

from .attention import attention_rows, received_attention
from .columns import causal_column_sums
from .coverage import greedy_cover, greedy_cover_cosine
from .determinant import greedy_determinant
from .duplicates import drop_duplicates
from .energies import energy
from .matching import bipartite_match, complete_match, energy_match, guided_match, match_max
from .merging import merge_rows, merge_rows_biased
from .selection import greedy_select
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
    "match_max",
    "merge_rows",
    "merge_rows_biased",
    "received_attention",
    "transition_stats",
]
