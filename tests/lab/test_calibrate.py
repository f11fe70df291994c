"""`vlmtok.calibrate`: means of what layers keep, and files that give them back."""

import pytest
import torch
from support.caches import kept
from support.checks import Print, Subject, watched
from support.hosts_of import CACHE_NAMES
from support.models import Batch

import vlmtok
from vlmtok import LayerProfile
from vlmtok.errors import ParameterError, SiteError
from vlmtok.lab.calibrate import _over_depth

SPEC = "prefixkv:keep=0.4"
PROMPTS = (("^3I5",), ("^1I2I5", "6"), ("^2I2", "2I1I4"))
BATCHES = [Batch.of(*rows) for rows in PROMPTS]
SAMPLES = [batch.inputs() for batch in BATCHES]


@pytest.fixture(scope="module")
def model():
    return Subject("HF LLaVA").model


def test_it_is_the_mean_of_what_each_prompt_keeps(model):
    """Prompt by prompt, each alone; one without pictures counts for nothing."""
    before = Print.of(model)
    profile = vlmtok.calibrate(model, SPEC, SAMPLES)
    before.assert_still(model)
    alone = []
    for one in (batch.alone(row) for batch in BATCHES for row, shown in enumerate(batch.pixels) if shown is not None):
        (method,) = vlmtok.parse_methods(SPEC)
        with watched([method]) as seen, vlmtok.compress(model, method), torch.no_grad():
            model.generate(**one.inputs(), max_new_tokens=1)
        alone.append([len(kept(s.reduction, n)[0]) / n for s in seen for n in [s.view.tokens.shape[1]]])
    depth = model.config.text_config.num_hidden_layers
    assert profile.samples == len(alone) == 4 and len(profile.shares) == depth
    assert profile.shares == pytest.approx([sum(layer) / 4 for layer in zip(*alone, strict=True)])
    assert len(set(profile.shares)) > 1
    assert profile.keep == 0.4 and sum(profile.shares) / depth == pytest.approx(0.4, abs=0.5 / (depth * 16))


def test_a_file_of_it_says_beforehand_what_stays(model, tmp_path):
    path = tmp_path / "shares.json"
    profile = vlmtok.calibrate(model, SPEC, SAMPLES)
    profile.save(path)
    batch = Batch.of("^3I5")
    with vlmtok.compress(model, f"{SPEC}:profile={path}") as run, torch.no_grad():
        out = model.generate(**batch.inputs(), max_new_tokens=1, return_dict_in_generate=True)
    cache = next(out[name] for name in CACHE_NAMES if name in out)
    text = batch.inputs()["input_ids"].shape[1] - 16
    held = [layer.keys.shape[2] - text for layer in cache.layers]
    assert held == list(profile.entries(0.4, 16, len(cache.layers))) and len(set(held)) > 1
    assert not any("profile" in line for line in run._attachment.said)  # made for this depth and budget


def test_generators_of_samples_and_their_own_options(model):
    """What a sample says of its generation is left to it, but for the length."""
    profile = vlmtok.calibrate(model, SPEC, ({**one, "max_new_tokens": 50, "num_beams": 2} for one in SAMPLES))
    assert profile == vlmtok.calibrate(model, SPEC, SAMPLES)


def test_what_cannot_be_calibrated(model):
    before = Print.of(model)
    with pytest.raises(ParameterError, match="one method, got 2"):
        vlmtok.calibrate(model, "prefixkv+random", SAMPLES)
    with pytest.raises(ParameterError, match="has a profile"):
        vlmtok.calibrate(model, "prefixkv:profile=(0.5;0.25)", SAMPLES)
    with pytest.raises(ParameterError, match="fastv acts at decoder"):
        vlmtok.calibrate(model, "fastv", SAMPLES)
    with pytest.raises(ParameterError, match="put one in a list"):
        vlmtok.calibrate(model, SPEC, SAMPLES[0])
    with pytest.raises(ParameterError, match="by name, got list"):
        vlmtok.calibrate(model, SPEC, [[1, 2]])
    with pytest.raises(ParameterError, match="no picture"):
        vlmtok.calibrate(model, SPEC, [Batch.of("6").inputs()])
    with pytest.raises(ParameterError, match="no picture"):
        vlmtok.calibrate(model, SPEC, [])
    with pytest.raises(ParameterError, match="that generates"):
        vlmtok.calibrate(Subject("timm ViT").model, SPEC, SAMPLES)
    with pytest.raises(SiteError, match="layer 99"):
        vlmtok.calibrate(model, f"{SPEC}:layers=99", SAMPLES)
    before.assert_still(model)


def test_layers_that_lose_nothing_get_what_lies_between():
    assert _over_depth({1: 0.8, 3: 0.4}, 5) == pytest.approx((0.8, 0.8, 0.6, 0.4, 0.4))
    assert _over_depth({0: 0.25}, 3) == (0.25,) * 3
    assert LayerProfile(_over_depth({5: 0.5, 11: 0.2}, 12)).shares[8] == pytest.approx(0.35)
