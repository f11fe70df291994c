"""`budget()`: a method set to a number of tokens, of MACs or of cache bytes, under a convention that has a name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..core.method import Method
from ..core.spec import as_methods
from ..cost.conventions import convention as named
from ..cost.report import Report
from ..cost.units import quantity, whole
from ..errors import MissingSignal, NotCounted, ParameterError, SiteError, TargetError
from ..guard import guarded
from ..sheet import Sheet, Shown
from ..tabular import Table
from .estimate import estimate
from .prompt import Asked, prompt_of
from .subject import Subject, subject_of

WITHIN = 0.01
"""How far from its target a budget may be, as a share of it."""
_STEPS = 40
_UNITS = {"tokens": "tokens", "layer_average_tokens": "tokens", "macs": "MACs", "kv_bytes": "bytes"}


@dataclass(frozen=True)
class Budget(Shown):
    """What was asked of `budget`, and what its method reaches.

    Attributes:
        what: the quantity that was set, with the convention if one was given.
        unit: of it.
        asked: the target.
        reached: by the method.
        bare: by the model without it.
        tokens: visual tokens that the last layer leaves.
        layer_average_tokens: visual tokens, mean over layers.
        model: preset or class.
        notes: what to know: which stages depend on content, and so entered as if they dropped nothing.
    """

    what: str
    unit: str
    asked: float
    reached: float
    bare: float
    tokens: float
    layer_average_tokens: float
    model: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        reached, asked = quantity(self.reached, self.unit), quantity(self.asked, self.unit)
        mean = whole(self.layer_average_tokens)
        tokens = f"visual tokens: {whole(self.tokens)} at the end, {mean} on average over layers"
        return "; ".join((f"{self.what} = {reached} on {self.model}, {asked} asked", tokens, *self.notes))

    def sheet(self) -> Sheet:
        """What was asked and reached."""
        cells = [self.what, *(quantity(value, self.unit) for value in (self.bare, self.asked, self.reached))]
        left = [whole(self.tokens), whole(self.layer_average_tokens)]
        head = ["", "bare", "asked", "reached", "tokens at the end", "tokens, mean over layers"]
        return Sheet(f"a budget on {self.model}", tables=[Table(head, [[*cells, *left]])], notes=self.notes)

    def __repr__(self) -> str:
        reached, asked = quantity(self.reached, self.unit), quantity(self.asked, self.unit)
        return f"<Budget: {self.what} = {reached} on {self.model}, {asked} asked>"


@guarded
def budget(
    method: Method | str,
    model: Any,
    *,
    tokens: float | int | None = None,
    layer_average_tokens: float | int | None = None,
    macs: float | int | None = None,
    kv_bytes: float | int | None = None,
    convention: str | None = None,
    within: float = WITHIN,
    **prompt: Any,
) -> Method:
    """Sets a method to a budget: one of its parameters (`Method.budget_parameter`) is moved until an estimate meets it.

    "128 tokens" means different things in different papers. Here `tokens` are those left at the end (FastV with
    keep=128), `layer_average_tokens` the mean over layers (FastV with K = 2 and 144 of 576 tokens kept has
    (2 x 576 + 30 x 144) / 32 = 171). Exactly one target is given: a number, or a float in (0, 1] as a share of the bare
    model.

    Args:
        method: a method or a spec string; the rest of its settings stays.
        model: as for `estimate`.
        tokens: visual tokens of a prompt behind the last layer; of a row, for a lone tower.
        layer_average_tokens: visual tokens that a layer gets, mean over the language model's layers (a lone tower's).
        macs: MACs of towers, projector and prefill, with signals and the method's own cost; with `convention` the
            figure of that convention, in its unit.
        kv_bytes: bytes of the key-value cache that stay behind the prefill, all rows, padding included.
        convention: how `macs` are counted, see `vlmtok.cost.conventions`.
        within: how far from the target its method may be, as a share of it.
        prompt: arguments of `estimate` (`text_tokens`, `pictures`, `batch`, `visual_tokens`, `image_size`, ...).

    Returns:
        A new method that meets the target within 1 percent (or `within`); its attribute `budget` (see `Budget`) says
        what it reaches. Stages whose counts depend on content enter as if they dropped nothing, and it says so.

    Raises:
        TargetError: no setting comes so near; the message names the nearest.
        ParameterError: no target or several, or the method has no parameter to move.
        NotCounted: `macs`, and part of the model is not counted.
        UnsupportedModel, SiteError, MissingSignal: as `compress`.
    """
    methods = as_methods(method)
    if len(methods) != 1:
        raise ParameterError(f"budget() sets one method, got {len(methods)}: {' + '.join(map(str, methods))}")
    given = {"tokens": tokens, "layer_average_tokens": layer_average_tokens, "macs": macs, "kv_bytes": kv_bytes}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        raise ParameterError(f"budget() takes one target of {', '.join(given)}; got {', '.join(asked) or 'none'}")
    ((what, value),) = asked.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ParameterError(f"budget: {what}={value!r} is not possible; a number above 0, or a share in (0, 1]")
    if convention is not None and what != "macs":
        raise ParameterError(f"budget: a convention counts macs, not {what}")
    subject = subject_of(model, prompt.pop("processor", None))
    shape = subject.shape
    missing = [one.what for one in shape.uncounted if not one.apart]
    if missing and what == "macs" and convention is None:
        raise NotCounted(
            f"budget: {shape.name} has no total to set macs to: {'; '.join(missing)}. Set tokens, "
            "layer_average_tokens or kv_bytes, or macs by a convention that does not count it"
        )
    if isinstance(within, bool) or not isinstance(within, (int, float)) or not 0 < within < 1:
        raise ParameterError(f"budget: within={within!r} is not possible; a share in (0, 1)")
    return _Search(methods[0], subject, what, convention, prompt, within).run(value)


@dataclass
class _Try:
    """A setting and what it reaches; no report where an estimate refuses it."""

    method: Method
    report: Report | None = None
    reached: float = 0.0


class _Search:
    """Bisection over `Method.at_level`."""

    def __init__(
        self,
        method: Method,
        subject: Subject,
        what: str,
        convention: str | None,
        prompt: dict[str, Any],
        within: float = WITHIN,
    ) -> None:
        self.within = within
        self.method = method
        self.subject = subject
        self.shape = subject.shape
        self.what = what
        self.convention = convention
        self.prompt = prompt
        self.unit = _UNITS[what] if convention is None else named(convention).unit
        self.deciding = what == "macs" and convention is None
        self.extra = 0.0
        known = {name: value for name, value in prompt.items() if name in Asked.__dataclass_fields__}
        laid = prompt_of(subject, Asked(**known))[0]
        self.tokens = max(picture.tokens for picture in laid.shown) or laid.patches

    def run(self, value: float | int) -> Method:
        """The method that meets the target."""
        ends = [self._at(0.0), self._at(1.0)]
        bare = self._bare(ends)
        share = isinstance(value, float) and value <= 1
        target = value * bare if share else float(value)
        best = self._bisect(target)
        # What deciding costs moves little with the level: it is counted for each setting that it led to.
        for _ in range(4 if self.deciding else 0):
            full = self._estimate(best.method, deciding=True)
            before, self.extra = self.extra, sum(full.line(name).after.high for name in ("signals", "method"))
            if abs(self.extra - before) <= 0.1 * WITHIN * target:
                break
            best = self._bisect(target)
        best = self._short(best, target)
        if self.deciding:
            best = self._seen(best.method, deciding=True)
        assert best.report is not None
        if abs(best.reached - target) > self.within * target:
            low = ends[0].reached if ends[0].report is not None else best.reached
            lowest = quantity(low, self.unit).removesuffix(" tokens")
            raise TargetError(
                f"{self.method} on {self.shape.name} cannot be set to {self.what} = {quantity(target, self.unit)} by "
                f"{self.method.budget_parameter}: the nearest is {quantity(best.reached, self.unit)} with "
                f"{best.method} (possible: {lowest} to {quantity(bare, self.unit)})"
            )
        made = dataclasses.replace(best.method)
        made.budget = Budget(
            self.what if self.convention is None else f"{self.what} by {self.convention}",
            self.unit,
            target,
            best.reached,
            bare,
            measure(best.report, "tokens")[1],
            measure(best.report, "layer_average_tokens")[1],
            self.shape.name,
            tuple(f"{site} depends on content and enters as if it dropped nothing" for site in best.report.open),
        )
        return made

    # ------------------------------------------------------------------ searching
    def _bisect(self, target: float) -> _Try:
        """The setting nearest to a target."""
        low, high = 0.0, 1.0
        best: _Try | None = None
        for level in (low, high, *[None] * _STEPS):
            at = (low + high) / 2 if level is None else level
            tried = self._at(at)
            if tried.report is not None and (best is None or _apart(tried, target) < _apart(best, target)):
                best = tried
            if level is None:
                low, high = (at, high) if tried.reached < target else (low, at)
        assert best is not None
        return best

    def _short(self, best: _Try, target: float) -> _Try:
        """The same with as few digits as do."""
        name = best.method.budget_parameter
        for digits in range(2, 7):
            value = _rounded(getattr(best.method, name), digits)
            try:
                tried = self._seen(dataclasses.replace(best.method, **{name: value}))
            except (ParameterError, SiteError, MissingSignal):
                continue
            if _apart(tried, target) <= max(_apart(best, target), 0.1 * WITHIN * target):
                return tried
        return best

    def _bare(self, ends: list[_Try]) -> float:
        for tried in ends:
            if tried.report is not None:
                return measure(tried.report, self.what, self.convention)[0]
        made = self.method.at_level(0.5, self.shape.layout, self.tokens)
        return measure(self._estimate(made), self.what, self.convention)[0]

    # ------------------------------------------------------------------ one setting
    def _at(self, level: float) -> _Try:
        """A level; too strong ones count as 0, those that leave nothing to do as infinite."""
        try:
            made = self.method.at_level(level, self.shape.layout, self.tokens)
        except ParameterError:
            if not 0.0 < level < 1.0:
                self.method.at_level(0.5, self.shape.layout, self.tokens)  # says so where no level is possible
            return _Try(self.method, reached=0.0 if level < 0.5 else float("inf"))
        try:
            return self._seen(made)
        except (SiteError, MissingSignal, ParameterError):  # the last: it does not fit the picture's grid
            if level == 0.0:  # the strongest setting always has something to do, so this is the model
                raise
            return _Try(made, reached=float("inf"))

    def _seen(self, made: Method, deciding: bool = False) -> _Try:
        report = self._estimate(made, deciding)
        reached = measure(report, self.what, self.convention)[1]
        return _Try(made, report, reached if deciding else reached + self.extra)

    def _estimate(self, made: Method, deciding: bool = False) -> Report:
        return estimate(self.subject, made, deciding=deciding, **self.prompt)


def measure(report: Report, what: str, convention: str | None = None) -> tuple[float, float]:
    """A quantity of `budget`: bare, and with the method (what depends on content drops nothing).

    Args:
        report: of a run or an estimate.
        what: ``tokens``, ``layer_average_tokens``, ``macs`` or ``kv_bytes``.
        convention: how macs are counted.

    Raises:
        ParameterError: the model has no such quantity.
    """
    if what == "macs":
        line = report.macs if convention is None else report.by(convention)
        return line.before, line.after.high
    if what == "kv_bytes":
        if report.cache is None:
            raise ParameterError(f"budget: {report.model} has no key-value cache")
        return report.cache.before, report.cache.after.high
    lines = report.last_layers()
    bare, left = report.visual(lines[0].stage if lines else "vision")
    if what == "tokens":
        return bare, left
    return bare, sum(line.visual.high for line in lines) / len(lines)


def _apart(tried: _Try, target: float) -> float:
    return abs(tried.reached - target)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rounded(one, digits) for one in value)
    return round(value, digits) if isinstance(value, float) else value
