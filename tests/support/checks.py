"""Comparisons and watchers that several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vlmtok
from vlmtok import Method, Reduction, TokenView

from . import models
from .hosts_of import cache_of, with_cache

EQUAL = 1e-5
"""How far "equal" tensors may be apart, relative to the greatest entry where that is above one."""


def gap(found: Tensor, wanted: Tensor) -> float:
    """Greatest difference, relative to the greatest entry of `wanted` where that is above one."""
    assert found.shape == wanted.shape, f"shapes differ: {list(found.shape)} and {list(wanted.shape)}"
    assert bool(found.isfinite().all()), "not finite"
    if found.numel() == 0:
        return 0.0
    scale = max(1.0, float(wanted.detach().abs().max()))
    return float((found.detach().double() - wanted.detach().double()).abs().max()) / scale


def assert_equal(found: Tensor, wanted: Tensor, within: float = EQUAL, what: str = "") -> None:
    apart = gap(found, wanted)
    assert apart <= within, f"{what or 'tensors'} differ by {apart:.1e}, allowed {within:.0e}"


def assert_same(found: Tensor, wanted: Tensor, what: str = "") -> None:
    assert torch.equal(found, wanted), f"{what or 'tensors'} are not bit-identical: {gap(found, wanted):.1e} apart"


def assert_differs(found: Tensor, bare: Tensor, least: float = 1e-3) -> None:
    """The compressed result is another one: what is compared below could fail."""
    assert gap(found, bare) > least, f"compression changed nothing ({gap(found, bare):.1e}): this test could not fail"


_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks(model: nn.Module) -> dict[str, int]:
    """How many hooks every module has, those of transformers' own output capture left out."""
    found = {}
    for name, module in model.named_modules():
        count = 0
        for table in _TABLES:
            count += sum("capturing" not in getattr(h, "__qualname__", "") for h in getattr(module, table).values())
        if count:
            found[name] = count
    return found


@dataclass
class Print:
    """What a model is, to see that it is still the same."""

    state: dict[str, Tensor]
    modules: list[tuple[str, type]]
    hooks: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Print:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return cls(state, [(name, type(m)) for name, m in model.named_modules()], hooks(model))

    def assert_still(self, model: nn.Module) -> None:
        now = Print.of(model)
        assert now.hooks == self.hooks, f"hooks were left: {now.hooks} (before: {self.hooks})"
        assert now.modules == self.modules, "modules changed"
        assert list(now.state) == list(self.state), "names of the state dict changed"
        assert all(torch.equal(now.state[name], value) for name, value in self.state.items()), "weights changed"


@dataclass
class Seen:
    """One call of `reduce`."""

    method: Method
    view: TokenView
    signals: dict[str, Tensor | None]
    state: dict[str, Tensor]
    row: dict[str, Any]
    reduction: Reduction | None
    autocast: bool
    precision: str
    grad: bool


@contextlib.contextmanager
def watched(methods: Sequence[Method]) -> Iterator[list[Seen]]:
    """Records every call of the methods' `reduce`."""
    found: list[Seen] = []

    def wrap(method: Method) -> Any:
        inner = method.reduce

        def reduce(view: TokenView) -> Reduction | None:
            signals = {name: view.maybe(name) for name in view.signals}
            flags = (
                torch.is_autocast_enabled("cpu"),
                torch.get_float32_matmul_precision(),
                torch.is_grad_enabled(),
            )
            state, row = ({name: held[name] for name in held} for held in (view.state, view.row))
            reduction = inner(view)
            found.append(Seen(method, view, signals, state, row, reduction, *flags))
            return reduction

        return reduce

    for method in methods:
        method.__dict__["reduce"] = wrap(method)
    try:
        yield found
    finally:
        for method in methods:
            del method.__dict__["reduce"]


def idle(spec: str) -> list[Method]:
    """The methods of a spec, that look at every signal and never do anything."""
    methods = vlmtok.parse_methods(spec)

    def reduce(view: TokenView) -> None:
        for name in view.signals:
            view.maybe(name)

    def insert(view: TokenView) -> None:
        reduce(view)

    for method in methods:
        method.__dict__.update(reduce=reduce, insert=insert, skip=lambda layout: {})
    return methods


class Subject:
    """A model of the matrix and three inputs for it, alike for towers and language models.

    Args:
        name: of the model in the matrix.
        model: another one of its kind, or None.
        writes: whether what a language model gives has one column more, of a token that was written on its cache.
    """

    PATTERNS = ("^3I5", "2I2", "^2I1I4", "6")

    WRITTEN = 7

    def __init__(self, name: str, model: nn.Module | None = None, writes: bool = False) -> None:
        self.name = name
        self.writes = writes and name not in models.TOWERS
        self.model = models.shared(name) if model is None else model
        self.tower = models.TOWERS.get(name)
        if self.tower is None:
            self.batch = models.Batch.of(*self.PATTERNS)

    @property
    def rows(self) -> int:
        return 3 if self.tower is not None else len(self.batch)

    def out(self, model: nn.Module | None = None, row: int | None = None) -> Tensor:
        """What the user gets, for the whole batch or one row of it: [B, ...], or [L, ...] of a language model's row."""
        model = self.model if model is None else model
        if self.tower is not None:
            pictures = self.tower.pictures(3)
            return self.tower.run(model, pictures if row is None else pictures[row : row + 1])
        batch = self.batch if row is None else self.batch.alone(row)
        given = batch.inputs(mask=row is None)
        dtype = next(model.parameters()).dtype
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(dtype)
        found = model(**given)
        return _answer(found) if not self.writes else torch.cat([_answer(found), self._written(model, given, found)], 1)

    def _written(self, model: nn.Module, given: dict[str, Tensor], found: Any) -> Tensor:
        """What the model gives to a token behind what it was shown."""
        ids = torch.full((len(given["input_ids"]), 1), self.WRITTEN)
        mask = {}
        if "attention_mask" in given:
            mask = {"attention_mask": torch.cat([given["attention_mask"], torch.ones_like(ids)], 1)}
        return _answer(model(input_ids=ids, **mask, **with_cache(model, cache_of(found))))

    def row_of(self, whole: Tensor, row: int) -> Tensor:
        """One row of what the whole batch gave, padding left out."""
        if self.tower is not None:
            return whole[row : row + 1]
        return whole[row : row + 1, whole.shape[1] - len(self.batch.rows[row]) - self.writes :]


def _answer(found: Any) -> Tensor:
    """Logits, or what stands for them."""
    answer: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return answer
