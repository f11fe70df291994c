"""MACs of the language model of every family: 2 x those of the report are what torch's counter counts there."""

import pytest
import torch
from support import referee

import vlmtok

from .build import FAMILIES
from .harness import batch

OTHER_FORM = {"qwen3_5", "qwen3_5_moe", "gemma4", "llama4", "lfm2_vl"}
"""Recurrent or convolutional layers, inputs of each layer, experts that all run: the report says it counts none."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_language_model_is_counted_exactly(name):
    model = FAMILIES[name].build("eager")
    if name.endswith("moe"):
        model.set_experts_implementation("eager")  # the fused one has no formula in the counter
    with torch.no_grad(), vlmtok.kernels.use("torch"), vlmtok.compress(model, "random:keep=0.5") as run:
        with referee.counter() as counter:
            model(**batch(name).inputs())
        report = run.report(total=True)
    if name in OTHER_FORM:
        assert any("the language model is not counted" in note for note in report.notes)
        return
    language = next(path for path, part in model.named_modules() if hasattr(part, "embed_tokens"))
    counts = {path: sum(by.values()) for path, by in counter.get_flop_counts().items()}
    ran = sum(count for path, count in counts.items() if path.endswith((f".{language}", ".lm_head")))
    prefill = next(line for line in report.lines if line.name == "prefill")
    assert 2 * prefill.after.low == ran and prefill.after.fixed and prefill.after.low < prefill.before
