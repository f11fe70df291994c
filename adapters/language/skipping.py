"""Hooks that let modules of decoder layers run without visual tokens, while a prefill with pictures runs.

An MLP, the query projection and the output projection of an attention work on each token by itself: they are given the
other tokens alone, gathered, and zeros are put where they were not asked, so that the residual connection adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.ledger import Skip
from ...core.skipping import MIXER, MLP, OUTPUT, QUERY
from ...core.threads import PerThread
from ...errors import UnsupportedModel
from .. import hosts
from ..account import is_linear
from .attention import attention_form, branches
from .call import Call, DecoderRun
from .layer_account import has_matrices

_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
"""Norms that stand behind a branch in some families; zeros stay zeros in one without a bias."""


@dataclass(frozen=True)
class Others:
    """The rows' tokens that are not visual.

    Attributes:
        index: int64 `[M]`, their places among the `B L` tokens.
        shape: B and L.
        left_out: how many tokens are visual.
    """

    index: Tensor
    shape: tuple[int, int]
    left_out: int

    def gather(self, x: Tensor) -> Tensor:
        """`[B, L, ...]` as `[1, M, ...]`, or `[B L, ...]` as `[M, ...]`; other tensors are given back as they are."""
        if x.dim() > 2 and x.shape[1] == self.shape[1] and x.shape[0] in (1, self.shape[0]):
            rows = x.expand(self.shape[0], *x.shape[1:]).flatten(0, 1)
            return rows.index_select(0, self.index.to(x.device))[None]
        if x.dim() == 2 and x.shape == self.shape:
            return x.flatten().index_select(0, self.index.to(x.device))[None]
        if x.dim() > 1 and x.shape[0] == self.shape[0] * self.shape[1]:
            return x.index_select(0, self.index.to(x.device))
        return x

    def spread(self, y: Tensor) -> Tensor:
        """What was made of them, `[..., C]`, as `[B, L, C]` with zeros elsewhere."""
        made = y.reshape(-1, y.shape[-1])
        full = made.new_zeros(self.shape[0] * self.shape[1], y.shape[-1])
        return full.index_copy(0, self.index.to(y.device), made).view(*self.shape, y.shape[-1])


class Skipper:
    """Leaves the work out that an attachment's methods name.

    Args:
        attachment: takes the hooks; its `skips` say what is left out.
        running: what each thread runs.
        watched: layers of which the change that branches make is read, and which therefore keep their input.
    """

    def __init__(self, attachment: Attachment, running: PerThread[DecoderRun], watched: Collection[int]) -> None:
        self.attachment = attachment
        self.running = running
        self.watched = frozenset(watched)

    def install(self, lm: Any) -> None:
        """Places the hooks on a text model, behind all others.

        Raises:
            UnsupportedModel: a layer is not known to be a mixer and an MLP, each added to what entered it.
        """
        placed = [
            (layer, name, module)
            for layer, names in self.attachment.skips.items()
            for name, module in _modules(layer, lm.layers[layer], names)
        ]
        put = self.attachment.hook
        for layer, name, module in placed:
            if name == MIXER:
                put(module, "post", self._silence, layer)
                continue
            work = _Work(self, name)
            put(module, "pre", work.narrow, layer)
            put(module, "post", work.widen, layer)

    def call(self) -> Call | None:
        """The prefill with pictures that runs in this thread, or None."""
        running = self.running.mine()
        if running.call is None or running.call.rows is None or running.muted or replaying():
            return None
        return running.call

    def others(self, module: nn.Module, call: Call, x: Tensor) -> Others | None:
        """The tokens of a call that are not visual; None where all are such.

        Args:
            module: that is called.
            call: a prefill with pictures.
            x: `[B, L, ...]`, or `[B L, ...]`; layers that run for the last tokens alone have fewer columns.
        """
        rows = call.rows
        assert rows is not None
        columns = x.shape[1] if x.dim() > 2 else x.shape[0] // rows.batch
        if columns > rows.length or (x.dim() > 2 and x.shape[0] != rows.batch):
            raise hosts.changed(
                module, f"it works on {list(x.shape)} where the rows are {rows.batch} of {rows.length} columns"
            )
        known = call.others.get(columns)
        if known is None or known[0] is not rows.label:
            known = call.others[columns] = rows.label, _others(rows, columns)
        return known[1]

    def book(self, call: Call, layer: int, name: str, tokens: int) -> None:
        """Books what one module was spared."""
        if call.run is not None:
            call.run.skips.append(Skip(layer, name, tokens))

    def _silence(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook on what stands in the place of an attention: it adds nothing to visual tokens."""
        call = self.call()
        if call is None:
            return None
        y = _first(output)
        others = self.others(module, call, y)
        if others is None:
            return None
        return _with_first(output, others.spread(others.gather(y)).view(y.shape))


class _Work:
    """One module of one layer that runs without visual tokens.

    Args:
        skipper: whose.
        name: its task, see `vlmtok.core.skipping`.
    """

    def __init__(self, skipper: Skipper, name: str) -> None:
        self.skipper = skipper
        self.name = name

    def narrow(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook: the module is given the other tokens alone."""
        call = self.skipper.call()
        if call is None:
            return None
        x = hosts.first_tensor(module, args, kwargs)
        others = self.skipper.others(module, call, x)
        if others is None:
            return None
        call.narrowed[layer, self.name] = others
        if self.name == MLP and layer in self.skipper.watched:
            call.whole[layer] = x
        self.skipper.book(call, layer, self.name, others.left_out)

        def given(value: Any) -> Any:
            return others.gather(value) if isinstance(value, Tensor) else value

        return tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}

    def widen(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Hook: zeros for visual tokens, of which the residual connection makes what entered."""
        call = self.skipper.call()
        others = None if call is None else call.narrowed.pop((layer, self.name), None)
        if others is None:
            return None
        y = _first(output)
        if y.numel() // y.shape[-1] != len(others.index):
            raise hosts.changed(module, f"it made {list(y.shape)} of {len(others.index)} tokens")
        return _with_first(output, others.spread(y))


def _others(rows: Any, columns: int) -> Others | None:
    """The tokens in the last columns of rows that are not visual; the device is asked only where the host cannot know.

    Args:
        rows: of a prefill.
        columns: how many.
    """
    visual = rows.label[:, rows.length - columns :] >= 0
    if columns == rows.length:
        count = sum(rows.count(picture) for picture in rows.pictures)
    elif columns == 1:  # a visual token that ends its row is held
        count = 0
    else:
        count = int(visual.sum())
    if not count:
        return None
    order = visual.flatten().to(torch.int8).argsort(stable=True)
    return Others(order[: visual.numel() - count], (rows.batch, columns), count)


def _modules(layer: int, block: Any, names: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer by their task.

    Raises:
        UnsupportedModel: see `Skipper.install`.
    """
    found, form = branches(block), attention_form(block)
    who = f"decoder layer {layer}, a {type(block).__name__} of {hosts.library_of(block)},"
    if found is None:
        raise UnsupportedModel(f"{who} is not known to be a mixer and an MLP, so neither can be left out")
    mixer, mlp = found
    known: Mapping[str, Callable[[], nn.Module]] = {
        MLP: lambda: mlp,
        MIXER: lambda: mixer,
        QUERY: lambda: form.projection("q"),  # type: ignore[union-attr]
        OUTPUT: lambda: form.output,  # type: ignore[union-attr]
    }
    beside = [
        name
        for name, part in block.named_children()
        if part is not mixer and part is not mlp and has_matrices(part) and not is_linear(part)
    ]
    if beside:
        raise UnsupportedModel(
            f"{who} has {', '.join(beside)} beside a mixer and an MLP, whose part in a branch that is left out is not "
            "known"
        )
    biased = [name for name in _BEHIND if _behind(block, name) and getattr(block, name).bias is not None]
    if biased:
        raise UnsupportedModel(f"{who} adds the bias of {', '.join(biased)} behind a branch, also to one left out")
    for name in names:
        yield name, known[name]()


def _behind(block: Any, name: str) -> bool:
    """Whether a norm stands behind a branch and has a bias at all: in front of the MLP another one stands then."""
    norm = getattr(block, name, None)
    if norm is None or not hasattr(norm, "bias"):
        return False
    return name != "post_attention_layernorm" or hasattr(block, "pre_feedforward_layernorm")


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def _with_first(output: Any, first: Tensor) -> Any:
    if isinstance(output, (tuple, list)):
        return type(output)((first, *output[1:]))
    return first
