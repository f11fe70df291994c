"""A knob as a widget of ipywidgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.settings import format_value
from ..core.spec import parse_value
from .knobs import STEP, Knob


class Control:
    """A slider, a box, a drop-down or a line of text, with a tick for None where that is possible.

    Args:
        knob: what is turned.

    Attributes:
        knob: what is turned.
        input: the widget that holds the value.
        none: the tick for None, or None.
        widget: all of it.
    """

    def __init__(self, knob: Knob) -> None:
        import ipywidgets as w

        self.knob = knob
        words = "strength" if knob.strength else "setting"
        how = {
            "description": knob.key,
            "tooltip": f"{words}: {knob.what}",
            "style": {"description_width": "6.5em"},
            "continuous_update": False,  # let go, then run
        }
        start = knob.value if knob.value is not None or not knob.values else knob.values[len(knob.values) // 2]
        if knob.kind == "share":
            low, high = knob.values[0], knob.values[-1]
            self.input = w.FloatSlider(value=start, min=low, max=high, step=STEP, readout_format=".3g", **how)
        elif knob.kind == "count":
            self.input = w.IntSlider(value=start, min=knob.values[0], max=knob.values[-1], **how)
        else:
            del how["continuous_update"]
            if knob.kind == "switch":
                self.input = w.Checkbox(value=knob.value, indent=True, **how)
            elif knob.kind == "choice":
                options = [(format_value(value), value) for value in knob.values]
                self.input = w.Dropdown(options=options, value=knob.value, **how)
            else:
                self.input = w.Text(value=knob.value, continuous_update=False, **how)
        self.none: Any = None
        self.widget: Any = self.input
        if knob.optional:
            self.none = w.Checkbox(value=knob.value is None, description="none", indent=False)
            self.none.layout.width = "5em"
            self.none.observe(self._switched, names="value")
            self._switched(None)
            self.widget = w.HBox([self.input, self.none])

    def _switched(self, _: Any) -> None:
        self.input.disabled = bool(self.none.value)

    def value(self) -> Any:
        """Where it stands.

        Raises:
            SpecError: what was typed is no value.
        """
        if self.none is not None and self.none.value:
            return None
        if self.knob.kind == "typed":
            return parse_value(self.input.value)
        if self.knob.kind == "share":
            return round(float(self.input.value), 6)
        return self.input.value

    def observe(self, call: Callable[[Any], None]) -> None:
        """Calls back when it is turned."""
        self.input.observe(call, names="value")
        if self.none is not None:
            self.none.observe(call, names="value")

    def close(self) -> None:
        """Takes it out of the page."""
        self.widget.close()
        self.input.close()
