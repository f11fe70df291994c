"""Which setting of a processor's dials gives the most visual tokens within a budget: the processor is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..adapters import adapter_for
from ..loading.models import Loaded
from ..loading.processors import Reader
from .sizing import Dial, Draft, Impossible, config_of, fresh, restore
from .twins import let_interpolate, twin

Sizes = tuple[tuple[int, int], ...]
"""Width and height of each picture of a prompt, in pixels."""

NEAR = 0.75
"""Share of the budget from which on a setting is taken that leaves tiles larger; below, smaller ones are tried."""

LEAST = {"mistral3": 2, "lighton_ocr": 2}
"""Families, by ``config.model_type``, whose host cannot run pictures of fewer tokens: it squeezes that dimension."""


class Search:
    """One search.

    Args:
        native: a vision-language model.
        dials: of its processor, one or two.
        sizes: of the pictures.
        asked: visual tokens of all of them.

    Attributes:
        counted: tokens by picture, for each setting that was tried.
    """

    def __init__(self, native: Loaded, dials: Sequence[Dial], sizes: Sizes, asked: int) -> None:
        self.native, self.dials, self.sizes, self.asked = native, dials, sizes, asked
        self.counted: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._values = [list(dial.values(native)) for dial in dials]
        self._least = LEAST.get(config_of(native).model_type, 1)
        self._twin = twin(native.model) if any(dial.twin for dial in dials) else None

    @property
    def fewest(self) -> int:
        """Tokens of the smallest setting that was tried and that the host can run."""
        return min(sum(each) for each in self.counted.values() if min(each) >= self._least)

    def run(self) -> tuple[int, ...] | None:
        """The setting, a value for each dial; None where all are above the budget."""
        if len(self.dials) == 1:
            return self._best([self._along(())])
        first = self._along((), (self._values[1][-1],))
        found = [] if first is None else [first]
        for value in self._values[0]:
            if found and sum(self.counted[found[-1]]) >= NEAR * self.asked:
                break
            if first is None or value > first[0]:
                found += [one] if (one := self._along((value,))) is not None else []
        return self._best(found)

    def _best(self, found: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
        runs = [one for one in found if one is not None and min(self.counted[one]) >= self._least]
        return max(runs, key=lambda one: sum(self.counted[one]), default=None)

    def _along(self, front: tuple[int, ...], behind: tuple[int, ...] = ()) -> tuple[int, ...] | None:
        """The last setting within the budget as one dial goes through its values, the others standing."""
        settings = [(*front, value, *behind) for value in self._values[len(front)]]
        if self.dials[len(front)].gaps:
            settings = [one for one in settings if self._whole(one)]
        number = bisect(settings, self._fits)
        return None if number < 0 else settings[number]

    def _whole(self, settings: tuple[int, ...]) -> bool:
        """Whether it gives whole tokens."""
        try:
            self.draft(settings)
        except Impossible:
            return False
        return True

    def _fits(self, settings: tuple[int, ...]) -> bool:
        if settings not in self.counted:
            self.counted[settings] = counts(self.draft(settings).loaded, self.sizes)
        return sum(self.counted[settings]) <= self.asked

    def draft(self, settings: Sequence[int]) -> Draft:
        """What settings make of the processor; what they make of the model is set on the twin."""
        if self._twin is not None:
            restore(self._twin.config, config_of(self.native))
        draft = fresh(self.native, self._twin)
        for dial, value in self.turned(settings).items():
            dial.turn(draft, value)
        return draft

    def turned(self, settings: Sequence[int]) -> dict[Dial, int]:
        """The dials that do not stand as the model came, with their values."""
        rows = zip(self.dials, settings, self._values)
        return {dial: value for dial, value, values in rows if value != values[-1]}

    def final(self, settings: Sequence[int]) -> Loaded:
        """The model with these settings; the search ends with it, since its twin is given away."""
        made = self.draft(settings).loaded
        if any(dial.twin for dial in self.turned(settings)):
            let_interpolate(made.model)
            return made
        return replace(made, model=self.native.model)


def counts(loaded: Loaded, sizes: Sizes) -> tuple[int, ...]:
    """Visual tokens of each picture of a prompt, as the model's processor and its adapter have it.

    Args:
        loaded: a vision-language model.
        sizes: of the pictures.
    """
    made, between = Reader(loaded.name, loaded.processor).pictures(sizes)
    sight = adapter_for(loaded.model).preview(made, between)
    return tuple(sum(seen.tokens for seen in picture) for picture in sight.pictures)


def bisect(values: Sequence[Any], fits: Callable[[Any], bool]) -> int:
    """Index of the last value that fits, -1 where none does.

    Args:
        values: ascending; what fits stands in front of what does not.
        fits: tells.
    """
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return low
