"""Merging inside towers that hold all pictures in one row: against a loop of plain tensor operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlmtok

from .build import FAMILIES, shared
from .packed_by_hand import PACKED, Decide, blocks_of, by_hand, by_method, crossget, pitome, tome
from .pictures import clips, pictures

DEPTH = 3

WAYS: dict[str, tuple[str, Callable[[], Decide], bool]] = {
    "tome": ("tome:r=3", lambda: tome(3), True),
    "tome without sizes": ("tome:r=3:prop_attn=false", lambda: tome(3), False),
    "pitome": ("pitome:ratio=0.7", lambda: pitome(0.7, DEPTH), True),
    "pitome without sizes": ("pitome:ratio=0.7:prop_attn=false", lambda: pitome(0.7, DEPTH), False),
    "crossget": ("crossget:rv=3", lambda: crossget(3), True),
    "tca": ("tca:ratio=0.6", lambda: by_method(vlmtok.create_method("tca", ratio=0.6), DEPTH), False),
}


def features(model: Any, name: str, arrays: dict[str, Tensor]) -> Tensor:
    """What the language model gets of pictures or clips, `[tokens, C]`, levels side by side."""
    video = "pixel_values_videos" in arrays
    encode = model.model.get_video_features if video else model.model.get_image_features
    out = encode(**arrays, return_dict=True)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    return torch.cat([torch.cat([part.reshape(-1, part.shape[-1]) for part in level]) for level in levels], -1)


def close(found: Tensor, wanted: Tensor, share: float = 2e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= share * float(wanted.abs().max())


def shots(name: str) -> list[dict[str, Tensor]]:
    return [pictures(name), *([clips(name)] if FAMILIES[name].clips else [])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_merging_equals_the_loop(name: str, way: str) -> None:
    spec, decide, sized = WAYS[way]
    model = shared(name)
    for arrays in shots(name):
        bare = features(model, name, arrays)
        with by_hand(model, decide(), sized):
            wanted = features(model, name, arrays)
        with vlmtok.compress(model, spec):
            found = features(model, name, arrays)
        close(found, wanted)
        assert float((wanted - bare).abs().max()) > 1e-2 * float(bare.abs().max())
        assert torch.equal(features(model, name, arrays), bare)
