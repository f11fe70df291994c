"""Reading the page that `vlmtok run --html` writes, as a browser and as a checker of links would."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LOADS = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "formaction", "background"}
"""Attributes that make a browser fetch something."""


@dataclass
class Read(HTMLParser):
    """A page in pieces.

    Attributes:
        loads: what attributes point at.
        tags: names of all elements, in order.
        ids: attributes of each element with an id.
        scripts: text of each script, with its attributes.
        styles: text of style elements.
        text: everything that is shown.
        handlers: attributes that run code.
    """

    loads: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    ids: dict[str, dict[str, str | None]] = field(default_factory=dict)
    scripts: list[tuple[dict[str, str | None], str]] = field(default_factory=list)
    styles: str = ""
    text: str = ""
    handlers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._inside: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADS and value is not None]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if given.get("id"):
            assert given["id"] not in self.ids, given["id"]
            self.ids[given["id"]] = given
        if tag in ("script", "style"):
            self._inside.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1][0] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data
        elif self._inside[-1][0] == "style":
            self.styles += data
        else:
            self.scripts.append((self._inside[-1][1], data))

    def json(self) -> dict[str, Any]:
        """The data block."""
        (found,) = [text for given, text in self.scripts if given.get("type") == "application/json"]
        return json.loads(found)


def read(page: str) -> Read:
    """Parses a page."""
    found = Read()
    found.feed(page)
    found.close()
    return found


def browser() -> str | None:
    """A Chromium on this machine, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


def open_page(path: Path, *options: str, width: int = 1200, height: int = 1400) -> str:
    """Opens a page without a window and gives what the browser printed.

    Raises:
        AssertionError: the browser failed.
    """
    program = browser()
    assert program is not None
    profile = path.parent / "profile"
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    words += [f"--window-size={width},{height}", "--virtual-time-budget=3000", *options, path.as_uri()]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def driven(page: str, script: str, folder: Path, **size: int) -> Any:
    """What a script finds on an open page.

    Args:
        page: HTML.
        script: statements that return something JSON can say; they run behind the page's own.
        folder: for the copy.
        size: of the window.
    """
    mark = "driven-result"
    told = f"""<script>
      const out = document.createElement("pre");
      out.id = "{mark}";
      try {{ out.textContent = JSON.stringify((() => {{ {script} }})()); }}
      catch (problem) {{ out.textContent = JSON.stringify({{ failed: String(problem) }}); }}
      document.body.append(out);
    </script></body>"""
    copy = folder / "driven.html"
    copy.write_text(page.replace("</body>", told), "utf-8")
    found = Result(mark)
    found.feed(open_page(copy, "--dump-dom", **size))
    result = json.loads(found.text)
    assert not (isinstance(result, dict) and "failed" in result), result
    return result


class Result(HTMLParser):
    """The text of one element.

    Args:
        mark: its id.
    """

    def __init__(self, mark: str) -> None:
        super().__init__(convert_charrefs=True)
        self.mark, self.inside, self.text = mark, False, ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = self.inside or dict(attrs).get("id") == self.mark

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.text += data
