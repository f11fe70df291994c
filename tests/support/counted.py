"""Models whose work torch counts, and what they generate."""

from __future__ import annotations

import functools

import torch

from . import models, referee


@functools.cache
def model_of(name):
    return models.fresh(name).requires_grad_(False)


BATCH = ("^3I4", "^1I2I5", "6", "^2I")
"""A picture, two pictures, none, and one that ends its prompt: rows of different lengths, padded."""


def generating(model, steps=4, rows=BATCH, **options):
    inputs = models.Batch.of(*rows).inputs()
    return lambda: model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)


class Outside:
    """Torch's count of what runs outside of some modules of a model.

    Args:
        modules: whose work is left out, and that of all below them.
    """

    def __init__(self, *modules):
        self.counter = referee.counter()
        self.inside = self.depth = self.before = 0
        self.handles = []
        for module in modules:
            self.handles.append(module.register_forward_pre_hook(self._enter))
            self.handles.append(module.register_forward_hook(self._leave))

    def _enter(self, *_):
        self.before = self.before if self.depth else self.counter.get_total_flops()
        self.depth += 1

    def _leave(self, *_):
        self.depth -= 1
        self.inside += 0 if self.depth else self.counter.get_total_flops() - self.before

    def __enter__(self):
        self.counter.__enter__()
        return self

    def __exit__(self, *error):
        self.counter.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    @property
    def flops(self):
        """So far."""
        return self.counter.get_total_flops() - self.inside


def bytes_of(cache):
    """Bytes of everything that a cache of transformers holds."""
    held = []
    for layer in cache.layers:
        held += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for name in ("conv_states", "recurrent_states"):
            held += getattr(layer, name, {}).values()
    return sum(one.numel() * one.element_size() for one in held if isinstance(one, torch.Tensor))
