"""What a listener heard of tower signals, held against those of each picture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from support.checks import assert_equal
from torch import Tensor

from vlmtok import TokenView

from .prompts import Prompt, Shot
from .test_token_signals import Listen, token_first

NAMES = ("received_attention", "flat_attention", "turned_keys", "turned_keys_full", "keys", "keys_full", "outputs")
"""Signals with an entry for each token, which towers without a class token give too."""


@dataclass(eq=False)
class ListenToTokens(Listen):
    """Notes the tokens as well."""

    def reduce(self, view: TokenView) -> None:
        super().reduce(view)
        for row, (_, found) in zip(range(len(view.tokens)), self.heard[-len(view.tokens) :], strict=True):
            found["tokens"] = view.tokens[row]


def columns_of(prompt: Prompt) -> Tensor:
    """Where the tokens of all pictures stand among those of the prompt's pictures in order of their columns."""
    return torch.cat([picture.columns for picture in prompt.pictures]).argsort()


def assert_heard(
    of_shot: Callable[[Shot, int], dict[str, Tensor]],
    prompts: Sequence[Prompt],
    heard: list,
    layers: Sequence[int] = (-1,),
    times: int = 1,
) -> None:
    """Each prompt's signals, in each of its rows, are those of its pictures alone.

    Args:
        of_shot: signals of a picture's tokens, by name, from the picture and a layer of its tower.
        prompts: of the batch.
        heard: columns and signals of each row.
        layers: that were listened to.
        times: rows of each prompt.
    """
    rows = [prompt for prompt in prompts if prompt.pictures] * times
    assert len(heard) == len(rows)
    left = list(heard)
    first = f"received_attention@vision:{layers[-1]}"
    for prompt in rows:
        order, wanted = columns_of(prompt), {}
        for layer in layers:
            made = [of_shot(picture.shot, layer) for picture in prompt.pictures]
            wanted |= {f"{key}@vision:{layer}": torch.cat([one[key] for one in made])[order] for key in made[0]}
        mine = min(
            (i for i, (_, found) in enumerate(left) if len(found[first]) == len(order)),
            key=lambda i: float((token_first(first, left[i][1][first]) - wanted[first]).abs().max()),
        )
        _, found = left.pop(mine)
        for need in {*found} - {"tokens"}:
            assert_equal(token_first(need, found[need]), wanted[need], 1e-6 if "attention" in need else 1e-5)
