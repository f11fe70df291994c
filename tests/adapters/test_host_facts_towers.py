"""What the hooks lean on in every vision tower of timm, open_clip and transformers, one sentence a fact.

Tiny models run with hooks of torch alone looking on; nothing of vlmtok's core runs here. An upgrade of a library that
moves a module, renames an argument or changes an order of calls fails with the sentence that no longer holds. What
single libraries, LLaVA and the other vision-language families do stands in the other files of this name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import hosts_of, models
from support.facts import Facts, assert_holds, begun, calls_of, close, one
from support.tower_facts import EVA, SPECS, Host, first_of, heads_of, host
from torch import nn
from vlmtok.adapters import base
from vlmtok.adapters.base import child
from vlmtok.adapters.towers import hf_rows, open_clip_vit, timm_vit

fact = Facts()


@fact("the tower calls its blocks one behind the other, each once, with the row [B, L, C] as first argument", SPECS)
def _(at: Host) -> bool:
    prefix = models.TOWERS[at.name].prefix
    shape = (2, models.PATCHES + prefix, models.WIDTH)
    ordered = len(at.blocks) == models.DEPTH and begun(at.calls, *at.blocks) == at.blocks
    return ordered and all(at.row(i).shape == shape for i in range(models.DEPTH))


@fact("a block gives a tensor, and the next block gets that very object", SPECS)
def _(at: Host) -> bool:
    return all(at.call(i).output is at.row(i + 1) for i in range(models.DEPTH - 1))


@fact(
    "a block calls norm, attention, the reader of the residual, MLP and the end of the MLP branch, in this order", SPECS
)
def _(at: Host) -> bool:
    spec = at.spec
    names = [spec.norm, spec.attn, spec.mid, spec.mlp] + [spec.branch_end] * (spec.branch_end != spec.mlp)
    paths = [at.path(1, name) for name in names]
    return begun(at.calls, *paths) == paths


@fact("attention gets what the norm gave, as its first argument or as hidden_states", SPECS)
def _(at: Host) -> bool:
    call = at.call(1, at.spec.attn)
    given = call.args[0] if call.args else call.kwargs["hidden_states"]
    return given is at.call(1, at.spec.norm).output


@fact("a block gives the residual after attention plus the MLP branch, and nothing comes behind", SPECS)
def _(at: Host) -> bool:
    residual, branch = at.call(1, at.spec.mid).args[0], at.call(1, at.spec.branch_end).output
    return torch.equal(at.call(1).output, residual + branch)


@fact("the residual after attention is the block's own object, no view and not its input", SPECS)
def _(at: Host) -> bool:
    residual = at.call(1, at.spec.mid).args[0]
    return residual is not at.row(1) and not residual._is_view() and residual.data_ptr() != at.row(1).data_ptr()


@fact("given other contents before the MLP branch, the residual is shorter in the block's sum too", SPECS)
def _(at: Host) -> bool:
    def shorten(module, args, kwargs):
        args[0].set_(args[0][:, :5].clone())

    handle = at.module(1, at.spec.mid).register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        with torch.no_grad():
            out = at.module(1)(*at.call(1).args, **at.call(1).kwargs)
    finally:
        handle.remove()
    return close(out, at.call(1).output[:, :5])


@fact("what the last module of the MLP branch returns is added to the residual, also a zero of one entry", SPECS)
def _(at: Host) -> bool:
    end = at.module(1, at.spec.branch_end)
    handle = end.register_forward_hook(lambda m, a, k, y: y.new_zeros(1), with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            out = at.module(1)(*at.call(1).args, **at.call(1).kwargs)
    finally:
        handle.remove()
    return torch.equal(out, at.call(1, at.spec.mid).args[0])


@fact("the last module of the MLP branch is called once a block, by this branch alone", SPECS)
def _(at: Host) -> bool:
    return begun(at.calls, at.path(1, at.spec.branch_end)) == [at.path(1, at.spec.branch_end)]


@fact(
    "q and k come by as [B, H, L, d] or [B, L, H d], where the row names a module for them",
    [n for n in SPECS if SPECS[n].q],
)
def _(at: Host) -> bool:
    batch, length, width = at.row(1).shape
    heads = getattr(at.module(1, at.spec.attn), at.spec.heads)
    shapes = {(batch, heads, length, width // heads), (batch, length, width)}
    return heads == models.HEADS and all(
        at.call(1, at.spec.attn, name).output.shape in shapes for name in (at.spec.q, at.spec.k)
    )


@fact("q and k computed again from the norm's output are those that come by", SPECS)
def _(at: Host) -> bool:
    attn, x = at.module(1, at.spec.attn), at.call(1, at.spec.norm).output
    with torch.no_grad():
        return all(close(at.spec.project(attn, x, which, {}), heads_of(at, which)) for which in "qk")


@fact("attention is softmax(scale q k + bias) v, the bias given under a name of the row", SPECS)
def _(at: Host) -> bool:
    """Asked by an output: with all weight on one key, every row of the attention is that key's value."""
    attn, call = at.module(1, at.spec.attn), at.call(1, at.spec.attn)
    length = at.row(1).shape[1]
    bias = torch.zeros(2, length)
    bias[:, 3] = 1e4
    signature = inspect.signature(attn.forward)
    given = dict(signature.bind(*call.args, **call.kwargs).arguments)
    name = next(name for name in at.spec.bias.names if name in signature.parameters)
    given[name] = bias if at.spec.bias_rank == 2 else bias[:, None, None]
    with torch.no_grad():
        out = attn(**given)
    out = out[0] if isinstance(out, tuple) else out
    return close(out, out[:, :1].expand_as(out)) and not close(out, first_of(call.output))


@fact(
    "without a rotary table, softmax(scale q k) from what came by gives the attention's output",
    [n for n in SPECS if n not in EVA],
)
def _(at: Host) -> bool:
    attn, call = at.module(1, at.spec.attn), at.call(1, at.spec.attn)
    rows = (heads_of(at, "q") @ heads_of(at, "k").mT * at.spec.scale(attn)).softmax(-1)
    x = at.call(1, at.spec.norm).output
    name = next((n for n in ("qkv", "v_proj") if isinstance(getattr(attn, n, None), nn.Linear)), None)
    with torch.no_grad():
        if name is None:
            v = F.linear(x, attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2])
        else:
            v = getattr(attn, name)(x)[..., -x.shape[-1] :]
        mixed = (rows @ v.unflatten(-1, (models.HEADS, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        out = next(getattr(attn, n) for n in ("proj", "out_proj", "o_proj") if hasattr(attn, n))
        return close(out(mixed), first_of(call.output))


@fact("the tower gives its attention no mask of its own", SPECS)
def _(at: Host) -> bool:
    call = at.call(1, at.spec.attn)
    bound = inspect.signature(at.module(1, at.spec.attn).forward).bind(*call.args, **call.kwargs).arguments
    return all(bound.get(name) is None for name in ("attn_mask", "attention_mask", "key_padding_mask"))


@fact("blocks take rows of any length, and what reads the tower takes what they leave", SPECS)
def _(at: Host) -> bool:
    handle = at.module(1).register_forward_hook(lambda m, a, k, y: y[:, :-7], with_kwargs=True, prepend=True)
    follow = []
    if at.call(2).kwargs.get("rope") is not None:
        for i in range(2, models.DEPTH):

            def shorter(module, args, kwargs):
                return args, {**kwargs, "rope": kwargs["rope"][None, None, ..., :-7, :].expand(2, 1, -1, -1)}

            follow.append(at.module(i).register_forward_pre_hook(shorter, with_kwargs=True))
    try:
        calls, out = calls_of(at.model, at.again)
    finally:
        for each in (handle, *follow):
            each.remove()
    return bool(out.isfinite().all()) and one(calls, at.path(3)).args[0].shape[1] == at.row(3).shape[1] - 7


@fact("protected tokens stand in front of the row, so that patches may leave behind them", SPECS)
def _(at: Host) -> bool:
    """Patches of two pictures differ in the first block's input, protected tokens do not."""
    same = (at.row(0)[0] == at.row(0)[1]).all(-1).tolist()
    prefix = models.TOWERS[at.name].prefix
    return same == [True] * prefix + [False] * models.PATCHES


@fact("blocks that are checkpointed run again inside backward, in reverse order, their inner modules too", SPECS)
def _(at: Host) -> bool:
    model = copy.deepcopy(at.model).train()
    if at.name.startswith("HF"):
        hosts_of.checkpoint(model)
    else:
        getattr(model, "visual", model).set_grad_checkpointing(True)
    seen: list[int] = []
    for i, path in enumerate(at.blocks):
        child(model, f"{path}.{at.spec.mid}").register_forward_pre_hook(
            lambda m, a, i=i: seen.append(i if torch._C._current_graph_task_id() == -1 else ~i)
        )
    models.TOWERS[at.name].run(model, at.pictures).sum().backward()
    back = list(dict.fromkeys(i for i in seen if i < 0))
    return seen[: models.DEPTH] == [*range(models.DEPTH)] and back == sorted(back) and len(back) >= models.DEPTH - 1


@pytest.mark.parametrize(("sentence", "name", "holds"), fact.rows)
def test_a_fact_that_hooks_lean_on(sentence: str, name: str, holds: Callable[..., bool]) -> None:
    assert_holds(sentence, holds, host(name) if name else None)


def test_every_row_of_the_surgery_is_looked_at() -> None:
    """A row that no model above is driven by would lean on facts that nobody checks."""
    rows = {
        id(value)
        for module in (timm_vit, open_clip_vit)
        for value in vars(module).values()
        if type(value) is base.BlockSpec
    }
    rows |= {id(hf_rows.ROWS[kind].block) for kind in ("clip_vision_model", "siglip_vision_model", "vit", "dinov2")}
    assert rows == {id(spec) for spec in SPECS.values()}
