"""The object behind the hooks: methods, where they act, what they remember, what they did.

Hooks own the attachment and the attachment owns no module of the model, so that a model with hooks is collectable and
a handle that goes out of scope changes nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .errors import ParameterError, PassError, SiteError, UnsupportedModel
from .guard import told
from .kernels.exact import exact
from .ledger import Ledger
from .method import LAYERED, POINTS, STAGES, Counts, Layout, Method, Site
from .reduction import Reduction
from .signals import Need, check_stage, resolve_need
from .view import Signal, TokenView

S = TypeVar("S")
_PATCHES = 576
"""A number of patches; whether a method's count depends on content shows with any."""

UserSignal = Callable[[TokenView], Tensor]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method at one of its sites.

    Attributes:
        index: place of the method in the attachment's list.
        method: the method.
        site: where.
        needs: its signals, resolved.
    """

    index: int
    method: Method
    site: Site
    needs: tuple[Need, ...]

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


class NotScriptable(UnsupportedModel, AttributeError):
    """TorchScript compiles hooks from their source; ours have none. Who asks a hook for its name gets no name."""


class Hook:
    """A module hook that goes quiet when its attachment ends; a copy of it is inert from the start."""

    __slots__ = ("attachment", "call", "layer", "where")

    def __init__(
        self,
        attachment: Attachment | None = None,
        call: Callable[..., Any] | None = None,
        layer: int = -1,
        where: nn.Module | None = None,
    ) -> None:
        self.attachment = attachment
        self.call = call
        self.layer = layer
        self.where = None if where is None else weakref.ref(where)

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Passes on to the driver, unless paused or ended."""
        if self.attachment is None or self.call is None or not self.attachment.live:
            return None
        if torch.compiler.is_compiling():  # a tracer says by exceptions of its own what it cannot follow
            return self.call(self.layer, module, *given)
        try:
            return self.call(self.layer, module, *given)
        except Exception as problem:
            fault = told(problem)
            if fault is None:
                raise
            raise fault from problem

    @property
    def __name__(self) -> str:
        """Asked by ``torch.jit.script`` alone.

        Raises:
            NotScriptable: always.
        """
        raise NotScriptable(
            "torch.jit.script takes no Python hooks, and this model carries those of a compression, paused or not; end "
            "it first (run.remove() or vlmtok.remove(model)), or use torch.jit.trace, torch.export or torch.compile, "
            "which follow it"
        )

    def __deepcopy__(self, memo: dict[Any, Any]) -> Hook:
        module = None if self.where is None else self.where()
        twin = memo.get(id(module)) if module is not None else None
        if twin is not None:
            memo.setdefault(_Bare, _Bare()).modules.append(twin)
        return Hook()

    def __copy__(self) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return (Hook, ())


class _Bare:
    """Takes inert hooks out of modules that were copied, when the copying is over and its memo goes."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []

    def __del__(self) -> None:
        for module in self.modules:
            _clear(module)


_TABLES = ("_forward_pre_hooks", "_forward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


def _own(module: nn.Module) -> Iterator[tuple[str, int, Hook]]:
    """Hooks of ours on one module: (table, key, hook)."""
    for table in _TABLES:
        for key, hook in list(getattr(module, table, {}).items()):
            if isinstance(hook, Hook):
                yield table, key, hook


def _clear(module: nn.Module) -> None:
    """Takes inert hooks off one module."""
    for table, key, hook in _own(module):
        if hook.attachment is None or not hook.attachment.active:
            getattr(module, table).pop(key, None)
            for flags in _FLAGS:
                getattr(module, flags, {}).pop(key, None)


def hooks_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, int, Hook]]:
    """Every hook of ours in a model, inert ones included: (module, table, key, hook)."""
    for module in model.modules():
        for table, key, hook in _own(module):
            yield module, table, key, hook


def sweep(model: nn.Module) -> None:
    """Takes out inert hooks, which a model that was pickled carries."""
    for module in model.modules():
        _clear(module)


class Attachment:
    """What one `compress` call put on a model.

    Attributes:
        methods: in list order.
        layout: what the model offers.
        entries: methods at their sites, in the order of the forward.
        memory: modules that methods built, by index; whoever attaches fills it in.
        owner: the dispatcher that placed it, by which a later `compress` finds its way.
        user: signals that the user gives.
        trace: whether tensors of the last pass are kept.
        ledger: what ran.
        active: until removal.
        compiled: whether a pass ran inside torch.compile, which keeps no books.
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
        self.said: list[str] = []
        self.entries = self._resolve()
        self.memory: dict[int, nn.Module] = {}
        self.drivers: dict[str, Any] = {}
        self.notes: dict[int, dict[str, Any]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    # ------------------------------------------------------------------ planning
    def _resolve(self) -> list[Entry]:
        known = frozenset(self.user)
        entries: list[Entry] = []
        for index, method in enumerate(self.methods):
            by = type(method).__name__
            sites = method.sites(self.layout)
            if len({(s.stage, s.layer, s.point) for s in sites}) != len(sites):
                raise SiteError(f"{by} names the same site twice: {', '.join(map(str, sites))}")
            for site in sites:
                check_stage(site, self.layout, by)
                if site.layer is not None and site.layer > self.layout.stages[site.stage].last:
                    continue  # nobody reads that layer's output
                needs = tuple(resolve_need(need, site, self.layout, known, by) for need in site.needs)
                entries.append(Entry(index, method, site, needs))
            self._say_positions(method, sites)
        entries.sort(key=Entry.order)
        features = [entry for entry in entries if entry.site.stage == "features"]
        for first, second in pairwise(features):
            if first.method.count(Counts(first.site, _PATCHES, _PATCHES)) is None:
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
        elsewhere = method.sites(replace(self.layout, stages=stages))
        if [site.positions for site in elsewhere] != [site.positions for site in sites]:
            self.said.append(
                f"{method.spec_name()} keeps position ids, which it renumbers elsewhere: those of {self.layout.family} "
                "are places in a picture (M-RoPE)"
            )

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
        hook = Hook(self, call, layer, module)
        if kind == "pre":
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            closing = kind == "close"
            self._handles.append(
                module.register_forward_hook(hook, with_kwargs=True, prepend=True, always_call=closing)
            )

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
        least = 0 if entry.site.stage == "decoder" else 1  # a language model can go on without pictures
        if reduction.keep.shape[0] != batch or reduction.slots < least:
            raise ParameterError(
                f"{by} at {entry.site}: keep must be [B = {batch}, K >= {least}], got {list(reduction.keep.shape)}"
            )
        if entry.site.stage != "features" and reduction.slots > n:
            raise ParameterError(f"{by} at {entry.site}: {reduction.slots} slots of {n} tokens")
        if reduction.valid is not None and entry.site.stage == "vision":
            raise ParameterError(f"{by} at {entry.site}: towers take no ragged reductions (valid)")
        return reduction

    def bind_user(self, view: TokenView, signals: MutableMapping[str, Signal]) -> None:
        """Adds the user's signals to those of a view; they win over built-in ones of the same name."""
        for name, make in self.user.items():
            signals[name] = lambda make=make: make(view)  # type: ignore[misc]

    def remember(self, index: int) -> nn.Module | None:
        """The module that a method built."""
        return self.memory.get(index)


class PerThread(Generic[S]):
    """State of the pass that runs, one for each thread: several threads may call one compressed model.

    Args:
        make: a fresh state.

    Attributes:
        latest: the state of the thread that ran last, for who asks from outside.
    """

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._local = threading.local()
        self._traced = make()
        self.latest = self._traced

    def mine(self) -> S:
        """The state of this thread."""
        if torch.compiler.is_compiling():
            return self._traced  # what is traced runs no hook again
        found: S | None = getattr(self._local, "state", None)
        if found is None:
            found = self._local.state = self._make()
        self.latest = found
        return found

    def seen(self) -> S:
        """The state of this thread if it ran anything, else of the one that ran last."""
        found: S | None = getattr(self._local, "state", None)
        return self.latest if found is None else found


class Watch:
    """How far a pass is in the thread that runs it; a block out of turn raises."""

    __slots__ = ("at", "begun", "stage")

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.begun = False
        self.at = -1

    def begin(self) -> None:
        """A pass starts at block 0."""
        self.begun = True
        self.at = -1

    def enter(self, layer: int) -> None:
        """A block arrives.

        Raises:
            PassError: before block 0 ran in this thread, or not behind the block before.
        """
        if not self.begun:
            raise PassError(
                f"{self.stage} block {layer} ran without block 0 before it in this thread; a pass of a compressed "
                "model starts at block 0 and stays in its thread"
            )
        if layer <= self.at:
            raise PassError(
                f"{self.stage} block {layer} arrived behind block {self.at} of the same pass; blocks run in order"
            )
        self.at = layer


def replaying() -> bool:
    """Whether autograd is running this forward again (gradient checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def weak(module: nn.Module) -> Callable[[], Any]:
    """A reference that does not keep the module alive.

    Raises (when called):
        PassError: the module is gone.
    """
    reference = weakref.ref(module)

    def get() -> nn.Module:
        found = reference()
        if found is None:
            raise PassError("the compressed model no longer exists")
        return found

    return get


__all__ = ["LAYERED", "Attachment", "Entry", "Hook", "PerThread", "Watch", "hooks_of", "replaying", "sweep", "weak"]
