"""Quality against a cost, a line a method: where each stands between the uncompressed model and nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost.units import binary, si
from ..errors import MissingPackage, ParameterError
from ..lab.plots import front, unit_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "macs": "MACs of the pass with the pictures",
    "kv_bytes": "key-value cache behind the prompt",
    "visual_tokens": "visual tokens, mean over layers",
    "latency_ratio": "times as fast as the uncompressed model",
}
"""Costs that can be plotted, and what their axes say."""
_MORE_IS_BETTER = "latency_ratio"
# Okabe and Ito's colours, which people with any colour vision tell apart, each with markers of its own.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c6d00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PLAIN = {"none": ("black", "*"), "random": ("#777777", "o"), "downsample": ("#777777", "s")}


def quality_plot(records: Sequence[Mapping[str, Any]], cost: str, kind: str, ax: Axes | None = None) -> Axes:
    """Draws it.

    Args:
        records: of `Evaluation.to_records`, or rows of a file of results.
        cost: one of `AXES`.
        kind: of question, or ``all``.
        ax: axes to draw on; new ones unless given.

    Returns:
        The axes.

    Raises:
        ParameterError: no such cost or kind, or fewer than two rows have it.
        MissingPackage: matplotlib is not installed.
    """
    if cost not in AXES:
        raise ParameterError(f"no cost {cost!r} to plot; one of {', '.join(AXES)}")
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    if kind not in kinds:
        raise ParameterError(f"no kind {kind!r} of question; there are {', '.join(kinds)}")
    shown = [r for r in records if r["kind"] == kind and r.get(cost) is not None and r.get("quality") is not None]
    if len(shown) < 2:
        raise ParameterError(f"nothing to plot: fewer than two rows have {cost!r}")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise MissingPackage("plot()", "matplotlib") from None
    axes = plt.subplots(figsize=(9, 5.5), layout="constrained")[1] if ax is None else ax
    names = list(dict.fromkeys(record["asked"] for record in shown))
    coloured = [name for name in names if name not in _PLAIN]
    ends: list[tuple[float, float, str, str]] = []
    for name in names:
        of_it = sorted((r for r in shown if r["asked"] == name), key=lambda record: float(record[cost]))
        colour, marker = _look(name, coloured)
        at = [float(r[cost]) for r in of_it], [100 * float(r["quality"]) for r in of_it]
        style = "--" if name in _PLAIN else "-"
        axes.plot(*at, marker=marker, color=colour, linestyle=style, linewidth=1, markersize=12 if marker == "*" else 5)
        gaps = [(r["low"], r["high"], r["difference"]) for r in of_it]
        if all(low is not None for low, _, _ in gaps):
            below = [100 * (float(gap) - float(low)) for low, _, gap in gaps]
            above = [100 * (float(high) - float(gap)) for _, high, gap in gaps]
            axes.errorbar(*at, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=0.6, alpha=0.5)
        ends.append((at[0][0], at[1][0], name, colour))
    sign = -1 if cost == _MORE_IS_BETTER else 1
    best = [shown[i] for i in front([(sign * float(r[cost]), -float(r["quality"])) for r in shown])]
    line = [float(r[cost]) for r in best], [100 * float(r["quality"]) for r in best]
    axes.plot(*line, color="gold", linewidth=6, alpha=0.35, zorder=0, solid_capstyle="round", label="Pareto front")
    unit_ticks(axes, {"macs": si, "kv_bytes": binary}.get(cost, "{:g}".format))
    axes.set_xlabel(AXES[cost])
    axes.set_ylabel("right answers, %" if kind == "all" else f"right answers, {kind}, %")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize="small", frameon=False)
    axes.margins(x=0.14, y=0.06)
    _name_lines(axes, ends)
    return axes


def _look(name: str, coloured: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a method."""
    if name in _PLAIN:
        return _PLAIN[name]
    place = coloured.index(name)
    return _COLOURS[place % len(_COLOURS)], _MARKERS[(place // len(_COLOURS) + place) % len(_MARKERS)]


def _name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each method's name beside its cheapest point, in a column where names do not touch."""
    figure: Any = axes.figure
    figure.draw_without_rendering()  # places are known only then
    scale = figure.dpi / 72
    taken: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(ends, key=lambda end: -end[1]):
        across, up = (value / scale for value in axes.transData.transform((x, y)))
        line = up
        while any(abs(line - other) < 9 and abs(across - place) < 60 for place, other in taken):
            line -= 1
        taken.append((across, line))
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6} if up - line > 9 else None
        axes.annotate(
            name, (x, y), (-8, line - up), textcoords="offset points", ha="right", va="center", fontsize=8,
            color=colour, arrowprops=arrow,
        )  # fmt: skip
