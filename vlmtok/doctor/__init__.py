"""The self-test: does vlmtok work with the libraries that are installed here?

For every adapter and family a tiny random model is built, and three things are asked of it: a compression that cuts
nothing leaves the bare model bit for bit; a cut leaves what an oracle of plain torch hooks says; `generate` says with a
cache what it says without. ``vlmtok doctor`` prints the answers; an issue report begins with them.

    report = vlmtok.doctor.examine()                       # a quick choice of rows
    report = vlmtok.doctor.examine(["gemma3", "timm"])     # a family, all towers of a library
    report.ok, report.rows, report.to_dict()
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..bench import Progress
from ..loading import pick_device
from . import environment
from .facts import BROKEN, OK, REFUSED, Fact, Row
from .report import Report
from .rows import QUICK, cases, chosen, one_thread


def examine(
    names: Iterable[str] = (),
    everything: bool = False,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Runs the self-test.

    Args:
        names: rows (families as in ``config.model_type``, towers) or libraries; by default a choice of all kinds.
        everything: all rows.
        device: ``cpu``, ``auto`` or a torch device.
        progress: told what is being done.

    Returns:
        What was found. Whatever a row raises is in it.

    Raises:
        ParameterError: there is no such row, or names and `everything` are both given.
        LoadError: torch has no such device here.
    """
    from ..errors import ParameterError

    names = list(names)
    if names and everything:
        raise ParameterError("a choice of families, or all of them: not both")
    begin = time.perf_counter()
    where = pick_device(device)
    asked = chosen(names, everything)
    rows = []
    with _hushed(), one_thread():
        for number, case in enumerate(asked):
            if progress is not None:
                progress(f"examining {case.name}", number, len(asked))
            rows.append(case.run(where))
    return Report(
        environment.versions(),
        environment.machine(where),
        environment.kernels(where),
        tuple(rows),
        time.perf_counter() - begin,
    )


@contextmanager
def _hushed() -> Iterator[None]:
    """Context without warnings and log lines: what matters is in the rows."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


__all__ = ["BROKEN", "OK", "QUICK", "REFUSED", "Fact", "Report", "Row", "cases", "examine"]
