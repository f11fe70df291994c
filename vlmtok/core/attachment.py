"""The object behind the hooks: methods, where they act, what they remember, what they did.

Hooks own the attachment and the attachment owns no module of the model, so that a model with hooks is collectable and
a handle that goes out of scope changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ParameterError, SiteError
from ..kernels.exact import exact
from .hooks import Hook
from .ledger import Ledger
from .method import Method
from .placing import looks_on, place, sample_count
from .reduction import Reduction
from .signals import BY_ATTENTION, MASSES, NEURONS, Need
from .site import POINTS, STAGES, Layout, Site
from .skipping import asked, work
from .view import Signal, TokenView

UserSignal = Callable[[TokenView], Tensor]


class Change(Protocol):
    """Something that an attachment changed on the model."""

    def remove(self) -> None:
        """Undoes it."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A method at one of its sites.

    Attributes:
        index: place of the method in the attachment's list.
        method: the method.
        site: where.
        needs: its signals, resolved.
        asked: the site that the method named, by which it counts (see `placing`).
    """

    index: int
    method: Method
    site: Site
    needs: tuple[Need, ...]
    asked: Site

    @property
    def scope(self) -> str:
        """What one view row is here."""
        return self.site.scope or self.method.scope

    @property
    def inserts(self) -> bool:
        """Whether the method puts tokens in at this site."""
        return self.site.point == "start" and type(self.method).insert is not Method.insert

    def order(self) -> tuple[int, int, int, int]:
        """Sorts entries by the forward, then by the list."""
        layer = -1 if self.site.layer is None else self.site.layer
        return (STAGES.index(self.site.stage), layer, POINTS.index(self.site.point), self.index)


class Attachment:
    """What hangs on a model: the methods of all its compressions, their sites and signals, what they remember.

    Attributes:
        methods: in list order.
        layout: what the model offers.
        entries: methods at their sites, in the order of the forward.
        skips: modules of decoder layers that run without visual tokens, by layer, see `skipping`.
        memory: modules that methods built, by index; whoever attaches fills it in.
        owner: the dispatcher that placed it, by which a later `compress` finds its way.
        user: signals that the user gives.
        trace: whether tensors of the last pass are kept.
        ledger: what ran.
        active: until removal.
        compiled: whether a pass ran inside torch.compile, which keeps no books.
        between_graphs: whether hooks that are placed from now on run between the graphs of ``torch.compile``, all of
            them, since a pass of which some hooks are traced and some are not has its state in two places.
        drivers: what the adapter put behind the hooks, by stage.
        said: what a reader of its reports must know about how methods act on this model.
    """

    def __init__(
        self,
        methods: Iterable[Method],
        layout: Layout,
        user: Mapping[str, UserSignal] | None = None,
        trace: bool = False,
        owner: Any = None,
    ) -> None:
        self.methods = list(methods)
        self.owner = owner
        self.layout = layout
        self.user = dict(user or {})
        self.trace = trace
        self.ledger = Ledger()
        self.active = True
        self.pauses = 0
        self.compiled = False
        self.between_graphs = False
        self.said: list[str] = []
        self.entries = self._resolve()
        self.skips = work(asked(self.methods, layout), layout, self._read(BY_ATTENTION | MASSES), self._read({NEURONS}))
        self.memory: dict[int, nn.Module] = {}
        self.drivers: dict[str, Any] = {}
        self.notes: dict[int, dict[str, Any]] = {}
        self._handles: list[Change] = []

    # ------------------------------------------------------------------ planning
    def _resolve(self) -> list[Entry]:
        known = frozenset(self.user)
        entries: list[Entry] = []
        for index, method in enumerate(self.methods):
            places, moved = place(method, self.layout, known)
            entries += [Entry(index, method, one.site, one.needs, one.asked) for one in places]
            sites = method.sites(self.layout)
            self._say_positions(method, sites)
            self.said += [*moved, *method.remarks(self.layout)]
            self._say_untried(method, sites)
        entries.sort(key=Entry.order)
        for first, second in pairwise(entry for entry in entries if entry.site.stage == "cache"):
            if first.site.layer == second.site.layer:
                raise SiteError(
                    f"{first.method} and {second.method} both act at {first.site}; one method chooses what a layer's "
                    "cache holds: give them different layers"
                )
        features = [entry for entry in entries if entry.site.stage == "features"]
        for first, second in pairwise(features):
            if sample_count(first.method, first.asked, self.layout) is None:
                raise SiteError(
                    f"{type(second.method).__name__} cannot act at features behind {first.method}, which leaves "
                    "pictures of different lengths there; turn the two round, or set how many tokens it keeps"
                )
        return entries

    def _say_positions(self, method: Method, sites: list[Site]) -> None:
        """Notes that a method keeps position ids which it renumbers on other models."""
        if all(stage.renumbers for stage in self.layout.stages.values()):
            return
        stages = {name: replace(stage, renumbers=True) for name, stage in self.layout.stages.items()}
        other = replace(self.layout, stages=stages)
        here, elsewhere = (
            [layout.positions_at(site) for site in found if not looks_on(method, site, layout)]
            for layout, found in ((self.layout, sites), (other, method.sites(other)))
        )
        if here != elsewhere:
            self.said.append(
                f"{method.spec_name()} keeps position ids, which it renumbers elsewhere: those of {self.layout.family} "
                "are places in a picture (M-RoPE)"
            )

    def _say_untried(self, method: Method, sites: list[Site]) -> None:
        """Notes, once for each method, that nobody knows what its cuts do to answers of real weights."""
        for name in dict.fromkeys(site.stage for site in sites if not looks_on(method, site, self.layout)):
            untried = self.layout.stages[name].untried
            if untried:
                self.said.append(
                    f"{method.spec_name()} acts on tokens that {untried}: no release does so, and what it costs in "
                    "quality on real weights is unknown"
                )

    @property
    def of_caches(self) -> dict[int, Entry]:
        """Methods by the layer of whose key-value cache each chooses."""
        return {entry.site.layer or 0: entry for entry in self.at("cache")}

    @property
    def forgets(self) -> bool:
        """Whether entries of tokens that leave between layers leave the caches before, too."""
        return any(entry.site.forget for entry in self.at("decoder"))

    def _read(self, names: Collection[str]) -> set[int | None]:
        """Decoder layers at whose ends, or of whose caches, methods ask for one of some signals of that layer."""
        places = (("decoder", "end"), ("cache", "end"))
        behind = [entry for entry in self.entries if (entry.site.stage, entry.site.point) in places]
        return {e.site.layer for e in behind if any(need.stage is None and need.name in names for need in e.needs)}

    def at(self, stage: str, layer: int | None = None, point: str | None = None) -> list[Entry]:
        """Entries of a stage, a layer of it, or a point of that layer."""
        return [
            e
            for e in self.entries
            if e.site.stage == stage
            and (layer is None or e.site.layer == layer)
            and (point is None or e.site.point == point)
        ]

    def tapped(self, stage: str) -> dict[int, list[Need]]:
        """Signals of `stage` that other sites wait for, by the layer that gives them."""
        found: dict[int, list[Need]] = {}
        for entry in self.entries:
            for need in entry.needs:
                if need.stage != stage or need.layer is None:
                    continue
                wanted = found.setdefault(need.layer, [])
                if all(other.name != need.name for other in wanted):
                    wanted.append(need)
        return found

    def awaited(self, stage: str) -> bool:
        """Whether sites of other stages wait for signals of this one."""
        return any(need.stage == stage != entry.site.stage for entry in self.entries for need in entry.needs)

    # ------------------------------------------------------------------ hooks
    @property
    def live(self) -> bool:
        """Whether hooks act."""
        return self.active and not self.pauses

    def hook(self, module: nn.Module, kind: str, call: Callable[..., Any], layer: int = -1) -> None:
        """Places a hook.

        Args:
            module: where.
            kind: ``pre`` (call(layer, module, args, kwargs)), or ``post`` (call(layer, module, args, kwargs, output)),
                which runs before hooks that were there already, so that hosts record what we return; ``close`` is
                ``post`` and runs after an exception too.
            call: method of a driver.
            layer: passed on.
        """
        if self.between_graphs:
            call = torch.compiler.disable(call)
        hook = Hook(self, call, layer, module)
        if kind == "pre":
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            closing = kind == "close"
            self._handles.append(
                module.register_forward_hook(hook, with_kwargs=True, prepend=True, always_call=closing)
            )

    def owns(self, change: Change) -> None:
        """Takes note of a change of the model that is no hook; it is undone when hooks are taken out."""
        self._handles.append(change)

    def suspend(self) -> None:
        """Goes quiet while another attachment tries to take its place."""
        self.active = False

    def resume(self) -> None:
        """Acts again."""
        self.active = True

    def remove(self) -> None:
        """Takes every hook out and forgets what passes left behind; calling it again does nothing."""
        self.active = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    # ------------------------------------------------------------------ running
    def decide(self, entry: Entry, view: TokenView) -> Reduction | None:
        """Asks a method, with gradients and autocast off, and checks the form of its answer."""
        with exact(view.tokens.device):
            reduction = entry.method.reduce(view)
        if reduction is None:
            return None
        by = type(entry.method).__name__
        if not isinstance(reduction, Reduction):
            raise ParameterError(f"{by}.reduce must return a Reduction or None, got {type(reduction).__name__}")
        batch, n, _ = view.tokens.shape
        # A language model can go on without pictures.
        least = 0 if entry.site.stage in ("decoder", "cache") else 1
        if reduction.keep.shape[0] != batch or reduction.slots < least:
            raise ParameterError(
                f"{by} at {entry.site}: keep must be [B = {batch}, K >= {least}], got {list(reduction.keep.shape)}"
            )
        if entry.site.stage != "features" and reduction.slots > n:
            raise ParameterError(f"{by} at {entry.site}: {reduction.slots} slots of {n} tokens")
        if reduction.valid is not None and entry.site.stage == "vision":
            raise ParameterError(f"{by} at {entry.site}: towers take no ragged reductions (valid)")
        if reduction.valid is not None and entry.scope == "head":
            raise ParameterError(f"{by} at {entry.site}: heads of a layer keep equally many entries (no valid)")
        return reduction

    def bind_user(self, view: TokenView, signals: MutableMapping[str, Signal]) -> None:
        """Adds the user's signals to those of a view; they win over built-in ones of the same name."""
        for name, make in self.user.items():
            signals[name] = lambda make=make: make(view)  # type: ignore[misc]

    def remember(self, index: int) -> nn.Module | None:
        """The module that a method built."""
        return self.memory.get(index)
