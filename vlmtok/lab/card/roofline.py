"""The roofline: FLOPs a second that ops reach against FLOPs a byte, under what the machine allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingPackage
from ...kernels.bench.measuring import GRAPH, MEASURED, ON_A_CPU, WARM
from ...kernels.bench.modelling import NOT_MEASURED
from ..suite_models import Row

# Okabe and Ito's colours, which people with any colour vision tell apart, each with a marker of its own.
_LOOK = {
    "triton": ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "compile": ("#E69F00", "^"),
    "floor": ("#009E73", "D"),
}
_RIVAL = ("#CC79A7", "P")
_TITLE = {
    MEASURED: "measured on {device}",
    ON_A_CPU: "measured on a CPU, small sizes",
    NOT_MEASURED: "modelled for an H200, not measured",
}


def need_matplotlib() -> None:
    """Checks that there is something to draw with.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingPackage("the roofline plot", "matplotlib") from None


def points_of(rows: Sequence[Row]) -> list[tuple[str, Row, float]]:
    """The one figure that is shown of each op, size and path: the path (``"floor"`` where modelled), its row, seconds.

    Args:
        rows: of ops; measured ones give their median with a warm cache, as a CUDA graph where there is one, modelled
            ones their floor, and those that were left out nothing.
    """
    found: dict[tuple[Any, ...], tuple[str, Row, float]] = {}
    for row in rows:
        key = (row["op"], row.get("case"), row.get("batch"), row.get("path"))
        if row["status"] == NOT_MEASURED:
            found[key] = "floor", row, 1e-6 * row["floor_us"]
        elif row["status"] in (MEASURED, ON_A_CPU) and (
            row["way"] == GRAPH or (row["way"] == WARM and key not in found)
        ):
            found[key] = row["path"], row, 1e-6 * row["median_us"]
    return list(found.values())


def rates_of(rows: Sequence[Row]) -> tuple[float, float]:
    """Bytes and FLOPs a second of the machine: as measured in the same run, or as stated."""
    for row in rows:
        for copy, product in (("rate_copy", "rate_product"), ("copy_bytes_per_s", "flops_per_s")):
            if copy in row:
                return row[copy], row[product]
    raise LookupError("no row says what the machine does a second")


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Draws ops with products under the roof, and those without as bytes a second beside it.

    Args:
        rows: of ops, at least one with figures.
        path: of the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = points_of(rows)
    if not points:
        raise LookupError("no row has a figure to draw")
    copy, product = rates_of(rows)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    roof, bytes_ = figure.subplots(1, 2, width_ratios=(3, 2))
    dense = [
        (name, row["flops"] / row["bytes"], row["flops"] / seconds) for name, row, seconds in points if row["flops"]
    ]
    sparse = [(name, row["bytes"], row["bytes"] / seconds) for name, row, seconds in points if not row["flops"]]
    ridge = product / copy
    reach = [x for _, x, _ in dense] or [ridge]
    low, high = min(*reach, ridge) / 4, max(*reach, ridge) * 4
    roof.plot([low, ridge, high], [low * copy, product, product], color="black")
    _scatter(roof, dense)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs of matrix products a byte", ylabel="FLOPs a second")
    bytes_.axhline(copy, color="black")
    _scatter(bytes_, sparse)
    bytes_.set(xscale="log", yscale="log", xlabel="bytes, each once", ylabel="bytes a second, ops without products")
    first = points[0][1]
    figure.suptitle(f"Ops: {_TITLE[first['status']].format(device=first['device'])}")
    roof.legend(loc="lower right")
    with rc_context({"svg.hashsalt": "vlmtok", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _scatter(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    for name in dict.fromkeys(name for name, *_ in points):
        colour, marker = _LOOK.get(name, _RIVAL)
        mine = [(x, y) for other, x, y in points if other == name]
        hollow = name == "floor"
        face = "none" if hollow else colour
        axes.scatter(*zip(*mine), marker=marker, facecolors=face, edgecolors=colour, label=name, alpha=0.8)
