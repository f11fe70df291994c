"""Pictures made worse as a camera does it: noise, blur, low contrast at five severities, the same for the same id."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image, ImageFilter

from ...errors import ParameterError

SEVERITIES = {
    "noise": (12.0, 24.0, 40.0, 60.0, 85.0),  # standard deviation in levels of 255
    "blur": (0.7, 1.1, 1.6, 2.3, 3.2),  # standard deviation in pixels
    "contrast": (0.6, 0.4, 0.27, 0.17, 0.1),  # what is left of the distance to the mean level
}
"""Strength of every shift at severities 1 to 5."""


def shift(picture: Image.Image, kind: str, severity: int, name: str) -> Image.Image:
    """A worse picture.

    Args:
        picture: RGB.
        kind: one of `SEVERITIES`.
        severity: 1 to 5.
        name: the picture's id, which decides the noise.

    Returns:
        RGB of the same size.

    Raises:
        ParameterError: there is no such shift or severity.
    """
    if kind not in SEVERITIES:
        raise ParameterError(f"shift: kind must be one of {', '.join(SEVERITIES)}, got {kind!r}")
    if severity not in range(1, len(SEVERITIES[kind]) + 1):
        raise ParameterError(f"shift: severity must be 1 to {len(SEVERITIES[kind])}, got {severity!r}")
    strength = SEVERITIES[kind][severity - 1]
    if kind == "blur":
        return picture.filter(ImageFilter.GaussianBlur(strength))
    levels = np.asarray(picture, np.float64)
    if kind == "noise":
        seed = int.from_bytes(hashlib.sha256(f"{kind}:{name}".encode()).digest()[:8], "big")
        levels = levels + strength * np.random.default_rng(seed).standard_normal(levels.shape)
    else:
        levels = levels.mean() + strength * (levels - levels.mean())
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
