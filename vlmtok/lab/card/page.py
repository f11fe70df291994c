"""The page of a card: its rows as tables of Markdown, the rows for the dispatch table, and the plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...kernels.bench.measuring import MEASURED, ON_A_CPU
from ...kernels.bench.modelling import NOT_MEASURED
from ...kernels.bench.sweep import policies
from ...kernels.policy import OWN, Policy, write_policies
from ...tabular import Table
from ..suite_models import Row
from .roofline import draw_roofline, points_of

HEADS = {
    MEASURED: "Measured.",
    ON_A_CPU: "Measured on a CPU, at small sizes: the figures show that this runs, and say nothing of a GPU.",
    NOT_MEASURED: "Modelled, not measured: floors from the stated rates of an H200, and promises of MACs.",
}
_OWN = ("eager", "compile", "triton")
_LEFT_OUT = ("not measured:", "not counted:", "left out:")
PARTS = ("kernels", "launches", "models")
"""What is measured, in this order: ops one by one with their rivals; launches of towers; towers and language models."""


def write_page(folder: Path, slug: str, tiny: bool) -> tuple[list[Path], Path | None]:
    """Writes the page, the plot and the dispatch thresholds of whatever parts lie in a folder.

    Args:
        folder: with ``PART_SLUG.json`` files.
        slug: of the card.
        tiny: whether sizes are those of a trial, from which nothing follows for the dispatch table.

    Returns:
        The files, and the one of them that holds thresholds, if kernels were measured on a GPU.
    """
    parts: dict[str, list[Row]] = {}
    for part in PARTS:
        path = folder / f"{part}_{slug}.json"
        parts[part] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    thresholds = [] if tiny else thresholds_of(parts["kernels"], f"kernels_{slug}.json")
    kept = folder / f"policies_{slug}.json" if thresholds else None
    if kept is not None:
        write_policies(kept, thresholds)
    plot = folder / f"roofline_{slug}.svg"
    page = folder / f"card_{slug}.md"
    drawn = points_of(parts["kernels"])
    if drawn:
        draw_roofline(parts["kernels"], plot)
    title = f"# What one card does: {slug}" + (", sizes of a trial" if tiny else "")
    text = "\n\n".join([title, *_page(parts, thresholds, plot.name if drawn else "")])
    page.write_text(text + "\n", encoding="utf-8")
    return [page, *([plot] if drawn else []), *([kept] if kept else [])], kept


def thresholds_of(kernels: Sequence[Row], source: str) -> list[Policy]:
    """Rows of the dispatch table from what was measured on a GPU.

    Args:
        kernels: rows of ops.
        source: the file that they are kept in.
    """
    return policies([row for row in kernels if row["status"] == MEASURED], source)


def left_out(row: Row) -> bool:
    """Whether a row has no figure, but a status that says why."""
    return str(row["status"]).startswith(_LEFT_OUT)


def _page(parts: dict[str, list[Row]], thresholds: Sequence[Policy], plot: str) -> Iterator[str]:
    """The paragraphs of the page."""
    tables = {"kernels": _kernels, "launches": _launches, "models": _models}
    for part, rows in parts.items():
        if not rows:
            continue
        yield f"## {part.capitalize()}"
        yield _origin(rows)
        figures = [row for row in rows if not left_out(row)]
        if figures:
            table, legend = tables[part](figures)
            yield table.markdown()
            yield legend
        yield from (f"- {_name(row)}: {row['status']}" for row in rows if left_out(row))
        if part == "kernels" and plot:
            yield f"![roofline]({plot})"
        if part == "kernels" and thresholds:
            yield Table(("op", "what `auto` takes"), [(row.op, row.start) for row in thresholds]).markdown()
            yield f"`{OWN}` with the path of the file of thresholds beside this page has `auto` go by them."


def _name(row: Row) -> str:
    """What a row is about, in words."""
    words = [str(row[name]) for name in ("model", "op", "case") if row.get(name)]
    return ", ".join([*words, *([f"batch {row['batch']}"] if "batch" in row else [])])


def _origin(rows: Sequence[Row]) -> str:
    """Where figures are from: what was done, the machine, its versions."""
    row = next((row for row in rows if not left_out(row)), rows[0])
    said = HEADS.get(row["status"], f"{row['status'].capitalize()}.")
    where = [f"{row['device']}"] if row.get("device") else []
    where += [f"driver {row['driver']}"] if row.get("driver") else []
    names = ("torch", "triton", "transformers", "vlmtok")
    where += [f"{name} {row[name]}" for name in names if row.get(name)]
    where += sorted({row["rival"] for row in rows if row.get("rival")})
    where += [str(row["dtype"])] if row.get("dtype") else []
    return f"**{said}** {', '.join(where)}."


def _kernels(rows: Sequence[Row]) -> tuple[Table, str]:
    """One line an op and size: microseconds of each path, as a CUDA graph where there is one, with a warm cache."""
    legend = "A floor is what the slowest of bytes, FLOPs, launches and steps that wait for each other takes at least."
    if all(row["status"] == NOT_MEASURED for row in rows):
        head = ["op", "size", "batch", "floor us", "bound by", "launches"]
        shown = [[r["op"], r["case"], r["batch"], _three(r["floor_us"]), r["bound"], r["launches"]] for r in rows]
        return Table(head, [[str(cell) for cell in row] for row in shown]), legend
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for path, row, _ in points_of(rows):
        found.setdefault((row["op"], row["case"], row["batch"]), {})[path] = row
    rivals = sorted({path for paths in found.values() for path in paths} - set(_OWN))
    columns = [path for path in (*_OWN, *rivals) if any(path in paths for paths in found.values())]
    own = ["times_eager", "percent_of_floor"] if "triton" in columns else []
    head = ["op", "size", "batch", *(f"{path} us" for path in columns)]
    head += ["triton, times as fast as eager", "% of floor"] if own else []
    lines = []
    for (op, case, batch), paths in found.items():
        ours = paths.get("triton", {})
        times = [_three(paths[path]["median_us"]) if path in paths else "" for path in columns]
        lines.append([op, case, str(batch), *times, *(_three(ours.get(name)) for name in own)])
    ways = (
        "Medians of one call with a warm cache, as a CUDA graph where there is one. `eager` is the definition in torch."
    )
    return Table(head, lines), f"{ways} {legend}" if own else ways


def _launches(rows: Sequence[Row]) -> tuple[Table, str]:
    """One line a method: launches of a forward, bare and compressed."""
    head = ["tower", "method", "layers", "bare", "compressed", "added a layer"]
    names = ("model", "method", "layers", "launches_bare", "launches")
    lines = [[*(str(r[n]) for n in names), f"{r['added_a_layer']:.2f}"] for r in rows]
    return Table(head, lines), "Kernels that a forward of one picture launches."


def _models(rows: Sequence[Row]) -> tuple[Table, str]:
    """Promise beside what was measured; floors where nothing was. Times of a CPU are not given."""
    modelled = all(row["status"] == NOT_MEASURED for row in rows)
    head = ["model", "stage", "method", "batch", "visual tokens", "MACs, times fewer"]
    head += (
        ["floor, times less"] if modelled else ["times as fast", "20 to 80 %", "rounds", "ms bare", "ms", "pays from"]
    )
    lines = []
    for row in rows:
        way = "" if row["kernels"] == "auto" else f" ({row['kernels']})"
        names = [row["model"], row["stage"], row["method"] + way, str(row["batch"]), _whole(row["visual_tokens"])]
        cells = [*names, _three(row["mac_ratio"])]
        if modelled:
            cells.append(_three(row["floor_speedup"]))
        else:
            spread = "" if row["p20"] is None else f"{row['p20']:.2f} to {row['p80']:.2f}"
            times = [None if row[name] is None else 1e3 * row[name] for name in ("seconds_bare", "seconds")]
            cells += [_three(row["speedup"]), spread, _whole(row["rounds"]), *map(_three, times)]
            cells.append(_whole(row["break_even_tokens"], " tokens"))
        lines.append(cells)
    legend = "`MACs, times fewer` is what counting promises."
    if not modelled:
        legend += (
            " A method `pays from` so many visual tokens: extrapolated from the one size of its row; rows of "
            "`break-even` are measured at several."
        )
    return Table(head, lines), legend


def _three(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _whole(value: float | None, unit: str = "") -> str:
    """A number without decimals."""
    return "" if value is None else f"{value:,.0f}{unit}"
