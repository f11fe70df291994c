"""Draws ``docs/images/overlay.png``: a sample picture, what two methods left of it, and how to read that.

python tools/readme_picture.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import vlmtok
from vlmtok import loading

FILE = Path(__file__).parents[1] / "docs" / "images" / "overlay.png"
METHODS = ("pitome:ratio=0.9", "todre:keep=0.1")
SIDE, GAP, BAND = 336, 16, 58
LEGEND = "clear patches stayed; one colour and outline is one merged group; dark ones left before the language model"


def main() -> None:
    """Draws the picture."""
    model, sample = vlmtok.load(), loading.samples()[0]
    picture = loading.open_picture(sample.path)
    panels = [(picture, f"{sample.question}")]
    for method in METHODS:
        found = vlmtok.compare(model, picture, sample.question, method, rounds=1, limit=0)
        if found.trace is None:
            raise SystemExit(found.overlay_problem)
        drawn = vlmtok.overlay(picture, found.trace, preprocess=model.processor, plain=True)
        panels.append((drawn, f'{method}: "{found.compressed.text}"'))
    sheet = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, SIDE + GAP + BAND), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for index, (shown, words) in enumerate(panels):
        left = GAP + index * (SIDE + GAP)
        sheet.paste(shown.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, GAP))
        draw.text((left, GAP + SIDE + 6), words, "black", font)
    draw.text((2 * GAP + SIDE, GAP + SIDE + 30), LEGEND, "dimgray", font)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(FILE, optimize=True)


if __name__ == "__main__":
    main()
