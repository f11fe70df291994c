"""The Pareto plot of a sweep as SVG, for pages that fetch nothing: MACs against agreement with the bare model."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cost.units import si
from . import plots

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 92, 24, 24, 52
RADIUS = 11
FLOOR = 1e-12
"""Divergence in nats below which two rows are drawn alike."""


@dataclass(frozen=True)
class Point:
    """A row of a sweep as a point.

    Attributes:
        name: of the method.
        cost: MACs.
        agreement: cosine or divergence.
        number: of the method on the page, or None for the bare model.
    """

    name: str
    cost: float
    agreement: float
    number: int | None


def points_of(records: Sequence[Mapping[str, Any]], measure: str) -> list[Point]:
    """Rows that have both figures.

    Args:
        records: of `vlmtok.Sweep.to_records`, the bare model first.
        measure: ``cosine`` or ``divergence``.
    """
    found, number = [], 0
    for place, record in enumerate(records):
        cost, agreement = record["total_macs"], record[measure]
        if cost is None or agreement is None or not math.isfinite(agreement):
            number += place > 0 and record.get("problem") is None
            continue
        found.append(Point(record["method"], cost, agreement, number if place else None))
        number += place > 0
    return found


def front(points: Sequence[Point], higher: bool) -> list[Point]:
    """Points that no other one beats in both, cheapest first.

    Args:
        points: of the plot.
        higher: whether more agreement is a larger number.
    """
    sign = -1.0 if higher else 1.0
    return [points[place] for place in plots.front([(point.cost, sign * point.agreement) for point in points])]


def pareto_svg(records: Sequence[Mapping[str, Any]]) -> str:
    """Draws the plot; its points choose a method of the page.

    Args:
        records: of `vlmtok.Sweep.to_records`, the bare model first.

    Returns:
        An ``<svg>``, or nothing where no row but the bare model has both figures.
    """
    measure = plots.measure_of(records)
    points = points_of(records, measure)
    if len(points) < 2:
        return ""
    costs = [point.cost for point in points]
    low, high = min(costs), max(costs)
    across = _axis(low - 0.06 * (high - low or high), high + 0.06 * (high - low or high), LEFT, WIDE - RIGHT)
    down, ticks = _agreement_axis([point.agreement for point in points], measure)
    lines = []
    for value, text in ticks:
        y = down(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for i in range(5):
        value = low + (high - low) * i / 4
        if i and low == high:
            break
        x, y = across(value), HIGH - BOTTOM
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{y}"/>')
        lines.append(
            f'<text class="tick" x="{x:.1f}" y="{y + 18}" text-anchor="middle">{html.escape(si(value))}</text>'
        )
    label = "cosine with bare (up is closer)" if measure == "cosine" else "KL from bare, nats (up is closer)"
    middle, centre = (TOP + HIGH - BOTTOM) / 2, (LEFT + WIDE - RIGHT) / 2
    lines += [
        f'<text x="{centre}" y="{HIGH - 10}" text-anchor="middle">MACs, total (left is cheaper)</text>',
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{label}</text>',
    ]
    path = " ".join(f"{across(p.cost):.1f},{down(p.agreement):.1f}" for p in front(points, measure == "cosine"))
    lines.append(f'<polyline class="front" points="{path}"/>')
    lines += [_mark(point, across(point.cost), down(point.agreement), measure) for point in points]
    title = "Cost against agreement with the bare model; the dashed line joins what no other method beats in both"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDE} {HIGH}" role="group" aria-label="{title}">' + "".join(lines) + "</svg>"
    )


def _axis(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (value - low) / ((high - low) or 1.0) * (last - first)


def _agreement_axis(values: Sequence[float], measure: str) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Where an agreement lies, closer ones higher, and the marks of the axis.

    Divergences of one picture span many powers of ten, and the bare model's is nought: their axis is of powers.
    """
    foot, head = HIGH - BOTTOM, TOP
    if measure == "cosine":
        low, high = min(values), max(*values, 1.0)
        room = 0.08 * (high - low or 1.0)
        ticks = [low + (high - low) * i / 3 for i in range(4)]
        return _axis(low - room, high + room, foot, head), [(tick, f"{tick:.4f}") for tick in ticks]
    above = [math.log10(value) for value in values if value > FLOOR]
    least, most = (math.floor(min(above)), math.ceil(max(above))) if above else (-1, 0)
    most = max(most, least + 1)
    place = _axis(most + 0.3, least - 1.3, foot, head)

    def down(value: float) -> float:
        return place(least - 1.0 if value <= FLOOR else math.log10(value))

    every = -(-(most - least) // 5)
    powers = range(least, most + 1, every)
    return down, [
        (0.0, "0"),
        *((10.0**power, f"1e{power}" if abs(power) > 3 else f"{10.0**power:g}") for power in powers),
    ]


def _mark(point: Point, x: float, y: float, measure: str) -> str:
    """A point with its number; the bare model's chooses nothing."""
    said = html.escape(f"{point.name}: {si(point.cost)} MACs, {measure} {point.agreement:.4g}")
    inner = f'<title>{said}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}"/>'
    if point.number is None:
        text = f'<text x="{x:.1f}" y="{y + 4.5:.1f}">b</text>'
        return f'<g class="point bare" role="img" aria-label="{said}">{inner}{text}</g>'
    text = f'<text x="{x:.1f}" y="{y + 4.5:.1f}">{point.number + 1}</text>'
    button = f'role="button" tabindex="0" data-method="{point.number}" aria-label="show {said}"'
    return f'<g class="point" {button}>{inner}{text}</g>'
