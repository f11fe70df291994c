"""How many tokens of each picture stay, from what a processor made of it: host ints, no weights, nothing runs."""

from __future__ import annotations

from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch

from ..adapters import adapter_for
from ..core.model_shape import ModelShape
from ..core.sight import Seen, Sight
from ..core.site import Layout
from ..cost.plan import left_in_front
from ..cost.planned_rows import Prompt
from ..errors import ParameterError, SiteError
from ..guard import guarded
from .item import CLIP, Item, Left, whole
from .layout import ENGINE
from .plan import ServingPlan, plan

KEPT = 64
"""Plans that are kept; a server sees few specs."""


class Counter:
    """Plans specs on one model and counts what they leave of pictures.

    Args:
        model: a model of transformers, with weights or without data (see `vlmtok.loading.models.configured`).
        engine: what runs it, for messages.

    Raises:
        UnsupportedModel: no adapter carries the model.
    """

    def __init__(self, model: Any, engine: str = ENGINE) -> None:
        self.adapter: Any = adapter_for(model)
        self.engine = engine
        self.layout: Layout = self.adapter.layout()
        self._planned = lru_cache(KEPT)(self._plan)
        self._counted = lru_cache(16 * KEPT)(self._count)

    @cached_property
    def shape(self) -> ModelShape:
        """The model as counts and widths."""
        made: ModelShape = self.adapter.account()
        return made

    def plan(self, spec: str) -> ServingPlan:
        """The plan of a spec on this model; see `vlmtok.serving.plan`."""
        return self._planned(spec)

    def _plan(self, spec: str) -> ServingPlan:
        made = plan(spec, self.layout, engine=self.engine)
        self.adapter.check(made.attachment)
        return made

    @guarded
    def left(self, chosen: ServingPlan | None, item: Item) -> Left:
        """What of an item stays in its prompt.

        Args:
            chosen: the plan, or None for all.
            item: by itself.

        Raises:
            ParameterError: the methods cannot act on a picture of that size, or marks stand among tokens of which
                some leave.
            SiteError: a clip is pooled before what the methods decide on reaches the language model.
        """
        sight = self._sight(item)
        seen = [one for picture in sight.pictures for one in picture]
        placeholders = torch.zeros(len(item.ids), dtype=torch.bool)
        for one in seen:
            placeholders[list(one.columns)] = True
        stays = torch.ones_like(placeholders)
        if chosen is None:
            return whole(item.ids, placeholders)
        self._check_clip(chosen, item)
        for one, count in zip(seen, self._counted(chosen, sight), strict=True):
            if count < one.tokens and one.inside:
                raise ParameterError(
                    f"{chosen.spec}: {self.layout.family} puts {one.inside} marks among the {one.tokens} tokens of a "
                    f"picture, and which of those stay between them depends on the picture; {self.engine} lays out a "
                    "prompt before it sees one"
                )
            stays[list(one.columns[count:])] = False
        return Left(stays, placeholders)

    def _sight(self, item: Item) -> Sight:
        names = dict(item.inputs)
        names["input_ids"] = item.ids[None]
        names["mm_token_type_ids"] = item.types[None]
        return self.adapter.preview(names)

    def _count(self, chosen: ServingPlan, sight: Sight) -> list[int]:
        """Tokens left of each run that belongs together."""
        seen = [one for picture in sight.pictures for one in picture]
        gaps = [one.gap for one in seen]
        prompt = Prompt(
            1,
            len(seen),
            (0, *gaps[1:], 1),
            patches=sight.patches,
            grids=sight.grids,
            seen=tuple(seen),
            seen_rows=sight.crops,
        )
        self._check_parts(chosen, seen)
        return left_in_front(chosen.attachment, self.shape, prompt, chosen.slots)

    def _check_clip(self, chosen: ServingPlan, item: Item) -> None:
        """Refuses clips of which it is not known here what becomes of their frames.

        Raises:
            SiteError: its positions are places in time, or patches are pooled in front of the projector.
        """
        if not bool((item.types == CLIP).any()):
            return
        if self.adapter.spec.positions == "mrope":
            raise SiteError(
                f"{chosen.spec}: positions of {self.layout.family} tell the time of a clip's frames, and no engine has "
                "been tried in which some of their tokens are gone; pictures can be served, clips as they are"
            )
        packing = self.adapter.spec.packing_methods
        pooled = packing is not None and not packing[1]  # a method that pools behind the projector is known
        if pooled and chosen.attachment.awaited("vision"):
            raise SiteError(
                f"{chosen.spec}: it decides on the tower's attention to patches, and {self.layout.family} pools those "
                "of a clip in front of its projector; pictures can be served, clips with methods that decide on tokens"
            )

    def _check_parts(self, chosen: ServingPlan, seen: list[Seen]) -> None:
        """Refuses cuts of parts behind a cut that leaves more of one part than of another.

        Raises:
            ParameterError: how many tokens parts have by then depends on the picture.
        """
        if not any(len(one.parts) > 1 for one in seen):
            return
        scopes = [(entry.method, entry.scope) for entry in chosen.attachment.at("projected")]
        for (first, wide), (second, narrow) in pairwise(scopes):
            if wide == "picture" and narrow == "part":
                raise ParameterError(
                    f"{second} chooses in each crop, and how many tokens of a crop {first} leaves depends on the "
                    f"picture; {self.engine} lays out a prompt before it sees one: turn the two round"
                )
