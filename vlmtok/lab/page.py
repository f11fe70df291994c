"""One self-contained HTML page of what ran: picture, patches with a slider, answers, report. Nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.trace import PictureTrace
from ..errors import VlmtokError
from ..loading.pictures import check_writable
from ..tabular import Table, bullets
from .panels import panel_size
from .pieces import pieces_of, worth_showing
from .states import states_of

FOLDER = Path(__file__).parents[1] / "data" / "page"
LARGEST = 1024
"""Pixels of the longer side of the picture in a page; larger ones are shrunk."""
PIXELS = 96
"""Pixels of the longer side up to which a picture is kept as the pixels that it is."""
ENLARGED = 4
"""Times from which on pixels stay pixels."""


class Page:
    """Something that writes itself as one page."""

    def to_html(self) -> str:
        """The page; nothing is fetched when it is opened."""
        raise NotImplementedError

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_html` into a file.

        Raises:
            LoadError: its folder does not exist, or does not let us write.
        """
        check_writable(path).write_text(self.to_html(), "utf-8")


@dataclass(frozen=True)
class Side:
    """One of the two answers.

    Attributes:
        title: whose it is.
        text: the answer.
        classes: a tower's best classes with their shares, as text.
    """

    title: str
    text: str
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class Entry:
    """What a page says of one method.

    Attributes:
        name: spec string.
        trace: what became of the patches, or None.
        problem: why there is none.
        sides: the answers.
        agreement: how close they are.
        table: bare and compressed, number by number.
        notes: what to know before trusting a figure.
        report: tables of the report, as HTML.
    """

    name: str
    trace: PictureTrace | None
    problem: str | None
    sides: Sequence[Side]
    agreement: str
    table: Table
    notes: Sequence[str]
    report: str


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    image: Image.Image,
    preprocess: Any,
    entries: Sequence[Entry],
    environment: Mapping[str, Any],
    sweep: str = "",
) -> str:
    """Writes the page.

    Args:
        title: plain text, as everything else but `Entry.report` and `sweep`.
        facts: names and values below the title.
        image: the picture, RGB.
        preprocess: as for `vlmtok.overlay`.
        entries: one a method; the page shows one at a time.
        environment: device and versions.
        sweep: HTML of what compares the methods, or nothing.

    Returns:
        HTML without a reference to anything outside of it.
    """
    data = {
        "width": image.width,
        "height": image.height,
        "methods": [_patches(entry, image.size, preprocess) for entry in entries],
    }
    times = 1 if max(image.size) > PIXELS else max(1, 320 // max(image.size))
    cells = {
        "title": html.escape(title),
        "facts": "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts),
        "choice": _choice(entries),
        "width": str(image.width),
        "height": str(image.height),
        "shown_width": str(image.width * times),
        "shown_height": str(image.height * times),
        "picture": _embedded(image),
        "methods": "\n".join(_method(number, entry) for number, entry in enumerate(entries)),
        "sweep": sweep,
        "environment": wide(
            Table(["", ""], [[name, "" if value is None else str(value)] for name, value in environment.items()]).html()
        ),
        "data": script_safe(data),
        "style": _part("page.css"),
        "script": _part("page.js"),
    }
    # In one go: what is put in is not searched for marks again.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: cells[mark[1]], _part("page.html"))


def script_safe(value: Any) -> str:
    """JSON that no HTML parser takes for the end of a script, and without what JSON has no word for."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _embedded(image: Image.Image) -> str:
    """A picture as a ``data:`` address, as PNG or JPEG, whichever is smaller."""
    shown = image.copy()
    shown.thumbnail((LARGEST, LARGEST))
    png, jpeg = io.BytesIO(), io.BytesIO()
    shown.save(png, "PNG", optimize=True)
    shown.save(jpeg, "JPEG", quality=88)
    small = max(image.size) <= PIXELS or len(png.getvalue()) <= len(jpeg.getvalue())
    kind, taken = ("png", png) if small else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(taken.getvalue()).decode('ascii')}"


def _patches(entry: Entry, size: tuple[int, int], preprocess: Any) -> dict[str, Any]:
    """What the script draws from: the grids on the picture, and the owners of their patches at each moment."""
    made: dict[str, Any] = {"name": entry.name, "problem": entry.problem, "views": [], "states": []}
    if entry.trace is None:
        return made
    try:
        views = list(_views(entry.trace, size, preprocess))
    except VlmtokError as problem:
        return {**made, "problem": str(problem)}
    states = [
        {
            "label": state.label,
            "where": state.where,
            "title": state.title,
            "method": state.method,
            "stage": None if state.site is None else state.site.stage,
            "layer": None if state.site is None else state.site.layer,
            "owner": state.owner.tolist(),
            "held": None if state.held is None else [round(value, 3) for value in state.held.tolist()],
            "layers": state.layers,
        }
        for state in states_of(entry.trace)
    ]
    return {**made, "views": views, "states": states}


def _views(trace: PictureTrace, size: tuple[int, int], preprocess: Any) -> Iterable[dict[str, Any]]:
    """The picture as a whole, and the thumbnail where the whole is made of crops."""
    wanted: list[tuple[str, int | None]] = [("the picture", None)]
    parts = trace.grids()
    if 0 in parts and len(parts) > 1:
        wanted = [("crops", None), ("thumbnail", 0)]
    elif trace.video:
        wanted = [("first frame", None)]
    for name, part in wanted:
        pieces = pieces_of(trace, size, preprocess, part)
        left, top, right, bottom = worth_showing(size, pieces)
        shown = panel_size((right - left, bottom - top), [piece.moved(left, top) for piece in pieces])
        yield {
            "name": name,
            "part": [left, top, right, bottom],
            "shown": list(shown),
            "pixels": shown[0] >= ENLARGED * (right - left),
            "pieces": [
                {
                    "box": [round(value, 3) for value in piece.box],
                    "grid": list(piece.grid),
                    "patches": piece.patches,
                }
                for piece in pieces
            ],
        }


def _choice(entries: Sequence[Entry]) -> str:
    """Buttons of which one is pressed, where there are several methods."""
    if len(entries) < 2:
        return ""
    made = "".join(
        f'<label><input type="radio" name="method" value="{number}"{" checked" if not number else ""}> '
        f'<span class="number">{number + 1}</span> {html.escape(entry.name)}</label>'
        for number, entry in enumerate(entries)
    )
    return f"<fieldset><legend>Method</legend>{made}</fieldset>"


def _method(number: int, entry: Entry) -> str:
    """Answers, figures and report of one method."""
    return "\n".join(
        [
            f'<section class="method" id="method-{number}" aria-label="{html.escape(entry.name)}">',
            f"<h2>{html.escape(entry.name)}: {html.escape(entry.agreement)}</h2>",
            f'<div class="answers">{"".join(map(_side, entry.sides))}</div>',
            "<h3>Bare and compressed</h3>",
            wide(entry.table.html()),
            bullets(entry.notes, ' class="notes"'),
            "<h3>Report</h3>",
            wide(entry.report),
            "</section>",
        ]
    )


def _side(side: Side) -> str:
    classes = "".join(f"<li>{html.escape(line)}</li>" for line in side.classes)
    listed = f"<ol>{classes}</ol>" if classes else ""
    return f"<div><h3>{html.escape(side.title)}</h3><p>{html.escape(side.text) or '&nbsp;'}</p>{listed}</div>"


def wide(inner: str) -> str:
    """What scrolls by itself in a narrow window, with the keyboard too."""
    return f'<div class="wide" tabindex="0" role="group" aria-label="table">{inner}</div>'
