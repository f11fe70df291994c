"""Which computation a module of the host runs, by the class whose forward it is: rows are written for known forms.

Wrapping makes subclasses that run their parent's forward (FSDP2, parametrizations, a mixin of one's own): these count
as the parent. A subclass with a forward of its own is another form, whatever it is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import UnsupportedModel
from .base import TowerSpec, child
from .hosts import Host, library_of

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes under which wrappers that are modules of their own keep the module."""
_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flex_attention"})
"""Attention functions of transformers that are softmax(scale q k + bias) v; flash attention is told by its name."""
BIASED = frozenset({"eager", "sdpa"})
"""Of these, the ones that take a bias `[B, 1, 1, L]` in place of the mask."""
FLEX = "flex_attention"
"""The one that takes a bias beside its mask, and adds it in its score_mod (see `takes_scores`)."""
TABLE = "ALL_ATTENTION_FUNCTIONS"
"""The host's attention functions by name, beside the class of an attention."""
SCORES = "position_bias"
"""The argument of the host's flex attention for what its score_mod adds, `[B, H, N, L]`."""


def inner(module: Host) -> Any:
    """The module below wrappers."""
    while True:
        name = next((name for name in _WRAPPERS if name in getattr(module, "_modules", ())), None)
        if name is None:
            return module
        module = getattr(module, name)


def called(module: Host, name: str) -> bool:
    """Whether a module is of a class of that name, or of one made of it by wrapping."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


def form(module: Host) -> str:
    """The class whose forward a module runs, as ``module:name``; empty where its forward is no class's."""
    return maker(inner(module), "forward")


def maker(module: Host, method: str) -> str:
    """The class that wrote a method of a module, as ``module:name``; empty where no class did.

    Args:
        module: of the host.
        method: its name.
    """
    if method in vars(module) and not hasattr(module, "_hf_hook"):  # accelerate only moves tensors around it
        return ""
    # Asked of the function, since hosts put a wrapped copy into every subclass, and others put theirs into a class.
    made = inspect.unwrap(getattr(type(module), method, type))
    name, _, last = str(getattr(made, "__qualname__", "")).rpartition(".")
    return f"{made.__module__}:{name}" if name and last == method else ""


def known(module: Host, forms: Iterable[str]) -> bool:
    """Whether a module runs one of these forms.

    Args:
        module: of the host.
        forms: ``module:name``, where the module may be the beginning of its path.
    """
    where, _, name = form(module).partition(":")
    pairs = (other.partition(":")[::2] for other in forms)
    return any(name == other and (where == path or where.startswith(f"{path}.")) for path, other in pairs)


def described(module: Host) -> str:
    """What a module runs, for messages."""
    module = inner(module)
    name = type(module).__name__
    if not form(module):
        return f"{name} of {library_of(module)} with a forward that was put in its place"
    made = form(module).rpartition(":")[2].rpartition(".")[2].replace("<locals>", "a function of its own")
    return f"{name} of {library_of(module)}" + (f" (which runs {made})" if made != name else "")


def strange(spec: TowerSpec) -> str:
    """Why signals of a tower's attention cannot be derived; empty where they can.

    Args:
        spec: the tower as data.
    """
    if spec.packed is not None and spec.packed.lacks:
        return spec.packed.lacks
    for block in spec.blocks:
        attn = child(block, spec.block.attn)
        if not known(attn, spec.block.forms):
            return (
                f"its attention is {described(attn)}, which is not known to be softmax(q k) v; known: "
                f"{', '.join(other.rpartition(':')[2] for other in spec.block.forms)}"
            )
        lacks = missing(attn, spec.block.functions)
        if lacks:
            return lacks
        name = implementation(attn)
        if name and name not in _IMPLEMENTATIONS and "flash" not in name:
            return f"its attention implementation {name!r} is not known to be softmax(q k) v"
    return ""


def implementation(attn: Host) -> str:
    """Name of the attention function that a module of transformers calls; empty where it calls its own."""
    return implementation_of(getattr(attn, "config", None))


def implementation_of(config: Host) -> str:
    """The same by the configuration of the module."""
    return str(getattr(shared(config), "_attn_implementation", None) or "")


def function_of(attn: Host) -> str:
    """Name of the function that an attention of a tower calls: by its configuration, or as timm and torch have it."""
    attn = inner(attn)
    if name := implementation(attn):
        return name
    fused = getattr(attn, "fused_attn", None)  # of timm
    if fused is None:
        return "sdpa" if isinstance(attn, nn.MultiheadAttention) else ""
    return "sdpa" if fused else "eager"


def shared(config: Host) -> Any:
    """The configuration that a model shares, where `towers.sized_attention` put others in its place on a module."""
    while hasattr(config, "vlmtok_shadowed"):
        config = config.vlmtok_shadowed
    return config


def unbiased(attn: Host) -> str:
    """The attention function that takes no bias on the keys; empty where it takes one."""
    name = implementation(attn)
    return "" if not name or name in BIASED or (name == FLEX and takes_scores(attn)) else name


def takes_scores(attn: Host) -> bool:
    """Whether the flex attention that a module of transformers would call has an argument for a bias on the logits."""
    table = found_beside(attn, TABLE)
    function = None if table is None else table.get(FLEX)
    return function is not None and SCORES in inspect.signature(function).parameters


def beside(module: Host, name: str) -> Any:
    """What a host defines under a name beside the class of a module.

    Args:
        module: of the host; its class may have been made of the host's by wrapping.
        name: of a function.

    Raises:
        UnsupportedModel: this version of the host defines none.
    """
    found = found_beside(module, name)
    if found is not None:
        return found
    raise UnsupportedModel(missing(module, [name]))


def missing(module: Host, names: Iterable[str]) -> str:
    """What a host does not define beside the class of a module, in words; empty where it defines all."""
    name = next((name for name in names if found_beside(module, name) is None), None)
    return "" if name is None else f"{library_of(module)} has no {name} beside {type(inner(module)).__name__}"


def found_beside(module: Host, name: str) -> Any:
    """The same as `beside`, or None where this version of the host defines none."""
    found = (getattr(sys.modules.get(kind.__module__), name, None) for kind in type(inner(module)).__mro__)
    return next((thing for thing in found if thing is not None), None)


def known_blocks(tower: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The blocks of a tower of transformers, of which a row was written for one class.

    Args:
        tower: that holds them.
        name: of the class.

    Raises:
        UnsupportedModel: there are none, or they run another forward than the class of that name.
    """
    blocks = blocks_of(tower, name)
    if not blocks:
        raise UnsupportedModel(f"{type(tower).__name__} has no {name}: this version of transformers is not known")
    for block in blocks:
        if not known(block, (f"transformers.models:{name}",)):
            raise UnsupportedModel(f"{type(tower).__name__} has blocks that are {described(block)} and not {name}")
    return blocks


def blocks_of(tower: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """Blocks of a tower by the name of their class, in order."""
    return tuple(module for module in tower.modules() if called(module, name))
