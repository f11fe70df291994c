"""A task of eight pictures for the shipped checkpoint: the colour of a circle, on the left or on the right."""

from PIL import Image, ImageDraw

from vlmtok.evaluation.dialogue import Dialogue, answer, check_chat, encode
from vlmtok.evaluation.task import Item, Outcome

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 210, 50)}
QUESTION = "what color is the circle ?"


class Circles:
    """Counts its calls; `refuse` is called with each batch, where given."""

    name = "circles"
    about = "colours of circles"
    model = "tiny-llava"
    language = True

    def __init__(self, refuse=None):
        self.refuse, self.asked, self.probed = refuse, [], 0

    def items(self, limit):
        """Sides in turn."""
        made = [Item(f"{colour} {side}", side, (colour, side)) for colour in COLOURS for side in ("left", "right")]
        return made[:limit]

    def check(self, loaded):
        """As for any task that asks."""
        check_chat(loaded)

    def batches(self, loaded, items, size):
        """All rows are of one length."""
        return [list(range(first, min(first + size, len(items)))) for first in range(0, len(items), size)]

    def pictures(self, item):
        """One circle."""
        colour, side = item.what
        page = Image.new("RGB", (96, 96), (250, 250, 250))
        left = 10 if side == "left" else 56
        ImageDraw.Draw(page).ellipse((left, 30, left + 30, 60), fill=COLOURS[colour])
        return [page]

    def answer(self, loaded, items):
        """Right or wrong, with the length of the answer as a further figure."""
        self.asked.append([item.id for item in items])
        if self.refuse is not None:
            self.refuse(loaded, items)
        given = answer(loaded, [self._dialogue(item) for item in items], 3)
        return [
            Outcome(float(text == item.what[0]), text, {"letters": float(len(text))})
            for item, text in zip(items, given)
        ]

    def probe(self, loaded, item):
        """The first token."""
        self.probed += 1
        loaded.model.generate(**encode(loaded, [self._dialogue(item)]), max_new_tokens=1, do_sample=False)

    def _dialogue(self, item):
        return Dialogue(tuple(self.pictures(item)), (), QUESTION)
