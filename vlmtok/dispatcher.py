"""All compressions of one model: which methods are active, and the one attachment that carries them."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .core.attachment import Attachment
from .core.hooks import hooks_of
from .core.method import Method
from .core.view import TokenView
from .errors import PassError, SiteError, UnsupportedModel, VlmtokError, VlmtokWarning


def dispatcher_of(model: nn.Module) -> Dispatcher | None:
    """Who placed the live hooks of a model."""
    for *_, hook in hooks_of(model):
        if hook.attachment is not None and hook.attachment.active:
            found: Dispatcher | None = hook.attachment.owner
            if found is not None:  # an encoder of `vlmtok.serving` places hooks of nobody's
                return found
    return None


@dataclass(eq=False)
class CompressCall:
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
        self.members: list[CompressCall] = []
        self.attachment: Attachment | None = None

    def add(
        self, methods: list[Method], signals: dict[str, Callable[[TokenView], Tensor]], trace: bool
    ) -> CompressCall:
        """Adds a compression; the model is left as it was where that fails."""
        member = CompressCall(methods, signals, trace)
        attachment = self._attach([*self.members, member])
        self._check(attachment, member)
        for index, method in enumerate(methods):
            module = method.build(attachment.layout)
            if module is not None:
                member.memory[str(index)] = module
        self._replace(attachment, [*self.members, member], "compress")
        return member

    def drop(self, member: CompressCall, quiet: bool = False) -> None:
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

    def has_fired(self, member: CompressCall) -> bool:
        """Whether any hook of a member ran."""
        if member.fired or self.attachment is None or self.attachment.compiled:
            return True
        own = range(member.first, member.first + len(member.methods))
        return any(key[3] in own for key in self.attachment.ledger.fired)

    def _attach(self, members: list[CompressCall]) -> Attachment:
        """The attachment of some members, its hooks not placed yet."""
        from .adapters import adapter_for

        signals = {name: make for member in members for name, make in member.signals.items()}
        methods = [method for member in members for method in member.methods]
        with reading_host(self._model()):
            layout = adapter_for(self._model(), self.adapter).layout()
        return Attachment(methods, layout, signals, any(member.trace for member in members), owner=self)

    def _check(self, attachment: Attachment, member: CompressCall) -> None:
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

    def _replace(self, attachment: Attachment, members: list[CompressCall], why: str) -> None:
        """Puts an attachment in the place of the one before."""
        from .adapters import adapter_for
        from .adapters.meter import meter

        for member in self.members:
            member.fired = self.has_fired(member)
        before, pauses = self.attachment, 0 if self.attachment is None else self.attachment.pauses
        _forget_compiled(self._model(), why)
        _guard_hooks()
        if before is not None:
            before.suspend()
        try:
            with reading_host(self._model()):
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
def reading_host(model: nn.Module) -> Iterator[None]:
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
