"""What masks of vision-language families and the table of model types lean on in transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from families.build import FAMILIES
from support.family_facts import host
from support.hosts_of import CACHE_NAMES
from transformers import masking_utils
from vlmtok.adapters.host_faults import fault_of, there
from vlmtok.adapters.language.families import REFUSED, ROWS
from vlmtok.adapters.language.masks import RECURRENT


@pytest.mark.parametrize("kind", sorted({*ROWS, *REFUSED}))
def test_transformers_knows_the_model_type(kind: str) -> None:
    assert kind in transformers.CONFIG_MAPPING, f"transformers {transformers.__version__} knows no model type {kind!r}"


def test_masks_take_what_we_hand_them() -> None:
    """Masks behind a cut are built by the host's own functions, for a layer of the asker's choice."""
    taken = {name: set(inspect.signature(make).parameters) for name, make in _mask_functions().items()}
    common = {"config", "inputs_embeds", "attention_mask", "position_ids"}
    for name, parameters in taken.items():
        assert len(parameters & set(CACHE_NAMES)) == 1, f"the mask function of {name} layers takes no Cache any more"
        assert common <= parameters, f"the mask function of {name} layers no longer takes {common - parameters}"
        assert "layer_idx" in parameters, f"masks of {name} layers are sized by another layer than the asker"
        assert "allow_is_causal_skip" in parameters, f"masks of {name} layers may be left out"
    full = set(inspect.signature(masking_utils.create_causal_mask).parameters)
    assert {"or_mask_function", "and_mask_function", "block_sequence_ids"} <= full
    assert "block_sequence_ids" in taken["sliding_attention"]
    assert callable(masking_utils.blockwise_overlay) and callable(masking_utils.sliding_window_overlay)


def _mask_functions() -> dict[str, Callable[..., Any]]:
    kinds = {kind for name in filter(there, FAMILIES) if fault_of(name) is None for kind in host(name).kinds} - set(
        RECURRENT
    )
    return {kind: masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind] for kind in kinds}
