"""BLIP-2 and InstructBLIP: merging in a tower that queries read, proportional attention included, against a loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import oracle
from support.checks import assert_differs, assert_equal, assert_same
from support.player import Player
from torch import Tensor, nn

import vlmtok
from vlmtok.errors import UnsupportedModel, VlmtokWarning

from .build import TOWER_ONLY

METHODS = ("tome", "tome:r=3", "pitome", "pitome:ratio=0.8", "crossget", "crossget:rv=3", "tca:ratio=0.7:update=false")


def built(name: str, attention: str = "sdpa") -> tuple[Any, dict[str, Tensor]]:
    family = TOWER_ONLY[name]
    return family.build(attention).requires_grad_(False), family.batch(*family.rows).inputs()


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.vision_model.encoder.layers]


def with_tokens(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of a bare model whose Q-Former reads other tokens."""

    def give(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = tokens
        return output

    handle = model.vision_model.register_forward_hook(give)
    try:
        found: Tensor = model(**inputs).logits
    finally:
        handle.remove()
    return found


class Idle(vlmtok.Method):
    """Looks at keys, and merges nothing."""

    proportional = True

    def sites(self, layout: Any) -> list[vlmtok.Site]:
        return [vlmtok.Site("vision", layer, "mid", needs=("keys",)) for layer in range(3)]

    def reduce(self, view: Any) -> None:
        assert view.signal("keys").isfinite().all()

    def __str__(self) -> str:
        return "idle"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
@torch.no_grad()
def test_the_tower_and_what_reads_it_equal_a_loop(name: str, spec: str, attention: str) -> None:
    model, inputs = built(name, attention)
    bare, methods = model(**inputs).logits, vlmtok.parse_methods(spec)
    with vlmtok.compress(model, methods) as run:
        logits = model(**inputs).logits
        tokens = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        memory = {at: run.memory(at) for at in range(len(methods))}
        layout = run.layout
    vision = oracle.vision_of(model.vision_model)
    wanted, sizes = [], []
    for pixels in inputs["pixel_values"]:
        left = oracle.run_tower(vision, pixels[None], Player(methods, layout, memory))
        wanted.append(vision.tokens(left.x[None]))
        sizes.append(left.size)
    assert (torch.stack(sizes) > 1).any() or "tca" in spec
    assert_equal(tokens, torch.cat(wanted), 1e-6)
    assert_equal(logits, with_tokens(model, inputs, torch.cat(wanted)), 1e-5)
    assert_differs(logits, bare)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWER_ONLY)
@torch.no_grad()
def test_sizes_count_in_the_attention_and_nothing_is_left_behind(name: str, attention: str) -> None:
    model, inputs = built(name, attention)
    bare, shared, text = model(**inputs).logits, model.vision_model.config, model.config.to_json_string()
    keys = list(model.state_dict())
    with vlmtok.compress(model, "tome:r=3"):
        sized = model(**inputs).logits
        assert any(attn.config is not shared for attn in attentions(model))
        assert attentions(model)[0].config is shared, "no token has a size in front of the first merge"
        assert model.vision_model.config is shared and model.config.to_json_string() == text
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
    with vlmtok.compress(model, "tome:r=3:prop_attn=false"):
        assert_differs(sized, model(**inputs).logits)
        assert all(attn.config is shared for attn in attentions(model))
    with vlmtok.compress(model, Idle()):
        assert any(attn.config is not shared for attn in attentions(model))
        assert_same(model(**inputs).logits, bare)
    assert all(attn.config is shared for attn in attentions(model))
    assert_same(model(**inputs).logits, bare)
    assert all(attn.config is twin.vision_model.config for attn in attentions(twin))
    assert_same(twin(**inputs).logits, bare)


@pytest.mark.parametrize("name", TOWER_ONLY)
@torch.no_grad()
def test_compressions_take_each_others_place(name: str) -> None:
    model, inputs = built(name)
    shared, bare = model.vision_model.config, model(**inputs).logits
    with vlmtok.compress(model, ["tome:r=3", "random:keep=0.8:stage=vision:layer=2"]):
        both = model(**inputs).logits
    one = vlmtok.compress(model, "tome:r=3")
    alone = model(**inputs).logits
    other = vlmtok.compress(model, "random:keep=0.8:stage=vision:layer=2")
    assert_same(model(**inputs).logits, both)
    other.remove()
    assert_same(model(**inputs).logits, alone)
    with one.paused():
        assert_same(model(**inputs).logits, bare)
    assert_same(model(**inputs).logits, alone)
    one.remove()
    assert all(attn.config is shared for attn in attentions(model))


@pytest.mark.parametrize("name", TOWER_ONLY)
def test_generate_and_a_file(name: str, tmp_path: Any) -> None:
    model, inputs = built(name)
    given: dict[str, Any] = {**inputs, "max_new_tokens": 4, "do_sample": False}
    bare = model.generate(**given)
    with vlmtok.compress(model, "pitome:ratio=0.7") as run:
        first = model.generate(**given)
        assert torch.equal(first, model.generate(**given))
        model.save_pretrained(tmp_path)
        report = run.report()
    assert report.line("vision").after.high < report.line("vision").before
    again = type(model).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    again.generation_config = model.generation_config
    assert torch.equal(again.generate(**given), bare)
    assert torch.equal(model.generate(**given), bare)


@pytest.mark.parametrize("kind", ["flash_attention_2"])
@pytest.mark.parametrize("name", TOWER_ONLY)
def test_attention_functions_without_a_bias_are_refused(name: str, kind: str) -> None:
    model, _ = built(name)
    shared = model.vision_model.config
    shared._attn_implementation_internal = kind
    for spec in ("tome", "pitome", "crossget"):
        with pytest.raises(UnsupportedModel, match=f"{kind} takes no bias on the keys; load .*'sdpa'"):
            vlmtok.compress(model, spec)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(attn.config is shared for attn in attentions(model))
    with pytest.warns(VlmtokWarning, match="never ran"):
        vlmtok.compress(model, "tome:r=2:prop_attn=false").remove()
