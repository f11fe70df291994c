"""The self-test of a vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compression import compress
from ...core.site import Layout, Site
from .facts import OK, Broken, Fact, Refused, allowed, check_close, check_cut, check_equal, difference, settle, told
from .probes import Fixed, Nothing, cut_sites, some
from .replay import Stay, TextModel, blocks_of, cut_tower

STEPS = 4
"""Tokens that are generated."""
STAGES = {"tower": "vision", "input": "projected", "layer": "decoder"}
"""Stage of each cut."""

SHARED_ROWS = "methods act there, but the self-test has no oracle for rows that pictures share"
"""Why a packed tower is not cut by the self-test."""


@dataclass(frozen=True)
class Said:
    """What greedy decoding wrote.

    Attributes:
        tokens: int64 `[B, steps]`.
        logits: `[B, steps, V]`.
    """

    tokens: Tensor
    logits: Tensor


class Language:
    """A vision-language model with two prompts of one picture each.

    Args:
        model: bare.
        batch: arguments of `generate` for both prompts, padded on the left.
        rows: the same, one prompt each and without padding.
        adapter: as for `vlmtok.compress`.
    """

    def __init__(
        self, model: Any, batch: Mapping[str, Tensor], rows: Sequence[Mapping[str, Tensor]], adapter: str | None = None
    ) -> None:
        self.model, self.adapter, self.adapter_name = model, adapter, ""
        self.batch, self.rows = dict(batch), [dict(row) for row in rows]
        self.bare: Tensor = torch.empty(0)
        self.alone: list[Tensor] = []
        self.said = Said(torch.empty(0), torch.empty(0))

    def open(self) -> None:
        """Asks the adapter where the model can be cut, and its row of data where its parts are.

        Raises:
            VlmtokError: it is not carried.
        """
        from ...adapters import adapter_for
        from ...adapters.base import child
        from ...adapters.language import families
        from ...adapters.language.discovery import discover

        model, adapter = self.model, self.adapter
        carrier = adapter_for(model, adapter)
        self.layout: Layout = carrier.layout()
        self.spec = discover(model) if adapter else families.ROWS[model.config.model_type]
        self.core = child(model, self.spec.core)
        self.lm = None if self.spec.boundary else child(self.core, self.spec.lm)
        self.cuts = cut_sites(self.layout)
        ids = [getattr(self.core.config, name, None) for name in self.spec.ids]
        self.ids = torch.tensor([number for number in ids if number is not None])
        self.adapter_name = adapter or carrier.name

    # ------------------------------------------------------------------ the model
    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, L, V]`."""
        logits: Tensor = self.model(**inputs).logits
        return logits

    @torch.no_grad()
    def generate(self, cached: bool = True) -> Said:
        """What is written behind the batch."""
        out = self.model.generate(
            **self.batch,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            num_beams=1,
            use_cache=cached,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return Said(out.sequences[:, -STEPS:], torch.stack(out.logits, 1))

    def columns(self, row: int) -> Tensor:
        """Where the tokens of a row stand in the batch, int64 `[L]`."""
        return self.batch["attention_mask"][row].nonzero()[:, 0]

    def visual(self, row: int) -> Tensor:
        """Where visual tokens stand in a row alone, int64 `[N]`."""
        ids = self.rows[row]["input_ids"][0]
        return torch.isin(ids, self.ids.to(ids.device)).nonzero()[:, 0].cpu()

    # ------------------------------------------------------------------ facts
    def host(self) -> float:
        """The bare model runs, says of a padded batch what it says of rows alone, and decodes alike with a cache."""
        self.bare = self.forward(self.batch)
        self.alone = [self.forward(row)[0] for row in self.rows]
        apart = 0.0
        for row, alone in enumerate(self.alone):
            found = self.bare[row, self.columns(row)]
            apart = max(apart, check_close(found, alone, f"logits of row {row} in a padded batch", "the row's alone"))
        self.said = self.generate()
        return max(apart, check_said(self.said, self.generate(cached=False), "without one"))

    def neutral(self) -> float:
        """A compression that cuts nothing changes nothing, nor does one that was removed."""
        self.open()
        method = Nothing()
        with compress(self.model, method, adapter=self.adapter):
            found, said = self.forward(self.batch), self.generate()
        check_equal(found, self.bare, "logits")
        check_equal(said.logits, self.said.logits, "logits of generated tokens")
        missed = [str(site) for site in method.sites(self.layout) if str(site) not in method.asked]
        if missed:
            raise Broken(f"methods were never asked at {', '.join(missed)}")
        return check_equal(self.forward(self.batch), self.bare, "logits after removal")

    def cut(self, name: str) -> float:
        """A cut leaves what the oracle says."""
        site = self._site(name)
        with told("with the cut"), compress(self.model, Fixed(site), adapter=self.adapter):
            found = self.forward(self.batch)
        apart = 0.0
        for row in range(len(self.rows)):
            stays, wanted = self._oracle(name, row)
            mine = found[row, self.columns(row)][stays]
            what = f"logits of row {row}"
            apart = max(apart, check_cut(mine, wanted, self.alone[row][stays], what))
        return apart

    def decode(self) -> float:
        """With cuts in place, `generate` says with a cache what it says without, and begins as the oracle does."""
        if "input" not in self.cuts:
            return self._decode("tower")
        return max(self._decode("input"), self._decode("input", "layer"))

    def _decode(self, *names: str) -> float:
        """The same with cuts of these names."""
        methods = [Fixed(self._site(name)) for name in names]
        where = " and ".join(names)
        with compress(self.model, methods, adapter=self.adapter):
            with told(f"without a cache, cut at {where}"):
                plain = self.generate(cached=False)
            with told(f"with a cache, cut at {where}"):
                cached = self.generate()
        apart = 0.0
        for row in range(len(self.rows)):
            wanted = self._oracle("both" if len(names) > 1 else names[0], row)[1][-1]
            bare = self.said.logits[row, 0]
            for said, how in ((plain, "without a cache"), (cached, "with a cache")):
                what = f"first logits of row {row}, {how}, cut at {where},"
                apart = max(apart, check_cut(said.logits[row, 0], wanted, bare, what))
        return max(apart, check_said(cached, plain, f"without one, cut at {where}"))

    def facts(self) -> list[Fact]:
        """All of them; where the host fails bare, that one alone."""
        bare = settle("bare", self.host)
        if bare.status != OK:
            return [bare]
        found = [bare, settle("neutral", self.neutral)]
        if not self.adapter_name:
            return found
        cuts = [settle(name, partial(self.cut, name)) for name in STAGES]
        return [*found, *cuts, settle("generate", self.decode)]

    # ------------------------------------------------------------------ oracles
    def _site(self, name: str) -> Site:
        """Where a cut is made.

        Raises:
            Refused: the model has no such stage.
        """
        if name not in self.cuts:
            if self.layout.has(STAGES[name]):
                raise Refused(SHARED_ROWS)
            offered = self.layout.stages.get(STAGES[name])
            known = self.layout.without.get(STAGES[name], "its adapter offers no cut there")
            raise Refused(known if offered is None else offered.whole)
        return self.cuts[name]

    def _oracle(self, name: str, row: int) -> tuple[Tensor, Tensor]:
        """Columns of a row that are left, int64 `[K]`, and their logits `[K, V]`."""
        with told("the oracle itself"):
            return self._tower(row) if name == "tower" else self._text(name, row)

    def _text(self, name: str, row: int) -> tuple[Tensor, Tensor]:
        inputs, visual = self.rows[row], self.visual(row)
        length = inputs["input_ids"].shape[1]
        every = torch.arange(length)
        replay = TextModel(self.model, self.lm, visual, length)
        again = replay.logits(inputs, Stay(every))[0]
        apart = difference(again, self.alone[row])
        if apart > allowed(again):
            raise Broken(f"the oracle without a cut is {apart:.2g} off the bare model: how it is called is not known")

        def left(columns: Tensor) -> Tensor:
            """Places of what stays: text, and some of the visual tokens."""
            seen = torch.isin(columns, visual).nonzero()[:, 0]
            stays = torch.ones(len(columns), dtype=torch.bool)
            stays[seen] = False
            stays[seen[some(len(seen))]] = True
            return stays.nonzero()[:, 0]

        layer = None if name == "input" else self.cuts["layer"].layer
        enter = every if name == "layer" else left(every)
        stay = Stay(enter, layer, None if layer is None else left(enter))
        return stay.columns, replay.logits(inputs, stay)[0, stay.columns]

    def _tower(self, row: int) -> tuple[Tensor, Tensor]:
        inputs, stage = self.rows[row], self.layout.stages["vision"]
        length = inputs["input_ids"].shape[1]
        stays = torch.arange(length)
        if self.spec.tower_cut == "slots":  # what is left takes the first placeholders; the others go
            visual = self.visual(row)
            gone = visual[len(some(len(visual))) :]
            stays = stays[~torch.isin(stays, gone)]
            whole = inputs["input_ids"].shape
            inputs = {k: v[:, stays.to(v.device)] if v.shape == whole else v for k, v in inputs.items()}
        last = stage.last if self.spec.tower_cut == "spread" else None
        blocks = blocks_of(self.core.get_submodule(self.spec.tower), stage.depth)
        layer = self.cuts["tower"].layer or 0
        with cut_tower(blocks, layer, some, stage.num_prefix, last):
            return stays, self.forward(inputs)[0]


def check_said(found: Said, wanted: Said, wanted_is: str) -> float:
    """Two ways of decoding: tokens and logits, step by step; behind a tie between tokens nothing is compared.

    Raises:
        Broken: they differ.
    """
    apart = 0.0
    for row in range(len(found.tokens)):
        for step in range(found.tokens.shape[1]):
            what = f"logits of row {row}, step {step}, with a cache"
            apart = max(apart, check_close(found.logits[row, step], wanted.logits[row, step], what, wanted_is))
            if found.tokens[row, step] != wanted.tokens[row, step]:
                break
    return apart
