"""`explore()`: a panel for notebooks, in which a method is turned and the overlay, the answer and the report follow."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from PIL import Image

from ..adapters import adapter_for
from ..core.method import Method
from ..core.registry import create_method
from ..core.spec import as_methods
from ..errors import MissingPackage, ParameterError, VlmtokWarning
from ..guard import guarded
from ..loading.models import Loaded
from ..loading.problems import line_of
from ..sheet import enlarged, png
from .compare import Comparing, default_method
from .comparison import Comparison
from .controls import Control
from .knobs import admitted, knobs


@guarded
def explore(
    model: Loaded,
    image: Image.Image | str | os.PathLike[str],
    prompt: str | None = None,
    method: str | Method | None = None,
    *,
    max_new_tokens: int = 32,
    live: bool = True,
    adapter: str | None = None,
) -> Explorer:
    """A panel of sliders for a notebook: turn a method, and see the overlay, the answer and the report follow.

    The bare model answers once. The model is bare again after each run.

    Args:
        model: from `vlmtok.load`.
        image: a PIL picture or the path of one.
        prompt: as for `vlmtok.compare`.
        method: where to begin; by default as `vlmtok.compare`.
        max_new_tokens: of the answers, which are greedy.
        live: run whenever a slider is let go; else the button runs.
        adapter: as for `vlmtok.compress`.

    Returns:
        The panel, which a notebook shows.

    Raises:
        MissingPackage: ipywidgets is not installed.
        ParameterError: several methods to begin with, or the prompt does not fit.
        LoadError: the picture cannot be read.
        VlmtokError: the method does not fit the model.
    """
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        raise MissingPackage("explore()", "ipywidgets") from None
    begin = as_methods(default_method(model.model, adapter) if method is None else method)
    if len(begin) != 1:
        raise ParameterError(f"explore() turns one method, got {len(begin)}: {' + '.join(map(str, begin))}")
    comparing = Comparing(model, image, prompt, max_new_tokens=max_new_tokens, adapter=adapter)
    comparing.check(begin[0])
    return Explorer(comparing, begin[0], live)


class Explorer:
    """The panel of `explore`.

    Attributes:
        panel: the widget as a whole.
        method: a drop-down of the methods that the model admits.
        controls: sliders and the like of its settings, by name; items of tuples as ``ratios[0]``.
        button: runs.
        spec: the spec string that was run last, or is refused.
        problem: why it could not run, on one line; empty where it did.
        comparison: the last outcome; None before the first and where a setting is refused.
    """

    def __init__(self, comparing: Comparing, begin: Method, live: bool) -> None:
        import ipywidgets as w

        self._comparing = comparing
        self._layout = adapter_for(comparing.model.model, comparing.adapter).layout()
        self._live, self._busy = live, False
        self.spec, self.problem = "", ""
        self.comparison: Comparison | None = None
        self.controls: dict[str, Control] = {}
        self._begin = begin
        names = sorted({*admitted(self._layout), begin.spec_name()})
        self.method = w.Dropdown(options=names, value=begin.spec_name(), description="method")
        self.button = w.Button(description="run", tooltip="run the model with these settings")
        self.settings, self.more = w.VBox(), w.Accordion([w.VBox()], titles=("more settings",))
        self.status, self.answer, self.report = w.HTML(), w.HTML(), w.HTML()
        self.picture = w.Image(format="png", layout=w.Layout(max_width="100%"))
        details = w.Accordion([self.report], titles=("report",))
        turned = w.VBox([self.method, self.settings, self.more, self.button, self.status])
        shown = w.VBox([self.picture, self.answer, details])
        self.panel = w.HBox([turned, shown], layout=w.Layout(flex_flow="row wrap"))
        self.method.observe(self._changed_method, names="value")
        self.button.on_click(lambda _: self.run())
        self._turn_to(begin)
        self.run()

    # ------------------------------------------------------------------ what is turned
    def _changed_method(self, change: Any) -> None:
        same = change["new"] == self._begin.spec_name()
        self._turn_to(self._begin if same else create_method(change["new"]))
        if self._live:
            self.run()

    def _turn_to(self, method: Method) -> None:
        """Puts up the controls of a method: its strength, layers and counts, and the rest folded away."""
        self._base = method
        made = [Control(knob) for knob in knobs(method, self._layout)]
        for old in self.controls.values():
            old.close()
        self.controls = {control.knob.key: control for control in made}
        first = [c for c in made if c.knob.strength or c.knob.kind == "count"]
        first = first or made[:1]
        rest = [c for c in made if c not in first]
        import ipywidgets as w

        self.settings.children = [control.widget for control in first]
        self.more.children = [w.VBox([control.widget for control in rest])]
        self.more.layout.display = None if rest else "none"
        for control in made:
            control.observe(self._turned)

    def _turned(self, _: Any) -> None:
        if self._live:
            self.run()

    def turned(self) -> Method:
        """The method as the controls stand.

        Raises:
            ParameterError, SpecError: the settings are not possible.
        """
        changed: dict[str, Any] = {}
        for control in self.controls.values():
            name, place = control.knob.name, control.knob.place
            if place is None:
                changed[name] = control.value()
            else:
                changed[name] = (*changed.get(name, ()), control.value())
        return replace(self._base, **changed)

    # ------------------------------------------------------------------ what follows
    def run(self) -> None:
        """Runs the model as the controls stand; what goes wrong is shown in the panel, on one line."""
        if self._busy:
            return
        with self._at_work():
            method = self.turned()
            self.spec = str(method)
            self._say(f"running {self.spec} ...")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", VlmtokWarning)
                self.comparison = self._comparing.with_method(method, rounds=0)
            notes = [str(warning.message) for warning in said if issubclass(warning.category, VlmtokWarning)]
            self._show(self.comparison, notes)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self._busy, self.button.disabled = True, True
        self.problem, self.comparison = "", None
        try:
            yield
        except Exception as problem:  # whatever it is, a traceback behind a slider helps nobody
            self.comparison = None
            self.problem = line_of(problem)
            self._clear()
        finally:
            self._busy, self.button.disabled = False, False

    def _show(self, found: Comparison, notes: list[str]) -> None:
        self.picture.value = b"" if found.overlay is None else png(found.overlay)
        if found.overlay is not None:
            self.picture.layout.width = f"{enlarged(found.overlay)}px"
        self.picture.layout.display = None if found.overlay is not None else "none"
        self.answer.value = replace(found.sheet(), picture=None).html()
        self.report.value = found.report.to_html()
        self._say(self.spec, *notes)

    def _clear(self) -> None:
        """Figures of other settings are none of these."""
        self.picture.value, self.answer.value, self.report.value = b"", "", ""
        self.picture.layout.display = "none"
        self._say(f"error: {self.problem}")

    def _say(self, *lines: str) -> None:
        self.status.value = "<br>".join(f"<code>{html.escape(line)}</code>" for line in lines)

    # ------------------------------------------------------------------ in a notebook
    def _repr_mimebundle_(self, **how: Any) -> Any:
        return self.panel._repr_mimebundle_(**how)

    def __repr__(self) -> str:
        state = f"error: {self.problem}" if self.problem else self.spec
        return f"<Explorer of {self._comparing.model.name}: {state}>"
