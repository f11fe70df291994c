"""Vision-language families of transformers that cannot be carried, and why."""

from __future__ import annotations

REFUSED: dict[str, str] = {
    "mllama": "pictures enter through cross-attention, and its cache holds vision states",
    "florence2": "it is an encoder-decoder; pictures are part of the encoder's input",
    "idefics": "pictures enter through cross-attention",
    "kosmos-2": "its own generate() builds the prompt",
    "kosmos-2.5": "its own generate() builds the prompt",
    "chameleon": "pictures are discrete tokens of the vocabulary",
    "emu3": "pictures are discrete tokens of the vocabulary",
    "molmo2": "its mask is built outside the language model in a form that cannot be rebuilt",
    "gemma3n": "its layers carry four streams of hidden states",
}
"""Families that cannot be carried, with the reason."""
