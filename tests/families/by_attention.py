"""An oracle for methods that decide inside a decoder: the host's own layers, row by row, and what they say they did.

Attention rows are the weights that the host's eager attention gives back, and a layer's changes are what hooks of these
tests see of its modules; nothing here asks vlmtok where a method acts: the caller says it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmtok import Method, Reduction, Site, TokenView

from .oracle import oracle
from .oracle.rows import Row
from .prompts import Prompt

Places = Mapping[tuple[int, str], int]
"""(layer, ``start`` or ``end``) at which a method acts, and the layer that it named."""


@contextlib.contextmanager
def watched(layer: Any) -> Iterator[dict[str, Any]]:
    """Context in which a layer's attention weights and the changes of its two branches are noted."""
    seen: dict[str, Any] = {"changes": []}
    mixer = next(getattr(layer, name) for name in ("self_attn", "linear_attn", "conv") if hasattr(layer, name))
    mlp = next(getattr(layer, name) for name in ("mlp", "feed_forward") if hasattr(layer, name))

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            if module is mixer:
                seen["weights"] = output[1]
            output = output[0]
        y = output.reshape(x.shape)
        ratio = y.norm(dim=-1) / x.norm(dim=-1)
        seen["changes"].append(torch.stack([ratio, nn.functional.cosine_similarity(x, y, dim=-1)], 1))

    hooks = [part.register_forward_hook(note, with_kwargs=True) for part in (mixer, mlp)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class Asked:
    """A method inside the decoder of one family.

    Args:
        family: its name.
        model: with eager attention.
        method: acts on all pictures of a prompt together.
        places: where.
        renumber: whether positions of what stays become contiguous.
    """

    def __init__(self, family: str, model: nn.Module, method: Method, places: Places, renumber: bool = False) -> None:
        self.oracle = oracle(family, model)
        self.method = method
        self.places = places
        self.renumber = renumber
        self.cut: dict[tuple[int, str], Reduction] = {}
        self.left: list[int] = []

    @torch.no_grad()
    def generate(self, prompt: Prompt, steps: int) -> tuple[Tensor, Tensor]:
        """Greedy decoding: tokens `[steps]` and the logits in front of each; the prompt decides, as in a prefill."""
        encoded = self.oracle.encode(prompt)
        written, logits = prompt.ids[:0], []
        self.cut, self.left, self.state, self.notes = {}, [], {}, {}
        for step in range(steps):
            row = self.oracle.start(self.oracle.row(prompt, written, encoded))
            if step == 0:
                self.entered = int((row.owner >= 0).sum())
                self._look(row)
            for index in range(len(self.oracle.layers)):
                row = self._visit(index, "start", row, step == 0)
                row = self._layer(index, row, step == 0)
            logits.append(self.oracle.head(row.hidden))
            written = torch.cat([written, logits[-1].argmax()[None]])
        return written, torch.stack(logits)

    def _look(self, row: Row) -> None:
        """The language model's input, at which SparseVLM chooses who rates; the others cut nothing there here."""
        if self.method.spec_name() == "sparsevlm":
            visual, text = self._columns(row)
            signals = {"text": row.hidden[None, text]}
            view = TokenView(row.hidden[None, visual], Site("projected"), signals=signals, row=self.notes)
            assert self.method.reduce(view) is None

    def _columns(self, row: Row) -> tuple[Tensor, Tensor]:
        visual = (row.owner >= 0).nonzero()[:, 0]
        text = (row.owner < 0).nonzero()[:, 0]
        return visual, text[text > visual[0]] if len(visual) else text

    def _layer(self, index: int, row: Row, first: bool) -> Row:
        with watched(self.oracle.layers[index]) as seen:
            after = replace(row, hidden=self.oracle.layer(index, row))
        return self._visit(index, "end", after, first, seen)

    def _visit(self, index: int, point: str, row: Row, first: bool, seen: dict[str, Any] | None = None) -> Row:
        asked = self.places.get((index, point))
        if asked is None:
            return row
        if first and (row.owner >= 0).any():
            if seen is None:
                with watched(self.oracle.layers[index]) as seen:
                    self.oracle.layer(index, row)
            reduction = self._decide(Site("decoder", asked, point), row, seen)
            if reduction is not None:
                self.cut[index, point] = reduction
        return self._apply(self.cut[index, point], row, first) if (index, point) in self.cut else row

    def _decide(self, site: Site, row: Row, seen: dict[str, Any]) -> Reduction | None:
        visual, text = self._columns(row)
        signals: dict[str, Tensor] = {"transition": torch.stack(seen["changes"], 1)}
        if "weights" in seen:
            weights = seen["weights"]
            signals |= {
                "last_attention": weights[:, :, -1, visual],
                "text_attention": weights[:, :, text][..., visual],
                "attention_to_text": weights[:, :, visual][..., text].sum(-1).mean(1),
                "attention_logits": weights.log(),
            }
        view = TokenView(
            row.hidden[None, visual],
            site,
            depth=len(self.oracle.layers),
            entered=self.entered,
            columns=visual[None],
            signals=signals,
            state=self.state,
            row=self.notes,
        )
        return self.method.reduce(view)

    def _apply(self, reduction: Reduction, row: Row, first: bool) -> Row:
        visual, _ = self._columns(row)
        keep = reduction.keep[0] if reduction.valid is None else reduction.keep[0][reduction.valid[0]]
        if reduction.src is not None and len(keep):
            merged, _ = reduction.apply(row.hidden[None, visual])
            row = replace(row, hidden=row.hidden.index_put((visual[keep],), merged[0]))
        stays = row.owner < 0
        stays[visual[keep]] = True
        index = torch.arange(len(row))
        index[visual[keep].sort().values] = visual[keep]  # slots take the places that are left in their order
        left = row.take(index[stays])
        if self.renumber:
            left = replace(left, positions=row.positions.min() + torch.arange(len(left))[None])
        if first:
            self.state = {name: table[:, keep] for name, table in self.state.items()}
            self.left.append(len(keep))
        return left
