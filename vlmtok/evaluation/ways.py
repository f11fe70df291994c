"""The ways of a sweep: the uncompressed model, baselines, and methods set to equal numbers of visual tokens."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..adapters import adapter_for
from ..compression import compress
from ..core.method import Method
from ..core.registry import list_methods
from ..core.site import Layout
from ..core.spec import as_methods, expand
from ..errors import ParameterError, VlmtokError, VlmtokWarning, hint
from ..forecast.budget import budget, measure
from ..forecast.estimate import estimate
from ..loading.models import Loaded

NONE, RANDOM, DOWNSAMPLE = "none", "random", "downsample"
BASELINES = (NONE, RANDOM, DOWNSAMPLE)
"""Names of the ways that are in every table unless switched off."""
_RANDOM_EARLY = "random:stage=vision:layer=0"
"""Of towers: behind the first layer, for in the middle of them half of all layers would see all tokens."""
CONVENTION = "mean visual tokens over layers"
"""What a budget counts: for a language model its own layers, for a lone tower the tower's."""
IN_CACHES = "bytes of the key-value caches behind the prompt"
"""What the budget of a method counts by which entries of caches leave and no tokens."""
_CONVENTIONS = {"layer_average_tokens": CONVENTION, "kv_bytes": IN_CACHES}
WITHIN = 0.07
"""How far from the budget a method may be, as a share of it; what it reaches is in the table."""


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Attributes:
        name: a method's plain name, or one of `BASELINES`.
        asked: the method as it was asked for, before it was set to a budget.
        spec: spec string that runs, or "" where none does.
        keep: share, of what `convention` counts, that is asked for, or that a method leaves as it is written; 1 for the
            uncompressed model.
        methods: that are attached.
        problem: why it cannot be run, or "".
        convention: what its budget counts.
    """

    name: str
    asked: str
    spec: str = ""
    keep: float = 1.0
    methods: tuple[Method, ...] = field(default=(), compare=False)
    problem: str = ""
    convention: str = CONVENTION

    @property
    def key(self) -> str:
        """What tells it from all others of a sweep."""
        return self.name if self.name == NONE else f"{self.spec or self.name} @ {self.keep:g}"

    @property
    def draws(self) -> bool:
        """Whether it draws, so that it is repeated."""
        return any(_seeded(method) for method in self.methods)

    def attached(self, loaded: Loaded, *seed: int) -> AbstractContextManager[Any]:
        """Context in which a model answers this way.

        Args:
            loaded: the model.
            seed: of what the methods draw; another batch draws anew.
        """
        if not self.methods:
            return nullcontext()
        state = int(np.random.SeedSequence(seed).generate_state(1)[0]) & 0x7FFFFFFF
        made = [dataclasses.replace(m, seed=state) if _seeded(m) else m for m in self.methods]  # type: ignore[call-arg]
        return compress(loaded.model, made)


def _seeded(method: Method) -> bool:
    return any(one.name == "seed" for one in dataclasses.fields(method))


def split_names(text: str) -> list[str]:
    """Methods behind commas; commas inside brackets, or between the values of a swept setting, part nothing."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named: list[str] = []
    for part in (part.strip() for part in parts):
        if named and part and (part[0].isdigit() or part[0] in ".-("):
            named[-1] += f",{part}"  # a value of the setting before it
        elif part:
            named.append(part)
    return named


def check_names(methods: Sequence[str], baselines: Sequence[str] = BASELINES) -> list[str]:
    """Spec strings of methods, swept settings spelled out.

    Args:
        methods: as they are given.
        baselines: names that are no spec strings of methods, and stay as they are.

    Raises:
        VlmtokError: a method or setting does not exist.
    """
    found: list[str] = []
    for one in methods:
        if not isinstance(one, str):
            raise ParameterError(f"methods are given as spec strings, not as a {type(one).__name__}")
        if one in baselines:
            found.append(one)
            continue
        name = one.partition(":")[0].partition("+")[0]
        if name not in list_methods():
            raise ParameterError(f"no method {name!r}{hint(name, [*list_methods(), *baselines])}")
        for spec in expand(one):
            as_methods(spec)
            found.append(spec)
    return list(dict.fromkeys(found))


def ways_of(
    loaded: Loaded,
    methods: Sequence[str],
    keeps: Sequence[float],
    baselines: Sequence[str],
    as_written: Sequence[str] = (),
    **prompt: Any,
) -> list[Way]:
    """Every way of a sweep, the uncompressed model first; those that a model refuses say why.

    A method is set to each budget by `vlmtok.budget`: as many visual tokens, on average over the layers, as the share
    says; one that acts on caches alone to that share of their bytes. Stacks (``tome+fastv``) have no single number to
    set and run once, as they are written.

    Args:
        loaded: the model.
        methods: spec strings, from `check_names`, without baselines.
        keeps: shares in (0, 1).
        baselines: which of `random` and `downsample` are in it.
        as_written: further spec strings, which run once with the settings that they have.
        prompt: of the estimates, as for `vlmtok.budget`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VlmtokWarning)  # nothing runs here, and the runs themselves say the rest
        return _ways(loaded, methods, keeps, baselines, as_written, prompt)


def _ways(
    loaded: Loaded,
    methods: Sequence[str],
    keeps: Sequence[float],
    baselines: Sequence[str],
    as_written: Sequence[str],
    prompt: dict[str, Any],
) -> list[Way]:
    found = [Way(NONE, NONE)]
    if RANDOM in baselines:
        drawn = RANDOM if loaded.language else _RANDOM_EARLY
        found += [dataclasses.replace(_at(loaded, drawn, keep, prompt), asked=RANDOM) for keep in keeps]
    if DOWNSAMPLE in baselines:
        found += [Way(DOWNSAMPLE, DOWNSAMPLE, DOWNSAMPLE, keep) for keep in keeps]
    for spec in methods:
        if len(as_methods(spec)) > 1:
            found.append(_as_written(loaded, spec, prompt))
        else:
            found += [_at(loaded, spec, keep, prompt) for keep in keeps]
    found += [_as_written(loaded, spec, prompt) for spec in as_written]
    return list(dict.fromkeys(found))  # a stack may be named twice


def _as_written(loaded: Loaded, spec: str, prompt: dict[str, Any]) -> Way:
    made = as_methods(spec)
    name, convention = "+".join(one.spec_name() for one in made), CONVENTION
    try:
        quantity = budget_quantity(made, adapter_for(loaded.model).layout())
        convention = _CONVENTIONS[quantity]
        bare, left = measure(estimate(loaded.model, made, deciding=False, **prompt), quantity)
        with compress(loaded.model, made):
            return Way(name, spec, spec, round(left / bare, 4), tuple(made), convention=convention)
    except VlmtokError as problem:
        return Way(name, spec, spec, problem=str(problem), convention=convention)


def budget_quantity(methods: Sequence[Method], layout: Layout) -> str:
    """The quantity by which methods are set to a budget, as `vlmtok.budget` calls it.

    Args:
        methods: the methods, which run together.
        layout: of the model.

    Returns:
        ``layer_average_tokens``; ``kv_bytes`` where entries of caches leave and no tokens.

    Raises:
        SiteError, MissingSignal: one cannot act there.
    """
    stages = {site.stage for method in methods for site in method.sites(layout)}
    return "kv_bytes" if stages == {"cache"} else "layer_average_tokens"


def _at(loaded: Loaded, spec: str, keep: float, prompt: dict[str, Any]) -> Way:
    (start,) = as_methods(spec)
    name, moved, convention = start.spec_name(), start.budget_parameter, CONVENTION
    try:
        quantity = budget_quantity([start], adapter_for(loaded.model).layout())
        convention = _CONVENTIONS[quantity]
        asked: dict[str, Any] = {quantity: keep, **prompt}
        try:
            made = budget(start, loaded.model, within=WITHIN, **asked)
        except ParameterError:
            if not moved or getattr(start, moved) is not None:
                raise
            # It left the number to the content: any number will do to begin with.
            start = dataclasses.replace(start, **{moved: keep})  # type: ignore[arg-type]
            made = budget(start, loaded.model, within=WITHIN, **asked)
        with compress(loaded.model, made):
            return Way(name, spec, str(made), keep, (made,), convention=convention)
    except VlmtokError as problem:
        return Way(name, spec, spec, keep, problem=str(problem), convention=convention)
