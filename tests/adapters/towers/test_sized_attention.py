"""Biases on the keys of attentions without an argument for one: in the right chunk, quiet, undone, never copied."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_differs, assert_equal, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPTextConfig, CLIPTextModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from vlmtok.adapters import forms
from vlmtok.adapters.towers.sized_attention import BiasOf, SizedAttention

from vlmtok.core.attachment import Attachment
from vlmtok.core.site import Layout
from vlmtok.errors import HostChanged, PassError, UnsupportedModel

WIDTH, HEADS = 32, 4


def blip(kind: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model = Blip2VisionModel(Blip2VisionConfig(**sizes, image_size=56, patch_size=14, attn_implementation=kind))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model.eval()


def attention(kind: str = "sdpa") -> Any:
    return blip(kind).encoder.layers[0].self_attn


def attached() -> Attachment:
    return Attachment([], Layout("none", {}))


def put(attn: Any, bias_of: BiasOf) -> Attachment:
    attachment = attached()
    SizedAttention(attachment).install(attn, bias_of)
    return attachment


def bias(n: int = 9) -> Tensor:
    return torch.arange(1.0, n + 1).log()


def rows(n: int = 9, seed: int = 1) -> Tensor:
    return torch.randn(2, n, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hand(attn: Any, x: Tensor, bias: Tensor) -> Tensor:
    """An attention's output with a bias `[B, 1, 1, n]` on the logits, from its weights."""
    made = x @ attn.qkv.weight.T + (0 if attn.qkv.bias is None else attn.qkv.bias)
    q, k, v = made.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ attn.projection.weight.T + attn.projection.bias


# ---------------------------------------------------------------------- what is computed
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [(9,), (2, 9), (2, 1, 1, 9), (1, HEADS, 9, 9)])
@torch.no_grad()
def test_the_bias_is_added_to_the_logits(kind: str, shape: tuple[int, ...]) -> None:
    attn, x = attention(kind), rows()
    bare = attn(x)[0]
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2
    asked: list[tuple[Any, list[int], list[int]]] = []

    def bias_of(module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
        asked.append((module, list(q.shape), list(k.shape)))
        return given

    attachment = put(attn, bias_of)
    full = given if given.dim() == 4 else given.reshape(-1, 1, 1, 9)
    assert_equal(attn(x)[0], by_hand(attn, x, full), 1e-5)
    assert asked == [(attn, [2, HEADS, 9, 8], [2, HEADS, 9, 8])]
    attachment.remove()
    assert_same(attn(x)[0], bare)
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@torch.no_grad()
def test_an_attention_that_goes_chunk_by_chunk_asks_for_each_in_order(kind: str) -> None:
    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(embed_dim=WIDTH, num_heads=HEADS, depth=1, attn_implementation=kind)
    attn = VisionAttention(config).eval()
    lengths, x = [3, 5, 1], rows()[0]
    borders = torch.tensor([0, 3, 8, 9])
    turn = (torch.ones(9, 8), torch.zeros(9, 8))  # no rotation
    biases = iter(bias().split(lengths))
    seen: list[int] = []

    def bias_of(module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
        seen.append(k.shape[-2])
        return next(biases)

    put(attn, bias_of)
    out = attn(x, borders, position_embeddings=turn)
    assert seen == lengths
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
    logits = q @ k.transpose(-1, -2) * 8**-0.5 + bias()
    part = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    weights = logits.masked_fill(part[:, None] != part, -torch.inf).softmax(-1)
    expected = (weights @ v).transpose(0, 1).flatten(1) @ attn.proj.weight.T + attn.proj.bias
    assert_equal(out, expected, 1e-5)


@pytest.mark.parametrize("mask", ["float", "bool"])
@torch.no_grad()
def test_masks_of_the_host_stay(mask: str) -> None:
    attn, x = attention(), rows()
    shown = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    shown[1, ..., 6:] = False
    added = torch.zeros(2, 1, 1, 9).masked_fill(~shown, torch.finfo(torch.float32).min)
    put(attn, lambda module, q, k: bias())
    given = {"float": added, "bool": shown}[mask]
    q, k, v = (torch.randn(2, HEADS, 9, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    out = attn.config.table["vlmtok_sized"](attn, q, k, v, given, scaling=0.5, dropout=0.0)[0]
    weights = (q @ k.transpose(-1, -2) * 0.5 + bias()).masked_fill(~shown, -torch.inf).softmax(-1)
    assert_equal(out, (weights @ v).transpose(1, 2), 1e-5)
    assert attn(x)[0].isfinite().all()


@torch.no_grad()
def test_in_half_precision_and_under_autocast_the_bias_has_the_form_of_the_keys() -> None:
    for kind in ("eager", "sdpa"):
        attn, x = attention(kind), rows()
        put(attn, lambda module, q, k: bias())
        expected = by_hand(attn, x, bias())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = [attn(x)[0]]
        outs.append(attn.to(torch.bfloat16)(x.to(torch.bfloat16))[0])
        for out in outs:
            assert out.dtype == torch.bfloat16
            assert (out.float() - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------------- quiet
@torch.no_grad()
def test_nothing_to_add_and_a_pause_change_no_bit() -> None:
    attn, x = attention(), rows()
    bare = attn(x)[0]
    first = put(attn, lambda module, q, k: None)
    assert_same(attn(x)[0], bare)
    first.remove()
    second = put(attn, lambda module, q, k: bias())
    second.pauses = 1
    assert_same(attn(x)[0], bare)
    second.pauses = 0
    assert_differs(attn(x)[0], bare)


# ---------------------------------------------------------------------- what is touched, and given back
def test_only_the_attention_is_touched() -> None:
    model = blip()
    config, text = model.config, model.config.to_json_string()
    attn, other = (layer.self_attn for layer in model.encoder.layers)
    assert attn.config is config
    attachment = put(attn, lambda module, q, k: bias())
    assert model.config is config and other.config is config and model.encoder.config is config
    assert config._attn_implementation == "sdpa" and config.to_json_string() == text
    assert type(attn.config).__name__ == type(config).__name__ and isinstance(attn.config, type(config))
    assert attn.config is not config and attn.config.to_json_string() == text
    assert attn.config.hidden_size == WIDTH and forms.implementation(attn) == "sdpa"
    attachment.remove()
    attachment.remove()
    assert attn.config is config


@pytest.mark.parametrize("order", ["newer first", "older first"])
@torch.no_grad()
def test_attachments_that_take_each_others_place(order: str) -> None:
    attn, x = attention(), rows()
    config, bare = attn.config, attn(x)[0]
    old = put(attn, lambda module, q, k: bias())
    sized = attn(x)[0]
    old.suspend()
    new = put(attn, lambda module, q, k: 2 * bias())
    assert_equal(attn(x)[0], by_hand(attn, x, 2 * bias()), 1e-5)
    if order == "newer first":  # as where its installation fails
        new.remove()
        old.resume()
        assert_same(attn(x)[0], sized)
        old.remove()
    else:
        old.remove()
        assert_equal(attn(x)[0], by_hand(attn, x, 2 * bias()), 1e-5)
        new.remove()
    assert attn.config is config
    assert_same(attn(x)[0], bare)


def test_an_attention_that_was_given_another_configuration_keeps_it() -> None:
    attn = attention()
    attachment = put(attn, lambda module, q, k: bias())
    attn.config = own = copy.copy(forms.shared(attn.config))
    attachment.remove()
    assert attn.config is own


def _through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def _through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, _through_pickle, _through_a_file])
@torch.no_grad()
def test_a_copy_of_the_model_is_bare(way: Callable[[nn.Module], Any]) -> None:
    model, x = blip(), rows()
    attn = model.encoder.layers[0].self_attn
    bare = attn(x)[0]
    keys = set(model.state_dict())
    put(attn, lambda module, q, k: bias())
    twin = way(model)
    assert set(model.state_dict()) == keys
    other = twin.encoder.layers[0].self_attn
    assert other.config is twin.config is twin.encoder.layers[1].self_attn.config
    assert type(other.config) is Blip2VisionConfig and other.config is not model.config
    assert_same(other(x)[0], bare)
    assert_differs(attn(x)[0], bare)
    lone = copy.copy(attn.config)
    assert type(lone) is Blip2VisionConfig and lone is not model.config


def test_what_is_saved_is_the_bare_model(tmp_path: Any) -> None:
    model = blip()
    put(model.encoder.layers[0].self_attn, lambda module, q, k: bias())
    model.save_pretrained(tmp_path)
    assert "vlmtok" not in (tmp_path / "config.json").read_text()
    again = Blip2VisionModel.from_pretrained(tmp_path)
    assert type(again.encoder.layers[0].self_attn.config) is Blip2VisionConfig


def test_the_attachment_keeps_no_model_alive() -> None:
    model = blip()
    attachment = put(model.encoder.layers[0].self_attn, lambda module, q, k: bias())
    gone = [weakref.ref(module) for module in (model, model.encoder.layers[0].self_attn)]
    del model
    gc.collect()
    assert [found() for found in gone] == [None, None]
    attachment.remove()


# ---------------------------------------------------------------------- the host's function
@pytest.mark.parametrize("kind", ["flash_attention_2", "sage"])
def test_functions_without_a_bias_are_refused_before_anything_is_changed(kind: str) -> None:
    attn = attention()
    attn.config._attn_implementation_internal = kind
    before = attn.config
    with pytest.raises(UnsupportedModel, match=f"{kind} of Blip2Attention takes no bias on the keys"):
        put(attn, lambda module, q, k: bias())
    assert attn.config is before


def test_an_attention_without_a_configuration_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="MultiheadAttention .*has no configuration"):
        put(nn.MultiheadAttention(8, 2), lambda module, q, k: bias())


@torch.no_grad()
def test_the_models_attention_may_be_switched_while_it_is_attached() -> None:
    model, x = blip(), rows()
    attn = model.encoder.layers[0].self_attn
    put(attn, lambda module, q, k: bias())
    model.set_attn_implementation("eager")
    assert forms.implementation(attn) == "eager"
    assert attn(x)[1] is not None  # the eager function returns its weights
    assert_equal(attn(x)[0], by_hand(attn, x, bias()), 1e-5)
    attn.config._attn_implementation = "sdpa"
    assert model.config._attn_implementation == "sdpa" and attn(x)[1] is None
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(PassError, match="flash_attention_2 of Blip2Attention takes no bias"):
        attn(x)


@torch.no_grad()
def test_biases_of_other_keys_are_refused() -> None:
    attn, x = attention(), rows()
    for given in (bias(8), bias().expand(3, 9), bias().expand(1, 2, 9)):
        attachment = put(attn, lambda module, q, k, given=given: given)  # type: ignore[misc]
        with pytest.raises(HostChanged, match="attends to 9 keys of 2 rows"):
            attn(x)
        attachment.remove()


@torch.no_grad()
def test_a_causal_attention_without_a_mask_is_refused_and_not_made_to_look_ahead() -> None:
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=HEADS)
    attn = CLIPTextModel(config).eval().encoder.layers[0].self_attn
    put(attn, lambda module, q, k: bias())
    with pytest.raises(HostChanged, match="causal without a mask"):
        attn(rows(), is_causal=True)


# ---------------------------------------------------------------------- threads, compile, checkpointing
@torch.no_grad()
def test_each_thread_asks_for_itself() -> None:
    attn, own = attention(), threading.local()
    put(attn, lambda module, q, k: own.bias)
    found: dict[int, Tensor] = {}

    def run(index: int) -> None:
        own.bias = index * bias()
        with torch.no_grad():
            for _ in range(20):
                found[index] = attn(rows(seed=index))[0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert_equal(found[index], by_hand(attn, rows(seed=index), index * bias()), 1e-5)


@torch.no_grad()
def test_compiled_in_one_graph() -> None:
    attn, x = attention(), rows()
    put(attn, lambda module, q, k: bias())
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    assert_equal(compiled(x)[0], by_hand(attn, x, bias()), 1e-5)


def test_gradients_flow_and_checkpointing_asks_again() -> None:
    attn, given = attention(), bias().requires_grad_()
    asked: list[int] = []

    def bias_of(module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
        asked.append(1)
        return given

    put(attn, bias_of)
    x = rows().requires_grad_()
    expected = torch.autograd.grad(by_hand(attn, x, given).square().sum(), [x, given])
    plain = torch.autograd.grad(attn(x)[0].square().sum(), [x, given])
    again = torch.autograd.grad(checkpoint(lambda y: attn(y)[0], x, use_reentrant=False).square().sum(), [x, given])
    for one, two, three in zip(plain, again, expected):
        assert_same(one, two)
        assert_equal(one, three, 1e-3)
    assert len(asked) == 3
