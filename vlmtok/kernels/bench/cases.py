"""The ops and sizes that are reported, with what each must read, multiply and launch."""

from __future__ import annotations

from .attention_cases import cached, received
from .choice_cases import cover_cosine, cover_table, determinant, duplicates, farthest_point, farthest_sum
from .drawn_cases import drawn_cases, lacking
from .floors import Case
from .tower_cases import tower_layer, transition

_WORDS = 24
"""Of a question, beside the picture's tokens among what a table covers."""


def cases(small: bool = False) -> list[Case]:
    """The sizes that are reported.

    Args:
        small: sizes for a processor, to see that the benchmark works.

    Returns:
        The cases, op by op: those written here, and those drawn of other ops with a kernel (see `drawn_cases`).
    """
    written = _small() if small else _reported()
    return sorted([*written, *drawn_cases({case.op for case in written}, small)], key=lambda case: case.op)


def without_case() -> dict[str, str]:
    """Public ops with a kernel that the benchmark leaves out, and why."""
    return lacking({case.op for case in _small()})


def _reported() -> list[Case]:
    """Of the models that users run: CLIP-L at 336 pixels, language models of 7B, one picture and several crops."""
    language = [(576, 57, 4096, 1), (576, 57, 4096, 8), (2880, 288, 4096, 1), (16384, 1638, 3584, 1)]
    vision = [(576, 57, 1024, 1), (576, 57, 1024, 8), (2880, 288, 1024, 1)]
    return [
        *(case for batch in (1, 32, 256) for case in tower_layer(batch)),
        *(farthest_sum(*size) for size in language),
        *(determinant(*size) for size in language),
        *(farthest_point(*size) for size in vision),
        *(cover_cosine(*size) for size in vision),
        *(cover_table(n, k, n + _WORDS, batch) for n, k, _, batch in vision),
        *(duplicates(*size) for size in [(544, 32, 1024, 1), (544, 32, 1024, 8), (2736, 144, 1024, 1)]),
        *(transition(*size) for size in [(640, 4096, 1), (640, 4096, 8), (2944, 4096, 1), (16384, 3584, 1)]),
        *(received(*size) for size in [(1024, 32, 128, 16), (4096, 32, 128, 1), (16384, 32, 128, 1)]),
        *(cached(*size) for size in [(640, 32, 32, 128, 1), (640, 32, 32, 128, 8)]),
        *(cached(*size) for size in [(2944, 32, 8, 128, 1), (16384, 28, 4, 128, 1)]),
    ]


def _small() -> list[Case]:
    """Of every op above, one."""
    return [
        *tower_layer(2, 8),
        farthest_sum(64, 8, 32, 2),
        determinant(64, 8, 32, 2),
        farthest_point(64, 8, 32, 2),
        cover_cosine(64, 8, 32, 2),
        cover_table(64, 8, 64 + _WORDS, 2),
        duplicates(40, 12, 32, 2),
        transition(16, 64, 2),
        received(32, 2, 16, 2),
        cached(32, 4, 2, 16, 2),
    ]
