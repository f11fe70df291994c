"""What a model says when some of its tokens are gone, worked out with plain torch hooks on the bare model.

It is what a cut is held against, so nothing of vlmtok's core or hooks is used, and nothing of a family is known: an
axis of a tensor is the axis of tokens where it is as long as the row. Rows are alone and without padding, so no mask
has to tell rows apart, and the host builds its own masks for the row that is left wherever it builds any.

A cut between layers is the host's own run over the shorter row, into which the hidden states of the whole row are put
where the cut is: rotary tables, masks, deepstack features and inputs of each layer then fit the shorter row by
themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Axes = Mapping[int, Tensor]
"""By the length of an axis, what stays of it: int64 `[K]`."""


def along(value: Any, axes: Axes) -> Any:
    """A value with what stays of its token axes; containers are followed, what is no tensor stays as it is."""
    if isinstance(value, Tensor):
        for axis, length in enumerate(value.shape):
            if length in axes:
                value = value.index_select(axis, axes[length].to(value.device))
        return value
    if isinstance(value, dict):
        return type(value)({name: along(item, axes) for name, item in value.items()})
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(along(item, axes) for item in value)
    return value


def spread(value: Tensor, keep: Tensor, length: int) -> Tensor:
    """Rows `[B, K, C]` back at their places among `length`; zeros elsewhere."""
    room = value.new_zeros(value.shape[0], length, *value.shape[2:])
    room[:, keep.to(value.device)] = value
    return room


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """The hidden states `[B, L, C]` among the arguments of a layer, and where they are.

    Raises:
        LookupError: there are none.
    """
    everything: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in everything:
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return place, value
    raise LookupError(f"no hidden states among the arguments of a layer: {[str(place) for place, _ in everything]}")


def put(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str, value: Any) -> tuple[tuple[Any, ...], Any]:
    """Arguments with another value at a place."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, place: value}


def change(output: Any, old: int, new: Any) -> Any:
    """An output whose token axis is changed: of a tensor, the first entry of a tuple, or fields `[B, L, C]`.

    Args:
        output: of a module.
        old: L.
        new: from `[B, L, C]`, what takes its place.
    """
    if isinstance(output, Tensor):
        return new(output)
    if isinstance(output, tuple):
        return (new(output[0]), *output[1:])
    for name, value in list(output.items()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == old:
            output[name] = new(value)
    return output


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Context that ends with the hooks' removal."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------- towers
def blocks_of(module: nn.Module, depth: int) -> list[nn.Module]:
    """The blocks of a tower: the first run of so many modules of one class.

    Raises:
        LookupError: there is none.
    """
    for part in module.modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) == depth:
            blocks = list(part)
            if len({type(block) for block in blocks}) == 1:
                return blocks
    raise LookupError(f"{type(module).__name__} has no list of {depth} blocks")


@contextmanager
def cut_tower(
    blocks: Sequence[nn.Module], layer: int, choose: Callable[[int], Tensor], prefix: int = 0, last: int | None = None
) -> Iterator[None]:
    """A tower with some of its tokens gone behind a block.

    An MLP works token by token, so tokens that leave between attention and MLP leave the same rows as tokens that leave
    behind it.

    Hosts note hidden states by hooks of their own, which must see what these leave: these come first.

    Args:
        blocks: of the tower.
        layer: the block.
        choose: from the number of tokens behind `prefix`, those that stay, int64 `[K]`.
        prefix: tokens in front; they stay.
        last: the block behind which rows get their length back, or None.

    Raises:
        LookupError: no block was called inside.
    """
    axes: dict[int, Tensor] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        length = hidden_of(args, kwargs)[1].shape[1]
        keep = choose(length - prefix)
        axes.clear()
        axes.update({length - prefix: keep, length: torch.cat([torch.arange(prefix), prefix + keep])})
        return change(output, length, lambda x: along(x, {length: axes[length]}))

    def follow(module: nn.Module, args: Any, kwargs: Any) -> Any:
        place, hidden = hidden_of(args, kwargs)
        return put(along(tuple(args), axes), along(dict(kwargs), axes), place, hidden)

    def come_back(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        length = max(axes)
        return change(output, len(axes[length]), lambda x: spread(x, axes[length], length))

    handles = [blocks[layer].register_forward_hook(leave, prepend=True, with_kwargs=True)]
    handles += [
        block.register_forward_pre_hook(follow, prepend=True, with_kwargs=True) for block in blocks[layer + 1 :]
    ]
    if last is not None:
        handles.append(blocks[last].register_forward_hook(come_back, prepend=True, with_kwargs=True))
    with hooked(*handles):
        yield
    if not axes:
        raise LookupError(
            f"no hook of {type(blocks[layer]).__name__} ran: the host does not call its blocks as modules"
        )


# ---------------------------------------------------------------------- language models
@dataclass(frozen=True)
class Stay:
    """What stays of a row in the language model.

    Attributes:
        enter: int64 `[K]`, columns that enter the text model, ascending.
        layer: the layer in front of which more leave, or None.
        rest: int64 `[K']`, those of `enter` (places in it) that stay in front of that layer.
    """

    enter: Tensor
    layer: int | None = None
    rest: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """Columns that reach the end, int64."""
        return self.enter if self.rest is None else self.enter[self.rest]


class TextModel:
    """The text model of a bare vision-language model, run on rows that lack some of their tokens.

    Args:
        model: the whole model.
        lm: its text model, with `layers`.
        visual: int64, columns of visual tokens in the row.
        length: tokens of the row.
    """

    def __init__(self, model: Any, lm: Any, visual: Tensor, length: int) -> None:
        sizes = {size for parameter in lm.parameters() for size in parameter.shape}
        if length in sizes:
            raise LookupError(
                f"the prompt has {length} tokens, as many as a weight has rows: axes cannot be told apart"
            )
        self.model, self.lm = model, lm
        self.visual, self.length = visual, length
        self.signature = inspect.signature(type(lm).forward)

    def logits(self, inputs: Mapping[str, Any], stay: Stay) -> Tensor:
        """Logits of the row, `[1, L, V]`; those of columns that left mean nothing.

        Args:
            inputs: of the whole model, one row without padding.
            stay: what stays.

        Raises:
            LookupError: the host does not call its layers as modules.
        """
        if stay.layer is None or stay.rest is None:
            return self._run(inputs, stay.enter, None, None)
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(hidden_of(args, kwargs)[1])

        layer = self.lm.layers[stay.layer]
        with hooked(layer.register_forward_pre_hook(catch, with_kwargs=True)):
            self._run(inputs, stay.enter, None, None)
        if not caught:
            raise LookupError(f"no hook of {type(layer).__name__} ran: the host does not call its layers as modules")
        return self._run(inputs, stay.columns, layer, caught[0][:, stay.rest.to(caught[0].device)])

    def _run(self, inputs: Mapping[str, Any], keep: Tensor, layer: Any, hidden: Tensor | None) -> Tensor:
        """A run with the columns `keep`; in front of `layer` these hidden states take the place of its own."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return (), self._shorter(args, kwargs, keep)

        def swap(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return put(args, kwargs, hidden_of(args, kwargs)[0], hidden)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return change(output, len(keep), lambda x: spread(x, keep, self.length))

        handles = [
            self.lm.register_forward_pre_hook(enter, with_kwargs=True),
            self.lm.register_forward_hook(leave, with_kwargs=True),
        ]
        if layer is not None:
            handles.append(layer.register_forward_pre_hook(swap, with_kwargs=True))
        with hooked(*handles), torch.no_grad():
            logits: Tensor = self.model(**inputs).logits
        return logits

    def _shorter(self, args: Any, kwargs: Any, keep: Tensor) -> dict[str, Any]:
        """Arguments of the text model for the columns that are left, by name."""
        given = dict(self.signature.bind(self.lm, *args, **kwargs).arguments)
        given.pop(next(iter(self.signature.parameters)))  # self
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        among = torch.isin(self.visual, keep).nonzero()[:, 0]
        made: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(value, (list, tuple)) and value and all(map(self._of_visual, value)):
                made[name] = type(value)(along(item, {len(self.visual): among}) for item in value)
            else:
                made[name] = along(value, {self.length: keep})
            if isinstance(value, dict):
                made[name] = self._windowed(value, made[name], keep)
        place = next((name for name in self.signature.parameters if "position" in name), None)
        if place is None:
            raise LookupError(f"{type(self.lm).__name__}.forward takes no positions")
        if made.get(place) is None:  # the host would count those that are left
            made[place] = keep[None].to(next(self.lm.parameters()).device)
        return made

    def _of_visual(self, value: Any) -> bool:
        """Whether it has a row for each visual token and none for text."""
        return isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == len(self.visual) != self.length

    def _windowed(self, before: dict[str, Any], after: dict[str, Any], keep: Tensor) -> dict[str, Any]:
        """Masks by layer type: a window counts the tokens that are left, not those that were there.

        What a full layer lets through and a sliding one did not, it lets through once it is near enough.
        """
        window = getattr(self.lm.config, "sliding_window", None)
        sliding = [name for name, mask in before.items() if "sliding" in str(name) and isinstance(mask, Tensor)]
        full = [name for name in before if "full" in str(name)]
        if window is None or not sliding or not full:
            return after
        place = torch.arange(len(keep))
        near = (place[:, None] - place[None] < window).to(after[sliding[0]].device)
        wide = after[full[0]]
        seen = (place[:, None] >= place[None]).to(near.device) if wide is None else _open(wide)
        for name in sliding:
            mask = after[name]
            open_ = _open(mask) | (seen & near)
            closed = False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
            after[name] = torch.where(open_, True if mask.dtype is torch.bool else 0.0, closed).to(mask.dtype)
        return after


def _open(mask: Tensor) -> Tensor:
    """Which keys a query sees, bool."""
    return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
