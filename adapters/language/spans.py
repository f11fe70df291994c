"""Where pictures stand in a prompt: placeholders show runs, the encoder's outputs how many tokens each picture has.

The outputs do not always reach a hook: `generate` passes neither picture sizes nor grids, so nothing here needs them.
"""

from __future__ import annotations

from ...core.rows import Picture
from ...errors import CacheError
from .spec import VLMSpec

NONE, IMAGE, VIDEO = 0, 1, 2
"""Codes of columns: text and placeholders."""


def find_pictures(
    codes: list[list[int]], lengths: dict[int, list[int]] | None = None, whole: bool = True
) -> list[Picture]:
    """Pictures (and clips) from the runs of placeholders.

    Args:
        codes: `[B][S]`, code of each column.
        lengths: by code, tokens of each picture in the order of the placeholders; splits runs of adjacent pictures and
            joins the runs of one (rows, frames).
        whole: whether a picture whose tokens are not all in this call is an error.

    Returns:
        Pictures, row by row.

    Raises:
        CacheError: a picture's tokens are split between calls.
    """
    queues = {code: list(known) for code, known in (lengths or {}).items()}
    pictures: list[Picture] = []
    for row, line in enumerate(codes):
        found: list[tuple[int, list[list[int]]]] = []  # code, runs
        open_need = 0
        for code, run in _runs(line):
            queue = queues.get(code)
            while run:
                if open_need and found[-1][0] == code:
                    take = min(open_need, len(run))
                    found[-1][1].append(run[:take])
                    open_need -= take
                else:
                    need = queue.pop(0) if queue else len(run)
                    take = min(need, len(run))
                    found.append((code, [run[:take]]))
                    open_need = need - take
                run = run[take:]
        if open_need and whole:
            raise CacheError(
                f"row {row} ends within a picture of which {open_need} tokens are missing; a prefill in chunks that "
                "splits a picture cannot be combined with a compression, nor can beams that the host gives the sizes "
                "of other pictures (GLM, with several in a prompt)"
            )
        for index, (code, runs) in enumerate(found):
            columns = [column for run in runs for column in run]
            starts = [0]
            for run in runs[:-1]:
                starts.append(starts[-1] + len(run))
            pictures.append(Picture(row, index, columns, runs=starts, video=code == VIDEO))
    return pictures


def _runs(line: list[int]) -> list[tuple[int, list[int]]]:
    """Maximal runs of one code."""
    runs: list[tuple[int, list[int]]] = []
    for column, code in enumerate(line):
        if code == NONE:
            continue
        if runs and runs[-1][0] == code and runs[-1][1][-1] == column - 1:
            runs[-1][1].append(column)
        else:
            runs.append((code, [column]))
    return runs


def crop_length(lengths: dict[int, list[int]] | None, spec: VLMSpec) -> int | None:
    """Tokens of one crop, where the encoder's outputs are crops of equal size."""
    if lengths is None or spec.lengths_of != "crop":
        return None
    sizes = {size for known in lengths.values() for size in known}
    return sizes.pop() if len(sizes) == 1 else None


def usable(lengths: dict[int, list[int]] | None, spec: VLMSpec) -> dict[int, list[int]] | None:
    """Lengths that tell pictures apart: not those of crops, nor of whole prompts."""
    return lengths if spec.lengths_of == "picture" else None
