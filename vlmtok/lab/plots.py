"""Figures of matplotlib: what a sweep's rows cost against how well they agree with the bare model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost.units import binary, si
from ..errors import MissingPackage, ParameterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {
    "total_macs": "MACs, total",
    "kv_bytes": "key-value cache",
    "visual_tokens_mean": "visual tokens a layer, mean",
}
"""What can be plotted against agreement, and what its axis says."""
FLOOR = 1e-6
"""Divergence in nats below which two rows are drawn alike."""
LINE = 11
"""Points between the lines of labels."""


def pareto(records: Sequence[Mapping[str, Any]], cost: str, ax: Axes | None = None) -> Axes:
    """Agreement with the bare model against a cost: a point a row, and a line through those that no other row beats.

    Args:
        records: of `vlmtok.Sweep.to_records`; rows without that cost, or without a finite agreement, are left out.
        cost: one of `COSTS`.
        ax: axes to draw on; new ones unless given.

    Returns:
        The axes.

    Raises:
        ParameterError: no such cost, or no row has it.
        MissingPackage: matplotlib is not installed.
    """
    if cost not in COSTS:
        raise ParameterError(f"no cost {cost!r} to plot; one of {', '.join(COSTS)}")
    measure = measure_of(records)
    shown = [r for r in records if r[cost] is not None and r[measure] is not None and math.isfinite(r[measure])]
    if len(shown) < 2:
        raise ParameterError(f"nothing to plot: no row besides the bare model has {cost!r} and {measure!r}")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingPackage("plot()", "matplotlib") from None
    axes = plt.subplots(figsize=(8, 5), layout="constrained")[1] if ax is None else ax
    names = list(dict.fromkeys(name_of(record) for record in shown))
    colours: dict[str, Any] = {}
    for name in names:
        of_it = [record for record in shown if name_of(record) == name]
        of_it.sort(key=lambda record: record[cost])
        at = [record[cost] for record in of_it], [record[measure] for record in of_it]
        form: dict[str, Any] = (
            {"marker": "*", "color": "black", "markersize": 12} if name == "bare" else {"marker": "o", "alpha": 0.8}
        )
        (drawn,) = axes.plot(*at, linewidth=0.8, label=name, zorder=3, **form)
        colours[name] = drawn.get_color()
    best = [shown[i] for i in front([(r[cost], r[measure] * (1 if measure == "divergence" else -1)) for r in shown])]
    line = [record[cost] for record in best], [record[measure] for record in best]
    axes.plot(*line, color="grey", linewidth=1, linestyle="--", label="Pareto front", zorder=1)
    unit_ticks(axes, {"total_macs": si, "kv_bytes": binary}.get(cost, "{:g}".format))
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel("cosine with bare" if measure == "cosine" else "KL divergence from bare, nats (up is closer)")
    axes.margins(x=0.12, y=0.12)
    if measure == "divergence":
        # Divergences of one picture span many powers of ten, and the bare model's is nought.
        least = min((r[measure] for r in shown if r[measure] > FLOOR), default=FLOOR)
        axes.set_yscale("symlog", linthresh=least, linscale=0.5)
        axes.set_ylim(3 * max(least, *(record[measure] for record in shown)), -least)
        axes.yaxis.set_ticks([tick for tick in axes.get_yticks() if tick == 0 or tick > least])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _label(axes, [(r[cost], r[measure], settings_of(r), colours[name_of(r)]) for r in shown])
    return axes


def unit_ticks(axes: Axes, words: Callable[[float], str]) -> None:
    """Writes a cost's figures along the axis, round ones without their zeros."""
    axes.xaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+ ", " ", words(value)))


def measure_of(records: Sequence[Mapping[str, Any]]) -> str:
    """What tells agreement in the rows of a sweep: ``cosine`` of towers, ``divergence`` of language models."""
    return "cosine" if records[0]["cosine"] is not None else "divergence"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats.

    Args:
        points: cost and loss; less is better in both.

    Returns:
        Their places, by rising cost.
    """
    found: list[int] = []
    for place in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[place][1] < points[found[-1]][1]:
            found.append(place)
    return found


def name_of(record: Mapping[str, Any]) -> str:
    """The methods of a row without their settings."""
    return "+".join(part.partition(":")[0] for part in str(record["method"]).split("+"))


def settings_of(record: Mapping[str, Any]) -> str:
    """The settings of a row without the methods."""
    return ", ".join(part.partition(":")[2].replace(":", ", ") for part in str(record["method"]).split("+")).strip(", ")


def _label(axes: Axes, labels: Sequence[tuple[float, float, str, Any]]) -> None:
    """Writes beside points in their colour; where words would lie on each other, later ones go down, with a line."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # places are known only then
    scale = figure.dpi / 72
    points = [axes.transData.transform((x, y)) / scale for x, y, _, _ in labels]
    taken: list[tuple[float, float, float]] = [(x - 4, x + 4, y - 3) for x, y in points]
    placed = [(*axes.transData.transform((x, y)), x, y, words, colour) for x, y, words, colour in labels if words]
    for across, up, x, y, words, colour in sorted(placed, key=lambda item: (-item[1], item[0])):
        left, line = across / scale + 6, up / scale - 3
        wide = 4.6 * len(words) + 4
        begin = line
        while any(left < right and start < left + wide and abs(line - other) < LINE for start, right, other in taken):
            line -= 1
        taken.append((left, left + wide, line))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6} if begin - line > LINE else None
        offset = (left - across / scale, line - up / scale)
        how = {"textcoords": "offset points", "fontsize": 8, "color": colour, "arrowprops": arrow}
        axes.annotate(words, (x, y), offset, **how)
