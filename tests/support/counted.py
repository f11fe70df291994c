"""Models whose work torch counts, and what they generate."""

from __future__ import annotations

import functools

from . import models


@functools.cache
def model_of(name):
    return models.fresh(name).requires_grad_(False)


BATCH = ("^3I4", "^1I2I5", "6", "^2I")
"""A picture, two pictures, none, and one that ends its prompt: rows of different lengths, padded."""


def generating(model, steps=4, rows=BATCH, **options):
    inputs = models.Batch.of(*rows).inputs()
    return lambda: model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
