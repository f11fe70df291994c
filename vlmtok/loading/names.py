"""What ships with the package, and by which name it is asked for."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
"""What ships with the package: checkpoints by name, ``pictures/`` with ``pictures/questions.json``, ``results/``."""

EMBEDDED = "tiny-llava"
"""Name of the checkpoint that is taken where none is named."""

SHIPPED = (EMBEDDED, "scenes-llava", "scenes-clip")
"""Names of all checkpoints that ship with the package."""
