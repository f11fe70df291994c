"""`compress()` and `Compression`: how long a compression lasts, and nothing else."""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .attachment import Attachment, hooks_of, sweep
from .errors import ParameterError, PassError, SiteError, VlmtokWarning
from .method import Layout, Method, parse_methods
from .view import TokenView

if TYPE_CHECKING:
    from .report import Report
    from .trace import Trace


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

    Raises:
        UnsupportedModel: no adapter carries the model.
        SiteError: a method has no place to act there, or the model carries a compression already.
        MissingSignal: a method needs what the model cannot give.
        ParameterError: a method's settings do not fit the model.
        UnknownMethod, SpecError: of spec strings.
    """
    from .adapters import adapter_for
    from .adapters.account import meter

    methods = _methods(method)
    carrier = adapter_for(model, adapter)
    found = {id(hook.attachment): hook.attachment for *_, hook in hooks_of(carrier.model)}
    for attachment in found.values():
        if attachment is not None and attachment.active:
            names = " + ".join(map(str, attachment.methods))
            raise SiteError(
                f"this model already carries a compression ({names}); remove it first (vlmtok.remove(model)), or pass "
                "all methods in one list"
            )
    attachment = Attachment(methods, carrier.layout(), signals, trace)
    if not attachment.entries:
        raise SiteError(
            f"{' + '.join(map(str, methods))} has nothing to do on {carrier.layout().family}: no site is left"
        )
    sweep(carrier.model)
    _forget_compiled(carrier.model, "compress")
    try:
        carrier.install(attachment)
        meter(carrier, attachment)
    except BaseException:
        attachment.remove()
        raise
    return Compression(attachment, carrier.model)


def remove(model: nn.Module) -> int:
    """Ends every compression of a model, also where the handle is gone.

    Args:
        model: the model, wrapped or not.

    Returns:
        How many were ended.
    """
    found = {id(hook.attachment): hook.attachment for *_, hook in hooks_of(model) if hook.attachment is not None}
    live = [attachment for attachment in found.values() if attachment.active]
    for attachment in live:
        _end(attachment, model)
    sweep(model)
    return len(live)


def _methods(method: Method | str | Sequence[Method | str]) -> list[Method]:
    items = [method] if isinstance(method, (Method, str)) else list(method)
    methods: list[Method] = []
    for item in items:
        if isinstance(item, str):
            methods += parse_methods(item)
        elif isinstance(item, Method):
            methods.append(item)
        else:
            raise ParameterError(
                f"compress() takes methods or spec strings, got {item!r}"
                + ("; make an instance first" if isinstance(item, type) and issubclass(item, Method) else "")
            )
    if not methods:
        raise ParameterError("compress() needs at least one method")
    return methods


def _end(attachment: Attachment, model: nn.Module | None, quiet: bool = False) -> None:
    if not attachment.active:
        return
    attachment.remove()
    if model is not None:
        _forget_compiled(model, "remove")
    if not attachment.ledger.fired and not attachment.compiled and not quiet:
        warnings.warn(
            f"the hooks of {' + '.join(map(str, attachment.methods))} never ran; was the compressed model called?",
            VlmtokWarning,
            stacklevel=4,
        )


def _forget_compiled(model: nn.Module, why: str) -> None:
    """Resets Dynamo where the model has compiled code: it would not see hooks come or go."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    entries = dynamo.eval_frame._debug_get_cache_entry_list
    codes = {type(module).forward.__code__ for module in model.modules() if hasattr(type(module).forward, "__code__")}
    if any(entries(code) for code in codes):
        dynamo.reset()
        warnings.warn(
            f"vlmtok.{why}: the model has compiled code, which does not see hooks come or go; Dynamo's caches were "
            "reset and the next call compiles again",
            VlmtokWarning,
            stacklevel=4,
        )


class Compression:
    """The handle of one `compress` call.

    The hooks own what they need: dropping the handle changes nothing. `remove()`, leaving ``with``, or
    `vlmtok.remove(model)` end the compression and give back the exact model.
    """

    def __init__(self, attachment: Attachment, model: nn.Module) -> None:
        self._attachment = attachment
        self._model = weakref.ref(model)

    # ------------------------------------------------------------------ lifetime
    @property
    def active(self) -> bool:
        """Whether the hooks are still in place."""
        return self._attachment.active

    def remove(self) -> None:
        """Ends the compression; calling it again does nothing. Warns where the hooks never ran."""
        _end(self._attachment, self._model())

    def __enter__(self) -> Compression:
        if not self.active:
            raise PassError("this compression has been removed; call vlmtok.compress(model, ...) again")
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        _end(self._attachment, self._model(), quiet=kind is not None)

    @contextlib.contextmanager
    def paused(self) -> Iterator[Compression]:
        """Runs the model bare inside this ``with``."""
        self._attachment.pauses += 1
        try:
            yield self
        finally:
            self._attachment.pauses -= 1

    # ------------------------------------------------------------------ what it did
    @property
    def methods(self) -> list[Method]:
        """The methods, in list order."""
        return list(self._attachment.methods)

    @property
    def layout(self) -> Layout:
        """What the model offers to methods."""
        return self._attachment.layout

    def report(self, total: bool = False) -> Report:
        """Tokens, MACs, FLOPs and cache bytes of the last pass, before and after.

        Args:
            total: of all passes instead.

        Returns:
            The report; print it, or take its `to_dict`, `to_markdown`, `to_csv`.
        """
        from .report import Report

        return Report.of(self._attachment, self._model(), total)

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
        return self._attachment.memory.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names."""
        return self._attachment.memory.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers of the methods."""
        return self._attachment.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` gave.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        self._attachment.memory.load_state_dict(state)

    def memory(self, index: int = 0) -> nn.Module | None:
        """The module that method `index` built, or None."""
        return self._attachment.remember(index)

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
        notes: MutableMapping[str, Any] = driver.notes(index, self._attachment.methods[index].scope)
        return notes

    def reset(self) -> None:
        """Empties what methods gathered across forwards (modules with a `reset`)."""
        for module in self._attachment.memory.values():
            if hasattr(module, "reset"):
                module.reset()

    def to(self, *args: Any, **kwargs: Any) -> Compression:
        """Moves the methods' modules, as `nn.Module.to`."""
        self._attachment.memory.to(*args, **kwargs)
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
