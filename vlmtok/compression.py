"""`compress()` and `Compression`: how long a compression lasts, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .core.acting import acting
from .core.attachment import Attachment
from .core.hooks import sweep
from .core.method import Method
from .core.site import Layout
from .core.spec import as_methods
from .core.view import TokenView
from .dispatcher import CompressCall, Dispatcher, dispatcher_of, reading_host
from .errors import ParameterError, PassError, SiteError
from .guard import guarded
from .sheet import Sheet, Shown

if TYPE_CHECKING:
    from .core.trace import Trace
    from .cost.report import Report


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
    from .adapters import adapter_for, check_alone

    methods = as_methods(method)
    if signals is not None and not (isinstance(signals, Mapping) and all(map(callable, signals.values()))):
        raise ParameterError(f"compress() takes signals as functions of the view by name, got signals={signals!r}")
    with reading_host(model):
        carrier = adapter_for(model, adapter)
        check_alone(carrier)
    sweep(carrier.model)
    dispatcher = dispatcher_of(carrier.model) or Dispatcher(carrier.model, adapter)
    part = dispatcher.model()
    if part is not carrier.model and any(module is part for module in carrier.model.modules()):
        raise SiteError(
            f"a part of this model, its {type(part).__name__}, carries another compression already; remove that one "
            "first (vlmtok.remove(model)), and compress the whole model with all methods"
        )
    return Compression(dispatcher, dispatcher.add(methods, dict(signals or {}), trace))


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
    dispatcher = dispatcher_of(model)
    count = 0 if dispatcher is None else len(dispatcher.members)
    if dispatcher is not None:
        for member in list(dispatcher.members):
            dispatcher.drop(member)
    sweep(model)
    return count


def carried(model: nn.Module) -> list[Compression]:
    """New handles of the compressions that a model carries, in the order in which they were placed."""
    dispatcher = dispatcher_of(model)
    return [] if dispatcher is None else [Compression(dispatcher, member) for member in dispatcher.members]


class Compression(Shown):
    """The handle of one `compress` call.

    The hooks own what they need: dropping the handle changes nothing. `remove()`, leaving ``with``, or
    `vlmtok.remove(model)` end the compression and give back the exact model.
    """

    def __init__(self, dispatcher: Dispatcher, member: CompressCall) -> None:
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
        from .cost.report import Report

        return Report.of(self._attachment, self._model(), total)

    @guarded
    def trace(self) -> Trace:
        """Which patch went where in the last pass.

        Raises:
            ParameterError: the compression was made without ``trace=True``.
            PassError: no pass has run.
        """
        from .core.trace import Trace

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

    def sheet(self) -> Sheet:
        """Methods at their sites, and how often they were asked."""
        carried, first = self._attachment, self._member.first
        table = acting(carried, range(first, first + len(self._member.methods)))
        title = f"{' + '.join(map(str, self.methods))} on {self.layout.family}, {self._state}"
        return Sheet(title, tables=[table], notes=carried.said)

    @property
    def _state(self) -> str:
        return "active" if self.active else "removed"

    def __repr__(self) -> str:
        return f"<Compression of {' + '.join(map(str, self.methods))} on {self.layout.family}, {self._state}>"

    __str__ = __repr__  # it is printed in the middle of other lines
