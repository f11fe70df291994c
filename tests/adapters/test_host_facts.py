"""What the hooks lean on in torch, timm, open_clip and transformers, one sentence a fact.

Tiny models run with hooks of torch alone looking on; nothing of vlmtok's core runs here. An upgrade of a library that
moves a module, renames an argument or changes an order of calls fails with the sentence that no longer holds. Facts of
the single vision-language families are in `test_host_facts_families.py`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import hosts_of, models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vlmtok.adapters import base
from vlmtok.adapters.base import BlockSpec, child
from vlmtok.adapters.towers import hf_rows, open_clip_vit, timm_vit

FACTS: list[Any] = []


def fact(sentence: str, hosts: Iterable[str] = ("",)) -> Callable[..., Any]:
    """Registers a check under its sentence, once for every host; it returns whether the sentence holds."""

    def register(holds: Callable[..., bool]) -> Callable[..., bool]:
        names = {host: f"{host}: {sentence}" if host else sentence for host in hosts}
        FACTS.extend(pytest.param(sentence, host, holds, id=name) for host, name in names.items())
        return holds

    return register


@dataclass
class Call:
    """One call of a module: what it got, by position and by name, and what it gave."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def calls_of(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Call], Any]:
    """Every call of a submodule in the order in which they began, and what `run` gave."""
    calls: list[Call] = []
    handles = []
    for path, module in model.named_modules():
        stack: list[Call] = []

        def before(module, args, kwargs, path=path, stack=stack):
            calls.append(Call(path, args, kwargs))
            stack.append(calls[-1])

        def after(module, args, kwargs, output, stack=stack):
            stack.pop().output = output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        return calls, run()
    finally:
        for handle in handles:
            handle.remove()


def one(calls: list[Call], path: str) -> Call:
    """The only call of a module."""
    (found,) = [call for call in calls if call.path == path]
    return found


def begun(calls: list[Call], *paths: str) -> list[str]:
    """Those of some modules that were called, in order, repetitions too."""
    return [call.path for call in calls if call.path in paths]


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, atol=1e-5))


# ---------------------------------------------------------------------- torch
@fact("torch: a forward pre-hook with kwargs sees (args, kwargs), and what it returns takes their place")
def _() -> bool:
    layer, seen = nn.MultiheadAttention(4, 1), []

    def look(module, args, kwargs):
        seen.append((len(args), set(kwargs)))
        return (args[0] * 0, *args[1:]), {**kwargs, "need_weights": True}

    layer.register_forward_pre_hook(look, with_kwargs=True)
    x = torch.randn(3, 1, 4)
    out, weights = layer(x, x, x, need_weights=False)
    return seen == [(3, {"need_weights"})] and weights is not None and close(out[0], out[1])


@fact("torch: pre-hooks run in the order in which they were placed, each on what the one before returned")
def _() -> bool:
    layer = nn.Identity()
    layer.register_forward_pre_hook(lambda m, a, k: ((a[0] + 1,), k), with_kwargs=True)
    layer.register_forward_pre_hook(lambda m, a, k: ((a[0] * 10,), k), with_kwargs=True)
    return layer(torch.tensor(2)).item() == 30


@fact("torch: a forward hook placed with prepend=True runs before those that were there, which see what it returns")
def _() -> bool:
    layer, seen = nn.Identity(), []
    layer.register_forward_hook(lambda m, a, y: seen.append(y.item()))
    layer.register_forward_hook(lambda m, a, k, y: y + 1, with_kwargs=True, prepend=True)
    return layer(torch.tensor(2)).item() == 3 and seen == [3]


@fact("torch: of two hooks placed with prepend=True the later one runs first")
def _() -> bool:
    layer, seen = nn.Identity(), []
    for name in "ab":
        layer.register_forward_hook(lambda m, a, k, y, name=name: seen.append(name), with_kwargs=True, prepend=True)
    layer(torch.tensor(2))
    return seen == ["b", "a"]


@fact("torch: a hook that returns None changes nothing, the very object goes on")
def _() -> bool:
    layer, x = nn.Identity(), torch.ones(2)
    layer.register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    layer.register_forward_hook(lambda m, a, k, y: None, with_kwargs=True, prepend=True)
    return layer(x) is x


@fact("torch: forward hooks do not run behind an exception unless they were placed with always_call=True")
def _() -> bool:
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError

    layer, seen = Fails(), []
    layer.register_forward_hook(lambda m, a, k, y: seen.append("plain"), with_kwargs=True, prepend=True)
    layer.register_forward_hook(lambda m, a, y: seen.append("always"), always_call=True)
    with pytest.raises(KeyError):
        layer(torch.ones(1))
    return seen == ["always"]


@fact("torch: hooks lie in _forward_pre_hooks and _forward_hooks, by a key that the tables of flags share")
def _() -> bool:
    layer = nn.Identity()
    pre = layer.register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    post = layer.register_forward_hook(lambda m, a, k, y: None, with_kwargs=True, prepend=True, always_call=True)
    placed = list(layer._forward_pre_hooks) == [pre.id] and list(layer._forward_hooks) == [post.id]
    flagged = list(layer._forward_pre_hooks_with_kwargs) == [pre.id] and list(layer._forward_hooks_with_kwargs)
    return placed and flagged == [post.id] and list(layer._forward_hooks_always_called) == [post.id]


@fact("torch: copy.deepcopy of a module copies its hooks by their own __deepcopy__")
def _() -> bool:
    class Hook:
        copied = False

        def __call__(self, *given):
            return None

        def __deepcopy__(self, memo):
            other = Hook()
            other.copied = True
            return other

    layer = nn.Sequential(nn.Identity())
    layer[0].register_forward_hook(Hook())
    (hook,) = copy.deepcopy(layer)[0]._forward_hooks.values()
    return hook.copied


@fact("torch: a module that is hooked is collectable, and a weak reference to it dies")
def _() -> bool:
    import gc
    import weakref

    layer = nn.Identity()
    layer.register_forward_hook(lambda m, a, y: None)
    dead = weakref.ref(layer)
    del layer
    gc.collect()
    return dead() is None


@fact("torch: _current_graph_task_id() is -1 but inside backward, recomputed forwards of checkpoint() included")
def _() -> bool:
    found = {}
    for reentrant in (False, True):
        layer, ids = nn.Linear(2, 2), []
        layer.register_forward_pre_hook(lambda m, a, ids=ids: ids.append(torch._C._current_graph_task_id()))
        checkpoint(layer, torch.ones(1, 2, requires_grad=True), use_reentrant=reentrant).sum().backward()
        found[reentrant] = len(ids) == 2 and ids[0] == -1 and ids[1] != -1
    return all(found.values()) and torch._C._current_graph_task_id() == -1


@fact("torch: set_ gives a tensor another row length, and what holds the same object sees it")
def _() -> bool:
    x = torch.arange(6.0).view(1, 3, 2) + 0
    held = x
    with torch.no_grad():
        x.set_(torch.ones(1, 2, 2))
    return held.shape == (1, 2, 2) and float((held + x).sum()) == 8


@fact("torch: scaled_dot_product_attention adds a float mask [B, 1, 1, L] to the scaled logits of every head and row")
def _() -> bool:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    bias = torch.randn(2, 1, 1, 5)
    wanted = ((q @ k.mT) * 8**-0.5 + bias).softmax(-1) @ v
    return close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias), wanted)


@fact("torch: nn.MultiheadAttention keeps q, k, v in that order in in_proj_weight and adds a float key_padding_mask")
def _() -> bool:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, bias = torch.randn(2, 5, 8), torch.randn(2, 5)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (2, 4)).transpose(1, 2)
        for w, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
    )
    rows = ((q @ k.mT) * 4**-0.5 + bias[:, None, None]).softmax(-1)
    wanted = layer.out_proj((rows @ v).transpose(1, 2).flatten(2))
    with torch.no_grad():
        fast = layer(x, x, x, need_weights=False, key_padding_mask=bias)[0]
    return close(fast, wanted) and close(layer(x, x, x, need_weights=False, key_padding_mask=bias)[0], wanted)


@fact("torch: nn.MultiheadAttention takes a float attn_mask [L, L], or one [B H, L, L] with heads inside rows")
def _() -> bool:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, mask = torch.randn(2, 5, 8), torch.randn(2, 5, 5)
    both = layer(x, x, x, need_weights=False, attn_mask=mask.repeat_interleave(2, 0))[0]
    alone = [layer(x[i : i + 1], x[i : i + 1], x[i : i + 1], attn_mask=mask[i])[0] for i in range(2)]
    return close(both, torch.cat(alone))


@fact("torch: argsort(dim=1, descending=True, stable=True) leaves ties in order, lowest index first")
def _() -> bool:
    return torch.ones(1, 300).argsort(dim=1, descending=True, stable=True)[0].tolist() == list(range(300))


@fact("torch: Dynamo tells of which code it holds graphs, and sees hooks that came since once it is reset")
def _() -> bool:
    import torch._dynamo as dynamo

    class Plain(nn.Module):
        def forward(self, x):
            return x * 2

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, x):
            return self.inner(x)

    dynamo.reset()
    try:
        layer, entries = Around(), dynamo.eval_frame._debug_get_cache_entry_list
        code = Around.forward.__code__
        run = torch.compile(layer, backend="eager")
        before = bool(entries(code))
        run(torch.ones(1))
        seen = bool(entries(code)) and any(reference() is code for reference in dynamo.convert_frame.input_codes.seen)
        layer.inner.register_forward_hook(lambda m, a, y: y + 1)
        dynamo.reset()
        return not before and seen and not entries(code) and run(torch.ones(1)).item() == 3
    finally:
        dynamo.reset()


# ---------------------------------------------------------------------- towers
SPECS: dict[str, BlockSpec] = {
    "timm ViT": timm_vit.VIT_BLOCK,
    "timm DeiT-3": timm_vit.VIT_BLOCK,
    "timm DINOv2 registers": timm_vit.VIT_BLOCK,
    "timm SigLIP": timm_vit.VIT_BLOCK,
    "timm EVA": timm_vit.EVA_BLOCK,
    "timm EVA-02": timm_vit.EVA_BLOCK,
    "timm PE": timm_vit.EVA_BLOCK,
    "timm DINOv3": timm_vit.EVA_BLOCK,
    "open_clip CLIP": open_clip_vit.MHA_BLOCK,
    "open_clip CustomTextCLIP": open_clip_vit.MHA_BLOCK,
    "open_clip CoCa": open_clip_vit.MHA_BLOCK,
    "HF CLIP vision": hf_rows.CLIP_BLOCK,
    "HF CLIP vision eager": hf_rows.CLIP_BLOCK,
    "HF SigLIP vision": hf_rows.CLIP_BLOCK,
    "HF ViT": hf_rows.VIT_BLOCK,
    "HF DINOv2": hf_rows.DINOV2_BLOCK,
}
"""Rows that that the driver of towers goes by, and a model for each."""
EVA = [name for name in SPECS if SPECS[name].rope]
TIMM = [name for name in SPECS if name.startswith("timm")]
OPEN_CLIP = [name for name in SPECS if name.startswith("open_clip")]
HF = [name for name in SPECS if name.startswith("HF")]


@dataclass
class Host:
    """A tower that ran once.

    Attributes:
        blocks: paths of its blocks, in order.
        calls: of all its modules.
    """

    name: str
    model: nn.Module
    spec: BlockSpec
    blocks: list[str]
    pictures: Tensor
    calls: list[Call] = field(default_factory=list)

    def path(self, block: int, *parts: str) -> str:
        return ".".join((self.blocks[block], *(part for part in parts if part)))

    def call(self, block: int, *parts: str) -> Call:
        return one(self.calls, self.path(block, *parts))

    def module(self, block: int, *parts: str) -> nn.Module:
        return child(self.model, self.path(block, *parts))

    def row(self, block: int) -> Tensor:
        """What a block got."""
        return self.call(block).args[0]

    def again(self) -> Tensor:
        with torch.no_grad():
            return models.TOWERS[self.name].run(self.model, self.pictures)


LAYERS = {"Block", "EvaBlock", "ResidualAttentionBlock", *(row.layer for row in hf_rows.ROWS.values())}


@functools.cache
def host(name: str) -> Host:
    model, tower = models.fresh(name), models.TOWERS[name]
    root = "visual." if name.startswith("open_clip") else ""
    blocks = [p for p, m in model.named_modules() if type(m).__name__ in LAYERS and p.startswith(root)]
    if name.endswith("CoCa"):
        blocks = [path for path in blocks if path.startswith("visual.transformer")]
    found = Host(name, model, SPECS[name], blocks, tower.pictures(2))
    found.calls, _ = calls_of(model, found.again)
    return found


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


def heads_of(at: Host, which: str) -> Tensor:
    """q or k of block 1, [B, H, L, d], caught where the row says, or else computed again."""
    attn, name = at.module(1, at.spec.attn), getattr(at.spec, which)
    if name is None:
        return at.spec.project(attn, at.call(1, at.spec.norm).output, which, {})
    out = at.call(1, at.spec.attn, name).output
    return out if out.dim() == 4 else out.unflatten(-1, (models.HEADS, -1)).transpose(1, 2)


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
    return close(out, out[:, :1].expand_as(out)) and not close(out, _first(call.output))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


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
        return close(out(mixed), _first(call.output))


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


# ---------------------------------------------------------------------- timm
@fact("timm: num_prefix_tokens counts the protected tokens, patch_embed.grid_size rows and columns of patches", TIMM)
def _(at: Host) -> bool:
    side = models.SIDE // models.PATCH
    return at.model.num_prefix_tokens == models.TOWERS[at.name].prefix and at.model.patch_embed.grid_size == (
        side,
        side,
    )


@fact("timm: q_norm and k_norm are called once each, whether or not the model norms q and k", TIMM)
def _(at: Host) -> bool:
    return sorted(begun(at.calls, at.path(1, "attn.q_norm"), at.path(1, "attn.k_norm"))) == [
        at.path(1, "attn.k_norm"),
        at.path(1, "attn.q_norm"),
    ]


@fact("timm: an unfused attention adds attn_mask [B, 1, 1, L] as the fused one does", ["timm ViT", "timm EVA-02"])
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    bias, out, fused = torch.randn(2, 1, 1, at.row(1).shape[1]), [], attn.fused_attn
    try:
        for attn.fused_attn in (True, False):
            with torch.no_grad():
                out.append(attn(*call.args, **{**call.kwargs, "attn_mask": bias}))
    finally:
        attn.fused_attn = fused
    return close(*out) and not close(out[0], call.output)


@fact("timm: every block of Eva gets the rotary table of the patches by name, as [N, D] or [H, N, D]", EVA)
def _(at: Host) -> bool:
    tables = [at.call(i).kwargs["rope"] for i in range(models.DEPTH)]
    if at.name == "timm EVA":
        return tables == [None] * models.DEPTH
    return all(table.shape[-2] == models.PATCHES for table in tables)


@fact(
    "timm: Eva turns what stands behind the prefix with apply_rot_embed_cat of its attention's module",
    [n for n in EVA if n != "timm EVA"],
)
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    table, prefix = call.kwargs["rope"], at.model.num_prefix_tokens
    turn = sys.modules[type(attn).__module__].apply_rot_embed_cat
    each = table[None, None].expand(2, 1, -1, -1) if table.dim() == 2 else table[None]
    x = heads_of(at, "k")[:, :, prefix:]
    half = getattr(attn, "rotate_half", False)
    same = close(turn(x, table, half=half), turn(x, each, half=half))
    with torch.no_grad():
        return (
            same
            and attn.num_prefix_tokens == prefix
            and close(attn(*call.args, **{**call.kwargs, "rope": each}), call.output)
        )


@fact("timm: a distilled DeiT has two protected tokens, and its heads read no others")
def _() -> bool:
    model, x = models.shared("timm DeiT distilled"), torch.randn(2, 9, models.WIDTH)
    with torch.no_grad():
        same = torch.equal(model.forward_head(x), model.forward_head(torch.cat([x[:, :2], x[:, 5:]], 1)))
        return same and model.num_prefix_tokens == 2 and not close(model.forward_head(x), model.forward_head(x[:, 1:]))


@fact("timm: attention pooling has no position embeddings of its own and takes any number of tokens", ["timm SigLIP"])
def _(at: Host) -> bool:
    pool = at.model.attn_pool
    with torch.no_grad():
        return pool.pos_embed is None and pool(torch.randn(2, 5, models.WIDTH)).shape == (2, models.WIDTH)


@fact("timm: BEiT and Swin are classes of their own, no VisionTransformer in disguise")
def _() -> bool:
    from timm.models import beit, swin_transformer, vision_transformer

    return not any(
        issubclass(kind, vision_transformer.VisionTransformer) for kind in (beit.Beit, swin_transformer.SwinTransformer)
    )


# ---------------------------------------------------------------------- open_clip
@fact("open_clip: attention is nn.MultiheadAttention, batch first, called with q, k, v by position", OPEN_CLIP)
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    return (
        type(attn) is nn.MultiheadAttention
        and attn.batch_first
        and len(call.args) == 3
        and not call.kwargs["need_weights"]
    )


@fact("open_clip: a plain tower shows its depth and grid as transformer.resblocks and grid_size", OPEN_CLIP)
def _(at: Host) -> bool:
    visual = at.model.visual
    side = models.SIDE // models.PATCH
    return len(visual.transformer.resblocks) == models.DEPTH and tuple(visual.grid_size) == (side, side)


def text_calls(name: str) -> tuple[nn.Module, nn.Module, Tensor, list[Call], Tensor]:
    model = models.shared(name)
    ids = torch.randint(1, 62, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 7] = 63
    with torch.no_grad():
        calls, out = calls_of(model, lambda: model.encode_text(ids))
    return model, getattr(model, "text", model), ids, calls, out


@fact(
    "open_clip: a text tower calls token_embedding with the ids, its blocks with the causal mask, then ln_final",
    OPEN_CLIP[:2],
)
def _(at: Host) -> bool:
    model, text, ids, calls, _ = text_calls(at.name)
    root = "" if text is model else "text."
    paths = [f"{root}token_embedding", f"{root}transformer.resblocks.0.attn", f"{root}ln_final"]
    ordered = begun(calls, *paths) == paths
    mask = one(calls, paths[1]).kwargs["attn_mask"]
    return ordered and torch.equal(one(calls, paths[0]).args[0], ids) and torch.equal(mask, text.attn_mask[:12, :12])


@fact("open_clip: the text feature is read off ln_final's output at the column of the highest id", OPEN_CLIP[:2])
def _(at: Host) -> bool:
    model, text, ids, calls, out = text_calls(at.name)
    rows = one(calls, "ln_final" if text is model else "text.ln_final").output
    return close(rows[torch.arange(2), ids.argmax(1)] @ text.text_projection, out)


# ---------------------------------------------------------------------- transformers
@fact("transformers: a tower's config.model_type is a row's, and its layers are of the class that the row names", HF)
def _(at: Host) -> bool:
    row = hf_rows.ROWS[at.model.config.model_type]
    return {type(at.module(i)).__name__ for i in range(models.DEPTH)} == {row.layer} and row.block is at.spec


@fact(
    "transformers: eager attention adds attention_mask [B, 1, 1, L] as sdpa does",
    ["HF CLIP vision", "HF SigLIP vision", "HF ViT", "HF DINOv2"],
)
def _(at: Host) -> bool:
    attn, call = at.module(1, at.spec.attn), at.call(1, at.spec.attn)
    given = dict(inspect.signature(attn.forward).bind(*call.args, **call.kwargs).arguments)
    given["attention_mask"] = torch.randn(2, 1, 1, at.row(1).shape[1])
    out, kind = [], at.model.config._attn_implementation
    try:
        for other in ("sdpa", "eager"):
            at.model.set_attn_implementation(other)
            with torch.no_grad():
                out.append(_first(attn(**given)))
    finally:
        at.model.set_attn_implementation(kind)
    return close(*out) and not close(out[0], _first(call.output))


@fact(
    "transformers: hidden_states are recorded by forward hooks, which see what a hook placed with prepend=True returns",
    HF,
)
def _(at: Host) -> bool:
    model = copy.deepcopy(at.model)
    with torch.no_grad():
        model(pixel_values=at.pictures, output_hidden_states=True)  # from now on its own hooks are there
        child(model, at.blocks[1]).register_forward_hook(lambda m, a, k, y: y[:, :9], with_kwargs=True, prepend=True)
        found = model(pixel_values=at.pictures, output_hidden_states=True).hidden_states
    return [h.shape[1] for h in found[1:4]] == [at.row(1).shape[1], 9, 9]


@fact("transformers: checkpointing leaves a layer's own hooks outside; inner modules are called again alone", HF)
def _(at: Host) -> bool:
    model, seen = copy.deepcopy(at.model).train(), []
    hosts_of.checkpoint(model)
    child(model, at.blocks[1]).register_forward_pre_hook(lambda m, a, k: seen.append("layer"), with_kwargs=True)
    child(model, at.path(1, at.spec.mid)).register_forward_pre_hook(lambda m, a: seen.append("inside"))
    model(pixel_values=at.pictures).last_hidden_state.sum().backward()
    return seen == ["layer", "inside", "inside"]


@fact("transformers: CLIPModel and SiglipModel keep the tower at vision_model, get_image_features gives pooler_output")
def _() -> bool:
    pictures = models.pictures(2)
    for name in ("HF CLIPModel", "HF SiglipModel"):
        model = models.shared(name)
        with torch.no_grad():
            calls, out = calls_of(model, lambda model=model: model.get_image_features(pixel_values=pictures))
        if begun(calls, "vision_model") != ["vision_model"] or out.pooler_output.shape[0] != 2:
            return False
    return True


@fact("transformers: CLIP's text model gets ids by name and reads its last norm's output at the end of text")
def _() -> bool:
    model = models.shared("HF CLIPModel")
    ids = torch.randint(3, 50, (2, 9))
    ids[:, 6] = model.config.text_config.eos_token_id
    with torch.no_grad():
        calls, out = calls_of(model, lambda: model.get_text_features(input_ids=ids))
    end = (ids == model.config.text_config.eos_token_id).int().argmax(1)
    rows = one(calls, "text_model.final_layer_norm").output[torch.arange(2), end]
    named = one(calls, "text_model").kwargs["input_ids"] is ids
    return named and close(model.text_projection(rows), out.pooler_output)


# ---------------------------------------------------------------------- LLaVA
@functools.cache
def llava() -> nn.Module:
    return models.llava(depth=3)


def prefill(**more: Any) -> list[Call]:
    with torch.no_grad():
        return calls_of(llava(), lambda: llava()(**models.Batch.of("^3I5", "^3I5").inputs(), **more))[0]


@fact("LLaVA: the projector reads hidden_states[vision_feature_layer] without its class token")
def _() -> bool:
    calls = prefill()
    layer = one(calls, "model.vision_tower.encoder.layers.1")  # of three: -2 is the output of the second
    return torch.equal(one(calls, "model.multi_modal_projector").args[0], layer.output[:, 1:])


@fact("LLaVA: as many features as placeholders, or an error")
def _() -> bool:
    model = copy.deepcopy(llava())
    model.model.multi_modal_projector.register_forward_hook(lambda m, a, y: y[:, :-1])
    with pytest.raises(ValueError, match="do not match"), torch.no_grad():
        model(**models.Batch.of("^3I5").inputs())
    return True


@fact("LLaVA: features are put on the columns of placeholders, in order, and nothing else changes")
def _() -> bool:
    calls = prefill()
    batch = models.Batch.of("^3I5", "^3I5").inputs()
    rows = one(calls, "model.language_model").kwargs["inputs_embeds"]
    here = batch["input_ids"] == models.IMAGE
    features = one(calls, "model.multi_modal_projector").output.flatten(0, 1)
    words = llava().get_input_embeddings()(batch["input_ids"])
    return torch.equal(rows[here], features) and torch.equal(rows[~here], words[~here])


@fact("LLaVA: every layer gets the same mask and the same rotary pair, made once by the text model")
def _() -> bool:
    calls = [one(prefill_calls, f"model.language_model.layers.{i}") for prefill_calls in (prefill(),) for i in range(3)]
    first = calls[0].kwargs
    same = all(call.kwargs["position_embeddings"] is first["position_embeddings"] for call in calls)
    return same and all(call.kwargs["attention_mask"] is first["attention_mask"] for call in calls)


@fact("transformers: the rotary pair depends on positions alone, so that gathered columns keep their angles")
def _() -> bool:
    rotary = llava().model.language_model.rotary_emb
    x, positions = torch.randn(1, 6, models.LM_WIDTH), torch.arange(6)[None]
    left = torch.tensor([0, 3, 5])
    return all(
        torch.equal(all_[:, left], few)
        for all_, few in zip(rotary(x, positions), rotary(x[:, left], positions[:, left]))
    )


@fact("transformers: without a mask and a cache a jump in position_ids reads as a packed sequence")
def _() -> bool:
    model = llava().model.language_model
    x, gap = torch.randn(1, 6, models.LM_WIDTH), torch.tensor([[0, 1, 2, 9, 10, 11]])
    with torch.no_grad():
        packed = model(inputs_embeds=x, position_ids=gap, use_cache=False).last_hidden_state
        alone = model(inputs_embeds=x[:, 3:], position_ids=gap[:, 3:], use_cache=False).last_hidden_state
        ones = torch.ones(1, 6, dtype=torch.int64)
        whole = model(inputs_embeds=x, position_ids=gap, attention_mask=ones, use_cache=False).last_hidden_state
    return close(packed[:, 3:], alone) and not close(packed, whole)


@fact("transformers: layers of a DynamicCache grow by themselves, and get_seq_length() is the first one's")
def _() -> bool:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, length in enumerate((5, 3)):
        cache.update(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
    return cache.get_seq_length() == 5 and cache.get_seq_length(1) == 3


@fact("transformers: create_causal_mask sizes a mask by the cache of the layer that layer_idx names")
def _() -> bool:
    from transformers import DynamicCache
    from transformers.masking_utils import create_causal_mask

    cache = DynamicCache()
    for layer, length in enumerate((5, 3)):
        cache.update(torch.ones(1, 2, length, 4), torch.ones(1, 2, length, 4), layer)
    valid = torch.ones(1, 5, dtype=torch.int64)
    valid[:, 0] = 0
    mask = create_causal_mask(
        config=llava().config.text_config,
        inputs_embeds=torch.ones(1, 2, models.LM_WIDTH),
        attention_mask=valid,
        layer_idx=1,
        **{hosts_of.cache_name(create_causal_mask): cache},
    )
    return mask.shape[-2:] == (2, 5)


@fact("transformers: generate() counts positions by the mask, from zero at the first real token of each row")
def _() -> bool:
    batch = models.Batch.of("^3I5", "2I2")
    calls, _ = calls_of(
        llava(), lambda: llava().generate(**batch.inputs(), max_new_tokens=2, do_sample=False, use_cache=True)
    )
    given = [call.kwargs["position_ids"] for call in calls if call.path == "model.language_model"]
    length = len(batch.rows[1])
    return given[0][1, -length:].tolist() == list(range(length)) and given[1][1].tolist() == [length]


@fact("transformers: a gap in position_ids stays a gap: later steps count on from the position before")
def _() -> bool:
    model, ids = llava(), models.prompt("^7")[None]
    calls, _ = calls_of(model, lambda: model.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    given = [call.kwargs["position_ids"].tolist() for call in calls if call.path == "model.language_model"]
    return given == [[list(range(8))], [[8]], [[9]]]


@fact("transformers: with labels the loss is of logits at their original columns")
def _() -> bool:
    given = models.Batch.of("^3I5").inputs()
    with torch.no_grad():
        out = llava()(**given, labels=given["input_ids"])
    wanted = F.cross_entropy(out.logits[0, :-1], given["input_ids"][0, 1:])
    return close(out.loss, wanted)


# ---------------------------------------------------------------------- tests
LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "HF": "transformers", "LLaVA": "transformers"}


@pytest.mark.parametrize(("sentence", "name", "holds"), FACTS)
def test_a_fact_that_hooks_lean_on(sentence: str, name: str, holds: Callable[..., bool]) -> None:
    word = (name or sentence.partition(":")[0]).split()[0]
    library = sys.modules.get(LIBRARIES.get(word, word), torch)
    about = f" of {name}" if name else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = holds(host(name)) if name else holds()
    assert found, f"no longer true{about} in {library.__name__} {library.__version__}: {sentence}"


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
