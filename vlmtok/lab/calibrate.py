"""`calibrate`: how much each layer's cache keeps of some samples, as a profile for prompts to come."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compression import compress
from ..core.layer_profile import LayerProfile
from ..core.method import Method
from ..core.reduction import Reduction
from ..core.spec import as_methods
from ..core.view import TokenView
from ..errors import ParameterError
from ..guard import guarded

PREFILL = {"max_new_tokens": 1, "num_beams": 1, "do_sample": False}
"""One token, of which the prefill decides."""

Kept = dict[int, list[float]]
"""By layer, the share of its entries that each view row keeps."""


@guarded
def calibrate(
    model: nn.Module, method: Method | str, samples: Iterable[Mapping[str, Any]], *, adapter: str | None = None
) -> LayerProfile:
    """Runs samples under a method for key-value caches, and takes the mean of what each layer keeps.

    The profile says beforehand what the method else finds out prompt by prompt, so that its cost can be told:
    ``vlmtok.calibrate(model, "prefixkv:keep=0.3", samples).save("shares.json")``, then
    ``prefixkv:keep=0.3:profile=shares.json``.

    Args:
        model: a vision-language model of transformers, bare.
        method: one method that acts on caches alone, or its spec string.
        samples: what ``model.generate`` takes, each: inputs of a processor, of one prompt or a batch. One token is
            generated of each.
        adapter: as for `vlmtok.compress`.

    Returns:
        The mean over samples (prompts with pictures), a share for each layer. Layers whose caches cannot lose entries
        get what lies between their neighbours.

    Raises:
        ParameterError: the method does not act on caches alone or decides by a profile already, or no sample has a
            picture.
        VlmtokError: the method does not fit the model.
    """
    found = as_methods(method)
    if len(found) != 1:
        raise ParameterError(f"calibrate() takes one method, got {len(found)}: {'+'.join(map(str, found))}")
    if not callable(getattr(model, "generate", None)):
        raise ParameterError(f"calibrate() takes a model that generates, got {type(model).__name__}")
    if isinstance(samples, (str, Mapping)):
        raise ParameterError("calibrate() takes several samples, each what model.generate takes; put one in a list")
    if getattr(found[0], "profile", None) is not None:
        raise ParameterError(f"{found[0]} has a profile; calibrate it with profile=none")
    noting, kept = _noting(found[0])
    with compress(model, noting, adapter=adapter) as run:
        stages = {site.stage for site in noting.sites(run.layout)}
        if stages != {"cache"}:
            raise ParameterError(
                f"calibrate() is for methods that act on caches; {found[0]} acts at {', '.join(stages)}"
            )
        depth = run.layout.stages["cache"].depth
        for sample in samples:
            if not isinstance(sample, Mapping):
                raise ParameterError(f"a sample is what model.generate takes, by name, got {type(sample).__name__}")
            with torch.no_grad():
                model.generate(**{**sample, **PREFILL})  # type: ignore[operator]  # asked above
    if not kept:
        raise ParameterError("calibrate() saw no picture: no entry of any sample could leave a cache")
    keep = getattr(found[0], "keep", None)
    return LayerProfile(
        _over_depth({layer: sum(shares) / len(shares) for layer, shares in kept.items()}, depth),
        str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__),
        keep if isinstance(keep, float) else None,
        max(map(len, kept.values())),
    )


def _noting(method: Method) -> tuple[Method, Kept]:
    """A copy of the method, and what it will note of what it keeps."""
    noting, kept = copy.copy(method), Kept()

    def reduce(view: TokenView) -> Reduction | None:
        found = method.reduce(view)
        kept.setdefault(view.layer, []).extend(_shares(found, view.tokens))
        return found

    noting.__dict__["reduce"] = reduce
    return noting, kept


def _shares(reduction: Reduction | None, tokens: Tensor) -> list[float]:
    """Share of its entries that each view row keeps."""
    rows, n, _ = tokens.shape
    if reduction is None:
        return [1.0] * rows
    if reduction.valid is None:
        return [reduction.slots / n] * rows
    return [count / n for count in reduction.valid.sum(1).tolist()]


def _over_depth(mean: Mapping[int, float], depth: int) -> tuple[float, ...]:
    """A share for every layer: between layers that have one on a straight line, beyond them that of the nearest."""
    found = []
    for layer in range(depth):
        low = max((one for one in mean if one <= layer), default=min(mean))
        high = min((one for one in mean if one >= layer), default=max(mean))
        part = (layer - low) / (high - low) if high > low else 0.0
        found.append(mean[low] + part * (mean[high] - mean[low]))
    return tuple(found)
