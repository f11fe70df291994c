"""A family whose text model is a causal decoder that counts positions from 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts import Prompt
from .rows import Cut, Row, causal, chosen, same_chunk, within


class Oracle:
    """A family whose text model is a causal decoder that counts positions from 0.

    Attributes:
        model: what is asked.
        core: the inner model.
        lm: the text model.
        layers: its layers.
        kinds: attention of each layer.
        gap: smallest gap of any choice so far; choices by a smaller one than the noise would prove nothing.
    """

    core_path, lm_path, norm_path = "model", "language_model", "norm"
    first_position = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.core = model.get_submodule(self.core_path)
        self.lm = self.core.get_submodule(self.lm_path)
        self.layers = self.lm.layers
        self.config = self.lm.config
        kinds = getattr(self.config, "layer_types", None)
        self.kinds = list(kinds) if kinds else ["full_attention"] * len(self.layers)
        self.gap = float("inf")

    # -------------------------------------------------------------- the input
    def encode(self, prompt: Prompt) -> dict[int, Any]:
        """What the host makes of pictures (1) and clips (2)."""
        found = {}
        for kind, name in ((1, "image"), (2, "video")):
            shots = [p.shot for p in prompt.pictures if (2 if p.shot.video else 1) == kind]
            if shots:
                arrays = {key: torch.cat([shot.arrays[key] for shot in shots]) for key in shots[0].arrays}
                arrays = self.arrays(arrays, prompt, kind)
                found[kind] = getattr(self.core, f"get_{name}_features")(**arrays, return_dict=True)
        return found

    def arrays(self, arrays: dict[str, Tensor], prompt: Prompt, kind: int) -> dict[str, Tensor]:
        """Arguments of the host's encoder."""
        return arrays

    def features(self, encoded: Any) -> Tensor:
        """`[N, C]`, one after the other."""
        made = encoded.pooler_output
        return (
            torch.cat([part.flatten(0, -2) for part in made]) if not isinstance(made, Tensor) else made.flatten(0, -2)
        )

    def embed(self, ids: Tensor) -> Tensor:
        """`[L, C]`, placeholders included."""
        return self.core.get_input_embeddings()(ids[None])[0]

    def positions(self, prompt: Prompt, more: int) -> Tensor:
        """int64 `[1, L + more]` of the prompt and what is written behind it."""
        return self.first_position + torch.arange(len(prompt.ids) + more)[None]

    def blocks(self, prompt: Prompt, more: int) -> Tensor:
        """int64 `[L + more]`: tokens that see each other both ways."""
        return torch.full((len(prompt.ids) + more,), -1)

    def row(self, prompt: Prompt, written: Tensor, encoded: dict[int, Any]) -> Row:
        """The language model's input."""
        ids, more = torch.cat([prompt.ids, written]), len(written)
        kinds, owner = torch.cat([prompt.kinds, 0 * written]), torch.cat([prompt.owner, 0 * written - 1])
        hidden = self.embed(ids).clone()
        for kind, made in encoded.items():
            hidden[kinds == kind] = self.features(made)
        part = torch.zeros_like(ids)
        for picture in prompt.pictures:
            parts = torch.tensor(picture.shot.parts or picture.shot.crops or (0,) * len(picture.shot))
            part[picture.columns] = parts[: part[picture.columns].numel()]  # a cut tower fills the first places alone
        positions, blocks = self.positions(prompt, more), self.blocks(prompt, more)
        return Row(hidden, positions, owner, blocks, ids, torch.ones(len(ids)), part)

    # -------------------------------------------------------------- the layers
    def visible(self, kind: str, row: Row) -> Tensor:
        """bool `[L, L]`: what each query of such a layer sees."""
        length = len(row)
        if kind == "sliding_attention":
            return causal(length) & within(length, self.config.sliding_window)
        if kind == "chunked_attention":
            return causal(length) & same_chunk(length, self.config.attention_chunk_size)
        return causal(length)

    def mask(self, kind: str, row: Row) -> Tensor | None:
        """What a layer takes as its mask; recurrent ones take none where nothing is padded."""
        if kind in ("linear_attention", "conv"):
            return None
        seen = self.visible(kind, row)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    def rotary(self, kind: str, row: Row) -> Any:
        """Rotary tables."""
        return self.lm.rotary_emb(row.hidden[None], row.positions)

    def start(self, row: Row) -> Row:
        """What the text model works out once, from its input."""
        return row

    def layer(self, index: int, row: Row) -> Tensor:
        """Output of a layer, `[L, C]`."""
        kind = self.kinds[index]
        hidden = self.layers[index](
            row.hidden[None],
            attention_mask=self.mask(kind, row),
            position_embeddings=self.rotary(kind, row),
            position_ids=None,
        )
        return (hidden[0] if isinstance(hidden, tuple) else hidden)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[V]` of the last token."""
        last = self.lm.get_submodule(self.norm_path)(hidden[None])[:, -1]
        return self.finish(self.model.get_output_embeddings()(last))[0]

    def finish(self, logits: Tensor) -> Tensor:
        """What the host does to logits."""
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    # -------------------------------------------------------------- cuts
    def cut(self, row: Row, cut: Cut) -> Row:
        """A row after a cut."""
        owner = row.owner
        if cut.scope == "sample":
            owner = torch.where(owner < 0, -1, 0)
        if cut.scope == "part":
            owner = torch.where((owner < 0) | (row.part < 0), -1, owner * 1000 + row.part)
        stays = owner < 0
        for unit in owner.unique().tolist():
            if unit < 0:
                continue
            columns = (owner == unit).nonzero()[:, 0]
            if cut.keep is None:
                row = self.merge(row, columns[: len(columns) // 2 * 2 : 2], columns[1::2])
                stays[columns[::2]] = True
            else:
                kept, gap = chosen(row.hidden[columns], cut.keep)
                stays[columns[kept]] = True
                self.gap = min(self.gap, gap)
        left = row.take(stays.nonzero()[:, 0])
        if cut.positions == "renumber" and len(left) < len(row):
            left = replace(left, positions=row.positions.min() + torch.arange(len(left))[None])
        return left

    @staticmethod
    def merge(row: Row, into: Tensor, joined: Tensor) -> Row:
        """Some tokens become the mean of themselves and others, by size."""
        hidden, size = row.hidden.clone(), row.size.clone()
        size[into] += row.size[joined]
        mixed = row.hidden[into] * row.size[into, None] + row.hidden[joined] * row.size[joined, None]
        hidden[into] = mixed / size[into, None]
        return replace(row, hidden=hidden, size=size)

    def logits(self, row: Row, cuts: Sequence[Cut]) -> Tensor:
        """Logits `[V]` behind a row."""
        for cut in cuts:
            if cut.layer is None:
                row = self.cut(row, cut)
        row = self.start(row)
        for index in range(len(self.layers)):
            for cut in cuts:
                if cut.layer == index:
                    row = self.cut(row, cut)
            row = replace(row, hidden=self.layer(index, row))
        return self.head(row.hidden)

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, cuts: Sequence[Cut] = (), steps: int = 6, forced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Greedy decoding.

        Args:
            prompt: one row.
            cuts: in order.
            steps: tokens to write.
            forced: tokens to write instead of the likeliest ones, int64 `[steps]`.

        Returns:
            The tokens, int64 `[steps]`, and the logits in front of each, `[steps, V]`.
        """
        encoded = self.encode(prompt)
        written, rows = prompt.ids[:0], []
        for step in range(steps):
            rows.append(self.logits(self.row(prompt, written, encoded), cuts))
            token = rows[-1].argmax() if forced is None else forced[step]
            written = torch.cat([written, token[None]])
        return written, torch.stack(rows)
