"""From what a processor made of a picture to what a language model is given of it, under a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapter_for
from ..core.attachment import Attachment
from ..core.hooks import hooks_of
from ..errors import PassError
from ..guard import guarded
from .item import Item, Left
from .plan import ServingPlan
from .stand_in import StandIn


@dataclass(frozen=True, eq=False)
class Encoded:
    """What is left of an item.

    Attributes:
        rows: `[K, C]`, embeddings for its placeholders that stay, in order.
        stacked: `[levels, K, C]`, what the model adds to them behind its first layers, or None.
        positions: int64 `[3, K]`, their positions counted from the item's first id, or None where tokens of a prompt
            are numbered one by one.
    """

    rows: Tensor
    stacked: Tensor | None = None
    positions: Tensor | None = None


class Encoder:
    """Runs the tower and the projector of a model under plans; its language model may be an engine's own.

    Args:
        model: of transformers, top or inner. Its parts are called, never changed; hooks lie on its tower, asleep
            between calls.

    Raises:
        UnsupportedModel: no adapter carries it, or its pictures reach the language model in another way.
    """

    def __init__(self, model: Any) -> None:
        self.stand_in = StandIn(model)
        self._takes = set(inspect.signature(self.stand_in.core.forward).parameters)
        self._moves = self.stand_in.moves
        self._attached: tuple[str, Attachment] | None = None

    @guarded
    def encode(
        self, chosen: ServingPlan | None, items: Sequence[Item], left: Sequence[Left], text: Tensor | None = None
    ) -> list[Encoded]:
        """Encodes items in one pass.

        Args:
            chosen: the plan, or None for bare pictures.
            items: on the model's device; several where their inputs can be joined along the first axis.
            left: what stays of each, as `Counter.left` says.
            text: int64 `[T]`, ids of the prompt behind the item, for plans that read the text; then one item.

        Raises:
            PassError: the model is compressed, was given another number of tokens than was said, or items do not go
                together: several where each has a text or positions of its own, or inputs that cannot be joined.
        """
        if len(items) != len(left):
            raise PassError(f"{len(items)} items come with what stays of {len(left)}")
        if not items:
            return []
        if len(items) > 1 and (text is not None or self._moves):
            raise PassError("items with a text or positions of their own are encoded one by one")
        if len({_form(item) for item in items}) > 1:
            raise PassError(
                "items of one pass have the same inputs, alike in shape behind the first axis; here: "
                + "; ".join(" ".join(f"{name} {list(shape)}" for name, shape, _ in _form(item)) for item in items)
            )
        ids, types = [item.ids for item in items], [item.types for item in items]
        if text is not None:
            ids, types = [*ids, text], [*types, torch.zeros_like(text)]
        inputs = {name: _joined([item.inputs[name] for item in items]) for name in items[0].inputs}
        inputs["input_ids"], inputs["mm_token_type_ids"] = torch.cat(ids)[None], torch.cat(types)[None]
        inputs["token_type_ids"] = (inputs["mm_token_type_ids"] > 0).long()
        with self._under(chosen), torch.no_grad():
            caught = self.stand_in(**{name: value for name, value in inputs.items() if name in self._takes})
        lengths = [int(one.stays.sum()) for one in left]
        expected = sum(lengths) + (0 if text is None else len(text))
        if caught.rows.shape[:2] != (1, expected):
            raise PassError(
                f"{'a bare model' if chosen is None else chosen.spec}: the language model is given "
                f"{list(caught.rows.shape[:2])} tokens of {len(items)} pictures where {expected} were said"
            )
        made, start = [], 0
        for one, length in zip(left, lengths):
            columns = one.rows.to(caught.rows.device) + start
            stacked, positions = caught.stacked, caught.positions if self._moves else None
            made.append(
                Encoded(
                    caught.rows[0, columns],
                    None if stacked is None else stacked[:, 0, columns],
                    None if positions is None else positions[-3:, 0, columns],
                )
            )
            start += length
        return made

    @contextmanager
    def _under(self, chosen: ServingPlan | None) -> Iterator[None]:
        """Context in which the hooks of a plan are awake; they stay in place, asleep, until another plan comes."""
        key = "" if chosen is None else chosen.key
        if self._attached is None or self._attached[0] != key:
            self.close()
            self._attached = key, self._attach(chosen)
        attachment = self._attached[1]
        attachment.pauses = 0
        try:
            yield
        finally:
            attachment.pauses = 1  # not ended, or a compression of the whole model would clear its hooks away

    def _attach(self, chosen: ServingPlan | None) -> Attachment:
        """Hooks of a plan, or those that alone follow what bare rows carry."""
        core = self.stand_in.core
        if any(hook.attachment is not None and hook.attachment.live for _, _, _, hook in hooks_of(core)):
            raise PassError("the model is compressed already; remove that first, an encoder places hooks of its own")
        carrier = adapter_for(core)
        made = Attachment([], carrier.layout()) if chosen is None else Attachment(chosen.methods, chosen.layout)
        try:
            carrier.install(made)
        except BaseException:
            made.remove()
            raise
        for index, method in enumerate(made.methods):
            module = method.build(made.layout)
            if module is not None:
                made.memory[index] = module.to(next(core.parameters()).device)
        return made

    def close(self) -> None:
        """Takes all hooks off the model."""
        if self._attached is not None:
            self._attached[1].remove()
        self._attached = None


def _form(item: Item) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
    """What inputs of items that go through a tower together have in common."""
    return tuple((name, tuple(value.shape[1:]), value.dtype) for name, value in sorted(item.inputs.items()))


def _joined(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else torch.cat(values)
