"""A question about the picture, and `compare` in one round."""

from __future__ import annotations

from vlmtok.lab import compare as comparing

QUESTION = "what color is the circle ?"


def compare(model, *given, **more):
    return comparing.compare(model, *given, **{"rounds": 1, "limit": 0, "max_new_tokens": 4, **more})
