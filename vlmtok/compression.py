"""`compress()` and `Compression`: how long a compression lasts, and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .attachment import Attachment, hooks_of, sweep
from .errors import ParameterError, PassError, SiteError, UnsupportedModel, VlmtokError, VlmtokWarning
from .guard import guarded
from .method import Layout, Method, parse_methods
from .view import TokenView

if TYPE_CHECKING:
    from .report import Report
    from .trace import Trace


@guarded
def compress(
    model: nn.Module,
    method: Method | str | Sequence[Method | str],
    *,
    signals: Mapping[str, Callable[[TokenView], Tensor]] | None = None,
    trace: bool = False,
    adapter: str | None = None,
) -> Compression:
    """Makes a model process fewer visual tokens, until the compression is removed.

    Everything is checked before the first hook is placed; nothing of the model is changed but its hooks.

    Args:
        model: a timm, open_clip or transformers model that an adapter carries, wrapped or not.
        method: a method, a spec string (``"pitome:ratio=0.9+todre:keep=0.1"``), or several of them; several act in
            the order of the forward, and in list order where they meet.
        signals: signals of your own, by name: from the view, a tensor `[B, N, ...]`.
        trace: keep what the last pass decided, for `Compression.trace` and pictures.
        adapter: None finds it; ``"generic-vlm"`` tries a vision-language model of transformers that is not listed.

    Returns:
        The handle: use it in ``with``, or keep it for `report()` and `remove()`. Dropping it changes nothing.

    A model may carry several compressions at different sites; they act as if given in one list.

    Raises:
        UnsupportedModel: no adapter carries the model.
        SiteError: a method has no place to act there, or another compression of the model acts at that site.
        MissingSignal: a method needs what the model cannot give.
        ParameterError: a method's settings do not fit the model.
        UnknownMethod, SpecError: of spec strings.
    """
    from .adapters import adapter_for

    methods = _methods(method)
    if signals is not None and not (isinstance(signals, Mapping) and all(map(callable, signals.values()))):
        raise ParameterError(f"compress() takes signals as functions of the view by name, got signals={signals!r}")
    with _reading(model):
        carrier = adapter_for(model, adapter)
        carrier.check_alone()
    sweep(carrier.model)
    dispatcher = _dispatcher(carrier.model) or Dispatcher(carrier.model, adapter)
    part = dispatcher.model()
    if part is not carrier.model and any(module is part for module in carrier.model.modules()):
        raise SiteError(
            f"a part of this model, its {type(part).__name__}, carries another compression already; remove that one "
            "first (vlmtok.remove(model)), and compress the whole model with all methods"
        )
    return dispatcher.add(methods, dict(signals or {}), trace)


@guarded
def remove(model: nn.Module) -> int:
    """Ends every compression of a model, also where the handle is gone.

    Args:
        model: the model, wrapped or not.

    Returns:
        How many were ended.

    Raises:
        ParameterError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ParameterError(
            f"vlmtok.remove() takes the model, got {type(model).__name__}"
            + ("; its own remove() ends this compression" if isinstance(model, Compression) else "")
        )
    dispatcher = _dispatcher(model)
    count = 0 if dispatcher is None else len(dispatcher.members)
    if dispatcher is not None:
        for member in list(dispatcher.members):
            dispatcher.drop(member)
    sweep(model)
    return count


def _dispatcher(model: nn.Module) -> Dispatcher | None:
    """Who placed the live hooks of a model."""
    for *_, hook in hooks_of(model):
        if hook.attachment is not None and hook.attachment.active:
            found: Dispatcher = hook.attachment.owner
            return found
    return None


@dataclass(eq=False)
class Member:
    """What one `compress` call brought.

    Attributes:
        methods: in list order.
        signals: of the user.
        trace: whether traces are wanted.
        memory: modules that its methods built, by their place in the list.
        first: place of its first method among all.
        fired: whether any of its hooks ran under an earlier attachment.
    """

    methods: list[Method]
    signals: dict[str, Callable[[TokenView], Tensor]]
    trace: bool
    memory: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    first: int = 0
    fired: bool = False


class Dispatcher:
    """One model's compressions: one attachment carries the methods of all, so that they know of each other's cuts.

    Adding or removing one places the hooks anew and starts new books.
    """

    def __init__(self, model: nn.Module, adapter: str | None) -> None:
        self.model = weakref.ref(model)
        self.adapter = adapter
        self.members: list[Member] = []
        self.attachment: Attachment | None = None

    def add(self, methods: list[Method], signals: dict[str, Callable[[TokenView], Tensor]], trace: bool) -> Compression:
        """Adds a compression; the model is left as it was where that fails."""
        member = Member(methods, signals, trace)
        attachment = self._attach([*self.members, member])
        self._check(attachment, member)
        for index, method in enumerate(methods):
            module = method.build(attachment.layout)
            if module is not None:
                member.memory[str(index)] = module
        self._replace(attachment, [*self.members, member], "compress")
        return Compression(self, member)

    def drop(self, member: Member, quiet: bool = False) -> None:
        """Ends a compression; the others go on."""
        if member not in self.members:
            return
        fired, books = self.has_fired(member), None if self.attachment is None else self.attachment.ledger
        others = [other for other in self.members if other is not member]
        if others and self.model() is not None:
            self._replace(self._attach(others), others, "remove")
        else:
            self._detach()
            self.members = []
            model = self.model()
            if model is not None:
                _forget_compiled(model, "remove")
        if not fired and not quiet:
            names = " + ".join(map(str, member.methods))
            warnings.warn(
                f"{names} had nothing to do: {books.blindness}"
                if books is not None and books.blind
                else f"the hooks of {names} never ran; was the compressed model called?",
                VlmtokWarning,
                stacklevel=5,
            )

    def has_fired(self, member: Member) -> bool:
        """Whether any hook of a member ran."""
        if member.fired or self.attachment is None or self.attachment.compiled:
            return True
        own = range(member.first, member.first + len(member.methods))
        return any(key[3] in own for key in self.attachment.ledger.fired)

    def _attach(self, members: list[Member]) -> Attachment:
        """The attachment of some members, its hooks not placed yet."""
        from .adapters import adapter_for

        signals = {name: make for member in members for name, make in member.signals.items()}
        methods = [method for member in members for method in member.methods]
        with _reading(self._model()):
            layout = adapter_for(self._model(), self.adapter).layout()
        return Attachment(methods, layout, signals, any(member.trace for member in members), owner=self)

    def _check(self, attachment: Attachment, member: Member) -> None:
        """Refuses a compression that has nothing to do, or acts where another one acts."""
        first = sum(len(other.methods) for other in self.members)
        own = [entry for entry in attachment.entries if entry.index >= first]
        if not own:
            names = " + ".join(map(str, member.methods))
            raise SiteError(f"{names} has nothing to do on {attachment.layout.family}: no site is left")
        taken = {(e.site.stage, e.site.layer, e.site.point): e for e in attachment.entries if e.index < first}
        for entry in own:
            other = taken.get((entry.site.stage, entry.site.layer, entry.site.point))
            if other is not None:
                raise SiteError(
                    f"{entry.method} wants to act at {entry.site}, where {other.method} of another compression acts "
                    "already; remove that one first (vlmtok.remove(model)), or pass both in one list"
                )

    def _replace(self, attachment: Attachment, members: list[Member], why: str) -> None:
        """Puts an attachment in the place of the one before."""
        from .adapters import adapter_for
        from .adapters.account import meter

        for member in self.members:
            member.fired = self.has_fired(member)
        before, pauses = self.attachment, 0 if self.attachment is None else self.attachment.pauses
        _forget_compiled(self._model(), why)
        _guard_hooks()
        if before is not None:
            before.suspend()
        try:
            with _reading(self._model()):
                carrier = adapter_for(self._model(), self.adapter)
                carrier.install(attachment)
                meter(carrier, attachment)
        except BaseException:
            attachment.remove()
            if before is not None:
                before.resume()
            raise
        if before is not None:
            before.remove()
        self.attachment, self.members = attachment, members
        attachment.pauses = pauses
        first = 0
        for member in members:
            member.first = first
            for index, module in member.memory.items():
                attachment.memory[first + int(index)] = module
            first += len(member.methods)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.remove()

    def _model(self) -> nn.Module:
        model = self.model()
        if model is None:
            raise PassError("the compressed model no longer exists")
        return model


@contextlib.contextmanager
def _reading(model: nn.Module) -> Iterator[None]:
    """Context of looking a model over: what it lacks makes it one that is not supported, whatever the slip is called.

    Raises:
        UnsupportedModel: in place of an AttributeError, KeyError, IndexError or TypeError that is none of ours.
    """
    from .adapters.hosts import library_of

    try:
        yield
    except VlmtokError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError) as problem:
        raise UnsupportedModel(
            f"{type(model).__name__} of {library_of(model)} is not built as its adapter expects "
            f"({type(problem).__name__}: {problem}); use a version of constraints.txt, or a newer vlmtok. "
            "`vlmtok doctor` tells which families run here"
        ) from problem


def _methods(method: Method | str | Sequence[Method | str]) -> list[Method]:
    items = list(method) if isinstance(method, Iterable) and not isinstance(method, str) else [method]
    methods: list[Method] = []
    for item in items:
        if isinstance(item, str):
            methods += parse_methods(item)
        elif isinstance(item, Method):
            methods.append(item)
        else:
            what = f"a model ({type(item).__name__}); it comes first" if isinstance(item, nn.Module) else repr(item)
            raise ParameterError(
                f"compress() takes methods or spec strings, got {what}"
                + ("; make an instance first" if isinstance(item, type) and issubclass(item, Method) else "")
            )
    if not methods:
        raise ParameterError("compress() needs at least one method")
    return methods


def _forget_compiled(model: nn.Module, why: str) -> None:
    """Resets Dynamo where the model has compiled code: it would not see hooks come or go."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    if _has_compiled(model, dynamo):
        dynamo.reset()
        warnings.warn(
            f"vlmtok.{why}: the model has compiled code, which does not see hooks come or go; Dynamo's caches were "
            "reset and the next call compiles again",
            VlmtokWarning,
            stacklevel=4,
        )


def _guard_hooks() -> None:
    """Makes Dynamo look at hooks in what it compiles from now on, in the whole process.

    All models of a class share compiled code, and by default it holds whatever hooks a model has: what was compiled
    for a bare twin later would run in place of a compressed model, and nobody would notice.
    """
    config: Any = importlib.import_module("torch._dynamo.config")
    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False


def _has_compiled(model: nn.Module, dynamo: Any) -> bool:
    """Whether Dynamo holds code of this model: its own, or that of a compiled function that calls it."""
    entries = dynamo.eval_frame._debug_get_cache_entry_list
    kinds = {type(module) for module in model.modules()}
    if any(entries(kind.forward.__code__) for kind in kinds if hasattr(kind.forward, "__code__")):
        return True
    # A caller's code took ours in; its guards name the classes of the modules they hold for.
    names = [repr(kind) for kind in kinds if not kind.__module__.startswith("torch.")]
    for reference in dynamo.convert_frame.input_codes.seen:
        code = reference()
        for entry in () if code is None else entries(code):
            guards = str(entry.guard_manager)
            if any(name in guards for name in names):
                return True
    return False


class Compression:
    """The handle of one `compress` call.

    The hooks own what they need: dropping the handle changes nothing. `remove()`, leaving ``with``, or
    `vlmtok.remove(model)` end the compression and give back the exact model.
    """

    def __init__(self, dispatcher: Dispatcher, member: Member) -> None:
        self._dispatcher = dispatcher
        self._member = member
        self._last = dispatcher.attachment

    # ------------------------------------------------------------------ lifetime
    def __deepcopy__(self, memo: dict[int, Any]) -> Compression:
        """The same handle: a copy of its model is bare and has none."""
        return self

    @property
    def active(self) -> bool:
        """Whether the hooks are still in place."""
        return self._member in self._dispatcher.members

    @guarded
    def remove(self) -> None:
        """Ends the compression; calling it again does nothing. Warns where the hooks never ran."""
        self._end()

    def _end(self, quiet: bool = False) -> None:
        self._last = self._attachment
        self._dispatcher.drop(self._member, quiet)

    @property
    def _attachment(self) -> Attachment:
        """What carries the methods now, or carried them last."""
        now = self._dispatcher.attachment if self.active else self._last
        assert now is not None
        return now

    def _model(self) -> nn.Module | None:
        return self._dispatcher.model()

    def __enter__(self) -> Compression:
        if not self.active:
            raise PassError("this compression has been removed; call vlmtok.compress(model, ...) again")
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._end(quiet=kind is not None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[Compression]:
        """Runs the model bare inside this ``with``, other compressions of it included."""
        attachment = self._attachment
        attachment.pauses += 1
        try:
            yield self
        finally:
            attachment.pauses -= 1

    # ------------------------------------------------------------------ what it did
    @property
    def methods(self) -> list[Method]:
        """The methods, in list order."""
        return list(self._member.methods)

    @property
    def layout(self) -> Layout:
        """What the model offers to methods."""
        return self._attachment.layout

    @guarded
    def report(self, total: bool = False) -> Report:
        """Tokens, MACs, FLOPs and cache bytes of the last pass, before and after.

        Args:
            total: of all passes instead.

        Returns:
            The report; print it, or take its `to_dict`, `to_markdown`, `to_csv`.
        """
        from .report import Report

        return Report.of(self._attachment, self._model(), total)

    @guarded
    def trace(self) -> Trace:
        """Which patch went where in the last pass.

        Raises:
            ParameterError: the compression was made without ``trace=True``.
            PassError: no pass has run.
        """
        from .trace import Trace

        return Trace.of(self._attachment)

    # ------------------------------------------------------------------ what methods learn
    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the methods brought (cross tokens, say); the model's own are not among them."""
        return self._member.memory.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names."""
        return self._member.memory.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of the methods."""
        return self._member.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` gave.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        self._member.memory.load_state_dict(state)

    def memory(self, index: int = 0) -> nn.Module | None:
        """The module that method `index` built, or None."""
        return self._attachment.remember(self._member.first + index)

    @guarded
    def row(self, index: int = 0, stage: str = "vision") -> MutableMapping[str, Any]:
        """What a method noted in `TokenView.row` during the last forward of a tower.

        Args:
            index: place of the method in its list.
            stage: ``vision`` or ``text``.

        Returns:
            The notes, `[B, ...]` each.

        Raises:
            PassError: that tower has not run.
        """
        driver = self._attachment.drivers.get(stage)
        if driver is None or driver.current is None:
            raise PassError(f"the {stage} tower has not run under this compression")
        notes: MutableMapping[str, Any] = driver.notes(self._member.first + index, self._member.methods[index].scope)
        return notes

    def reset(self) -> None:
        """Empties what methods gathered across forwards (modules with a `reset`)."""
        for module in self._member.memory.values():
            reset = getattr(module, "reset", None)
            if callable(reset):
                reset()

    def to(self, *args: Any, **kwargs: Any) -> Compression:
        """Moves the methods' modules, as `nn.Module.to`."""
        self._member.memory.to(*args, **kwargs)
        return self

    # ------------------------------------------------------------------ mistakes
    def __call__(self, *args: object, **kwargs: object) -> None:
        """Says that the handle is not the model."""
        raise TypeError(
            "this is the handle of a compression, not the model; call the model itself, the hooks are in it"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("generate", "forward", "encode_image", "forward_features", "get_image_features"):
            raise AttributeError(f"a Compression has no {name!r}: it is a handle; call the model itself")
        raise AttributeError(f"Compression has no attribute {name!r}")

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"<Compression of {' + '.join(map(str, self.methods))} on {self.layout.family}, {state}>"
