"""The objects that hosts hand around: caches, outputs of modules, encoded pictures, known by their type and form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UnsupportedModel
from .hosts import CACHE, LAST_HIDDEN, POOLED, RECORDED, Arguments, Host, changed, version_of


# ---------------------------------------------------------------------- caches
def cache_class() -> type:
    """The class of every key-value cache of transformers.

    Raises:
        UnsupportedModel: this version has none of that name.
    """
    import transformers

    found = getattr(transformers, "Cache", None)
    if not isinstance(found, type):
        raise UnsupportedModel(
            f"transformers {version_of('transformers')} has no class Cache, by which a cache is told from other "
            "arguments; use a version of constraints.txt, or a newer vlmtok"
        )
    return found


def cache_in(module: Host, arguments: Arguments, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The cache of a call, known by its type whatever it is called, or None.

    Args:
        module: that is called.
        arguments: of it, with `CACHE`.
        args: of the call.
        kwargs: of the call.

    Raises:
        HostChanged: two caches, or one under the cache's name that is none.
    """
    kind = cache_class()
    found: Any = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, kind) and value is not found:
            if found is not None:
                raise changed(module, f"a call brings two caches, {type(found).__name__} and {type(value).__name__}")
            found = value
    if found is None:
        given = arguments.get(CACHE, args, kwargs)
        if given is not None:
            raise changed(module, f"the {CACHE} of a call is a {type(given).__name__}, which is no transformers.Cache")
    return found


def length_of(module: Host, cache: Any, layer: int | None = None) -> int:
    """Columns that a cache holds.

    Args:
        module: whose call brought it.
        cache: or None.
        layer: by which layer; None takes the one that hosts go by.

    Raises:
        HostChanged: it does not say.
    """
    if cache is None:
        return 0
    count = getattr(cache, "get_seq_length", None)
    if count is None:
        raise changed(module, f"its cache, a {type(cache).__name__}, has no get_seq_length() any more")
    return int(count() if layer is None else count(layer))


def records_past(cache: Any) -> bool:
    """Whether a cache keeps what it could drop until the host says which drafts are taken back."""
    return any(getattr(layer, "record_past", False) for layer in getattr(cache, "layers", ()))


def span_of(module: Host, cache: Any, count: int, layer: int) -> tuple[int, int]:
    """Keys that a layer's mask indexes, and the column of the first of them.

    Args:
        module: whose mask it is.
        cache: of the call.
        count: new columns.
        layer: whose cache.

    Raises:
        HostChanged: it does not say.
    """
    sizes = getattr(cache, "get_mask_sizes", None)
    if sizes is None:
        raise changed(module, f"its cache, a {type(cache).__name__}, has no get_mask_sizes() any more")
    length, offset = sizes(count, layer)
    return int(length), int(offset)


def keys_in(module: Host, cache: Any, layer: int) -> Tensor:
    """Keys that a layer has cached, `[B, H, L, d]`.

    Args:
        module: the layer.
        cache: of the call.
        layer: its number.

    Raises:
        HostChanged: they are not where they are expected.
    """
    try:
        keys = cache.layers[layer].keys
    except (AttributeError, IndexError, TypeError) as problem:
        raise changed(module, f"its cache, a {type(cache).__name__}, has no layers[{layer}].keys ({problem})") from None
    if not isinstance(keys, Tensor) or keys.dim() != 4:
        raise changed(module, f"its cached keys are {_described(keys)} and no [B, H, L, d]")
    return keys


def entries_in(module: Host, cache: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer has cached, each `[B, H, L, d]`.

    Args:
        module: the layer.
        cache: of the call.
        layer: its number.

    Raises:
        HostChanged: they are not where they are expected.
    """
    keys = keys_in(module, cache, layer)
    values = getattr(cache.layers[layer], "values", None)
    if not isinstance(values, Tensor) or values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
        raise changed(module, f"its cached values are {_described(values)} and no [B, H, L, d] like its keys")
    return keys, values


# ---------------------------------------------------------------------- outputs
def hidden_of(module: Host, output: Any, batch: int | None = None, packed: bool = False) -> Tensor:
    """The hidden states `[B, L, C]` in what a layer, an attention or a model gives back.

    Args:
        module: that gave it.
        output: a tensor, a tuple or list with hidden states first, or an output object.
        batch: B, where it is known.
        packed: whether they may also be one row of all pictures, `[L, C]`.

    Raises:
        HostChanged: none is found.
    """
    place = _place(output)
    try:
        found = output if place is None else output[place]
    except (IndexError, KeyError):
        found = None
    if not isinstance(found, Tensor) or found.dim() < 3 - packed or (batch is not None and found.shape[0] != batch):
        raise changed(module, f"no {LAST_HIDDEN.what} [B, L, C] are found in its output {_described(output)}")
    return found


def branch_of(module: Host, output: Any, x: Tensor) -> Tensor:
    """What an attention, a mixer or an MLP made of its input, one token for each; mixtures may give all rows as one.

    Args:
        module: that gave it.
        output: a tensor, or a tuple with it first.
        x: `[B, L, C]`, the input.

    Raises:
        HostChanged: none is found.
    """
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor) or found.numel() != x.numel() or found.shape[-1] != x.shape[-1]:
        raise changed(module, f"no output of shape {list(x.shape)} is found in what it gave, {_described(output)}")
    return found.reshape(x.shape)


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of `hidden_of` with other hidden states; output objects are changed in place, as hosts expect."""
    place = _place(output)
    if place is None:
        return hidden
    if isinstance(output, tuple):
        items = (*output[:place], hidden, *output[place + 1 :])
        return type(output)(*items) if hasattr(output, "_fields") else items
    output[place] = hidden
    return output


def _place(output: Any) -> Any:
    """Index or key of the hidden states, or None where the output is the tensor."""
    if isinstance(output, (tuple, list)):
        return next((i for i, value in enumerate(output) if isinstance(value, Tensor) and value.dim() >= 3), 0)
    if isinstance(output, Mapping):
        # A field of several layers' states has the old name of the last one's, so it counts as a tensor only.
        named = (name for name in LAST_HIDDEN.names if isinstance(output.get(name), Tensor))
        first = (name for name, value in output.items() if isinstance(value, Tensor) and value.dim() == 3)
        return next(named, next(first, LAST_HIDDEN.names[0]))
    return None


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {', '.join(type(value).__name__ for value in output)}"
    return type(output).__name__


def recorded_states(output: Any) -> tuple[Tensor | None, ...] | None:
    """The hidden states of every layer that a host recorded in its output, or None."""
    if not isinstance(output, Mapping):
        return None
    for name in RECORDED.names:
        found = output.get(name)
        if isinstance(found, tuple) and found:
            return found
    return None


def set_recorded_states(output: Any, states: tuple[Tensor | None, ...]) -> None:
    """Puts others in the place of what `recorded_states` gave."""
    name = next(name for name in RECORDED.names if isinstance(output.get(name), tuple))
    output[name] = states


def checkpoints_whole_calls(layer: Any) -> bool:
    """Whether gradient checkpointing of a layer runs its whole call again, hooks included.

    transformers before 5.23 wraps ``__call__``; hooks then see rows that were cut already. Later it wraps ``forward``.
    """
    own = [kind for kind in type(layer).__mro__ if kind.__module__.startswith("transformers.")]
    return bool(getattr(layer, "gradient_checkpointing", False)) and any("__call__" in kind.__dict__ for kind in own)


def features_in(module: Host, encoded: Any, late: bool) -> Any:
    """The features of each picture among what an encoder gave, or None where the projector runs later.

    Args:
        module: the inner model.
        encoded: an output object of `get_image_features`, or what stands for it.
        late: whether the family's projector may run later, so that there need be none.

    Raises:
        HostChanged: they are not where they are expected.
    """
    if late:
        return encoded.get(POOLED.names[0]) if isinstance(encoded, Mapping) else None
    if isinstance(encoded, (list, tuple, Tensor)):
        return encoded
    if not isinstance(encoded, Mapping):
        raise changed(module, f"encoded pictures come as {type(encoded).__name__}")
    name = next((name for name in POOLED.names if encoded.get(name) is not None), None)
    if name is None:
        raise changed(module, f"encoded pictures have no {POOLED}; they are {_described(encoded)}")
    return encoded[name]
