"""Plays methods of the library to the oracle: hands them views made by hand, and writes out what they answer.

`Reduction.apply`, `assignment` and the core have no part in it: slots are summed entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmtok import Layout, Method, Reduction, Site, TokenView

from .oracle import Cut, Moment


def written_out(reduction: Reduction, size: Tensor, spare: int = 0) -> Cut:
    """A reduction of one row, slot by slot.

    Args:
        reduction: with B = 1.
        size: [N].
        spare: protected tokens that `keep` may name behind the N.
    """
    n = len(size)
    keep = reduction.keep[0].tolist()
    real = [True] * len(keep) if reduction.valid is None else reduction.valid[0].tolist()
    entries = []
    if reduction.src is not None and reduction.dst is not None:
        entries = [(s, d, r) for r, (s, d) in enumerate(zip(reduction.src[0].tolist(), reduction.dst[0].tolist()))]
    weight = torch.cat([size.double(), torch.zeros(spare).double()])
    mix, own = torch.zeros(len(keep), n + spare).double(), torch.zeros(len(keep), n + spare).double()
    taken = {token for token, is_real in zip(keep, real) if is_real}
    for slot, token in enumerate(keep):
        own[slot, token] = 1
    for source, slot, _ in entries:
        if slot >= 0 and source not in taken:
            own[slot, source] = 1
            taken.add(source)
    for slot, token in enumerate(keep):
        if reduction.keep_weight is not None and reduction.src_weight is not None:
            mix[slot, token] += reduction.keep_weight[0, slot].double()
        else:
            members = [token] + [source for source, at, _ in entries if at == slot]
            total = sum(float(weight[m]) for m in members) if len(members) > 1 else 1.0
            for member in members:
                mix[slot, member] = float(weight[member]) / total if len(members) > 1 else 1.0
    if reduction.src_weight is not None:
        for source, slot, r in entries:
            if slot >= 0:
                mix[slot, source] += reduction.src_weight[0, r].double()
    left = torch.tensor([slot for slot, is_real in enumerate(real) if is_real], dtype=torch.int64)
    return Cut(reduction.keep[0][left], mix[left], own[left])


@dataclass
class Visit:
    index: int
    method: Method
    site: Site


@dataclass
class Note:
    """One call of `reduce`: what came in, what came out."""

    visit: Visit
    view: TokenView
    reduction: Reduction | None


@dataclass
class Player:
    """A `Decider` that asks methods.

    Attributes:
        methods: in list order.
        layout: of the model.
        built: modules that the methods built, by index.
        user: the user's signals.
        notes: every call of `reduce`.
    """

    methods: Sequence[Method]
    layout: Layout
    built: dict[int, Any] = field(default_factory=dict)
    user: dict[str, Callable[[TokenView], Tensor]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    states: dict[tuple[int, int, int, str], Tensor] = field(default_factory=dict)
    rows: dict[tuple[int, str, tuple[int, int]], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = []
        for index, method in enumerate(self.methods):
            for site in method.sites(self.layout):
                if site.layer is None or site.layer <= self.layout.stages[site.stage].last:
                    self.sites.append(Visit(index, method, site))

    # ------------------------------------------------------------------ Decider
    def visits(self, stage: str, layer: int | None = None, point: str = "end") -> list[Visit]:
        return [v for v in self.sites if (v.site.stage, v.site.layer, v.site.point) == (stage, layer, point)]

    def acts(self, stage: str) -> bool:
        return any(visit.site.stage == stage for visit in self.sites)

    def skips(self, layer: int) -> frozenset[str]:
        parts = {method.skip(self.layout).get(layer) for method in self.methods} - {None}
        return frozenset({"ffn", "attn"} if "block" in parts else parts)

    def scope(self, visit: Visit) -> str:
        return visit.site.scope or visit.method.scope

    def renumbers(self, visit: Visit) -> bool:
        if visit.site.positions is not None:
            return visit.site.positions == "renumber"
        return visit.site.stage == "projected"

    def bias_from(self) -> int:
        layers = [v.site.layer or 0 for v in self.sites if v.site.stage == "vision" and v.method.proportional]
        return min(layers, default=1 << 30)

    def insert(self, visit: Visit, moment: Moment) -> Tensor | None:
        made = visit.method.insert(self.view(visit, moment))
        return None if made is None else made[0]

    @torch.no_grad()
    def decide(self, visit: Visit, moment: Moment) -> Cut | None:
        view = self.view(visit, moment)
        reduction = visit.method.reduce(view)
        self.notes.append(Note(visit, view, reduction))
        for name, value in view.state.items():
            for at, token in enumerate(moment.who.tolist()):
                self.states[visit.index, moment.unit[0], token, name] = value[0, at]
        if reduction is None:
            return None
        spare = 0
        if moment.stage == "features" and "protected" in moment.signals:
            spare = len(moment.signals["protected"][0])
        return written_out(reduction, moment.size, spare)

    # ------------------------------------------------------------------ views
    def view(self, visit: Visit, moment: Moment) -> TokenView:
        signals: dict[str, Any] = {}
        for need in visit.site.needs:
            if need in self.user:
                continue
            name = self._resolved(need, moment)
            found = moment.signals.get(name)
            signals[need] = None if found is None else found[0].detach().unsqueeze(0)
        key = (visit.index, self.scope(visit), moment.unit)
        grid = moment.grid  # of tokens that are all there
        view = TokenView(
            moment.tokens.detach()[None],
            visit.site,
            size=None if bool((moment.size == 1).all()) else moment.size[None],
            num_prefix=moment.prefix,
            depth=moment.depth,
            grid=grid if grid is not None and grid[0] * grid[1] == len(moment.tokens) else None,
            entered=moment.entered,
            columns=None if moment.columns is None else moment.columns[None],
            signals=signals,
            state=self._state(visit, moment),
            row=self.rows.setdefault(key, {}),
            memory=self.built.get(visit.index),
            frames=moment.frames,
        )
        for need in visit.site.needs:
            if need in self.user:
                signals[need] = self.user[need](view)
        return view

    def _state(self, visit: Visit, moment: Moment) -> dict[str, Tensor]:
        names = {name for index, row, _, name in self.states if (index, row) == (visit.index, moment.unit[0])}
        found = {}
        for name in names:
            keys = [(visit.index, moment.unit[0], token, name) for token in moment.who.tolist()]
            if all(key in self.states for key in keys):
                found[name] = torch.stack([self.states[key] for key in keys])[None]
        return found

    def _resolved(self, need: str, moment: Moment) -> str:
        name, at, place = need.partition("@")
        if not at:
            if moment.stage == "features" and name == "protected":
                return "protected"
            return name
        stage, _, layer = place.partition(":")
        layout = self.layout.stages[stage]
        number = layout.last if layer == "feature" else int(layer) % layout.depth
        return f"{name}@{stage}:{number}"
