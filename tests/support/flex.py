"""FlexAttention of transformers without its compiler: the same score_mod and BlockMask, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.attention.flex_attention as flex
from transformers import masking_utils
from transformers.integrations import flex_attention as host


def uncompiled(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Has the host call torch's definition, and make its masks by it.

    Args:
        patch: undoes it.

    Returns:
        The words of each call of torch's function from now on, with the shape of its queries under ``shape``.
    """
    calls: list[dict[str, Any]] = []
    block_mask = masking_utils.create_block_mask

    def attention(query: Any, key: Any, value: Any, training: bool = False, **words: Any) -> Any:
        calls.append({**words, "shape": tuple(query.shape)})
        return flex.flex_attention(query, key, value, **words)

    def masks(*given: Any, _compile: bool = False, **words: Any) -> Any:
        return block_mask(*given, **words)

    patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    patch.setattr(host, "compile_friendly_flex_attention", attention)
    patch.setattr(masking_utils, "create_block_mask", masks)
    return calls
