"""What a model says after cuts, worked out the plain way: one row, no padding, no cache, no hooks, no library.

Each step starts from the prompt. Embeddings, positions, masks and cuts are made here from their definitions; only the
model's own modules (encoders, decoder layers, rotary tables, head) are called. Nothing of vlmtok and no mask helper of
transformers is imported.
"""

from .kinds import (
    Gemma3Oracle,
    Gemma4Oracle,
    Llama4Oracle,
    MRoPEOracle,
    PaliGemmaOracle,
    Qwen3Oracle,
    Qwen25Oracle,
    oracle,
)
from .plain import Oracle
from .rows import Cut, causal, chosen, same_block

__all__ = [
    "Cut",
    "Gemma3Oracle",
    "Gemma4Oracle",
    "Llama4Oracle",
    "MRoPEOracle",
    "Oracle",
    "PaliGemmaOracle",
    "Qwen3Oracle",
    "Qwen25Oracle",
    "causal",
    "chosen",
    "oracle",
    "same_block",
]
