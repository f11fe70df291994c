"""Branches left out for visual tokens, on every family: generation equals the oracle, and work is counted as it ran."""

from __future__ import annotations

import pytest
import torch
from support import referee
from support.checks import Print
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok import IMA
from vlmtok.errors import UnsupportedModel

from .build import FAMILIES, shared
from .harness import NOISE, batch
from .harness import generate as generated
from .oracle import oracle
from .pairs import recorded, said
from .test_totals import built

PARTS = ("ffn", "attn", "block")
EVERY = {"interval": 1, "start": -1}
MOVED = 1e-2


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_the_oracle(name: str, part: str) -> None:
    """Every layer skips: sandwich norms, experts, windows, M-RoPE, deepstack, layers without attention."""
    model, rows = shared(name, FAMILIES[name].attentions[0]), batch(name, "several")
    asked = oracle(name, shared(name, "eager"))
    alone, prompt = rows.alone(0).inputs(), rows.prompts[0]
    with torch.no_grad():
        bare = generated(model, alone, 1)[1]
        encoded = asked.encode(prompt)
        with vlmtok.compress(model, IMA(part, **EVERY)) as run:
            for cached, steps in ((False, 2), (True, 3)):
                with recorded(model, run) as heard:
                    tokens, logits = generated(model, alone, steps, use_cache=cached)
                words, wanted = said(asked, prompt, encoded, [[]], run.layout, steps, heard.skips)
                assert (logits[0] - wanted).abs().max() <= NOISE
                assert torch.equal(tokens[0], words)
            together = generated(model, rows.inputs(), 1)[1]
    assert (together[0, 0] - wanted[0]).abs().max() <= NOISE
    assert (wanted[0] - bare[0, 0]).abs().max() > MOVED


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_counted(name: str, part: str) -> None:
    """The language model's line; a mixer in the place of attention runs whole, and counts as that."""
    model, inputs = built(name), batch(name, "several").inputs()
    lm = adapter_for(model).lm
    with torch.no_grad(), vlmtok.kernels.use("torch"), vlmtok.compress(model, IMA(part, **EVERY)) as run:
        left = _flops_of(lm, model, inputs)
        report = run.report()
        with run.paused():
            bare = _flops_of(lm, model, inputs)
    line = next((one for one in report.lines if one.name == "prefill"), None)
    if line is None:
        assert any("language model is not counted" in reason for reason in report.missing)
        return
    assert left < bare or (
        part == "attn" and all(i in run.layout.stages["decoder"].blind for i in range(len(lm.layers)))
    )
    assert 2 * (line.before - line.after.low) == bare - left


def _flops_of(lm: torch.nn.Module, model: torch.nn.Module, inputs: dict) -> int:
    with referee.counter() as counter:
        model(**inputs)
    name = next(name for name, part in model.named_modules() if part is lm)
    return sum(counter.get_flop_counts()[f"{type(model).__name__}.{name}"].values())


def test_experts_beside_an_mlp_are_refused() -> None:
    model = FAMILIES["gemma4"].build()
    layer = model.model.language_model.layers[2]
    layer.add_module("experts", torch.nn.MultiheadAttention(16, 2))
    before = Print.of(model)
    with pytest.raises(
        UnsupportedModel, match=r"decoder layer 2, a Gemma4\w* .* has experts beside a mixer and an MLP"
    ):
        vlmtok.compress(model, IMA())
    before.assert_still(model)
