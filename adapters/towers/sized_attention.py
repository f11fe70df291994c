"""Proportional attention where the host's attention takes no bias: log(size) goes in where it calls its function.

An attention of transformers looks its function up by ``self.config._attn_implementation`` at every call. So an
attention module gets, as an attribute of its own, a twin of its configuration that differs in that name alone, and the
name is that of a function here, which adds what a driver says to the mask and calls what the host would have called.
Flex attention gets it beside its mask, a BlockMask, and adds it in its score_mod.

The configuration that the model shares is not touched, and the module has it again when the attachment ends. A copy of
the model, made by `copy`, `pickle` or `torch.save`, gets the shared configuration from the start. The name stays in the
host's table of functions; nothing looks there unless a twin sends it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import Hook
from ...errors import PassError, UnsupportedModel
from .. import forms, hosts
from ..hosts import Host

BiasOf = Callable[[nn.Module, Tensor, Tensor], Tensor | None]
"""What one call of the function adds to the logits: from the attention, its q `[B, H, N, d]` and its k `[B, H, n, d]`,
a float `[n]`, `[B, n]` or `[B, 1 or H, 1 or N, n]`; None where nothing is added."""

_NAME = "vlmtok_sized"
"""Of our function; no host takes it for a flash kernel, whose names they know by the word."""
_TABLE, _EAGER = forms.TABLE, "eager_attention_forward"
_CALLABLE = frozenset({"", *forms.BIASED})
"""Functions that may be called with the bias; an attention without a name calls the eager one."""


class Twin:
    """What a twin of a configuration adds to the configuration's own class.

    Attributes:
        vlmtok_shadowed: the configuration in whose place it stands: the shared one, or a twin of another attachment.
        bias: the driver's answer, behind a hook that is quiet while the attachment is.
        eager: the host's own function.
        table: the host's functions by name.
        scores: whether its flex attention takes a bias.
    """

    __slots__ = ("bias", "eager", "scores", "table", "vlmtok_shadowed")

    vlmtok_shadowed: Host
    bias: Hook
    eager: Callable[..., Any]
    table: Host
    scores: bool

    def __init_subclass__(cls) -> None:
        """Keeps the host from making the class of a twin into a configuration with fields of its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain configuration, for hosts that make another one of the class of theirs."""
        return cls.__bases__[1](*args, **kwargs)

    @property
    def _attn_implementation(self) -> str:
        return _NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.vlmtok_shadowed._attn_implementation = value  # who sets it means the one that is shared

    def __copy__(self) -> Any:
        return copy.copy(forms.shared(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (forms.shared(self),)  # also `deepcopy`'s way, whose memo knows the shared one


def _itself(config: Any) -> Any:
    return config


@lru_cache(maxsize=64)
def _twin_class(kind: type) -> type:
    """The class of twins of a class of configurations; it has the same name, for messages."""
    return type(kind.__name__, (Twin, kind), {"__slots__": (), "__module__": kind.__module__})


class SizedAttention:
    """Puts biases on the keys of attention modules whose forward has no argument for one.

    Args:
        attachment: whose life the change has: it is quiet while that is paused, and undone when that ends.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def install(self, attn: Host, bias_of: BiasOf) -> None:
        """Has one attention ask for a bias at each call of its function, chunk by chunk where the host chunks.

        Args:
            attn: the attention.
            bias_of: asked in the thread of the call, when autograd runs a block again, too.

        Raises:
            UnsupportedModel: the attention looks no function up by its configuration, or one that takes no bias on the
                keys (flash, or the user's own).
        """
        attn = forms.inner(attn)
        check(attn)
        shadowed = attn.config
        kind: type = type(forms.shared(shadowed))  # the host's own, also where another twin stands there
        twin: Any = object.__new__(_twin_class(kind))
        twin.__dict__.update(vars(shadowed))
        twin.vlmtok_shadowed = shadowed
        twin.bias = Hook(self.attachment, lambda layer, module, q, k: bias_of(module, q, k), where=attn)
        twin.eager = forms.beside(attn, _EAGER)
        twin.table = forms.beside(attn, _TABLE)
        twin.scores = forms.takes_scores(attn)
        twin.table.register(_NAME, sized_attention)
        self.attachment.owns(_Placed(attn, twin))
        attn.config = twin


def check(attn: Host) -> None:
    """Refuses an attention that cannot be given a bias in this way.

    Args:
        attn: the attention.

    Raises:
        UnsupportedModel: it looks no function up by its configuration, or one that takes no bias on the keys.
    """
    attn = forms.inner(attn)
    if getattr(attn, "config", None) is None:
        raise UnsupportedModel(
            f"{forms.described(attn)} has no configuration that names its attention function, so that no bias on the "
            "keys can be brought in; switch proportional attention off in the method (prop_attn=False)"
        )
    forms.beside(attn, _EAGER)
    forms.beside(attn, _TABLE)
    if forms.unbiased(attn):
        raise UnsupportedModel(_no_bias(attn))


def _no_bias(attn: Host) -> str:
    return (
        f"{forms.implementation(attn)} of {type(attn).__name__} takes no bias on the keys, which proportional "
        "attention needs; load the model with attn_implementation='sdpa' (or 'eager'), or switch proportional "
        "attention off in the method (prop_attn=False)"
    )


class _Placed:
    """One attention with a twin; `remove` gives it back what it had."""

    def __init__(self, attn: nn.Module, twin: Any) -> None:
        self.attn = weakref.ref(attn)
        self.twin = twin

    def remove(self) -> None:
        """Takes the twin out, wherever it stands: a later attachment may have put its own in front of it."""
        attn: Any = self.attn()
        if attn is None:
            return
        above, config = None, attn.config
        while config is not self.twin:
            if not isinstance(config, Twin):
                return  # somebody gave the attention another configuration
            above, config = config, config.vlmtok_shadowed
        if above is None:
            attn.config = self.twin.vlmtok_shadowed
        else:
            above.vlmtok_shadowed = self.twin.vlmtok_shadowed


def sized_attention(
    module: Host, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The function in the host's table: its own one, with what the driver adds to the logits.

    Args:
        module: an attention with a twin for its configuration.
        query: `[B, H, N, d]`.
        key: `[B, H or fewer, n, d]`.
        value: the same.
        attention_mask: of the host: what is added to the logits, or bool, what is seen, or a BlockMask.
        kwargs: of the host, passed on.

    Raises:
        PassError: the model's attention was switched to a function that takes no bias.
        HostChanged: the bias is not one of these keys.
    """
    twin = module.config
    name = forms.implementation(module)
    call = twin.table.get_interface(name or None, twin.eager)
    bias = twin.bias(module, query, key)
    if bias is not None:
        bias = _fitting(module, bias, query, key)
        if name == forms.FLEX and twin.scores:
            # A view: no table of pairs is stored, and the kernel reads one number a key.
            scores = bias.expand(*query.shape[:3], key.shape[-2])
            given = [more for word, more in kwargs.items() if word == forms.SCORES and more is not None]
            kwargs = {**kwargs, forms.SCORES: sum(given, scores)}
        elif name in _CALLABLE:
            attention_mask = _joined(module, bias, attention_mask, name, kwargs)
        else:
            raise PassError(_no_bias(module))
    return call(module, query, key, value, attention_mask=attention_mask, **kwargs)


def check_masks(attn: Host) -> None:
    """Refuses to hand an attention a mask of numbers that it reads otherwise than it did when hooks were placed.

    Args:
        attn: the attention.

    Raises:
        PassError: the model's attention was switched to flex attention.
    """
    if not torch.compiler.is_compiling() and forms.implementation(attn) == forms.FLEX:
        raise PassError(
            f"{type(attn).__name__} was switched to {forms.FLEX} after the compression was attached, which reads masks "
            "otherwise; switch first, then compress"
        )


def _fitting(module: Host, bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A bias as `[B or 1, 1 or H, 1 or N, n]` in the dtype of the queries.

    Raises:
        HostChanged: it is not one of these keys.
    """
    rows, keys = query.shape[0], key.shape[-2]
    if bias.dim() not in (1, 2, 4) or bias.shape[-1] != keys or (bias.dim() > 1 and bias.shape[0] not in (1, rows)):
        raise hosts.changed(
            module, f"it attends to {keys} keys of {rows} rows where a bias {list(bias.shape)} was made for them"
        )
    bias = bias.to(query.dtype)
    return bias if bias.dim() == 4 else bias.reshape(-1, 1, 1, keys)


def _joined(module: Host, bias: Tensor, mask: Tensor | None, name: str, kwargs: dict[str, Any]) -> Tensor:
    """The host's mask and a bias as one mask that is added to the logits.

    Raises:
        HostChanged: the host means a causal mask that is nowhere written.
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return mask + bias
    said = [value for word, value in kwargs.items() if word in hosts.CAUSAL.names and value is not None]
    if name == "sdpa" and any(said or [getattr(module, "is_causal", True)]):
        raise hosts.changed(module, "it is causal without a mask, which a bias on the keys would switch off")
    return bias
