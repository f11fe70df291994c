"""Writes the finished model as one folder that transformers and open_clip both load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_llava.export import store
from tiny_llava.tower import MEAN, STD
from torch import Tensor
from transformers import CLIPModel

from scenes_clip.words import build_processor
from vlmtok.evaluation.dual import CROSS_TOKENS

_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def export(clip: CLIPModel, folder: Path) -> None:
    """Saves the model twice, in half precision, and its processor; it computes in single precision by default."""
    folder.mkdir(parents=True, exist_ok=True)
    clip.save_pretrained(folder)
    store(folder / "model.safetensors")
    build_processor().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(torch.float32).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
    halves = {name: value.half().contiguous() for name, value in open_clip_names(clip).items()}
    save_file(halves, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(clip), indent=2) + "\n")


def open_clip_config(clip: CLIPModel) -> dict[str, object]:
    """What `open_clip.create_model("local-dir:...")` reads."""
    vision, text = clip.config.vision_config, clip.config.text_config
    return {
        "model_cfg": {
            "embed_dim": clip.config.projection_dim,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "hf_tokenizer_name": "scenes-clip",
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def open_clip_names(clip: CLIPModel) -> dict[str, Tensor]:
    """The weights by the names and in the shapes of open_clip."""
    have = {name.replace("vision_model.vision_model.", "vision_model."): v for name, v in clip.state_dict().items()}
    have = {name.replace("text_model.text_model.", "text_model."): value for name, value in have.items()}
    found = {
        "logit_scale": have["logit_scale"],
        "text_projection": have["text_projection.weight"].T,
        "token_embedding.weight": have["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": have["text_model.embeddings.position_embedding.weight"],
        "visual.proj": have["visual_projection.weight"].T,
        "visual.class_embedding": have["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": have["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": have["vision_model.embeddings.patch_embedding.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for here, there in norms.items():
        found |= {f"{here}.{kind}": have[f"{there}.{kind}"] for kind in ("weight", "bias")}
    towers = {"": "text_model", "visual.": "vision_model"}
    for prefix, tower in towers.items():
        for i in range(clip.config.vision_config.num_hidden_layers):
            here, there = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for name, other in _BLOCK.items():
                    found[f"{here}.{other}.{kind}"] = have[f"{there}.{name}.{kind}"]
                found[f"{here}.attn.in_proj_{kind}"] = torch.cat(
                    [have[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                )
    return found


def save_cross_tokens(state: dict[str, Tensor], folder: Path, spec: str) -> None:
    """Saves what `Compression.state_dict` gave, with the method it was trained in."""
    held = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(held, folder / CROSS_TOKENS, metadata={"format": "pt", "method": spec})
    (folder / CROSS_TOKENS).chmod(0o644)
