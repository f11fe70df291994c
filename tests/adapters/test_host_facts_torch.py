"""What the hooks lean on in torch, one sentence a fact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.facts import Facts, assert_holds, close
from torch import nn
from torch.utils.checkpoint import checkpoint

fact = Facts()


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


@pytest.mark.parametrize(("sentence", "_", "holds"), fact.rows)
def test_a_fact_that_hooks_lean_on(sentence: str, _: str, holds: Callable[..., bool]) -> None:
    assert_holds(sentence, holds)
