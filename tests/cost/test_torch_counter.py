"""What torch's own counter says of one attention, as `docs/counting.md` tells: every product, or by the kernel."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from transformers import LlamaConfig, LlamaModel

ROWS, HEADS, N, WIDTH = 2, 4, 64, 16
EVERY_PRODUCT = 2 * 2 * ROWS * HEADS * N * N * WIDTH
FORMS = {"full": {}, "causal": {"is_causal": True}, "masked": {"attn_mask": torch.ones(N, N, dtype=torch.bool).tril()}}
FUSED_ON_CPU = any("flash_attention_for_cpu" in str(one) for one in flop_counter.flop_registry)
"""Whether this torch has a formula for its fused kernel on a CPU."""


def _counted(call):
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _qkv(device="cpu"):
    return [torch.zeros(ROWS, HEADS, N, WIDTH, device=device) for _ in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_math_counts_every_product_a_causal_half_and_masked_ones_too(form):
    def call():
        with sdpa_kernel(SDPBackend.MATH):
            functional.scaled_dot_product_attention(*_qkv(), **FORMS[form])

    assert _counted(call) == EVERY_PRODUCT


@pytest.mark.parametrize("form", FORMS)
def test_fused_attention_on_a_cpu_counts_as_nothing_where_torch_has_no_formula(form):
    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            functional.scaled_dot_product_attention(*_qkv(), **FORMS[form])

    assert _counted(call) == (EVERY_PRODUCT if FUSED_ON_CPU else 0)


@pytest.mark.parametrize("causal", [False, True])
def test_formulas_of_the_kernels_of_a_gpu_know_shapes_and_no_mask(causal):
    """Asked on tensors without data; a causal kernel does half of it, and counts as all."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    assert _counted(lambda: flash(*_qkv("meta"), 0.0, causal)) == EVERY_PRODUCT
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    assert _counted(lambda: efficient(*_qkv("meta"), None, False, 0.0, causal)) == EVERY_PRODUCT


@pytest.mark.parametrize("padded", [False, True])
def test_eager_and_math_agree_on_a_language_model(padded):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    ids, mask = torch.zeros(1, N, dtype=torch.int64), torch.ones(1, N, dtype=torch.int64)
    mask[:, :5] = 0
    found = {}
    for name in ("eager", "sdpa"):
        model = LlamaModel._from_config(config, attn_implementation=name).eval()

        def call(model=model):
            model(input_ids=ids, attention_mask=mask if padded else None)

        found[name] = _counted(call)
        if name == "sdpa":
            with sdpa_kernel(SDPBackend.MATH):
                found["math"] = _counted(call)
    linear = 2 * 2 * N * (4 * 64 * 64 + 3 * 64 * 128)
    attention = 2 * (2 * 2 * N * N * 64)
    assert found["eager"] == found["math"] == linear + attention
    assert found["sdpa"] == linear + (attention if FUSED_ON_CPU else 0)
