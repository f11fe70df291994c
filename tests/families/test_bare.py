"""Controls: the hosts alone say what the oracle says, and the oracle's rules matter.

If these fail, the tiny models, their inputs or the oracle are wrong, not the library.
"""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vlmtok.adapters.host_faults import FAULTS, fault_of

from vlmtok.lab.tiny import prompts

from . import oracle as oracles
from .build import FAMILIES, shared
from .harness import MODES, NOISE, PAIRS, batch, expected, generate
from .oracle import (
    Gemma3Oracle,
    Gemma4Oracle,
    MRoPEOracle,
    Oracle,
    PaliGemmaOracle,
    Qwen3Oracle,
    Qwen25Oracle,
    oracle,
)

WITH_CLIPS = [name for name, family in FAMILIES.items() if family.clips]


def test_faults_of_hosts_are_faults():
    """What is excused where a release of the host cannot run a family: when a release can, the table says so."""
    for fault in FAULTS:
        model, inputs = shared(fault.family, "eager"), batch(fault.family).inputs()
        if fault_of(fault.family) is None:
            generate(model, inputs)
            continue
        with pytest.raises(AttributeError):
            generate(model, inputs)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("which", ["rows", "several"])
@pytest.mark.parametrize(("name", "attention"), PAIRS)
def test_host_equals_the_oracle(name, attention, which, cached):
    model = shared(name, attention)
    expected(name, (), which).check(*generate(model, batch(name, which).inputs(), use_cache=cached))


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", WITH_CLIPS)
def test_host_equals_the_oracle_with_clips(name, cached):
    model = shared(name, "sdpa")
    expected(name, (), "clips").check(*generate(model, batch(name, "clips").inputs(), use_cache=cached))


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_matter(name):
    """Every cut moves the first logits by far more than the noise, and so does another picture."""
    bare = expected(name, ()).logits[:, 0]
    for mode, cuts in MODES.items():
        if mode != "bare":
            moved = (expected(name, cuts).logits[:, 0] - bare).abs().amax(-1)
            assert (moved > 100 * NOISE).all(), f"{mode}: {moved.tolist()}"
    prompt = batch(name).prompts[0]
    shot = prompt.pictures[0].shot
    other = {
        key: value.flip(*{0, 1, value.dim() - 1}) if value.is_floating_point() else value
        for key, value in shot.arrays.items()
    }
    pictures = (replace(prompt.pictures[0], shot=replace(shot, arrays=other)),)
    logits = oracle(name, shared(name, "eager")).generate(replace(prompt, pictures=pictures), steps=1)[1]
    assert (logits[0] - bare[0]).abs().max() > 100 * NOISE


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_ragged_and_differ(name):
    """Rows have different lengths, text on both sides of a picture, and none of them says what another one says."""
    prompts = batch(name).prompts
    assert len({len(prompt.ids) for prompt in prompts}) == len(prompts)
    assert all(prompt.owner[-1] < 0 for prompt in prompts)
    assert all(len(prompt.pictures) >= 2 for prompt in batch(name, "several").prompts[:1])
    tokens = expected(name, ()).tokens
    assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
    special = [*range(5), *range(970, 1000)]
    assert not torch.isin(tokens, torch.tensor(special)).any()


def _off(base, **changes):
    return type("Wrong", (base,), changes)


class _Blind(Gemma3Oracle):
    """Full layers of Gemma 3 look both ways only in sliding layers."""

    both_ways_in_full = False


class _Wide(Gemma4Oracle):
    """The same mistake the other way round."""

    both_ways_in_full = True


def _without_window(self, kind, row):
    return oracles.causal(len(row))


def _nobody(self, prompt, more):
    return torch.full((len(prompt.ids) + more,), -1)


def _flat(self, prompt, more):
    return torch.arange(len(prompt.ids) + more).expand(3, -1)


WRONG = {
    "gemma3: no blocks": ("gemma3", _off(Gemma3Oracle, blocks=_nobody)),
    "gemma3: no blocks in full layers": ("gemma3", _Blind),
    "gemma3: no window": ("gemma3", _off(Gemma3Oracle, visible=_without_window)),
    "gemma4: no blocks": ("gemma4", _off(Gemma4Oracle, blocks=_nobody)),
    "gemma4: blocks in full layers": ("gemma4", _Wide),
    "paligemma: no blocks": ("paligemma", _off(PaliGemmaOracle, blocks=_nobody)),
    "paligemma2: no window": (
        "paligemma2",
        _off(
            PaliGemmaOracle,
            visible=lambda self, kind, row: Oracle.visible(self, "full_attention", row) | oracles.same_block(row.block),
        ),
    ),
    "llama4: no chunks": ("llama4", _off(oracles.Llama4Oracle, visible=_without_window)),
    "aya_vision: no window": ("aya_vision", _off(Oracle, visible=_without_window)),
    "qwen2_vl: positions in one dimension": ("qwen2_vl", _off(MRoPEOracle, positions=_flat)),
    "qwen2_5_vl: frames without distance": ("qwen2_5_vl", _off(Qwen25Oracle, frame_step=1)),
    "qwen3_vl: no deepstack": ("qwen3_vl", _off(Qwen3Oracle, layer=Oracle.layer)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rule_shows(case):
    """The inputs tell the rules apart: with one rule of the oracle changed, the host no longer agrees."""
    name, wrong = WRONG[case]
    which = "clips" if "frames" in case else "rows"
    asked = wrong(shared(name, "eager"))
    right = expected(name, (), which).logits
    found = torch.stack(
        [asked.generate(p, forced=t)[1] for p, t in zip(batch(name, which).prompts, expected(name, (), which).tokens)]
    )
    assert (found - right).abs().max() > 10 * NOISE


def test_the_oracle_stands_alone():
    """It imports torch and the prompts, nothing else."""
    found = set()
    for file in (*Path(oracles.__file__).parent.glob("*.py"), Path(prompts.__file__)):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add("." * node.level + (node.module or "").split(".")[0])
    own = {".kinds", ".plain", ".rows", "..prompts"}
    assert found <= {"__future__", "collections", "dataclasses", "typing", "torch", *own}
