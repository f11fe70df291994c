"""What a tower is called with, looked at before anything is changed: rows, masks, maps, a bias on the keys."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Entry
from ...errors import PassError, UnsupportedModel
from .. import forms, hosts
from ..base import TowerSpec
from ..hosts import Arguments


def check_key_bias(entries: Iterable[Entry], spec: TowerSpec) -> None:
    """Refuses proportional attention where the attention takes no bias on the keys.

    Args:
        entries: methods of the tower.
        spec: the tower as data.

    Raises:
        UnsupportedModel: the block has no such argument, or its attention is of a form that is not known.
    """
    asking = [type(entry.method).__name__ for entry in entries if entry.method.proportional]
    why = "it takes no bias on the keys" if not spec.block.takes_bias else forms.strange(spec)
    if asking and why:
        raise UnsupportedModel(
            f"{asking[0]} wants proportional attention, but with the attention of this tower that is not possible: "
            f"{why}; switch it off in the method (prop_attn=False)"
        )


def check_graph(flexible: bool) -> None:
    """Refuses to be traced around flex attention: Dynamo loses what hooks note of a layer behind a score_mod.

    Args:
        flexible: whether the tower's attention is flex attention.

    Raises:
        PassError: it is, and hooks are compiled.
    """
    if flexible and torch.compiler.is_compiling():
        raise PassError(
            "torch.compile cannot take a compressed tower whose attention is flex_attention into its graph; call the "
            "model as it is (transformers compiles its flex attention by itself), or load it with "
            "attn_implementation='sdpa' and compile"
        )


def check_input(module: nn.Module, x: Any, width: int, packed: bool = False) -> None:
    """What block 0 gets must be a row of tokens, or the hooks stand where this version does something else.

    Args:
        module: block 0.
        x: what it gets.
        width: C.
        packed: whether it may also be one row of all pictures, `[L, C]`.

    Raises:
        PassError: it is a symbol, or a picture out of a batch that nobody sees whole.
        HostChanged: it is not `[B, L, C]`.
    """
    if not torch.compiler.is_compiling():
        _refuse_symbols(x)
    if not isinstance(x, Tensor) or x.dim() not in ((2, 3) if packed else (3,)) or x.shape[-1] != width:
        what = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise hosts.changed(module, f"its hidden states are {what}, where [B, L, {width}] is expected")


def _refuse_symbols(x: Any) -> None:
    """Refuses what stands for tokens in transforms that hooks cannot follow.

    Raises:
        PassError: symbols of torch.fx, or pictures of a batch that torch.func.vmap hides.
    """
    if isinstance(x, torch.fx.Proxy):
        raise PassError(
            "torch.fx.symbolic_trace gives symbols, and what a method keeps depends on the tokens; trace the model "
            "without the compression, or take torch.export, which follows it"
        )
    functorch = torch._C._functorch
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise PassError(
                "torch.func.vmap hides the batch from the hooks, so that what is kept cannot be chosen picture by "
                "picture; call the compressed model with the whole batch"
            )
        x = functorch.get_unwrapped(x)


def visible_keys(
    stage: str, arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any], masked: bool, padded: bool
) -> Tensor | None:
    """Which keys a tower's mask shows.

    Masks are refused but where the host hides padding itself: a tower's rows are whole pictures, and a method would
    take what a mask hides for patches.

    Args:
        stage: of the tower, for messages.
        arguments: of block 0.
        args: of its call.
        kwargs: of its call.
        masked: whether the host makes a mask of its own that hides nothing.
        padded: whether it makes one that hides padding.

    Returns:
        bool `[B, L]`, or None where every token is seen.

    Raises:
        PassError: the blocks get another mask that hides something, or the causal switch.
    """
    mask = dense(arguments.get(hosts.BIAS, args, kwargs))
    if arguments.get(hosts.CAUSAL, args, kwargs):
        raise PassError(f"the {stage} tower was called as a causal one; call the compressed model without that")
    if mask is None or (masked and isinstance(mask, Tensor) and hides_nothing(mask)):
        return None
    visible = _by_key(mask) if padded and isinstance(mask, Tensor) else None
    if visible is not None:
        return visible
    raise PassError(
        f"the {stage} tower was called with an attention mask that hides tokens (patches of padding, or your "
        "own); a compression cannot be combined with it: call the model without a mask, with pictures of one size"
    )


def dense(mask: Any) -> Any:
    """A mask as a host's blocks get it, where it is a BlockMask of flex attention as bool `[B, 1 or H, N, L]`."""
    rule = getattr(mask, "mask_mod", None)
    if rule is None:
        return mask
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, rows, keys = mask.shape
    # What a BlockMask stores is of whole blocks alone; its rule knows each pair.
    return create_mask(rule, batch, heads, rows, keys, device=mask.kv_indices.device)


def _by_key(mask: Tensor) -> Tensor | None:
    """The keys that a mask shows to every row alike, bool `[B, L]`; None where rows see different ones, or none."""
    if mask.dim() == 2:
        shown = mask.bool()
    elif mask.dim() == 4 and mask.shape[1] == 1:
        whole = mask if mask.dtype == torch.bool else mask == 0
        shown = whole[:, 0, 0]
        if not bool((whole == shown[:, None, None]).all()):
            return None
    else:
        return None
    return shown if bool(shown.any(1).all()) else None


def check_padding(module: nn.Module, mask: Any, shown: Tensor) -> None:
    """Rows that are padded must hide just their padding, or signals would be those of other keys.

    Args:
        module: block 0.
        mask: that it gets; one that is no tensor is not looked at.
        shown: bool `[B, L]`, patches of pictures.

    Raises:
        HostChanged: the mask hides others, or none.
    """
    if mask is not None and not isinstance(mask, Tensor):
        return
    if mask is None:
        same = shown.all()
    elif mask.dim() == 2:
        same = (mask.bool() == shown).all()
    else:
        same = ((mask if mask.dtype == torch.bool else mask == 0) == shown[:, None, None]).all()
    if torch.compiler.is_compiling():
        torch._assert_async(same, "an attention mask hides other tokens than padding")
    elif not bool(same):
        raise hosts.changed(
            module,
            f"its mask does not hide the padding of its rows, and only that: pictures have {shown.sum(1).tolist()} "
            f"patches in rows of {shown.shape[1]}",
        )


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask lets every token see every other; compiled code looks when it runs, and stops there."""
    if mask.dtype == torch.bool or mask.dim() == 2:  # flash attention takes one number a token, not what is added
        seen = mask.bool().all()
    else:
        seen = (mask == 0).all()
    if torch.compiler.is_compiling():
        torch._assert_async(seen, "an attention mask hides tokens of a compressed tower")
        return True
    return bool(seen)


def check_maps(collectors: Collection[CodeType], cuts: int) -> None:
    """Refuses the first cut of a call that lays the rows of its blocks out as maps.

    No hook stands where that is done, and shortened rows fill a map of another size without an error where the
    numbers divide: so the callers are asked. Compiled code has none.

    Args:
        collectors: code of the host's methods that can lay out maps.
        cuts: cuts of this pass so far.

    Raises:
        PassError: one of them collects maps.
    """
    if not collectors or cuts or torch.compiler.is_compiling():
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in collectors:
            asked = next((frame.f_locals[name] for name in hosts.MAPS.names if name in frame.f_locals), None)
            if asked != "NLC":
                raise PassError(
                    f"{frame.f_code.co_name} was asked for maps ({asked}), and the rows of a compressed model are "
                    f"no grid any more; ask for rows ({hosts.MAPS.names[0]}='NLC'), and bring them back with "
                    "Compression.trace()[i].restore(rows, layer)"
                )
            return
        frame = frame.f_back
