"""`DropsBetweenLayers`: what methods share by which tokens leave between the layers of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .method import Method
from .settings import check_flag


@dataclass(eq=False, kw_only=True)
class DropsBetweenLayers(Method):
    """What methods share by which tokens leave between the layers of a language model.

    Args:
        forget: whether entries of what leaves between two layers leave the key-value caches of the layers in front,
            too, behind the prefill, so that decode steps see them nowhere; no release does so. By keyword alone.
    """

    forget: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """See `Method`; `forget` is a flag."""
        if name == "forget":
            check_flag(value, type(self).__name__, name)
        super().__setattr__(name, value)
