"""Results as people look at them: a title, tables, notes and a picture; in a terminal, as text, and in a notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .tabular import Table, bullets, plain

LARGEST, SMALLEST = 1200, 240
"""Pixels of the longer side of a picture in a notebook: larger ones are shrunk, smaller ones shown larger."""


@dataclass(frozen=True)
class Sheet:
    """What there is to say of a result, without its form.

    Attributes:
        title: one line.
        lines: below it.
        tables: below those.
        notes: at the end.
        picture: shown in notebooks, above the tables.
        caption: how to read the picture, or why there is none.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    picture: Image.Image | None = None
    caption: str = ""

    def rich(self) -> Iterator[Any]:
        """What a console of rich prints; pictures are left out."""
        from rich.text import Text

        yield Text(self.title, style="bold")
        yield from map(Text, self.lines)
        yield from (table.rich() for table in self.tables)
        yield from (Text(note, style="dim") for note in self.notes)

    def text(self, width: int = 120) -> str:
        """Everything but the picture as text.

        Args:
            width: columns.
        """
        return plain(*self.rich(), width=width)

    def html(self) -> str:
        """Everything, for notebooks and pages; colours are left to the page, whether it is light or dark."""
        parts = [f"<p><b>{html.escape(self.title)}</b></p>"]
        if self.lines:
            parts.append(f"<p>{'<br>'.join(map(html.escape, self.lines))}</p>")
        if self.picture is not None or self.caption:
            shown = "" if self.picture is None else _img(self.picture, self.caption)
            caption = f"<figcaption>{html.escape(self.caption)}</figcaption>"
            parts.append(f'<figure style="margin:0.5em 0">{shown}{caption}</figure>')
        parts += [table.html() for table in self.tables]
        if self.notes:
            parts.append(bullets(self.notes))
        return "\n".join(parts)


class Shown:
    """Something that displays as its sheet: HTML in notebooks, text for `str` and `print`."""

    def sheet(self) -> Sheet:
        """What there is to say."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.sheet().html()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The sheet for a rich console."""
        yield from self.sheet().rich()

    def __str__(self) -> str:
        return self.sheet().text()


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, shrunk to `LARGEST` pixels."""
    shown = picture if max(picture.size) <= LARGEST else picture.copy()
    shown.thumbnail((LARGEST, LARGEST))  # does nothing to a small one
    out = io.BytesIO()
    shown.save(out, format="PNG")
    return out.getvalue()


def enlarged(picture: Image.Image) -> int:
    """Width in pixels at which a picture is shown; pictures of tiny models are stamps otherwise."""
    factor = max(1, -(-SMALLEST // max(picture.size)))
    return min(picture.size[0] * factor, LARGEST)


def _img(picture: Image.Image, words: str) -> str:
    data = base64.b64encode(png(picture)).decode("ascii")
    style = f"width:{enlarged(picture)}px;max-width:100%;image-rendering:{_rendering(picture)}"
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(words)}" style="{style}">'


def _rendering(picture: Image.Image) -> str:
    return "pixelated" if enlarged(picture) > picture.size[0] else "auto"
