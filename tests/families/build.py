"""The tiny families of the package, under the names that these tests use."""

from vlmtok.lab.tiny.families import FAMILIES, TOWER_ONLY, Family, shared
from vlmtok.lab.tiny.models_1d import PINPOINTS, gemma4, llama4, llava_onevision
from vlmtok.lab.tiny.sizes import TEXT, TOWER

__all__ = [
    "FAMILIES",
    "PINPOINTS",
    "TEXT",
    "TOWER",
    "TOWER_ONLY",
    "Family",
    "gemma4",
    "llama4",
    "llava_onevision",
    "shared",
]
