"""Vision towers end to end: the published implementations, weights included, and the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from support import models, oracle
from support.checks import assert_differs, assert_equal
from support.merging_by_hand import golden, pitome_by_hand, tome_by_hand
from support.player import Player

import vlmtok
from vlmtok import PiToMe, ToMe

# ---------------------------------------------------------------------- end to end, weights included
MICRO = {
    "tome_r4": ToMe(r=4),
    "tome_r4_noprop": ToMe(r=4, prop_attn=False),
    "tome_r7": ToMe(r=7),
    "tome_r7_dec": ToMe(r=(7, -1)),
    "pitome_deit_095": PiToMe.preset("deit", ratio=0.95),
    "pitome_deit_090": PiToMe.preset("deit", ratio=0.9),
    "pitome_mae_090": PiToMe.preset("mae", ratio=0.9),
    "pitome_all_090": PiToMe.preset("aug", ratio=0.9),
    "pitome_paper_0925": PiToMe.preset("paper", ratio=0.925),
}


@pytest.fixture(scope="module")
def micro():
    from timm.models.vision_transformer import VisionTransformer

    data = golden("e2e_micro_vit.npz")
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=10, mlp_ratio=2.0
    )
    model.load_state_dict({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    return model.eval(), data


def test_the_micro_vit_is_the_published_one(micro):
    model, data = micro
    variants = {key.partition(".")[0] for key in data if key.endswith(".logits")}
    assert variants == {"none", *MICRO}
    with torch.no_grad():
        assert_equal(model(data["x"]), data["none.logits"], 1e-5)


@pytest.mark.parametrize("variant", MICRO)
def test_micro_vit_end_to_end(micro, variant):
    """Logits to 1e-4 and identical sources, tokens of every layer included."""
    model, data = micro
    bare = data["none.logits"]
    lengths = []
    handles = [block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1])) for block in model.blocks]
    with torch.no_grad(), vlmtok.compress(model, MICRO[variant], trace=True) as run:
        found = model(data["x"])
        trace = run.trace()
    for handle in handles:
        handle.remove()
    assert lengths == data[f"{variant}.tokens_out"].tolist()
    assert_equal(found, data[f"{variant}.logits"], 1e-4)
    assert_differs(found, bare)
    for row in range(len(found)):
        source = data[f"{variant}.source"][row, 1:, 1:]  # slots by patches, without the class token
        assert same_groups(trace[row].owner.tolist(), source.float().argmax(0).tolist())
        sizes = data[f"{variant}.size"][row, 1:, 0]
        assert sorted(trace[row].group_sizes().tolist()) == sorted(
            int(sizes[slot]) for slot in source.float().argmax(0).tolist()
        )


def same_groups(one, other):
    """Whether two owner maps group the patches alike, whatever the slots are called."""
    return len(set(one)) == len(set(other)) == len(set(zip(one, other)))


@pytest.mark.parametrize("variant", MICRO)
def test_the_oracle_agrees_with_the_published_micro_vit(micro, variant):
    """What all other models are compared with gives the published numbers here."""
    model, data = micro
    from vlmtok.adapters import adapter_for

    layout, vision = adapter_for(model).layout(), oracle.vision_of(model)
    with torch.no_grad():
        for row in range(3):
            run = oracle.run_tower(vision, data["x"][row : row + 1], Player([MICRO[variant]], layout))
            assert_equal(vision.head(vision.tokens(run.x[None])), data[f"{variant}.logits"][row : row + 1], 1e-4)
            source = data[f"{variant}.source"][row, 1:, 1:].float().argmax(0)
            assert run.source.tolist() == source.tolist(), "the order of the slots"


TINY = {
    "tome:r=16": [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11],
    "tome:r=(16;-1)": [165, 136, 110, 87, 67, 50, 36, 25, 17, 12, 10, 10],
    "pitome:preset=deit:ratio=0.95": [188, 179, 171, 163, 155, 148, 141, 134, 128, 122, 116, 111],
    "pitome:preset=paper:ratio=0.925": [183, 170, 158, 147, 137, 127, 118, 110, 102, 95, 88, 82],
}
"""Tokens behind each block of the published runs on a vit_tiny_patch16_224 (12 blocks, 197 tokens)."""


@pytest.fixture(scope="module")
def vit_tiny():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    torch.manual_seed(1)
    return model, torch.randn(2, 3, 224, 224)


@pytest.mark.parametrize("spec", TINY)
def test_vit_tiny_has_the_published_lengths_and_the_tokens_of_the_oracle(vit_tiny, spec):
    model, x = vit_tiny
    methods, lengths = vlmtok.parse_methods(spec), []
    handles = [block.register_forward_hook(lambda m, a, y: lengths.append(y.shape[1])) for block in model.blocks]
    with torch.no_grad(), vlmtok.compress(model, methods, trace=True) as run:
        found = model(x)
        trace = run.trace()
    for handle in handles:
        handle.remove()
    assert lengths == TINY[spec]
    vision = oracle.vision_of(model)
    with torch.no_grad():
        wanted = oracle.run_tower(vision, x[:1], Player(methods, run.layout))
        assert_equal(found[:1], vision.head(vision.tokens(wanted.x[None])), 1e-4)
        assert_differs(found, model(x))
    assert same_groups(trace[0].owner.tolist(), wanted.source.tolist())


# ---------------------------------------------------------------------- PiToMe in LLaVA's tower
def llava_tower(depth=16):
    import transformers as tf

    torch.manual_seed(0)
    config = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        attn_implementation="eager",
    )
    return models.randomize(tf.CLIPVisionModel(config), gain=1.0)


@pytest.mark.parametrize("ratio", [0.95, 0.9])
def test_pitome_llava_preset_equals_the_released_recipe(ratio):
    """pitome.md 1.3, HF row, written out: after the whole block, on its output; plain matching with the class token
    counted in r and in the parity for layers 0 to 12, energy matching behind; plain means; no sizes anywhere."""
    model = llava_tower()
    depth = 16
    x = models.pictures(2, 3, (64, 64))
    seen = []
    handles = [m.register_forward_hook(lambda m, a, y: seen.append(y)) for m in model.encoder.layers]
    with torch.no_grad():
        bare = model(pixel_values=x, output_hidden_states=True)
        seen.clear()
        with vlmtok.compress(model, PiToMe.preset("llava", ratio=ratio)):
            found = model(pixel_values=x, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        lengths = {0.95: [62, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 38, 37, 36, 35]}.get(ratio)
        lengths = lengths or [59, 54, 49, 45, 41, 37, 34, 31, 28, 26, 24, 22, 20, 19, 18, 17]
        assert [h.shape[1] for h in found.hidden_states[1:]] == lengths, "transformers' own record"
        assert [h.shape[1] for h in seen] == lengths, "hooks that were there before"
        for row in range(2):
            h = model.pre_layrnorm(model.embeddings(x[row : row + 1]))
            for layer, block in enumerate(model.encoder.layers):
                h = block(h, attention_mask=None)
                h = h[0] if isinstance(h, tuple) else h
                h = released_step(h[0], ratio, layer, depth)[None]
                assert_equal(found.hidden_states[layer + 1][row : row + 1], h, what=f"hidden state {layer + 1}")
    assert_differs(found.pooler_output, bare.pooler_output)


def released_step(h, ratio, layer, depth):
    """One layer's merge of a row [1 + T, C], class token first."""
    cls, patches = h[:1], h[1:]
    if layer <= 12:
        total = len(h)
        stay, pairs, targets = tome_by_hand(patches, math.floor(total - total * ratio), 1)
    else:
        total = len(patches)
        stay, pairs, targets = pitome_by_hand(
            patches, math.floor(total - total * ratio), 0.9 - 0.9 * layer / depth, 1.0
        )
    if not pairs:
        return h
    merged = []
    for b in targets:
        members = [b, *(a for a, to in pairs if to == b)]
        merged.append(patches[members].mean(0))
    return torch.cat([cls, patches[stay], torch.stack(merged)])
