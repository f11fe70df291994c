"""What ships with the package, and by which name it is asked for."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
"""What ships with the package: ``tiny-llava/`` (a checkpoint), ``pictures/`` and ``pictures/questions.json``."""

EMBEDDED = "tiny-llava"
"""Name of the checkpoint that ships with the package."""
