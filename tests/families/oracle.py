"""What a model says after cuts, worked out the plain way: one row, no padding, no cache, no hooks, no library.

Each step starts from the prompt. Embeddings, positions, masks and cuts are made here from their definitions; only the
model's own modules (encoders, decoder layers, rotary tables, head) are called. Nothing of vlmtok and no mask helper of
transformers is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import Prompt


@dataclass(frozen=True)
class Cut:
    """A cut that both sides can make: of every unit the `keep` share of tokens with the largest L2 norm stays.

    Attributes:
        keep: share, 0 for none; rounds half up. None merges instead: every second token joins the one before it.
        layer: the decoder layer in front of which it happens; None for the language model's input.
        scope: what one unit is: ``picture``, ``part`` (each crop or frame; separators stay) or ``sample``.
        positions: ``keep`` or ``renumber``.
    """

    keep: float | None
    layer: int | None = None
    scope: str = "picture"
    positions: str = "keep"


def chosen(tokens: Tensor, keep: float) -> tuple[Tensor, float]:
    """The tokens that stay of one unit.

    Args:
        tokens: `[N, C]`.
        keep: share.

    Returns:
        int64 `[K]` ascending, and how far the last one taken lies above the first one left out, as a share of it.
    """
    count = int(keep * len(tokens) + 0.5)
    norms, order = tokens.double().norm(dim=-1).sort(descending=True, stable=True)
    gap = float("inf") if count in (0, len(tokens)) else float(norms[count - 1] / norms[count] - 1)
    return order[:count].sort().values, gap


@dataclass(frozen=True)
class Row:
    """The tokens of a row at some depth of the language model; the tensors share their first axis, but for `positions`.

    Attributes:
        hidden: `[L, C]`.
        positions: int64 `[1 or 3, L]`.
        owner: int64 `[L]`, picture of each token, -1 for text.
        block: int64 `[L]`, tokens of equal block see each other both ways; -1 for none.
        ids: int64 `[L]`.
        size: `[L]`, tokens that each one stands for.
        part: int64 `[L]`, crop or frame of each token of a picture, -1 for separators.
        tables: what layers take besides, one `[L, ...]` for each of the first layers.
    """

    hidden: Tensor
    positions: Tensor
    owner: Tensor
    block: Tensor
    ids: Tensor
    size: Tensor
    part: Tensor
    tables: tuple[Tensor, ...] = ()

    def take(self, index: Tensor) -> Row:
        """Some of its tokens."""
        return Row(
            self.hidden[index],
            self.positions[:, index],
            self.owner[index],
            self.block[index],
            self.ids[index],
            self.size[index],
            self.part[index],
            tuple(table[index] for table in self.tables),
        )

    def __len__(self) -> int:
        return len(self.hidden)


# ---------------------------------------------------------------------- who sees whom
def causal(length: int) -> Tensor:
    """bool `[L, L]`, query by key."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def within(length: int, window: int) -> Tensor:
    """Keys less than a window behind the query, or in front of it."""
    place = torch.arange(length)
    return place[None] > place[:, None] - window


def same_chunk(length: int, size: int) -> Tensor:
    """Keys in the query's chunk of so many tokens."""
    chunk = torch.arange(length) // size
    return chunk[None] == chunk[:, None]


def same_block(block: Tensor) -> Tensor:
    """Keys in the query's block."""
    return (block[None] == block[:, None]) & (block[None] >= 0)


# ---------------------------------------------------------------------- families
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
        return made.flatten(0, -2) if isinstance(made, Tensor) else torch.cat(list(made))

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


class OneVisionOracle(Oracle):
    """LLaVA-OneVision: pictures that share a prompt are one crop each, and the host must be told how many do."""

    def arrays(self, arrays: dict[str, Tensor], prompt: Prompt, kind: int) -> dict[str, Tensor]:
        if kind == 2:
            return arrays
        side = self.core.config.vision_config.image_size
        whole = [size == [side, side] for size in arrays["image_sizes"].tolist()]
        counts = [1] * (len(whole) - sum(whole)) + [sum(whole)] * any(whole)
        return {**arrays, "batch_num_images": torch.tensor(counts)}


class TilesOracle(Oracle):
    """SmolVLM and Idefics 3: tiles come by sample."""

    lm_path = "text_model"

    def arrays(self, arrays: dict[str, Tensor], prompt: Prompt, kind: int) -> dict[str, Tensor]:
        return {name: value[None] for name, value in arrays.items()}


class MRoPEOracle(Oracle):
    """Positions in three dimensions: time, row and column.

    A text token takes the next number in all three. The tokens of a grid take their place in it, counted from that
    number on; the text behind goes on as far as the longer side. Written tokens follow the last one of the prompt
    (`generate`), or the largest number in it (a host that counts by itself): with frames far apart these differ.
    """

    frame_step = 1
    follows = "last"

    def positions(self, prompt: Prompt, more: int) -> Tensor:
        places, at, column = torch.zeros(3, len(prompt.ids), dtype=torch.int64), 0, 0
        for picture in prompt.pictures:
            for run, (frames, rows, columns) in zip(picture.runs(), picture.shot.grids, strict=True):
                first = int(run[0])
                places[:, column:first] = at + torch.arange(first - column)
                at += first - column
                step = self.frame_step if picture.shot.video else 1
                grid = torch.cartesian_prod(torch.arange(frames) * step, torch.arange(rows), torch.arange(columns))
                places[:, run] = at + grid.T
                at, column = at + max(rows, columns), first + len(run)
        places[:, column:] = at + torch.arange(len(prompt.ids) - column)
        end = places[:, -1:] if self.follows == "last" else places.max().expand(3, 1)
        return torch.cat([places, end + 1 + torch.arange(more)], 1)

    def rotary(self, kind: str, row: Row) -> Any:
        return self.lm.rotary_emb(row.hidden[None], row.positions[:, None])


class Qwen25Oracle(MRoPEOracle):
    """Qwen2.5-VL: frames of a clip lie seconds apart."""

    @property
    def frame_step(self) -> int:  # type: ignore[override]
        return int(self.core.config.vision_config.tokens_per_second)


class Qwen3Oracle(MRoPEOracle):
    """Qwen3-VL: features of lower tower layers are added to visual tokens behind the first decoder layers."""

    def row(self, prompt: Prompt, written: Tensor, encoded: dict[int, Any]) -> Row:
        row = super().row(prompt, written, encoded)
        kinds = torch.cat([prompt.kinds, 0 * written])
        levels = max((len(made.deepstack_features) for made in encoded.values()), default=0)
        added = torch.zeros(levels, *row.hidden.shape)
        for kind, made in encoded.items():
            for level, features in enumerate(made.deepstack_features):
                added[level, kinds == kind] = torch.cat(list(features))
        return replace(row, tables=tuple(added))

    def layer(self, index: int, row: Row) -> Tensor:
        hidden = super().layer(index, row)
        return hidden + row.tables[index] if index < len(row.tables) else hidden


class Gemma3Oracle(Oracle):
    """Gemma 3: the tokens of one run see each other both ways, in sliding layers as far as the window reaches back."""

    both_ways_in_full = True

    def blocks(self, prompt: Prompt, more: int) -> Tensor:
        block, count = super().blocks(prompt, more), 0
        for picture in prompt.pictures:
            for run in picture.runs():
                block[run] = count
                count += 1
        return block

    def visible(self, kind: str, row: Row) -> Tensor:
        seen = causal(len(row))
        if kind == "sliding_attention" or self.both_ways_in_full:
            seen = seen | same_block(row.block)
        if kind == "sliding_attention":
            seen = seen & within(len(row), self.config.sliding_window)
        return seen

    def rotary(self, kind: str, row: Row) -> Any:
        return self.lm.rotary_emb(row.hidden[None], row.positions, kind)


class Gemma4Oracle(Gemma3Oracle):
    """Gemma 4: only sliding layers look both ways; each layer adds something of the token's id; late layers share keys.

    Placeholders count as padding where their id is looked up.
    """

    both_ways_in_full = False

    def blocks(self, prompt: Prompt, more: int) -> Tensor:
        if self.config.use_bidirectional_attention != "vision":
            return Oracle.blocks(self, prompt, more)
        return super().blocks(prompt, more)

    def _plain(self, ids: Tensor) -> Tensor:
        config = self.core.config
        held = torch.tensor([config.image_token_id, config.video_token_id, config.audio_token_id])
        return torch.where(torch.isin(ids, held), self.config.pad_token_id, ids)

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(self._plain(ids))

    def start(self, row: Row) -> Row:
        self.keys: dict[str, Any] = {}
        by_id = self.lm.get_per_layer_inputs(self._plain(row.ids)[None], None)  # or embeddings, read back into ids
        by_layer = self.lm.project_per_layer_inputs(row.hidden[None], by_id)[0]
        return replace(row, tables=tuple(by_layer.unbind(1)))

    def layer(self, index: int, row: Row) -> Tensor:
        kind = self.kinds[index]
        return self.layers[index](
            row.hidden[None],
            row.tables[index][None],
            shared_kv_states=self.keys,
            attention_mask=self.mask(kind, row),
            position_embeddings=self.rotary(kind, row),
        )[0]


class PaliGemmaOracle(Oracle):
    """PaliGemma: the prompt sees itself both ways, whatever the window; positions count from 1."""

    first_position = 1
    capped = True
    """Whether the host caps logits as PaliGemma 2's config says; it did not always."""

    def finish(self, logits: Tensor) -> Tensor:
        return super().finish(logits) if self.capped else logits

    def blocks(self, prompt: Prompt, more: int) -> Tensor:
        return torch.cat([torch.zeros(len(prompt.ids), dtype=torch.int64), torch.full((more,), -1)])

    def visible(self, kind: str, row: Row) -> Tensor:
        return super().visible(kind, row) | same_block(row.block)


class Llama4Oracle(Oracle):
    """Llama 4: the projector runs outside the host's encoder."""

    core_path, lm_path = "", "language_model.model"

    def features(self, encoded: Any) -> Tensor:
        return self.core.multi_modal_projector(encoded.last_hidden_state.flatten(0, 1))


class Lfm2Oracle(Oracle):
    """LFM2-VL: the last norm has another name."""

    norm_path = "embedding_norm"


ORACLES: dict[str, Callable[[nn.Module], Oracle]] = {
    "llava_onevision": OneVisionOracle,
    "qwen2_vl": MRoPEOracle,
    "qwen2_5_vl": Qwen25Oracle,
    "qwen3_vl": Qwen3Oracle,
    "qwen3_vl_moe": Qwen3Oracle,
    "qwen3_5": MRoPEOracle,
    "qwen3_5_moe": MRoPEOracle,
    "glm4v": MRoPEOracle,
    "glm46v": MRoPEOracle,
    "paddleocr_vl": MRoPEOracle,
    "smolvlm": TilesOracle,
    "idefics3": TilesOracle,
    "gemma3": Gemma3Oracle,
    "gemma4": Gemma4Oracle,
    "paligemma": PaliGemmaOracle,
    "paligemma2": PaliGemmaOracle,
    "llama4": Llama4Oracle,
    "lfm2_vl": Lfm2Oracle,
}
"""By family; all others are plain."""


def oracle(family: str, model: nn.Module) -> Oracle:
    """The oracle of a family."""
    return ORACLES.get(family, Oracle)(model)
