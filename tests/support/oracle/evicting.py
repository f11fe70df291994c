"""What leaves caches behind a prompt: what each layer held, as view rows see it, and what is asked of the decider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cuts import Decider, Moment, Signals
from .held import Eviction, Unit
from .rows import LlamaLayer, RowRun


@dataclass(frozen=True)
class Shown:
    """A layer that ran: the row as it had it, `[L, ...]` each.

    Attributes:
        picture, place, who, size: see `RowRun`.
        keys, values: `[Hkv, L, d]`.
        gone: bool `[Hkv, L]`, entries that have left.
        logits: `[H, L, L]`.
    """

    picture: Tensor
    place: Tensor
    who: Tensor
    size: Tensor
    keys: Tensor
    values: Tensor
    gone: Tensor
    logits: Tensor

    @classmethod
    def of(cls, run: RowRun, layer: LlamaLayer, logits: Tensor) -> Shown:
        """Of a layer that has just run."""
        return cls(run.picture, run.place, run.who, run.size, layer.keys, layer.values, layer.gone, logits)

    def signals(self, columns: Tensor, window: int, first: int) -> Signals:
        """By name, `[Hkv, N]` or `[Hkv, N, d]`; rows that ask are those of this prompt, from column `first` on.

        Args:
            columns: int64 `[Hkv, N]`.
            window: of ``recent_mass``.
            first: see above.
        """
        rows, heads = self.logits.softmax(-1), len(self.keys)
        asking, deep = self.place >= first, columns[..., None].expand(-1, -1, self.keys.shape[2])

        def mass(which: Tensor) -> Tensor:
            found = (rows * which[None, :, None]).sum(1).unflatten(0, (heads, -1)).mean(1)
            return found.gather(1, columns).float()

        recent = torch.arange(len(asking)) >= len(asking) - window
        could = torch.tensor([[float(asking[c:].sum()) for c in one] for one in columns.tolist()])
        found = {
            "attention_mass": mass(asking),
            "text_mass": mass(asking & (self.picture < 0)),
            "recent_mass": mass(asking & recent),
            "attention_rows": could,
            "keys_cached": self.keys.gather(1, deep).float(),
            "values_cached": self.values.gather(1, deep).float(),
        }
        return {name: (value, 1) for name, value in found.items()}


@dataclass(frozen=True)
class Dropped:
    """A cut inside the language model that caches follow: layers below `layer` lose the entries of tokens `who`."""

    layer: int
    who: frozenset[int]


def evict(
    run: RowRun,
    shown: list[Shown],
    decider: Decider,
    first: int,
    until: int,
    dropped: list[Dropped],
    steps: tuple[int, int] | None = None,
) -> dict[int, Eviction]:
    """What the end of a prompt, or of some decode steps, does to every layer, by layer.

    Args:
        run: the row behind the last layer.
        shown: its layers.
        decider: who decides.
        first: columns that were there before this prompt.
        until: columns there are now.
        dropped: cuts that caches follow.
        steps: columns written in front of this call and behind it, where it brought no pictures.
    """
    new = [picture for picture, began in run.began.items() if began >= first]
    lost = [_lost(layer, seen, dropped) for layer, seen in enumerate(shown)]
    ends = int(shown[0].place[shown[0].place < until - (0 if steps is None else steps[1])][-1])
    cases: dict[tuple[int, str, int], list[tuple[Any, Moment, Tensor]]] = {}
    for layer, seen in enumerate(shown):
        for visit in decider.visits("cache", layer, "end"):
            scope, every = decider.scope(visit), decider.every(visit)
            if steps is not None and (not every or steps[0] // every == steps[1] // every):
                continue
            for picture in new if scope != "sample" else [-1] * bool(new):
                mine = seen.picture >= 0 if picture < 0 else seen.picture == picture
                mine = mine & (seen.place != ends)  # what ends the prompt stays
                for other in set(run.began) - set(new):
                    mine = mine & (seen.picture != other)
                held = (mine & ~torch.isin(seen.place, lost[layer]))[None] & ~seen.gone
                each = [one.nonzero()[:, 0] for one in held]
                if len(each[0]):
                    columns = torch.stack(each)
                    assert scope == "head" or bool((columns == columns[:1]).all())
                    moment = _moment(run, seen, layer, picture, columns, decider.window(visit), first, len(shown))
                    places = seen.place[columns if scope == "head" else columns[0]]
                    cases.setdefault((visit.index, scope, picture), []).append((visit, moment, places))
    for asked in cases.values():
        decider.plan([(visit, moment) for visit, moment, _ in asked])
    found = {layer: Eviction(until, [], left if len(left) else None) for layer, left in enumerate(lost)}
    for asked in cases.values():
        for visit, moment, places in asked:
            cuts = decider.evict(visit, moment)
            if cuts is not None:
                weighted, proportional = decider.joins(visit)
                sizes = moment.size if proportional else None
                assert moment.layer is not None
                found[moment.layer].units.append(Unit(places, cuts, weighted, sizes))
    return {layer: eviction for layer, eviction in found.items() if eviction.units or eviction.lost is not None}


def _lost(layer: int, seen: Shown, dropped: list[Dropped]) -> Tensor:
    """Prompt columns whose entries a layer loses, since cuts dropped their tokens later."""
    who = [token for one in dropped if one.layer > layer for token in one.who]
    return seen.place[torch.isin(seen.who, torch.tensor(who, dtype=torch.int64))]


def _moment(
    run: RowRun, seen: Shown, layer: int, picture: int, columns: Tensor, window: int, first: int, depth: int
) -> Moment:
    deep = columns[..., None].expand(-1, -1, seen.values.shape[2])
    return Moment(
        "cache",
        layer,
        "end",
        seen.values.gather(1, deep).transpose(0, 1).flatten(1),
        seen.size[columns[0]],
        seen.who[columns[0]],
        seen.signals(columns, window, first),
        depth=depth,
        entered=sum(run.entered.values()) if picture < 0 else run.entered[picture],
        columns=columns[0],
        unit=(run.row, picture),
    )
