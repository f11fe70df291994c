"""Reports name the kernel of a tower's attention where it adds log(size), and where keys must be hidden."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlmtok
from vlmtok.lab.tiny import towers as tiny

SIZED = "proportional attention"


def told(model, spec, run):
    """What the report says of attention, and how often SDPA got a mask."""
    seen, real = Counter(), F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, *rest, **words):
        seen[attn_mask is not None] += 1
        return real(query, key, value, attn_mask, *rest, **words)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), vlmtok.compress(model, spec) as compressed:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        run(model)
        found = compressed.report().kernels
    return {name: count for name, count in found.items() if "attention" in name}, seen[True]


def of_timm(fused=True):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=32, num_heads=2).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def on_pictures(model):
    model(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "SiglipVisionModel", "ViTModel", "Dinov2Model"])
def test_transformers_is_named_by_its_configuration(kind):
    """And an attention counts where it got a bias, no more often."""
    for attention in ("sdpa", "eager"):
        model = tiny._hf(kind, attention)
        size = model.config.image_size
        run = lambda model, size=size: model(pixel_values=torch.randn(2, 3, size, size))  # noqa: E731
        found, masked = told(model, "tome:r=1", run)
        ((name, count),) = found.items()
        assert name == f"{SIZED}:" + ("sdpa (flash)" if attention == "sdpa" else "eager")  # a CPU's flash takes masks
        assert masked == (count if attention == "sdpa" else 0) and count == model.config.num_hidden_layers - 1
        assert told(model, "tome:r=1:prop_attn=false", run) == ({}, 0)


def test_timm_is_named_by_what_it_fuses():
    found, masked = told(of_timm(), "tome:r=2", on_pictures)
    assert found == {f"{SIZED}:sdpa (flash)": 3} and masked == 3
    assert told(of_timm(fused=False), "tome:r=2", on_pictures) == ({f"{SIZED}:eager": 3}, 0)
    with sdpa_kernel(SDPBackend.MATH):
        assert told(of_timm(), "tome:r=2", on_pictures)[0] == {f"{SIZED}:sdpa (math)": 3}


def test_a_tower_that_hides_keys_says_so():
    """Masks without sizes behind a cut: a text tower's causal one, at the rows that are left."""
    model = tiny._hf("CLIPModel", "sdpa")
    ids = torch.randint(1, 90, (2, 9))

    def run(model):
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 48, 48))

    found, _ = told(model, "crossget:rv=0:rl=2:prop_attn=false", run)
    assert set(found) == {"masked attention of a tower:sdpa (flash)"}


def test_a_traced_or_compiled_tower_is_not_asked():
    model = of_timm()
    expected = {f"{SIZED}:sdpa (flash)": 3}
    assert told(model, "tome:r=2", lambda m: m.to("meta")(torch.empty(1, 3, 64, 64, device="meta")))[0].values()
    model = of_timm()
    with torch.no_grad(), vlmtok.compress(model, "tome:r=2") as run:
        torch.compile(model, backend="eager")(torch.randn(1, 3, 64, 64))
        assert not [name for name in run.report().kernels if name in expected]
