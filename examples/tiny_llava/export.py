"""Writes the finished model as a checkpoint folder that transformers loads by `from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from tiny_llava.processor import build_processor

WRITTEN, STORED = "vision_tower.", "vision_tower.vision_model."
"""How transformers 5 spells the tower's names, and how it and vLLM's own LLaVA both read them."""


def export(llava: LlavaForConditionalGeneration, folder: Path, processor: LlavaProcessor | None = None) -> None:
    """Saves model, generation settings and processor, by default that of tiny-llava.

    Weights are stored in half precision for their size, but the configuration says float32, so that a plain
    `from_pretrained` computes in single precision on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = llava.config.text_config
    llava.set_attn_implementation("sdpa")
    llava.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, max_new_tokens=8
    )
    llava.save_pretrained(folder)
    store(folder / "model.safetensors")
    (build_processor() if processor is None else processor).save_pretrained(folder)
    _say_float32(folder / "config.json")


def store(weights: Path) -> None:
    """Rewrites a file of weights in half precision and with the names of `STORED`; done twice, it is done once."""
    halves = {stored(name): value.half() for name, value in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def stored(name: str) -> str:
    """The name of a tensor in the stored file."""
    inside = name.startswith(WRITTEN) and not name.startswith(STORED)
    return STORED + name.removeprefix(WRITTEN) if inside else name


def _say_float32(path: Path) -> None:
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(torch.float32).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
