"""How a report writes numbers: counts, bytes, shares, tokens."""

from __future__ import annotations

from .lines import Line


def whole(value: float) -> str:
    """Tokens: no digit behind the point where it is a whole number, else one."""
    return f"{value:g}" if value == int(value) else f"{value:.1f}"


def share(line: Line) -> str:
    """After by before in per cent; empty where there is nothing to compare with."""
    return "" if line.share is None else line.share.show(lambda value: f"{100 * value:.1f} %")


def si(value: float) -> str:
    """With a prefix of thousands and three digits behind the point."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3f}{letter}"
    return f"{value:g}"


def binary(value: float) -> str:
    """Bytes with a prefix of 1024s."""
    for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(value) >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:g} B"


def quantity(value: float, unit: str) -> str:
    """A number with its unit: bytes as `binary`, MACs and FLOPs as `si`, anything else as `whole`."""
    if unit == "bytes":
        return binary(value)
    if unit in ("MACs", "FLOPs"):
        number = si(value)
        return number + ("" if number[-1].isalpha() else " ") + unit
    return f"{whole(value)} {unit}"
