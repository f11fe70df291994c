"""What commands print, and how they tell of progress."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .words import in_options


def standard_output() -> Any:
    """Standard output; a pipe gets lines as wide as a wide terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on standard output."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    standard_output().print(table)


def print_json(value: dict[str, Any]) -> None:
    """One object; what JSON cannot say (infinite, not a number) is null."""
    print(json.dumps(_plain(value), indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def at_work() -> Iterator[Callable[[str, int, int], None]]:
    """Context of a command at work: gives what is told of progress, and keeps warnings to one line each.

    A bar shows on a terminal and goes away when the work is done. While a model comes from the hub, the libraries' own
    bars show instead.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def tell(what: str, done: int, steps: int) -> None:
        bar.update(task, description=what, total=steps or None, completed=done)

    with warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")
        from ..errors import VlmtokWarning

        warnings.simplefilter("always", VlmtokWarning)
        warnings.showwarning = _warn  # type: ignore[assignment]
        task = bar.add_task("starting", total=None)
        yield tell


def _warn(message: Warning | str, *rest: Any) -> None:
    print(f"vlmtok: note: {in_options(' '.join(str(message).split()))}", file=sys.stderr)
