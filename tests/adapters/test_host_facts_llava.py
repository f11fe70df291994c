"""What the hooks lean on in LLaVA of transformers, one sentence a fact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import hosts_of, models
from support.facts import Call, Facts, assert_holds, calls_of, close, one
from torch import nn

fact = Facts()


@functools.cache
def llava() -> nn.Module:
    return models.llava(depth=3)


def prefill(**more: Any) -> list[Call]:
    with torch.no_grad():
        return calls_of(llava(), lambda: llava()(**models.Batch.of("^3I5", "^3I5").inputs(), **more))[0]


@fact("LLaVA: the projector reads hidden_states[vision_feature_layer] without its class token")
def _() -> bool:
    calls = prefill()
    layer = one(calls, "model.vision_tower.encoder.layers.1")  # of three: -2 is the output of the second
    return torch.equal(one(calls, "model.multi_modal_projector").args[0], layer.output[:, 1:])


@fact("LLaVA: as many features as placeholders, or an error")
def _() -> bool:
    model = copy.deepcopy(llava())
    model.model.multi_modal_projector.register_forward_hook(lambda m, a, y: y[:, :-1])
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        model(**models.Batch.of("^3I5").inputs())
    return True


@fact("LLaVA: features are put on the columns of placeholders, in order, and nothing else changes")
def _() -> bool:
    calls = prefill()
    batch = models.Batch.of("^3I5", "^3I5").inputs()
    rows = one(calls, "model.language_model").kwargs["inputs_embeds"]
    here = batch["input_ids"] == models.IMAGE
    features = one(calls, "model.multi_modal_projector").output.flatten(0, 1)
    words = llava().get_input_embeddings()(batch["input_ids"])
    return torch.equal(rows[here], features) and torch.equal(rows[~here], words[~here])


@fact("LLaVA: every layer gets the same mask and the same rotary pair, made once by the text model")
def _() -> bool:
    calls = [one(prefill_calls, f"model.language_model.layers.{i}") for prefill_calls in (prefill(),) for i in range(3)]
    first = calls[0].kwargs
    same = all(call.kwargs["position_embeddings"] is first["position_embeddings"] for call in calls)
    return same and all(call.kwargs["attention_mask"] is first["attention_mask"] for call in calls)


@fact("transformers: the rotary pair depends on positions alone, so that gathered columns keep their angles")
def _() -> bool:
    rotary = llava().model.language_model.rotary_emb
    x, positions = torch.randn(1, 6, models.LM_WIDTH), torch.arange(6)[None]
    left = torch.tensor([0, 3, 5])
    return all(
        torch.equal(all_[:, left], few)
        for all_, few in zip(rotary(x, positions), rotary(x[:, left], positions[:, left]))
    )


@fact("transformers: without a mask and a cache a jump in position_ids reads as a packed sequence")
def _() -> bool:
    model = llava().model.language_model
    x, gap = torch.randn(1, 6, models.LM_WIDTH), torch.tensor([[0, 1, 2, 9, 10, 11]])
    with torch.no_grad():
        packed = model(inputs_embeds=x, position_ids=gap, use_cache=False).last_hidden_state
        alone = model(inputs_embeds=x[:, 3:], position_ids=gap[:, 3:], use_cache=False).last_hidden_state
        ones = torch.ones(1, 6, dtype=torch.int64)
        whole = model(inputs_embeds=x, position_ids=gap, attention_mask=ones, use_cache=False).last_hidden_state
    return close(packed[:, 3:], alone) and not close(packed, whole)


@fact("transformers: layers of a DynamicCache grow by themselves, and get_seq_length() is the first one's")
def _() -> bool:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, length in enumerate((5, 3)):
        cache.update(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
    return cache.get_seq_length() == 5 and cache.get_seq_length(1) == 3


@fact("transformers: create_causal_mask sizes a mask by the cache of the layer that layer_idx names")
def _() -> bool:
    from transformers import DynamicCache
    from transformers.masking_utils import create_causal_mask

    cache = DynamicCache()
    for layer, length in enumerate((5, 3)):
        cache.update(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
    valid = torch.ones(1, 5, dtype=torch.int64)
    valid[:, 0] = 0
    mask = create_causal_mask(
        config=llava().config.text_config,
        inputs_embeds=torch.ones(1, 2, models.LM_WIDTH),
        attention_mask=valid,
        layer_idx=1,
        **{hosts_of.cache_name(create_causal_mask): cache},
    )
    return mask.shape[-2:] == (2, 5)


@fact("transformers: generate() counts positions by the mask, from zero at the first real token of each row")
def _() -> bool:
    batch = models.Batch.of("^3I5", "2I2")
    calls, _ = calls_of(
        llava(), lambda: llava().generate(**batch.inputs(), max_new_tokens=2, do_sample=False, use_cache=True)
    )
    given = [call.kwargs["position_ids"] for call in calls if call.path == "model.language_model"]
    length = len(batch.rows[1])
    return given[0][1, -length:].tolist() == list(range(length)) and given[1][1].tolist() == [length]


@fact("transformers: a gap in position_ids stays a gap: later steps count on from the position before")
def _() -> bool:
    model, ids = llava(), models.prompt("^7")[None]
    calls, _ = calls_of(model, lambda: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    given = [call.kwargs["position_ids"].tolist() for call in calls if call.path == "model.language_model"]
    return given == [[list(range(8))], [[8]], [[9]]]


@fact("transformers: with labels the loss is of logits at their original columns")
def _() -> bool:
    given = models.Batch.of("^3I5").inputs()
    with torch.no_grad():
        out = llava()(**given, labels=given["input_ids"])
    wanted = F.cross_entropy(out.logits[0, :-1], given["input_ids"][0, 1:])
    return close(out.loss, wanted)


@pytest.mark.parametrize(("sentence", "_", "holds"), fact.rows)
def test_a_fact_that_hooks_lean_on(sentence: str, _: str, holds: Callable[..., bool]) -> None:
    assert_holds(sentence, holds)
