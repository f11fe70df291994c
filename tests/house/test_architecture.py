"""`docs/architecture.md`: every file stands there with its purpose, what it names exists, and its drawing is true."""

from __future__ import annotations

import re
import subprocess
import sys

from support.places import ROOT
from test_borders import WINGS, wing

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_every_file_is_listed_with_its_purpose():
    done = subprocess.run([sys.executable, "tools/files.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_it_names_exists():
    """Names without a folder are of the language wing, where the way of a picture speaks of it."""
    places = [
        ROOT,
        ROOT / "vlmtok",
        ROOT / "vlmtok" / "core",
        ROOT / "adapters" / "language",
        ROOT / "adapters" / "towers",
    ]
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE.partition("<!-- files")[0]))
    missing = {name for name in named if not any((place / name).is_file() for place in places)}
    assert not missing and len(named) > 40


def test_its_drawing_has_the_wings_and_no_arrow_that_the_walls_forbid():
    drawn = set(re.findall(r"^  (\w+)\[", PAGE, re.M))
    names = {name.split(".")[0] for name in WINGS} - {"front"}
    assert drawn == names
    arrows = re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.M)
    inside = {
        name: {other for key, allowed in WINGS.items() if key.split(".")[0] == name for other in allowed}
        for name in names
    }
    for upper, lower in arrows:
        assert any(other.split(".")[0] == lower for other in inside[upper]), (upper, lower)
    assert wing("vlmtok.adapters.hosts") == "adapters"
