"""The self-test: does vlmtok work with the libraries that are installed here?

For every adapter and family a tiny random model is built, and three things are asked of it: a compression that cuts
nothing leaves the bare model bit for bit; a cut leaves what an oracle of plain torch hooks says; `generate` says with a
cache what it says without. ``vlmtok doctor`` prints the answers; an issue report begins with them.

    report = vlmtok.lab.doctor.examine()                       # a quick choice of rows
    report = vlmtok.lab.doctor.examine(["gemma3", "timm"])     # a family, all towers of a library
    report.ok, report.rows, report.to_dict()
    row = vlmtok.lab.doctor.examine_model(model, inputs)       # a loaded model, and a prompt as its processor makes it
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from ...errors import ParameterError
from ...guard import guarded
from ...loading.devices import pick_device
from ...loading.models import load
from ...timing import Progress, tell
from . import environment
from .facts import BROKEN, OK, REFUSED, Fact, Row
from .own import examine_loaded, examine_model
from .report import Report
from .rows import QUICK, cases, chosen, hushed, one_thread


@guarded
def examine(
    names: Iterable[str] = (),
    everything: bool = False,
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Report:
    """Runs the self-test.

    Args:
        names: rows (families as in ``config.model_type``, towers) or libraries; by default a choice of all kinds.
        everything: all rows.
        model: a checkpoint, as for `vlmtok.load`; it is tested with a picture of the package, and no other row
            is, unless asked for.
        adapter: of the checkpoint, as for `vlmtok.compress`.
        device: ``cpu``, ``auto`` or a torch device.
        dtype: of the checkpoint; in half precision only large differences can be told from rounding.
        progress: told what is being done.

    Returns:
        What was found. Whatever a row raises is in it.

    Raises:
        ParameterError: there is no such row, or names and `everything` are both given.
        LoadError: torch has no such device here, or the checkpoint cannot be loaded.
    """
    names = list(names)
    if names and everything:
        raise ParameterError("--family and --all: one of them")
    if adapter is not None and model is None:
        raise ParameterError(f"adapter {adapter!r} is of a checkpoint, and none is given")
    begin = time.perf_counter()
    where = pick_device(device)
    asked = chosen(names, everything) if names or everything or model is None else []
    rows = []
    with hushed():
        if model is not None:
            tell(progress, f"loading {model}", 0, 0)
            loaded = load(model, device=str(where), dtype=dtype)
            tell(progress, f"examining {model}", 0, 0)
            rows.append(examine_loaded(loaded, adapter))
        with one_thread():
            for number, case in enumerate(asked):
                tell(progress, f"examining {case.name}", number, len(asked))
                rows.append(case.run(where))
    best = pick_device("auto")  # what users run their models on, wherever the tiny ones ran
    return Report(
        environment.versions(),
        {**environment.machine(best), "tested_on": str(where)},
        environment.kernels(best),
        tuple(rows),
        time.perf_counter() - begin,
    )


__all__ = ["BROKEN", "OK", "QUICK", "REFUSED", "Fact", "Report", "Row", "cases", "examine", "examine_model"]
