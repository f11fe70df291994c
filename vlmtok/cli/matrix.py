"""``vlmtok list --matrix``: which method runs on which model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .console import at_work, print_json, standard_output


def check_matrix(asked: bool, other: bool, belonging: Mapping[str, Any], as_json: bool) -> None:
    """Refuses options of `vlmtok list` that do not go together.

    Args:
        asked: whether the matrix is.
        other: whether another list is.
        belonging: options that only the matrix takes, as typed.
        as_json: whether JSON is asked for.

    Raises:
        ParameterError: they do not.
    """
    from ..errors import ParameterError

    alone = [name for name, value in belonging.items() if value]
    if alone and not asked:
        raise ParameterError(f"{alone[0]} goes with --matrix, which says what runs on what")
    if asked and other:
        raise ParameterError("one of --matrix, --models and --conventions")
    if as_json and belonging["--csv"]:
        raise ParameterError("one of --json and --csv")


def list_matrix(pattern: str, model: str | None, adapter: str | None, as_csv: bool, as_json: bool) -> None:
    """Prints methods by family, or of one model.

    Args:
        pattern: shell wildcards for methods.
        model: as typed, or None for all families.
        adapter: as typed.
        as_csv: print CSV.
        as_json: print JSON.
    """
    with at_work() as progress:
        progress("starting", 0, 0)
        from ..lab.matrix import matrix

        found = matrix(model, pattern, adapter=adapter, progress=progress)
    if as_json:
        print_json(found.to_dict())
    elif as_csv:
        print(found.to_csv(), end="")
    else:
        standard_output().print(found)
