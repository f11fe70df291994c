"""LLaVA 1.5 for one row: pixels, features, the language model, and tokens one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import hf_tower
from .cuts import Cut, Decider, Moment, Signals
from .evicting import Dropped, Shown, evict
from .rows import LlamaLayer, Plan, RowRun, rms_norm, row_signals
from .towers import TowerRun, run_tower


class Llava:
    """LLaVA 1.5 for one row."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.core = model.model if hasattr(model, "lm_head") else model
        self.lm = self.core.language_model
        self.layers = [LlamaLayer(module, self.lm.config) for module in self.lm.layers]
        self.image = self.core.config.image_token_id
        self.vision = hf_tower(self.core.vision_tower)
        index, depth = self.core.config.vision_feature_layer, len(self.vision.blocks)
        self.feature = (index if index >= 0 else depth + 1 + index) - 1

    # ------------------------------------------------------------------ from pixels to the language model's input
    def features(self, pixels: Tensor, decider: Decider, unit: tuple[int, int]) -> tuple[Tensor, Tensor, TowerRun]:
        """Projected features [K, C] of one picture and their sizes."""
        run = run_tower(self.vision, pixels, decider, unit)  # to the end: layers behind the features may be read
        x, size = run.hidden[self.feature], run.size
        protected, x, size = x[: run.prefix], x[run.prefix :], size[run.prefix :]
        for visit in decider.visits("features"):
            signals = {**run.carried, "protected": (protected, None)}
            grid = self.vision.grid
            cut = decider.decide(
                visit,
                Moment("features", None, "end", x, size, run.who, signals, entered=run.entered, grid=grid, unit=unit),
            )
            if cut is not None:
                n = len(x)
                named = torch.cat([x, protected])[: cut.mix.shape[1]]
                x = cut.tokens(named)
                size = cut.own.to(size) @ torch.cat([size, size.new_zeros(len(named) - n)])
                run.book(cut, n)
        projector = self.core.multi_modal_projector
        return projector.linear_2(projector.act(projector.linear_1(x))), size, run

    def embed(self, ids: Tensor, pixels: Tensor | None, decider: Decider, row: int) -> RowRun:
        """A row at the language model's input: what the tower left fills the first placeholders of its picture."""
        length, count = len(ids), 0 if pixels is None else len(pixels)
        h, size = self.lm.embed_tokens(ids), torch.ones(length)
        picture, rank, stay = torch.full((length,), -1), torch.zeros(length, dtype=torch.int64), torch.ones(length) > 0
        columns, began, carried = (ids == self.image).nonzero()[:, 0], {}, {}
        for index in range(count):
            x, sizes, run = self.features(pixels[index : index + 1], decider, (row, index))
            mine, columns = columns[: run.entered], columns[run.entered :]
            used = mine[: len(x)]
            h, size = h.index_copy(0, used, x), size.index_copy(0, used, sizes)
            rank[used], picture[mine], stay[mine[len(x) :]] = torch.arange(len(x)), index, False
            began[index], carried[index] = int(mine[0]), dict(run.carried)
        assert not count or not len(columns), "placeholders without a picture"
        place = stay.nonzero()[:, 0]
        positions = torch.arange(len(place)) if len(place) < length else place.clone()
        return RowRun(
            h[stay], picture[stay], positions, size[stay], place, place.clone(), row, began, carried, rank[stay]
        )

    # ------------------------------------------------------------------ one forward
    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None,
        decider: Decider,
        row: int = 0,
        plan: Plan | None = None,
        mask_from: int | None = None,
    ) -> tuple[Tensor, RowRun]:
        """Last hidden states [L', C] of a row.

        Args:
            ids: [L], the whole row.
            pixels: its pictures.
            decider: who decides.
            row: number of the row, for the decider.
            plan: None decides on all of `ids`; else cuts are recorded, or taken again where they are.
            mask_from: from this layer on text no longer looks at pictures (masking instead of dropping).
        """
        run = self.embed(ids, pixels, decider, row)
        dropped: list[Dropped] = []
        shown: list[Shown] = []

        def visit_all(stage: str, layer: int | None, point: str, logits: Any = None, modules: Any = None) -> None:
            now = torch.arange(len(run.h))
            for visit in decider.visits(stage, layer, point):
                if callable(logits):  # those of the layer to come, for rows as they are
                    now = torch.arange(len(run.h))
                seen = logits() if callable(logits) else logits
                ready: list[tuple[Tensor, Cut]] = []
                fresh: set[int] = set()
                for picture, columns in run.units(decider.scope(visit)):
                    key = (stage, layer, point, visit.index, picture)
                    if plan is not None and key in plan.cuts:
                        cut = plan.cuts[key]
                    else:
                        moment = self._moment(run, stage, layer, point, picture, columns, seen, now, modules)
                        cut = decider.decide(visit, moment)
                        if plan is not None:
                            plan.cuts[key] = cut
                        fresh.update(run.who[columns].tolist())
                    if cut is not None:
                        ready.append((columns, cut))
                before, there = len(run.h), set(run.who.tolist())
                now = now[run.take(ready)]
                if layer is not None and decider.forgets(visit):
                    left = (there - set(run.who.tolist())) & fresh
                    dropped.append(Dropped(layer + (point == "end"), frozenset(left)))
                if len(run.h) < before and decider.renumbers(visit):
                    run.renumber()

        run.enter()
        visit_all("projected", None, "end", lambda: self.layers[0].attend(run.h, run.positions)[2])
        skips = [decider.skips(layer) for layer in range(len(self.layers))]
        if decider.acts("decoder") or any(skips):
            if plan is not None and plan.done:
                run.held = plan.held
            elif run.picture[-1] >= 0:
                run.held = int(run.place[-1])
            run.enter()
        for layer, part in enumerate(self.layers):
            visit_all("decoder", layer, "start", lambda part=part: part.attend(run.h, run.positions)[2])
            run.lengths.append(len(run.h))
            unseen = run.picture >= 0 if mask_from is not None and layer >= mask_from else None
            idle = (run.picture >= 0) & (run.place != run.held)
            evictions = [] if plan is None else plan.evictions.get(layer, [])
            run.h, logits, modules = part.run(run.h, run.positions, unseen, skips[layer], idle, run.place, evictions)
            shown.append(Shown.of(run, part, logits))
            visit_all("decoder", layer, "end", logits, modules)
        if plan is not None:
            if any(began >= plan.until for began in run.began.values()):
                for layer, eviction in evict(run, shown, decider, plan.until, len(ids), dropped).items():
                    plan.evictions.setdefault(layer, []).append(eviction)
                plan.until, plan.written = len(ids), 0
            elif plan.done and plan.until:
                steps = (plan.written, len(ids) - plan.until)
                for layer, eviction in evict(run, shown, decider, 0, len(ids), [], steps).items():
                    plan.evictions.setdefault(layer, []).append(eviction)
                plan.written = steps[1]
            plan.done, plan.held = True, run.held
        return rms_norm(run.h, self.lm.norm), run

    def _moment(
        self,
        run: RowRun,
        stage: str,
        layer: int | None,
        point: str,
        picture: int,
        columns: Tensor,
        logits: Tensor | None,
        now: Tensor,
        modules: Any,
    ) -> Moment:
        signals: Signals = {}
        if stage == "projected":
            text = run.text_behind(picture)
            if len(text):
                signals["text"] = (run.h[text], None)
            if logits is not None:
                states = rms_norm(run.h, self.lm.norm)
                ahead = row_signals(run, picture, columns, logits, now, None, self.layers[0], states)
                signals |= {name: ahead[name] for name in ("text_attention", "last_attention") if name in ahead}
        elif logits is not None:
            states = rms_norm(run.h, self.lm.norm)
            signals = row_signals(run, picture, columns, logits, now, modules, self.layers[layer], states)
        for name, (value, axis) in run.carried.get(picture, {}).items():
            signals[name] = (value if axis is None else value.index_select(axis, run.rank[columns]), axis)
        return Moment(
            stage,
            layer,
            point,
            run.h[columns],
            run.size[columns],
            run.who[columns],
            signals,
            depth=len(self.layers) if stage == "decoder" else 1,
            entered=sum(run.entered.values()) if picture < 0 else run.entered[picture],
            grid=self.vision.grid if stage == "projected" and picture >= 0 else None,
            columns=columns,
            unit=(run.row, picture),
            frames=len(run.entered) if picture < 0 and len(set(run.entered.values())) == 1 else 0,
        )

    # ------------------------------------------------------------------ generation
    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        pixels: Tensor | None,
        decider: Callable[[], Decider],
        steps: int,
        *,
        again: bool = False,
        row: int = 0,
        given: Tensor | None = None,
        mask_from: int | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Greedy tokens [steps] and their logits [steps, V], each from the whole row.

        Args:
            ids: [L], the prompt.
            pixels: its pictures.
            decider: makes a decider for each forward.
            steps: how many tokens.
            again: decide anew at every step, with what was generated as text (what a host without a cache does);
                else the prompt alone decides.
            row: number of the row, for the decider.
            given: tokens to go on with instead of the best ones.
            mask_from: see `forward`.
            plan: of the turns before.
        """
        if plan is None and not again:
            plan = Plan()
        found, prompt = [], len(ids)
        for step in range(steps):
            hidden, _ = self.forward(ids, pixels, decider(), row, plan, mask_from)
            found.append(self.model.lm_head(hidden[-1]))
            following = found[-1].argmax() if given is None else given[step]
            ids = torch.cat([ids, following.reshape(1)])
        return ids[prompt:], torch.stack(found)
