"""Methods asked by hand, at every site that they name on a layout, on views of tensors that a function fills."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmtok import Method
from vlmtok.core.cache_signals import CACHE_SIGNALS, ENTRIES, MASSES
from vlmtok.core.placing import Placed, place
from vlmtok.core.sequence import TowerRow
from vlmtok.core.signals import AHEAD, DECODER_SIGNALS, TOWER_SIGNALS, DecoderTaps, Need, TowerTaps, tower_signals
from vlmtok.core.site import STAGES, Layout, StageLayout
from vlmtok.core.view import TokenView

WIDTH, HEADS, BATCH, WORDS = 16, 2, 2, 5
DEPTH, LAYERS = 4, 16
"""Blocks of towers, layers of the language model."""
FRAMES = 4
"""Of views that are clips."""
USER = frozenset({"relevance"})
"""Signals that only a user can give, one number a token."""

Fill = Callable[..., Tensor]
"""From a name and a shape to a tensor."""


def tower(prefix: int = 1, guarded: int = 1) -> StageLayout:
    """A tower with protected tokens, `prefix` of them in front of what methods see."""
    points = frozenset({"start", "mid", "end"})
    return StageLayout(DEPTH, WIDTH, HEADS, DEPTH - 1, points, tower_signals(guarded), prefix)


def llava(decoder: bool = True) -> Layout:
    """What a LLaVA offers, or a serving engine with one: that has no place between layers of its language model."""
    stages = {
        "vision": tower(),
        "features": StageLayout(1, WIDTH, 0, 0, provides=frozenset({"protected"})),
        "projected": StageLayout(1, WIDTH, 0, 0, provides=frozenset({"text"}) | (AHEAD if decoder else set())),
    }
    if not decoder:
        why = "a paged cache has one length for all layers"
        return Layout("an engine", stages, without={"decoder": why, "cache": why})
    signals = frozenset(DECODER_SIGNALS)
    layers = StageLayout(LAYERS, WIDTH, HEADS, LAYERS - 1, frozenset({"start", "end"}), signals)
    caches = StageLayout(LAYERS, WIDTH, HEADS, LAYERS - 1, provides=CACHE_SIGNALS)
    return Layout("LLaVA by hand", {**stages, "decoder": layers, "cache": caches})


def dual() -> Layout:
    """What a dual encoder offers: two protected tokens anywhere in the rows of its text tower."""
    return Layout("a dual encoder by hand", {"vision": tower(), "text": tower(0, 2)})


def empty(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Asking:
    """A method and what it noted, site by site in the order of the forward.

    Attributes:
        places: its sites.
    """

    def __init__(self, method: Method, layout: Layout, fill: Fill) -> None:
        self.method, self.layout, self.fill = method, layout, fill
        self.places = sorted(place(method, layout, USER)[0], key=lambda one: (STAGES.index(one.site.stage), one.key))
        self.state: dict[str, Tensor] = {}
        self.row: dict[str, Any] = {}
        self.memory = method.build(layout)
        if self.memory is not None:
            self.memory.to(fill("memory", 1).device)
        self.block: tuple[str, int | None] = ("", None)
        self.inserted = self.outputs = 0

    def views(self, n: int, grid: tuple[int, int] | None) -> Iterator[TokenView]:
        """A view of each site; what stays at one is what the next one shows. Caches lose entries layer by layer, all of
        what is there, and behind a plan over all of them.

        Args:
            n: tokens that enter.
            grid: rows and columns that they had there.
        """
        stage, entered = "", n
        for at in self.places:
            if at.site.stage != stage:
                stage, entered = at.site.stage, n
                if stage == "cache":
                    caches = [one for one in self.places if one.site.stage == stage]
                    self.method.plan([self.view(one, n, entered, grid, planned=True) for one in caches])
            view = self.view(at, n, entered, grid)
            if at.site.point == "start":
                added = self.method.insert(view)
                self.inserted += 0 if added is None else added.shape[1]
            yield view
            n = n if stage == "cache" else self.left

    def leave(self, reduction: Any, n: int) -> None:
        """Notes what a site left of n tokens."""
        self.left = n if reduction is None else reduction.slots
        if reduction is not None and self.block[0] != "cache":
            self.state = {name: reduction.gather(value, 1) for name, value in self.state.items()}

    def view(self, at: Placed, n: int, entered: int, grid: tuple[int, int] | None, planned: bool = False) -> TokenView:
        """What the method is shown at a site; while it plans, the tokens have no data."""
        if (at.site.stage, at.site.layer) != self.block:
            self.block, self.outputs, self.inserted = (at.site.stage, at.site.layer), self.inserted, 0
        stage = self.layout.stages[at.site.stage]
        text = at.site.stage == "text"
        scope = at.asked.scope or self.method.scope
        rows, width = (BATCH * HEADS, WIDTH // HEADS) if scope == "head" else (BATCH, WIDTH)
        clip = scope in ("clip", "sample") and n == entered and n % FRAMES == 0
        return TokenView(
            (empty if planned else self.fill)(f"tokens of {at.site}", rows, n, width),
            at.asked,
            size=torch.ones_like(self.fill("size", rows, n)),
            num_prefix=stage.num_prefix,
            depth=stage.depth,
            grid=None if text else grid,
            entered=entered,
            signals={need.key: self.signal(at, need, n) for need in at.needs},
            state={} if at.site.stage == "cache" else self.state,
            row=self.row,
            memory=self.memory,
            frames=FRAMES if clip else 0,
        )

    # ------------------------------------------------------------------ signals
    def signal(self, at: Placed, need: Need, n: int) -> Callable[[], Tensor | None]:
        """A signal of a site, derived as the core derives it."""
        if need.key in USER:
            return lambda: self.fill(need.name, BATCH, n)
        stage = need.stage or at.site.stage
        if stage == "cache":
            return lambda: self.cached(at, need.name, n)
        if stage in ("vision", "text"):
            layer = at.site.layer if need.layer is None else need.layer
            where = replace(at.site, stage=stage, layer=layer, separators="keep")
            return lambda: TOWER_SIGNALS[need.name].make(self.tower_taps(str(where), stage, n))
        if need.name in DECODER_SIGNALS:
            return lambda: DECODER_SIGNALS[need.name](self.decoder_taps(str(at.site), n))
        return lambda: self.fill(need.name, BATCH, WORDS, WIDTH)

    def cached(self, at: Placed, name: str, n: int) -> Tensor:
        """A signal of a layer's cache: of a word, n tokens and the text behind them, the last rows looking at all."""
        shape = (BATCH, HEADS, n, WIDTH // HEADS) if name in ENTRIES else (BATCH, HEADS, n)
        value = self.fill(f"{name} of {at.site}", *shape)
        if name == "attention_rows":
            value = torch.arange(n + WORDS, WORDS, -1, device=value.device).float().expand(shape)
        elif name in MASSES:
            value = value.abs()
        return value.flatten(0, 1) if (at.asked.scope or self.method.scope) == "head" else value

    def tower_taps(self, where: str, stage: str, n: int) -> TowerTaps:
        """Taps of a block that saw n tokens."""
        row = TowerRow(2 if stage == "text" else 1, n, self.inserted if where.startswith(self.block[0]) else 0)

        def heads(name: str) -> Tensor:
            return self.fill(f"{name} of {where}", BATCH, HEADS, row.length, WIDTH // HEADS)

        outputs = self.fill(f"outputs of {where}", BATCH, self.outputs, WIDTH) if self.outputs else None
        tokens = self.fill(f"row of {where}", BATCH, row.length, WIDTH)
        return TowerTaps(row, tokens, lambda: heads("q"), lambda: heads("k"), 1.0, inserted=outputs)

    def decoder_taps(self, where: str, n: int) -> DecoderTaps:
        """Taps of a layer that saw a word, n tokens and the text behind them."""
        length = 1 + n + WORDS
        device = self.fill("device", 1).device
        here = torch.arange(length, device=device).expand(BATCH, length)

        def heads(rows: int, name: str) -> Tensor:
            return self.fill(f"{name} of {where}", BATCH, HEADS, rows, WIDTH // HEADS)

        return DecoderTaps(
            lambda places: heads(places.shape[1], "q"),
            lambda: heads(length, "k"),
            1.0,
            lambda places: torch.zeros_like(self.fill("bias", BATCH, 1, places.shape[1], length)),
            here,
            here[:, 1 : 1 + n],
            here[:, 1 + n :],
            True,
            self.fill(f"transition of {where}", BATCH, 2, 2, length),
            normed=lambda places: self.fill(f"normed of {where}", BATCH, places.shape[1], WIDTH),
            active=lambda places: self.fill(f"neurons of {where}", BATCH, places.shape[1], 4 * WIDTH) > 0.5,
        )
