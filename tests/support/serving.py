"""Pictures of tiny families as a serving engine has them, and what a whole model gives its language model of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vlmtok.adapters import adapter_for
from vlmtok.adapters.base import child

import vlmtok
from vlmtok.lab.tiny.families import FAMILIES, shared
from vlmtok.lab.tiny.prompts import Prompt
from vlmtok.serving import Counter, Encoder, Item

BEFORE, BEHIND = 3, 5
"""Text tokens around a picture."""
NOT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
NAMES = [*FAMILIES]


@functools.cache
def model(name: str) -> nn.Module:
    """A family's model with the first attention implementation that its host runs with."""
    return shared(name, FAMILIES[name].attentions[0])


@functools.cache
def counter(name: str) -> Counter:
    """Of a family's model."""
    return Counter(model(name))


@functools.cache
def encoder(name: str) -> Encoder:
    """Of a family's model; the same for all tests of a process, so that plans change on it all the time."""
    return Encoder(model(name))


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture in a prompt.

    Attributes:
        prompt: with text around it.
        inputs: of the whole model.
        first: column of the picture's first id.
        item: the picture alone.
    """

    prompt: Prompt
    inputs: dict[str, Tensor]
    first: int
    item: Item

    @property
    def text(self) -> Tensor:
        """Ids behind the picture."""
        return self.prompt.ids[self.first + len(self.item.ids) :]


def letters(name: str) -> list[str]:
    """A picture, one that is cut into crops, and a clip, where a family takes them."""
    return [letter for letter in "IMV" if letter in FAMILIES[name].shots]


def show(name: str, letter: str, seed: int = 3) -> Shown:
    """A picture or clip of a family."""
    family = FAMILIES[name]
    begins = family.rows[0].startswith("I")  # PaliGemma's prompts begin with their pictures
    prompt = family.prompt(f"{letter}^{BEHIND}" if begins else f"^{BEFORE - 1}{letter}{BEHIND}", seed)
    first = 0 if begins else BEFORE
    shot = prompt.pictures[0].shot
    inputs = family.collect(prompt).inputs()
    given = {key: value for key, value in inputs.items() if key not in NOT_INPUTS}
    ids = torch.tensor(shot.ids)
    return Shown(prompt, inputs, first, Item(ids, given, prompt.kinds[first : first + len(ids)]))


@dataclass
class Given:
    """What a language model was given.

    Attributes:
        rows: `[B, L, C]`.
        positions: int64 `[..., B, L]`, or None.
        entered: what each layer was given, `[B, L, C]`.
        left: what each layer made, before anybody adds to it.
    """

    rows: Tensor | None = None
    positions: Tensor | None = None
    entered: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)


@contextlib.contextmanager
def listening(whole: nn.Module) -> Iterator[Given]:
    """Notes what reaches the language model of a model, and its layers."""
    adapter: Any = adapter_for(whole)
    text, found = child(adapter.core, adapter.spec.lm), Given()

    def entrance(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        found.rows, found.positions = given["inputs_embeds"], given.get("position_ids")

    def layer(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        found.entered.append(args[0] if args else given["hidden_states"])

    def noted(inner: Any) -> Any:
        @functools.wraps(inner)
        def forward(*args: Any, **given: Any) -> Any:
            made = inner(*args, **given)
            found.left.append(made[0] if isinstance(made, tuple) else made)
            return made

        return forward

    handles = [text.register_forward_pre_hook(entrance, with_kwargs=True)]
    for one in text.layers:
        handles.append(one.register_forward_pre_hook(layer, with_kwargs=True))
        one.forward = noted(one.forward)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for one in text.layers:
            del one.forward


@torch.no_grad()
def given_whole(name: str, spec: str | None, shown: Shown) -> Given:
    """What the language model is given in a forward of the whole model under a spec."""
    whole = model(name)
    with contextlib.nullcontext() if spec is None else vlmtok.compress(whole, spec), listening(whole) as found:
        whole(**shown.inputs)
    return found


def hooks(whole: nn.Module) -> int:
    """Hooks on a model."""
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in whole.modules())
