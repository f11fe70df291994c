"""`Method`, `Site` and `Layout`: the contract between a method and the core, the registry, and spec strings."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import importlib.metadata
import math
import pkgutil
import re
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import ParameterError, SiteError, SpecError, UnknownMethod, VlmtokWarning, hint
from .guard import guarded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .reduction import Reduction
    from .view import TokenView

STAGES = ("vision", "features", "projected", "decoder", "text")
"""Stages in the order in which a forward passes them (``text`` is the text tower of a dual encoder)."""
LAYERED = ("vision", "decoder", "text")
"""Stages that have layers; the others are a single moment."""
POINTS = ("start", "mid", "end")
SCOPES = ("picture", "part", "sample")
POSITIONS = ("keep", "renumber")


@dataclass(frozen=True)
class Site:
    """A place where a method acts or observes.

    Attributes:
        stage: ``vision``, ``features``, ``projected``, ``decoder`` or ``text``.
        layer: 0-based block; None for ``features`` and ``projected``.
        point: ``start``, ``mid`` (between attention and MLP, towers only) or ``end`` of the block.
        needs: signals, by name (``"keys"``) or with a place (``"cls_attention@vision:-1"``).
        positions: ``keep`` or ``renumber``, what happens to the position ids of what stays; None means the stage's
            default: renumber at ``features`` and ``projected``, keep in the decoder.
        scope: what one view row is; None means the method's.
    """

    stage: str
    layer: int | None = None
    point: str = "end"
    needs: tuple[str, ...] = ()
    positions: str | None = None
    scope: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise SiteError(f"stage {self.stage!r} does not exist; stages: {', '.join(STAGES)}")
        if self.point not in POINTS:
            raise SiteError(f"point {self.point!r} does not exist; points: {', '.join(POINTS)}")
        if (self.layer is not None) != (self.stage in LAYERED):
            raise SiteError(f"stage {self.stage!r} {'needs a' if self.stage in LAYERED else 'has no'} layer")
        if self.positions not in (None, *POSITIONS):
            raise SiteError(f"positions {self.positions!r}: one of {', '.join(POSITIONS)}")
        if self.scope not in (None, *SCOPES):
            raise SiteError(f"scope {self.scope!r}: one of {', '.join(SCOPES)}")

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"{self.stage} layer {self.layer} {self.point}"


def layer_of(layer: int | None, point: str) -> int:
    """The first layer that runs with what a decoder site leaves."""
    return (layer or 0) + (point == "end")


@dataclass(frozen=True)
class Counts:
    """A view as host ints: what `Method.count` decides on.

    Attributes:
        site: where the method acts.
        n: tokens of a view row that arrive.
        entered: tokens of the row when it entered the stage.
        num_prefix: protected tokens in front.
        depth: layers of the stage.
        grid: rows and columns of the patches, or None where there is no single grid.
    """

    site: Site
    n: int
    entered: int
    num_prefix: int = 0
    depth: int = 1
    grid: tuple[int, int] | None = None

    @property
    def layer(self) -> int:
        """The site's layer; 0 where the stage has none."""
        return self.site.layer or 0


@dataclass(frozen=True)
class StageLayout:
    """What one stage of a model offers.

    Attributes:
        depth: layers (1 for a stage without layers).
        width: channels of a token.
        heads: attention heads (0 for a stage without layers).
        last: the last layer whose output is used; later sites are skipped.
        points: points at which a method may act.
        provides: signals that can be derived at this stage.
        num_prefix: protected tokens in front of a row.
        blind: layers whose attention gives no signal.
        last_cut: the last layer at whose start tokens may leave; None means any.
        carries: whether signals of this stage reach later ones, or which do.
        renumbers: whether position ids can become contiguous; not where they are places in a picture (M-RoPE).
        why: why signals are missing that others of its kind give; empty where none are.
    """

    depth: int
    width: int
    heads: int
    last: int
    points: frozenset[str] = frozenset({"end"})
    provides: frozenset[str] = frozenset()
    num_prefix: int = 0
    blind: frozenset[int] = frozenset()
    last_cut: int | None = None
    carries: bool | frozenset[str] = True
    renumbers: bool = True
    why: str = ""


@dataclass(frozen=True)
class Layout:
    """What a model offers to methods: its stages and their signals.

    Attributes:
        family: name of the adapter that carries the model.
        stages: stage name to `StageLayout`.
        without: why stages are missing that others of its kind have.
    """

    family: str
    stages: Mapping[str, StageLayout] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    def has(self, stage: str) -> bool:
        """Whether the model has this stage."""
        return stage in self.stages

    def stage(self, name: str, by: str = "this method") -> StageLayout:
        """The stage of that name.

        Raises:
            SiteError: the model has none.
        """
        if name not in self.stages:
            why = f" ({self.without[name]})" if name in self.without else ""
            raise SiteError(
                f"{by} acts at stage {name!r}, which {self.family} does not offer{why}; it offers: "
                f"{', '.join(self.stages)}"
            )
        return self.stages[name]

    def gives(self, stage: str, signal: str, later: bool = False) -> bool:
        """Whether `signal` can be derived at `stage`, and, if asked, reach a later stage."""
        if stage not in self.stages:
            return False
        reach = self.stages[stage].carries
        if later and not (signal in reach if isinstance(reach, frozenset) else reach):
            return False
        return signal in self.stages[stage].provides

    def positions(self, stage: str, asked: str | None, released: str = "renumber") -> str:
        """What becomes of position ids at a stage, for a method that leaves it to the model unless asked.

        Args:
            stage: a stage of the model.
            asked: ``keep``, ``renumber``, or None for what was released, where the model can.
            released: ``keep`` or ``renumber``.

        Returns:
            ``keep`` or ``renumber``.
        """
        if asked is not None:
            return asked
        return released if self.stages[stage].renumbers else "keep"

    def layers(self, stage: str, layers: Any = None, by: str = "this method") -> list[int]:
        """Resolves a `layers` parameter: None for all that matter, an int, or several; negatives count from the end.

        Args:
            stage: a stage with layers.
            layers: None, int, or a sequence of ints.
            by: who asks, for the error.

        Returns:
            Ascending 0-based layers up to ``last`` (later ones are skipped: nobody reads their output).

        Raises:
            SiteError: a layer does not exist.
        """
        layout = self.stage(stage, by)
        if layers is None:
            return list(range(layout.last + 1))
        asked = [layers] if isinstance(layers, int) else list(layers)
        found = []
        for layer in asked:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -layout.depth <= layer < layout.depth:
                raise SiteError(
                    f"{by}: layer {layer!r} does not exist; {stage} of {self.family} has layers 0 to "
                    f"{layout.depth - 1} (negative ones count from the end)"
                )
            found.append(layer % layout.depth)
        return sorted({layer for layer in found if layer <= layout.last})


class Method:
    """Base class of every token-reduction method: settings and tensor maths, no model.

    A subclass is a dataclass (``eq=False``) decorated with `register_method`. It names its sites and answers
    each view with a `Reduction`. See CONTRIBUTING for a worked example.
    """

    name: ClassVar[str] = ""
    """Name in the registry and in spec strings; the class name in lower case unless given."""
    paper: ClassVar[str] = ""
    """Title of the paper and where it appeared."""
    arxiv: ClassVar[str] = ""
    """arXiv number."""
    code: ClassVar[str] = ""
    """Official code, or empty."""
    training_free: ClassVar[bool] = True
    """Whether the method works on a released checkpoint as it is."""
    parity: ClassVar[str] = ""
    """What our implementation has been compared with."""
    deviations: ClassVar[tuple[str, ...]] = ()
    """Where it differs from the released code, one sentence each."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """Where it does badly by its nature, with the measurement and the reason."""
    scope: ClassVar[str] = "picture"
    """What one view row is: ``picture``, ``part`` (crop or frame) or ``sample``; a site may override it."""
    proportional: bool = False
    """Whether attention logits get + log(size) in towers after a merge."""
    budget_parameter: ClassVar[str] = ""
    """The parameter that `vlmtok.budget` moves; empty where there is none."""
    budget: Any = None
    """What `vlmtok.budget` was asked and reached, on the methods that it returns."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings from a sweep may be NumPy's numbers; they become Python's, as specs and checks know them."""
        super().__setattr__(name, _plain(value))

    # ------------------------------------------------------------------ what a method says
    def sites(self, layout: Layout) -> list[Site]:
        """Where the method wants to act on a model.

        Args:
            layout: what the model offers.

        Returns:
            Sites in any order; they are visited in the order of the forward.
        """
        raise NotImplementedError

    def reduce(self, view: TokenView) -> Reduction | None:
        """Decides what stays. Runs under no_grad, in prefill only; no ``.item()``; works on meta tensors.

        Args:
            view: the tokens and their signals.

        Returns:
            The reduction, or None to leave the tokens as they are.
        """
        raise NotImplementedError

    def count(self, counts: Counts) -> int | None:
        """How many slots `reduce` returns.

        Args:
            counts: the view as host ints.

        Returns:
            The number (`counts.n` where nothing is cut), or None where it depends on content.
        """
        return counts.n

    def insert(self, view: TokenView) -> Tensor | None:
        """Tokens to put at the end of the row for one block; asked at ``start`` sites.

        Args:
            view: the tokens; the signal ``inserted`` holds the outputs of this method's previous insert.

        Returns:
            `[B, E, C]`, or None.
        """
        return None

    def build(self, layout: Layout) -> nn.Module | None:
        """Parameters and buffers that live across forwards; owned by the attachment.

        Args:
            layout: what the model offers.

        Returns:
            A module, or None.
        """
        return None

    def finish(self, logits: Tensor, row: MutableMapping[str, Any], memory: nn.Module | None) -> Tensor:
        """Corrects class logits after a forward; called by `vlmtok.zero_shot`, never by a hook.

        Args:
            logits: `[B, classes]`.
            row: this method's row dict of the last forward.
            memory: what `build` made.

        Returns:
            `[B, classes]`.
        """
        return logits

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """The same method at another strength; what `vlmtok.budget` searches over.

        Args:
            level: from 0 (as much as the method can) to 1 (as little); a higher level never leaves fewer tokens.
            layout: what the model offers.
            tokens: visual tokens of a picture.

        Returns:
            A new method.

        Raises:
            ParameterError: the method has no such parameter, or it is None.
        """
        name = self.budget_parameter
        if not name or getattr(self, name) is None:
            why = f"{name}=None leaves the number to the method" if name else "it has no parameter for it"
            raise ParameterError(f"{self}: a budget cannot be set, {why}; parameters: {', '.join(self.settings())}")
        value = scaled(getattr(self, name), level, tokens)
        return dataclasses.replace(self, **{name: value})  # type: ignore[type-var]

    # ------------------------------------------------------------------ text form
    @classmethod
    def spec_name(cls) -> str:
        """Name in the registry and in spec strings."""
        return cls.__dict__.get("name") or cls.__name__.lower()

    def settings(self) -> dict[str, Any]:
        """The parameters, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    def __str__(self) -> str:
        changed = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            if item.init and (value != default or type(value) is not type(default)):
                changed.append(f":{item.name}={format_value(value)}")
        return self.spec_name() + "".join(changed)


def _plain(value: Any) -> Any:
    """A setting with Python's numbers in place of NumPy's."""
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


# ---------------------------------------------------------------------- checks shared by methods
def check_keep(keep: float | int, by: str, name: str = "keep") -> float | int:
    """Checks a `keep` parameter: a float in (0, 1] is a share, an int >= 1 a count.

    Raises:
        ParameterError: anything else, bool included.
    """
    fine = (isinstance(keep, float) and 0.0 < keep <= 1.0) or (isinstance(keep, int) and keep >= 1)
    if isinstance(keep, bool) or not fine:
        raise ParameterError(
            f"{by}: {name}={keep!r} is not possible; a float in (0, 1] is a share of the tokens that arrive, "
            "an int >= 1 a count"
        )
    return keep


def keep_count(keep: float | int, n: int) -> int:
    """How many of n tokens `keep` leaves: a share rounds half up, at least 1; a count is capped at n.

    Args:
        keep: as checked by `check_keep`.
        n: tokens that arrive.

    Returns:
        A number between 0 (only for n = 0) and n.
    """
    wanted = int(keep * n + 0.5) if isinstance(keep, float) else keep
    return min(n, max(1, wanted))


def scaled(value: Any, level: float, tokens: int) -> Any:
    """A `keep` parameter, or several, at a level of reduction.

    Args:
        value: a share (float), a count (int), or a sequence of them.
        level: from 0 (almost nothing is kept) to 1 (everything).
        tokens: that a count of everything would be.

    Returns:
        The level itself for a share, its part of `tokens` for a count. A sequence becomes shares, all times one factor
        and at most 1; at level 1/2 they are what they were.
    """
    if isinstance(value, (tuple, list)):
        factor = level / max(1.0 - level, 1e-9)
        shares = (one if isinstance(one, float) else one / tokens for one in value)
        return type(value)(min(1.0, max(1e-9, share * factor)) for share in shares)
    if isinstance(value, int):
        return max(1, round(level * tokens))
    return max(level, 1e-9)


def check_range(
    value: Any, by: str, name: str, low: float = float("-inf"), high: float = float("inf"), kind: type = float
) -> None:
    """Checks a number.

    Args:
        value: what the user gave.
        by: the method's name.
        name: the parameter's name.
        low: smallest value allowed.
        high: largest value allowed.
        kind: `int` or `float` (an int is a float too; bool is neither).

    Raises:
        ParameterError: not a finite number of that kind, or outside.
    """
    number = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not number or not math.isfinite(value) or not low <= value <= high:
        what = "a number" if kind is float else "an integer"
        raise ParameterError(f"{by}: {name}={value!r} must be {what} in [{low:g}, {high:g}]")


def check_flag(value: Any, by: str, name: str) -> None:
    """Checks a switch.

    Raises:
        ParameterError: neither True nor False (1 and 0 are neither).
    """
    if not isinstance(value, bool):
        raise ParameterError(f"{by}: {name}={value!r} must be true or false")


def check_layers(values: Sequence[Any], depth: int, by: str, name: str) -> None:
    """Checks a list with one value a layer; a short one says nothing of the later layers.

    Raises:
        ParameterError: it names layers that the tower has not.
    """
    if len(values) > depth:
        raise ParameterError(f"{by}: {name} names {len(values)} layers, and the tower has {depth}")


def check_layer(value: Any, by: str, name: str) -> None:
    """Checks one layer, or None for a method's own; whether a model has it is found out on the model.

    Raises:
        ParameterError: neither None nor an integer.
    """
    if value is not None:
        check_range(value, by, name, kind=int)


def check_choice(value: Any, by: str, name: str, choices: tuple[Any, ...]) -> None:
    """Checks a word.

    Raises:
        ParameterError: it is none of the choices.
    """
    if value not in choices:
        raise ParameterError(f"{by}: {name}={value!r} is not possible; one of {', '.join(map(repr, choices))}")


# ---------------------------------------------------------------------- registry
_METHODS: dict[str, type[Method]] = {}
_loaded = False
M = TypeVar("M", bound=type[Method])


def register_method(cls: M) -> M:
    """Class decorator: makes a method known by its name.

    Raises:
        ParameterError: another class already has the name.
    """
    name = cls.spec_name()
    other = _METHODS.get(name)
    same = other is not None and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    if other is not None and not same:
        raise ParameterError(f"method name {name!r} of {cls.__module__} is already taken by {other.__module__}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ParameterError(f"method name {name!r} must be lower-case letters, digits and _")
    _METHODS[name] = cls
    return cls


def _load() -> None:
    """Imports every module of pruners/ and mergers/, then the entry points, once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for folder in ("pruners", "mergers"):
        package = importlib.import_module(f"{__package__}.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in importlib.metadata.entry_points(group="vlmtok.methods"):
        try:
            entry.load()
        except Exception as problem:
            warnings.warn(f"method plug-in {entry.name!r} does not load: {problem!r}", VlmtokWarning, stacklevel=3)


def list_methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods.

    Args:
        pattern: shell wildcards, for instance ``"*prune*"``.

    Returns:
        Sorted names.

    Raises:
        ParameterError: the pattern is no text.
    """
    if not isinstance(pattern, str):
        raise ParameterError(f"list_methods() takes shell wildcards, got {pattern!r}")
    _load()
    return sorted(fnmatch.filter(_METHODS, pattern))


def method_class(name: str) -> type[Method]:
    """The class registered under a name.

    Raises:
        UnknownMethod: none is; the message names the nearest.
    """
    _load()
    if not isinstance(name, str):
        raise UnknownMethod(f"a method's name is a word, got {name!r}")
    if name not in _METHODS:
        raise UnknownMethod(f"no method {name!r}{hint(name, _METHODS, 3, 0.4)} Known: {', '.join(sorted(_METHODS))}")
    return _METHODS[name]


@guarded
def create_method(name: str, **settings: Any) -> Method:
    """Makes a method by name.

    Args:
        name: as in `list_methods`.
        settings: its parameters; ``preset=NAME`` starts from one of its presets.

    Returns:
        The method.

    Raises:
        UnknownMethod: no such method.
        ParameterError: no such parameter, or a value that is not possible.
    """
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    preset = settings.pop("preset", None)
    for key in settings:
        if key not in known:
            like = hint(key, known, alike=0.4)
            raise ParameterError(f"{name} has no parameter {key!r}{like} Parameters: {', '.join(known) or 'none'}")
    if preset is not None:
        if not hasattr(cls, "preset"):
            raise ParameterError(f"{name} has no presets")
        made: Method = cls.preset(preset, **settings)
        return made
    return cls(**settings)


# ---------------------------------------------------------------------- spec strings
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")
_WORD = re.compile(r"[A-Za-z_][\w./@-]*$")


@guarded
def parse_methods(spec: str) -> list[Method]:
    """Makes the methods that a spec string names: ``name[:key=value]*[+name...]``.

    A value is an int, a float, true, false, none, a word, an ``(a;b)`` tuple or an ``[a;b]`` list, nestable. ``+``
    separates methods only outside values and before a letter. There are no commas.

    Args:
        spec: for instance ``"pitome:ratio=0.9:margin=0.5+todre:keep=0.1"``.

    Returns:
        The methods, in order.

    Raises:
        SpecError: the string cannot be parsed.
        UnknownMethod: no method of that name.
        ParameterError: no such parameter or value.
    """
    methods = []
    for part in _split(spec, "+"):
        name, *settings = _split(part, ":")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise SpecError(f"{name!r} in {spec!r} is no method name; write name:key=value:key=value+name")
        values: dict[str, Any] = {}
        for item in settings:
            key, equals, text = item.partition("=")
            if not equals or not key.isidentifier():
                raise SpecError(f"{item!r} in {spec!r} is no setting; write key=value")
            if key in values:
                raise SpecError(f"{key!r} is given twice in {spec!r}")
            values[key] = _parse_value(text, spec)
        methods.append(create_method(name.lower(), **values))
    return methods


def _split(text: str, mark: str) -> list[str]:
    """Splits at `mark` outside brackets; a ``+`` counts only before a letter."""
    parts, depth, at = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            raise SpecError(f"bracket closed but not opened in {text!r}")
        follows = text[i + 1 : i + 2]
        if letter == mark and depth == 0 and (mark != "+" or follows.isalpha() or follows == "_"):
            parts.append(text[at:i])
            at = i + 1
    if depth:
        raise SpecError(f"bracket opened but not closed in {text!r}")
    return [part.strip() for part in (*parts, text[at:])]


def _parse_value(text: str, spec: str) -> Any:
    text = text.strip()
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    if text[:1] in "([" and text[-1:] in ")]" and text:
        if {"(": ")", "[": "]"}[text[0]] != text[-1]:
            raise SpecError(f"{text!r} in {spec!r} opens and closes with different brackets")
        inside = text[1:-1].strip()
        items = [_parse_value(item, spec) for item in _split(inside.rstrip(";"), ";")] if inside else []
        return tuple(items) if text[0] == "(" else items
    if _NUMBER.match(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if _WORD.match(text):
        return text
    raise SpecError(f"{text!r} in {spec!r} is no value; an int, a float, true, false, none, a word, (a;b) or [a;b]")


def format_value(value: Any) -> str:
    """A value as `parse_methods` reads it back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        inside = ";".join(format_value(item) for item in value)
        if isinstance(value, tuple):
            return f"({inside}{';' if len(value) == 1 else ''})"
        return f"[{inside}]"
    if isinstance(value, float):
        return repr(value)
    return str(value)
