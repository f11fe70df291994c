"""Towers whose host hides patches of padding: signals leave padding out, and masks follow rows that get shorter."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from support.checks import assert_differs, assert_equal, assert_same
from torch import Tensor, nn

import vlmtok
from vlmtok import Layout, Method, Reduction, Site, TokenView
from vlmtok.errors import PassError
from vlmtok.lab.tiny.families import FAMILIES, shared

NAMES = ("smolvlm", "idefics3")
SIGNALS = ("received_attention", "flat_attention", "keys", "turned_keys", "keys_full", "turned_keys_full")


def padded(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A tower, two pictures and what of them is real: all of the first, a corner of the second."""
    model = shared(name, "eager")
    pixels = FAMILIES[name].batch("2I3", "4J3").inputs()["pixel_values"].flatten(0, 1)
    real = torch.ones(2, *(side // 4 for side in pixels.shape[-2:]), dtype=torch.bool)
    real[1, :, 5:] = False
    real[1, 6:] = False
    return model.model.vision_model, pixels, real


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes signals of every layer."""

    heard: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("vision", layer, "mid", SIGNALS) for layer in layout.layers("vision")]

    def reduce(self, view: TokenView) -> None:
        for name in SIGNALS:
            self.heard.setdefault(name, []).append(view.signal(name))


@dataclass(eq=False)
class Halve(Method):
    """Every second patch joins the one before it, or goes; in the first layer."""

    merge: bool = True
    prop: bool = True

    @property
    def proportional(self) -> bool:
        return self.prop

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("vision", 0, "mid")]

    def reduce(self, view: TokenView) -> Reduction:
        batch, n, _ = view.tokens.shape
        keep, odd = (torch.arange(first, n, 2).expand(batch, -1) for first in (0, 1))
        return Reduction(keep, odd, odd // 2) if self.merge else Reduction(keep)


def projections(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a block's input, `[B, H, L, d]`."""
    attn, x = block.self_attn, block.layer_norm1(x)
    made = (linear(x).unflatten(-1, (attn.num_heads, -1)) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
    return tuple(part.transpose(1, 2) for part in made)


def blocks_by_hand(tower: nn.Module, x: Tensor, shown: Tensor, method: Halve) -> Tensor:
    """The encoder in plain torch, shortened behind the first attention, spread out behind the last block."""
    size = torch.ones_like(shown, dtype=x.dtype)
    blocks = tower.encoder.layers
    for layer, block in enumerate(blocks):
        q, k, v = projections(block, x)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if method.prop and layer:
            logits = logits + size.log()[:, None, None]
        weights = logits.masked_fill(~shown[:, None, None], float("-inf")).softmax(-1)
        x = x + block.self_attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if layer == 0:
            shown = shown[:, ::2]
            if method.merge:
                x, size = (x[:, ::2] + x[:, 1::2]) / 2, size[:, ::2] + size[:, 1::2]
            else:
                x, size = x[:, ::2], size[:, ::2]
        x = x + block.mlp(block.layer_norm2(x))
    whole = x.repeat_interleave(2, 1)
    if not method.merge:
        whole[:, 1::2] = 0.0
    return tower.post_layernorm(whole)


@pytest.mark.parametrize("name", NAMES)
def test_signals_are_those_of_the_patches_that_the_host_shows(name: str) -> None:
    tower, pixels, real = padded(name)
    shown = real.flatten(1)
    listen = Listen()
    with torch.no_grad():
        bare = tower(pixel_values=pixels, patch_attention_mask=real, output_attentions=True, output_hidden_states=True)
        with vlmtok.compress(shared(name, "eager"), listen):
            seen = tower(pixel_values=pixels, patch_attention_mask=real).last_hidden_state
    assert_same(seen, bare.last_hidden_state)
    assert len(listen.heard["keys"]) == len(bare.attentions)
    for layer, weights in enumerate(bare.attentions):
        rows = torch.stack([weights[i][:, shown[i]].mean((0, 1)) for i in range(2)])
        assert float(rows[1][~shown[1]].abs().max()) == 0.0
        assert_equal(listen.heard["received_attention"][layer], rows, 1e-6)
        q, k, _ = projections(tower.encoder.layers[layer], bare.hidden_states[layer])
        assert_equal(listen.heard["keys"][layer], k.mean(1))
        assert_equal(listen.heard["turned_keys_full"][layer], k.transpose(1, 2).flatten(2))
        wide_q, wide_k = (part.transpose(1, 2).flatten(2) for part in (q, k))
        logits = wide_q @ wide_k.transpose(1, 2) * wide_q.shape[-1] ** -0.5
        flat = logits.masked_fill(~shown[:, None], float("-inf")).softmax(-1)
        flat = torch.stack([flat[i][shown[i]].mean(0) for i in range(2)])
        assert_equal(listen.heard["flat_attention"][layer], flat, 1e-6)


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "drop"])
@pytest.mark.parametrize("prop", [True, False], ids=["prop", "plain"])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_follow_the_rows(name: str, kind: str, prop: bool, merge: bool) -> None:
    tower, pixels, real = padded(name)
    method = Halve(merge, prop)
    with torch.no_grad():
        x = tower.embeddings(pixel_values=pixels, patch_attention_mask=real)
        wanted = blocks_by_hand(tower, x, real.flatten(1), method)
        blind = blocks_by_hand(tower, x, torch.ones_like(real).flatten(1), method)
        model = shared(name, kind)
        with vlmtok.compress(model, method):
            found = model.model.vision_model(pixel_values=pixels, patch_attention_mask=real).last_hidden_state
    assert_equal(found, wanted)
    assert_differs(wanted, blind)


def test_gradients_flow_through_rows_with_padding() -> None:
    tower, pixels, real = padded("smolvlm")
    pixels = pixels.clone().requires_grad_()
    method = Halve()

    def gradient(run) -> Tensor:
        return torch.autograd.grad(run().square().sum(), pixels)[0]

    def by_hand() -> Tensor:
        x = tower.embeddings(pixel_values=pixels, patch_attention_mask=real)
        return blocks_by_hand(tower, x, real.flatten(1), method)

    wanted = gradient(by_hand)
    with vlmtok.compress(shared("smolvlm", "eager"), method):
        found = gradient(lambda: tower(pixel_values=pixels, patch_attention_mask=real).last_hidden_state)
    assert_equal(found, wanted, 1e-4)


def test_a_mask_that_differs_from_row_to_row_is_refused() -> None:
    tower, pixels, _ = padded("smolvlm")
    with torch.no_grad():
        x = tower.embeddings(pixel_values=pixels, patch_attention_mask=torch.ones(2, 8, 8, dtype=torch.bool))
        ladder = torch.zeros(2, 1, 64, 64).masked_fill(torch.ones(64, 64).triu(1).bool(), float("-inf"))
        with vlmtok.compress(shared("smolvlm", "eager"), "tome:r=2"), pytest.raises(PassError, match="mask that hides"):
            tower.encoder(inputs_embeds=x, attention_mask=ladder)
