"""Slips that are made in notebooks: NumPy's numbers, arguments in the wrong place, handles that are copied."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmtok
from vlmtok import cli
from vlmtok.errors import MissingSignal, ParameterError, UnknownMethod


def small(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, img_size=64, depth=4, **settings).eval()


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_settings_may_be_numpys():
    for keep in np.linspace(0.1, 0.8, 3):
        assert str(vlmtok.Random(keep=keep)) == f"random:keep={float(keep)!r}"
    assert repr(vlmtok.Random(keep=np.float32(0.5)).keep) == "0.5"
    assert vlmtok.ToMe(r=np.int64(3)).r == 3 and type(vlmtok.ToMe(r=[np.int32(3), 2]).r[0]) is int
    assert vlmtok.PiToMe(margin=(np.float64(0.5), 0.5)).margin == (0.5, 0.5)
    with pytest.raises(ParameterError, match="r=-2 must be an integer"):
        vlmtok.ToMe(r=np.int64(-2))
    with pytest.raises(ParameterError):
        vlmtok.Random(keep=np.array([0.5]))


def test_a_copied_handle_is_the_handle_and_the_copied_model_bare():
    model = small()
    bare = model(X)
    run = vlmtok.compress(model, "tome:r=2")
    short = model(X)
    twin = copy.deepcopy({"model": model, "run": run})
    assert twin["run"] is run and "active" in repr(twin["run"])
    assert torch.equal(twin["model"](X), bare) and torch.equal(model(X), short)
    run.remove()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, run: vlmtok.remove(None), "takes the model, got NoneType"),
        (lambda m, run: vlmtok.remove(run), "takes the model, got Compression; its own remove"),
        (lambda m, run: vlmtok.compress(m, "pitome", signals=3), "signals=3"),
        (lambda m, run: vlmtok.compress(m, "pitome", signals={"foo": 1}), "functions of the view by name"),
        (lambda m, run: vlmtok.compress(m, m), "got a model \\(VisionTransformer\\); it comes first"),
        (lambda m, run: vlmtok.list_methods(3), "wildcards, got 3"),
        (lambda m, run: vlmtok.estimate("llava-1.5-7b", "todre", text_tokens=1.5), "text_tokens=1.5"),
        (lambda m, run: vlmtok.lab.overlay.overlay(Image.new("RGB", (8, 8)), None), "its trace, got NoneType"),
        (lambda m, run: vlmtok.zero_shot(Clip(), None, None), "must be a tensor \\[classes, E\\], got NoneType"),
        (lambda m, run: vlmtok.zero_shot(Clip(), None, torch.ones(3, 5))(X), "E = 4\\] as the model's pictures"),
    ],
)
def test_one_clear_error_and_nothing_changed(call, message):
    model = small()
    run = vlmtok.compress(model, "tome:r=2")
    short = model(X)
    with pytest.raises(ParameterError, match=message):
        call(model, run)
    assert run.active and torch.equal(model(X), short)
    run.remove()


class Clip(torch.nn.Module):
    """The least that `zero_shot` asks of a dual encoder."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def encode_image(self, images):
        return images.mean((2, 3)).repeat(1, 2)[:, :4]


def test_a_name_is_a_word():
    with pytest.raises(UnknownMethod, match="got None"):
        vlmtok.create_method(None)


def test_registers_are_no_class_token():
    model = small("vit_medium_patch16_reg4_gap_256")
    assert model.num_prefix_tokens == 4 and not model.has_class_token
    for spec in ("crossget:guidance=cls", "tca:reservoir_size=3"):
        with pytest.raises(MissingSignal):
            vlmtok.compress(model, spec)
    for spec in ("tome:r=2", "crossget", "crossget:guidance=none", "tca", "tca:reservoir_size=0"):
        with vlmtok.compress(model, spec) as run:
            model(X)
            assert run.report().visual("vision")[1] <= 16
    classed = small("vit_small_patch14_reg4_dinov2", patch_size=16)  # registers behind a class token
    with vlmtok.compress(classed, "crossget:rv=2"):
        classed(X)


def test_the_report_of_a_pass_says_how_many_there_were():
    model = small()
    with vlmtok.compress(model, "tome:r=2") as run:
        model(X)
        assert "last pass (1 x vision)" in str(run.report())
        model(X)
        assert "last pass (of 2 x vision)" in str(run.report())
        assert "all passes (2 x vision)" in str(run.report(total=True))


def test_the_command_without_words_and_as_a_module():
    asked = CliRunner().invoke(cli.app, [])
    assert "Usage" in asked.output and "vlmtok: \n" not in asked.output
    found = subprocess.run([sys.executable, "-m", "vlmtok", "--version"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and vlmtok.__version__ in found.stdout
