"""CLIP from weights in OpenAI's names, in the libraries that carry it."""

import torch


def sizes(weights):
    """Width, depth, patch, picture side, and width of the joint space of a vision tower."""
    width, _, patch, _ = weights["conv1.weight"].shape
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer"))
    side = patch * round((len(weights["positional_embedding"]) - 1) ** 0.5)
    return width, depth, patch, side, weights["proj"].shape[1]


def _under(weights, path):
    return {name[len(path) :]: value for name, value in weights.items() if name.startswith(path)}


def both(weights):
    """Vision weights, text weights (or None) and the rest."""
    if "conv1.weight" in weights:
        return weights, None
    vision = _under(weights, "visual.")
    return vision, {name: value for name, value in weights.items() if not name.startswith("visual.")}


def open_clip_of(weights, heads, text_heads=1):
    """An open_clip model with the weights; a text tower that they lack is a small random one."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision, text = both(weights)
    width, depth, patch, side, joint = sizes(vision)
    looks = CLIPVisionCfg(layers=depth, width=width, head_width=width // heads, patch_size=patch, image_size=side)
    if text is None:
        reads = CLIPTextCfg(context_length=4, vocab_size=4, width=8, heads=1, layers=1)
    else:
        words, wide = text["token_embedding.weight"].shape
        layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("transformer"))
        length = len(text["positional_embedding"])
        reads = CLIPTextCfg(context_length=length, vocab_size=words, width=wide, heads=text_heads, layers=layers)
    model = CLIP(joint, looks, reads, quick_gelu=True).eval()
    model.visual.load_state_dict(vision)
    if text is not None:
        text = {**text, "logit_scale": torch.as_tensor(text["logit_scale"])}
        missing = model.load_state_dict(text, strict=False)
        assert not missing.unexpected_keys and all(name.startswith("visual.") for name in missing.missing_keys)
    return model


def transformers_of(weights, heads, text_heads=1, eot=None):
    """The same as a CLIPModel of transformers. `eot` is the id that ends a text; by default the greatest."""
    import transformers as tf

    vision, text = both(weights)
    width, depth, patch, side, joint = sizes(vision)
    looks = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
        "hidden_act": "quick_gelu",
    }
    reads = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    if text is not None:
        words, wide = text["token_embedding.weight"].shape
        layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("transformer"))
        reads = {
            "hidden_size": wide,
            "intermediate_size": 4 * wide,
            "num_hidden_layers": layers,
            "num_attention_heads": text_heads,
            "vocab_size": words,
            "max_position_embeddings": len(text["positional_embedding"]),
            "hidden_act": "quick_gelu",
            "eos_token_id": words - 1 if eot is None else eot,
            "bos_token_id": 0,
            "pad_token_id": 0,
        }
    model = tf.CLIPModel(tf.CLIPConfig(vision_config=looks, text_config=reads, projection_dim=joint)).eval()
    found = {
        "vision_model.embeddings.class_embedding": vision["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": vision["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": vision["positional_embedding"],
        "visual_projection.weight": vision["proj"].T,
        **_norm(vision, "ln_pre", "vision_model.pre_layrnorm"),
        **_norm(vision, "ln_post", "vision_model.post_layernorm"),
        **_blocks(vision, "vision_model"),
    }
    if text is not None:
        found |= {
            "text_model.embeddings.token_embedding.weight": text["token_embedding.weight"],
            "text_model.embeddings.position_embedding.weight": text["positional_embedding"],
            "text_projection.weight": text["text_projection"].T,
            "logit_scale": torch.as_tensor(text["logit_scale"]),
            **_norm(text, "ln_final", "text_model.final_layer_norm"),
            **_blocks(text, "text_model"),
        }
    missing = model.load_state_dict(found, strict=False)
    allowed = ("text_", "logit_scale") if text is None else ()
    assert not missing.unexpected_keys
    assert all(name.startswith(allowed) and "position_ids" not in name for name in missing.missing_keys)
    return model


def _norm(weights, name, to):
    return {f"{to}.{leaf}": weights[f"{name}.{leaf}"] for leaf in ("weight", "bias")}


def _blocks(weights, to):
    found = {}
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("transformer"))
    for layer in range(depth):
        block, there = _under(weights, f"transformer.resblocks.{layer}."), f"{to}.encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            for name, part in zip("qkv", block[f"attn.in_proj_{leaf}"].chunk(3)):
                found[f"{there}.self_attn.{name}_proj.{leaf}"] = part
            found[f"{there}.self_attn.out_proj.{leaf}"] = block[f"attn.out_proj.{leaf}"]
            found[f"{there}.mlp.fc1.{leaf}"] = block[f"mlp.c_fc.{leaf}"]
            found[f"{there}.mlp.fc2.{leaf}"] = block[f"mlp.c_proj.{leaf}"]
            found[f"{there}.layer_norm1.{leaf}"] = block[f"ln_1.{leaf}"]
            found[f"{there}.layer_norm2.{leaf}"] = block[f"ln_2.{leaf}"]
    return found
