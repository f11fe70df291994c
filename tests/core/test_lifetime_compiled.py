"""What happens when a compression comes and goes around compiled code."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import models
from support.checks import Subject, assert_differs, assert_equal

import vlmtok
from vlmtok.errors import VlmtokWarning


@pytest.fixture
def dynamo():
    import torch._dynamo as dynamo

    dynamo.reset()
    yield dynamo
    dynamo.reset()


@pytest.fixture
def short():
    """Two blocks: what is compiled is compiled six times."""
    return Subject("timm ViT", models.short_vit())


WAYS = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="eager"),
    "model.compile()": lambda model: model.compile(backend="eager") or model,
    "a compiled function around the model": lambda model: torch.compile(lambda x: model(x) * 1.0, backend="eager"),
    "each block compiled": lambda model: [block.compile(backend="eager") for block in model.blocks] and model,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_compile_remove_attach_is_right_or_raises(short, dynamo, way):
    """Dynamo does not see hooks come or go; whatever the order, results are right."""
    x = short.tower.pictures(2)
    with torch.no_grad():
        bare = short.model(x)
        with vlmtok.compress(short.model, "tome:r=6"):
            cut = short.model(x)
        call = WAYS[way](short.model)
        assert_equal(call(x), bare, what="compiled bare")
        run = vlmtok.compress(short.model, "tome:r=6")
        assert_equal(call(x), cut, what="compiled bare, then compressed")
        run.remove()
        assert_equal(call(x), bare, what="and removed")
        run = vlmtok.compress(short.model, "tome:r=3")
        with_three = call(x)
        assert_differs(with_three, cut)
        run.remove()
        assert_equal(call(x), bare, what="and removed again")
        with vlmtok.compress(short.model, "tome:r=6"):
            assert_equal(call(x), cut, what="and compressed again")


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_compiled_while_attached_then_removed(short, dynamo):
    x = short.tower.pictures(2)
    with torch.no_grad():
        bare = short.model(x)
        run = vlmtok.compress(short.model, "tome:r=6")
        cut = short.model(x)
        call = torch.compile(short.model, backend="eager")
        assert_equal(call(x), cut)
        with run.paused():
            assert_equal(call(x), bare, what="paused")
        assert_equal(call(x), cut)
        run.remove()
        assert_equal(call(x), bare, what="removed")


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_a_compiled_model_can_be_compressed_itself(short, dynamo):
    x = short.tower.pictures(2)
    call = torch.compile(short.model, backend="eager")
    with torch.no_grad():
        bare = call(x)
        with vlmtok.compress(call, "tome:r=6"):
            assert_differs(call(x), bare)
        assert_equal(call(x), bare)


def test_attaching_to_compiled_code_is_said(short, dynamo):
    call = torch.compile(short.model, backend="eager")
    with torch.no_grad():
        call(short.tower.pictures(1))
    with pytest.warns(VlmtokWarning, match="compiled"):
        run = vlmtok.compress(short.model, "tome:r=6")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.remove()


@pytest.mark.filterwarnings("ignore:vlmtok:vlmtok.errors.VlmtokWarning")
def test_a_compiled_pass_counts_as_one_that_ran(dynamo):
    model, tower = models.fresh("timm ViT"), models.TOWERS["timm ViT"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "the hooks", VlmtokWarning)
        with vlmtok.compress(model, "tome:r=6"):
            torch.compile(model, backend="eager", fullgraph=True)(tower.pictures(1))
