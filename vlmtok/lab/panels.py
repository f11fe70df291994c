"""The overlay as people look at it: the original, a panel a cut, a legend and a caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from ..core.trace import PictureTrace
from .legend import legend
from .paint import EARLY, LATE, LINES, TINT, Fates, colour, dimmed, paint, room_for, seen_mask, unseen
from .pieces import Piece, worth_showing
from .states import State, spread

PANELS = 6
"""Cuts that are drawn; where there are more, so many of them, evenly spaced."""
SMALL, LARGE, LARGEST = 320, 640, 1600
"""Pixels of a panel's longer side: what small pictures are brought to, large ones, and those of very many patches."""
NOTHING = 0.01
"""Share of a picture that is lost to rounding."""
CELL = 6
"""Pixels that a patch has at least."""
WIDTH, GAP, NARROW = 1440, 14, 200
"""Of the sheet: how wide it may become, between panels, and for the words below a narrow one."""
TEXT, SWATCH = 15, 22
FRAME = (214, 40, 40)
PAPER, INK, FAINT, EDGE = (255, 255, 255), (20, 20, 20), (90, 90, 90), (190, 190, 190)


def panel_size(size: tuple[int, int], pieces: Sequence[Piece]) -> tuple[int, int]:
    """Width and height at which a picture is shown, so that its patches can be told apart.

    Pictures keep their shape unless they are so thin that patches would vanish.

    Args:
        size: of the picture.
        pieces: the grids on it.
    """
    longer = max(size)
    scale = min(LARGE, max(SMALL, longer)) / longer
    shown = (size[0] * scale, size[1] * scale)
    across, down = room_for(
        (round(shown[0]), round(shown[1])), [piece.scaled(scale, scale) for piece in pieces], CELL, LARGEST
    )
    return max(1, round(shown[0] * across)), max(1, round(shown[1] * down))


def panels(
    image: Image.Image,
    trace: PictureTrace,
    pieces: Sequence[Piece],
    states: Sequence[State],
    step: int | None = None,
    title: str = "",
) -> Image.Image:
    """Draws the sheet.

    Args:
        image: the picture, RGB.
        trace: of the picture.
        pieces: the grids, in pixels of it.
        states: of `states_of`.
        step: the one state to draw, or None for one each cut.
        title: above; by default the names of the methods.
    """
    part = worth_showing(image.size, pieces)
    near, inside = image.crop(part), [piece.moved(*part[:2]) for piece in pieces]
    size = panel_size(near.size, inside)
    across, down = size[0] / near.width, size[1] / near.height
    base = near.resize(size, _how(min(across, down)))
    placed = [piece.scaled(across, down) for piece in inside]
    cuts = range(1, len(states)) if len(states) > 1 else range(1)
    numbers = [step] if step is not None else [cuts[i] for i in spread(len(cuts), PANELS)]
    fates = [Fates.of(states, number) for number in numbers]
    original = base if near.size == image.size else _framed(image, part, size)
    shown = [(original, f"the picture, {image.width} x {image.height} pixels")]
    shown += [(paint(base, placed, fate), states[number].title) for fate, number in zip(fates, numbers)]
    notes = [legend(trace)]
    if near.size != image.size:
        notes.append("the frame is the part that is drawn: the model saw no more of the picture")
    if step is None and len(numbers) < len(cuts):
        notes.append(f"{len(numbers)} of {len(cuts)} cuts are drawn, evenly spaced; the last one is the end")
    if abs(across / down - 1) > 0.05:
        notes.append(f"drawn {max(across / down, down / across):.1f} times as thick as it is, so that patches show")
    head = title or " + ".join(dict.fromkeys(state.method for state in states if state.method))
    return _sheet(shown, head, list(_swatches(base, placed, fates)), "; ".join(notes))


def _how(times: float) -> Image.Resampling:
    """Pixels stay pixels where they are enlarged a lot."""
    return Image.Resampling.NEAREST if times >= 4 else Image.Resampling.LANCZOS


def _framed(image: Image.Image, part: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """The whole picture within a panel, with a frame around the part that the others show."""
    times = min(size[0] / image.width, size[1] / image.height)
    small = image.resize((max(1, round(image.width * times)), max(1, round(image.height * times))), _how(times))
    panel = Image.new("RGB", size, PAPER)
    x, y = (size[0] - small.width) // 2, (size[1] - small.height) // 2
    panel.paste(small, (x, y))
    left, top, right, bottom = (round(value * times) for value in part)
    ImageDraw.Draw(panel).rectangle((x + left - 1, y + top - 1, x + right, y + bottom), outline=FRAME, width=2)
    return panel


def _swatches(base: Image.Image, pieces: Sequence[Piece], fates: Sequence[Fates]) -> Iterator[tuple[Image.Image, str]]:
    """What the panels show, each as a small piece of the picture itself."""
    small = base.resize((SWATCH, SWATCH), Image.Resampling.BOX)
    tokens = [fate for fate in fates if fate.held is None]
    drawn = [(fate, patch) for fate in tokens for piece in pieces for patch in piece.patches]
    if any(fate.sizes[patch] == 1 for fate, patch in drawn):
        yield small, "kept"
    if any(fate.sizes[patch] > 1 for fate, patch in drawn):
        tinted = Image.blend(small, Image.new("RGB", small.size, colour(0)), TINT / 255)
        ImageDraw.Draw(tinted).rectangle((0, 0, SWATCH - 1, SWATCH - 1), outline=LINES[1])
        yield tinted, "merged, a colour a group"
    lost = {fate.late[patch] for fate, patch in drawn if fate.owner[patch] < 0}
    if False in lost:
        yield dimmed(small, EARLY), "dropped before the language model" if True in lost else "dropped"
    if True in lost:
        yield dimmed(small, LATE), "dropped inside the language model"
    if any(fate.held is not None for fate in fates):
        for share, words in ((1.0, "held in the caches of all layers"), (0.5, "of half of them"), (0.0, "of none")):
            yield Image.blend(dimmed(small, EARLY), small, share), words
    if seen_mask(base.size, pieces).histogram()[0] > NOTHING * base.width * base.height:
        yield unseen(small), "never seen by the model"


def _sheet(
    shown: Sequence[tuple[Image.Image, str]], head: str, swatches: Sequence[tuple[Image.Image, str]], caption: str
) -> Image.Image:
    """Puts pictures and words on paper."""
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 4)
    high = shown[0][0].height
    column = max(shown[0][0].width, NARROW)
    columns = max(1, min(len(shown), (WIDTH - GAP) // (column + GAP)))
    words = [_wrapped(text, column, font) for _, text in shown]
    band = max(map(len, words)) * (TEXT + 4) + 4
    width = 2 * GAP + max(columns * (column + GAP) - GAP, 420)
    rows = -(-len(shown) // columns)
    titles = _wrapped(head, width - 2 * GAP, bold)
    key = list(_lines_of(swatches, width - 2 * GAP, font))
    below = _wrapped(caption, width - 2 * GAP, font)
    top = GAP + len(titles) * (TEXT + 10)
    foot = top + rows * (high + band + GAP)
    height = foot + len(key) * (SWATCH + 8) + 4 + len(below) * (TEXT + 4) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((GAP, GAP - 4), "\n".join(titles), INK, bold)
    for index, ((picture, _), lines) in enumerate(zip(shown, words)):
        row, place = divmod(index, columns)
        x, y = GAP + place * (column + GAP), top + row * (high + band + GAP)
        sheet.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + picture.width, y + high), outline=EDGE)
        for number, line in enumerate(lines):
            pen.text((x, y + high + 4 + number * (TEXT + 4)), line, INK, font)
    for number, entries in enumerate(key):
        for x, swatch, text in entries:
            y = foot + number * (SWATCH + 8)
            sheet.paste(swatch, (GAP + x, y))
            pen.rectangle((GAP + x - 1, y - 1, GAP + x + SWATCH, y + SWATCH), outline=FAINT)
            pen.text((GAP + x + SWATCH + 6, y + 2), text, INK, font)
    y = foot + len(key) * (SWATCH + 8) + 4
    for number, line in enumerate(below):
        pen.text((GAP, y + number * (TEXT + 4)), line, FAINT, font)
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines no longer than so many pixels; a word that is longer is broken."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width and len(word) > 1:
            cut = max(1, sum(font.getlength(word[: i + 1]) <= width for i in range(len(word))))
            lines.append(word[:cut])
            word = word[cut:]
        if word:
            lines.append(word)
    return lines


def _lines_of(
    swatches: Sequence[tuple[Image.Image, str]], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Iterator[list[tuple[int, Image.Image, str]]]:
    """Swatches with their words in lines, each with its place from the left."""
    line: list[tuple[int, Image.Image, str]] = []
    x = 0
    for swatch, text in swatches:
        taken = SWATCH + 6 + round(font.getlength(text)) + 22
        if line and x + taken > width:
            yield line
            line, x = [], 0
        line.append((x, swatch, text))
        x += taken
    if line:
        yield line
