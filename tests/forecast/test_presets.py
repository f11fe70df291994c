"""Presets are what the adapters read off the models."""

from __future__ import annotations

import pytest
import torch
from vlmtok.adapters import adapter_for

from vlmtok.errors import ParameterError
from vlmtok.forecast.presets import PRESETS, preset


def _clip_336():
    import transformers as tf

    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    return tf.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)


def _llava(width, hidden, depth, heads):
    import transformers as tf

    sizes = dict(hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads)
    text = tf.LlamaConfig(**sizes, num_key_value_heads=heads, vocab_size=32064)
    feature = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=_clip_336(), text_config=text, **feature))


def _next():
    import transformers as tf

    llama = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    text = tf.LlamaConfig(**llama, num_key_value_heads=32, vocab_size=32064)
    return tf.LlavaNextForConditionalGeneration(tf.LlavaNextConfig(vision_config=_clip_336(), text_config=text))


def _siglip():
    import transformers as tf

    sizes = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes, image_size=384, patch_size=14))


def _timm(name, **changes):
    import timm

    return timm.create_model(name, pretrained=False, **changes)


def _open_clip(name):
    import open_clip

    return open_clip.create_model(name, device="meta")


BUILT = {
    "llava-1.5-7b": lambda: _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _llava(5120, 13824, 40, 40),
    "llava-next-7b": _next,
    "clip-vit-b-16": lambda: _open_clip("ViT-B-16"),
    "clip-vit-l-14": lambda: _open_clip("ViT-L-14"),
    "clip-vit-l-14-336": lambda: __import__("transformers").CLIPVisionModel(_clip_336()),
    "siglip-so400m-14-384": _siglip,
    "vit-t-16": lambda: _timm("vit_tiny_patch16_224"),
    "vit-s-16": lambda: _timm("vit_small_patch16_224"),
    "vit-b-16": lambda: _timm("vit_base_patch16_224"),
    "vit-b-16-384": lambda: _timm("vit_base_patch16_384"),
    "vit-l-16": lambda: _timm("vit_large_patch16_224"),
    "deit-s": lambda: _timm("deit_small_patch16_224"),
    "mae-h": lambda: _timm("vit_huge_patch14_224.mae", num_classes=1000),
}


def _plain(tower):
    """A tower without what only a model has: paths, names, and how q and k are read."""
    if tower is None:
        return None
    parts = sorted((part.row, part.token, part.pair) for part in tower.parts)
    return tower.blocks, tower.tokens, tower.protected, tower.stem, parts, tower.grid, tower.spread


@pytest.mark.parametrize("name", BUILT)
def test_presets_are_what_the_adapters_read_off_the_models(name):
    with torch.device("meta"):
        model = BUILT[name]().to(torch.float16)
    found, wanted = preset(name), adapter_for(model).account()
    assert _plain(found.vision) == _plain(wanted.vision)
    assert _plain(found.text) == _plain(wanted.text)
    assert sum(part.row for part in found.projector) == sum(part.row for part in wanted.projector)
    if wanted.visual:  # else the prompt says how many there are
        assert (found.visual, found.crops) == (wanted.visual, wanted.crops)
    if found.language is not None:
        assert found.language.blocks == wanted.language.blocks
        assert found.language.head.row == wanted.language.head.row
        assert all(block.kv_bytes for block in found.language.blocks)
    assert dict(found.layout.stages) == dict(wanted.layout.stages)


def test_every_preset_can_be_made_and_an_unknown_one_names_them():
    for name in PRESETS:
        shape = preset(name)
        assert shape.name == name and shape.layout.stages
        assert shape.visual == sum(shape.parts or (shape.visual,))
    with pytest.raises(ParameterError, match=r"no preset 'llava-1.5'; did you mean 'llava-1.5-7b'\?"):
        preset("llava-1.5")
