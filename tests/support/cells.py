"""What of the table in `matrix.json` runs, what is refused, and methods with the settings of the table."""

from __future__ import annotations

import vlmtok

from . import matrix, models
from .checks import Subject
from .matrix import spec_of
from .methods import on_caches

EXPECTED = matrix.expected()
CELLS = [(method, model) for method, row in EXPECTED.items() for model in row]
RUNS = [cell for cell in CELLS if EXPECTED[cell[0]][cell[1]] == "runs"]
REFUSED = [cell for cell in CELLS if cell not in set(RUNS)]
LLAVA_RUNS = [cell for cell in RUNS if cell[1] in models.LLAVA and not on_caches(cell[0])]
CACHE_RUNS = [cell for cell in RUNS if on_caches(cell[0]) and cell[1] in ("HF LLaVA", "HF LLaVA eager")]
TOWER_RUNS = [cell for cell in RUNS if cell[1] in models.TOWERS]


def ids(cells):
    return [" on ".join(cell) for cell in cells]


def subject_of(method, model):
    """The model and its inputs; where a method changes nothing but caches, one token is written on them."""
    return Subject(model, writes=on_caches(method))


def made(method):
    return vlmtok.parse_methods(spec_of(method))
