"""Nothing of ours takes the process's default dtype, and autocast changes no dtype that we compare or join."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from families.build import FAMILIES
from families.build import shared as family_model
from support import matrix, models
from support.checks import gap, watched
from support.hosts_of import cache_of, with_cache
from support.methods import cuts
from support.sweep import some

import vlmtok
from vlmtok.errors import VlmtokError

SPECS = {
    **matrix.SPECS,
    "fastv": "fastv:K=1:keep=0.5",
    "transprune": "transprune:layers=(1;2):ratios=(0.7;0.4)",
    "sparsevlm": "sparsevlm:tokens=192:layers=(1;2):budgets=(6;3)",
    "aim": "aim:first=1:last=3",
    "todre": "todre:keep=0.5:tau=0.6:check_layer=1",
    "pyramiddrop": "pyramiddrop:layers=(1;2):ratios=(0.6;0.3)",
}
"""Settings that act in language models of three layers."""
IDS = torch.tensor([[1, 7, 9, 12, 30, 63, 0, 0, 0, 0, 0, 0], [1, 3, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


def _tower(name):
    tower = models.TOWERS[name]
    return models.shared(name), functools.partial(_see, tower.run, tower.pictures(2))


def _see(run, pictures, model):
    return run(model, pictures)


def _dual(name):
    return models.shared(name), functools.partial(_see_and_read, name, models.TOWERS[name].pictures(2))


def _see_and_read(name, pictures, model):
    if name.startswith("open_clip"):
        return torch.cat([model.encode_image(pictures), model.encode_text(IDS)])
    text = model.get_text_features(input_ids=IDS, attention_mask=(IDS > 0).long()).pooler_output
    return torch.cat([model.get_image_features(pixel_values=pictures).pooler_output, text])


def _answer(inputs, model):
    """Logits of a prompt, and of a token written behind it."""
    found = model(**inputs)
    ids = torch.full((len(inputs["input_ids"]), 1), 7)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    written = model(input_ids=ids, attention_mask=mask, **with_cache(model, cache_of(found)))
    return torch.cat([found.logits, written.logits], 1)


@functools.cache
def target_of(name):
    """A model and what is asked of it; both are made once, under the plain default dtype."""
    assert torch.get_default_dtype() == torch.float32
    if name == "HF LLaVA":
        inputs = models.Batch.of("^3I5", "2I2", "^2I1I4").inputs()
        return models.llava(depth=4), functools.partial(_answer, inputs)
    if name == "LLaVA-NeXT":
        inputs = FAMILIES["llava_next"].batch("2I3J5", "4J3", "7").inputs()
        return family_model("llava_next"), functools.partial(_answer, inputs)
    return (_tower if name.startswith("timm") else _dual)(name)


TARGETS = ("timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIPModel", "HF LLaVA", "LLaVA-NeXT")


@contextlib.contextmanager
def _default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _shape(found):
    """What was chosen: everything of a reduction that is no weight."""
    reduction = found.reduction
    if reduction is None:
        return None
    parts = (reduction.keep, reduction.src, reduction.dst, reduction.valid)
    return tuple(None if part is None else part.tolist() for part in parts)


def _run(method, target, model=None, run=None):
    """What comes out and what was chosen, or the error's name where the model refuses the method."""
    if model is None or run is None:
        model, run = target_of(target)
    methods = vlmtok.parse_methods(SPECS.get(method, method))
    try:
        with vlmtok.compress(model, methods), torch.no_grad(), watched(methods) as seen:
            found = run(model)
    except VlmtokError as refusal:
        return type(refusal).__name__
    acted = any(one.reduction is not None for one in seen) or not cuts(method)
    assert seen and acted, "nothing was cut: this proves nothing"
    assert not any(one.autocast for one in seen), "a choice was made under autocast"
    return found, [_shape(one) for one in seen], [one.reduction for one in seen]


@functools.cache
def _plain(method, target, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return _run(method, target)


def _assert_same(found, plain):
    if isinstance(plain, str):
        assert found == plain
        return
    assert found[0].dtype == plain[0].dtype
    assert found[1] == plain[1], "another selection"
    for one in found[2]:
        for weight in () if one is None else (one.keep_weight, one.src_weight):
            assert weight is None or weight.dtype == torch.float32
    assert torch.equal(found[0], plain[0])


CELLS = [(method, target) for method in vlmtok.list_methods() for target in TARGETS]
NAMES = [" on ".join(cell) for cell in CELLS]
DTYPES = (torch.bfloat16, torch.float64)
AUTOCAST = (False, True)


@pytest.mark.parametrize(
    ("method", "target", "dtype", "autocast"), some(vlmtok.list_methods(), TARGETS, DTYPES, AUTOCAST, every=4), ids=str
)
def test_the_default_dtype_changes_nothing(method, target, dtype, autocast):
    """The model is fp32; every index and every bit of the output is that of the plain default."""
    plain = _plain(method, target, autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), _default(dtype):
        found = _run(method, target)
    _assert_same(found, plain)


@pytest.mark.parametrize(("method", "target"), CELLS, ids=NAMES)
def test_autocast_runs_what_runs_without(method, target):
    plain, found = _plain(method, target), _plain(method, target, True)
    if isinstance(plain, str):
        assert found == plain
        return
    model, run = target_of(target)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bare = run(model)
    assert found[0].dtype == bare.dtype
    assert gap(found[0].float(), bare.float()) > 1e-3
    counts = [[None if one is None else one.slots for one in part[2]] for part in (plain, found)]
    ragged = any(one is not None and one.valid is not None for part in (plain, found) for one in part[2])
    assert ragged or counts[0] == counts[1]


@pytest.mark.parametrize(("method", "target", "dtype"), some(vlmtok.list_methods(), TARGETS, DTYPES, every=3), ids=str)
def test_models_of_any_dtype_under_that_default_as_under_another(method, target, dtype):
    """Serving scripts set the default to the checkpoint's dtype."""
    model = _in(target, dtype)
    run = target_of(target)[1]
    run = functools.partial(run.func, *(_cast(part, dtype) for part in run.args))
    found = []
    for default in (torch.float32, dtype):
        with _default(default):
            found.append(_run(method, target, model, run))
    _assert_same(found[1], found[0])
    assert isinstance(found[0], str) == isinstance(_plain(method, target), str)
    assert isinstance(found[0], str) or found[0][0].dtype == dtype


@functools.cache
def _in(target, dtype):
    return copy.deepcopy(target_of(target)[0]).to(dtype)


def _cast(value, dtype):
    if isinstance(value, dict):
        return {name: _cast(part, dtype) for name, part in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
