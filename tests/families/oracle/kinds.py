"""Families that differ from the plain one, and the oracle of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts import Prompt
from .plain import Oracle
from .rows import Row, causal, same_block, within


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


class UnifiedOracle(Gemma4Oracle):
    """Gemma 4 without a tower: its layers take nothing besides, and share no keys; blocks reach beyond windows."""

    def visible(self, kind: str, row: Row) -> Tensor:
        return Oracle.visible(self, kind, row) | same_block(row.block)

    def start(self, row: Row) -> Row:
        return row

    def layer(self, index: int, row: Row) -> Tensor:
        kind = self.kinds[index]
        return self.layers[index](
            row.hidden[None],
            shared_kv_states={},
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


class GraniteOracle(TilesOracle, Qwen3Oracle):
    """Granite Docling: embeddings are scaled by the text model."""

    follows = "last"

    def positions(self, prompt: Prompt, more: int) -> Tensor:
        return Oracle.positions(self, prompt, more)

    def rotary(self, kind: str, row: Row) -> Any:
        return Oracle.rotary(self, kind, row)

    def start(self, row: Row) -> Row:
        return replace(row, hidden=row.hidden * self.config.embedding_multiplier)


class OvisOracle(Oracle):
    """Ovis2: marks around pictures have embeddings out of the visual table."""

    def row(self, prompt: Prompt, written: Tensor, encoded: dict[int, Any]) -> Row:
        row = super().row(prompt, written, encoded)
        hidden = row.hidden.clone()
        for made in encoded.values():
            for mark, value in zip(self.core.config.visual_indicator_token_ids, made.visual_indicator_features):
                hidden[row.ids == mark] = value
        return replace(row, hidden=hidden)


class TypedOracle(Oracle):
    """Rotary tables of each type of layer."""

    def rotary(self, kind: str, row: Row) -> Any:
        return self.lm.rotary_emb(row.hidden[None], row.positions, kind)


class StepOracle(TypedOracle):
    """Step 3.7: pictures that are not cut bring no crops."""

    def arrays(self, arrays: dict[str, Tensor], prompt: Prompt, kind: int) -> dict[str, Tensor]:
        return {name: value for name, value in arrays.items() if value.numel()}


class Lfm3Oracle(TypedOracle):
    """LFM3-VL: the last norm has another name."""

    norm_path = "embedding_norm"

    def rotary(self, kind: str, row: Row) -> Any:
        return None if kind == "conv" else super().rotary(kind, row)


class CompassOracle(Qwen3Oracle):
    """North Micro Vision: layers without a window have no positions."""

    def rotary(self, kind: str, row: Row) -> Any:
        if self.config.rope_parameters[kind] is None:
            return None
        return self.lm.rotary_emb(row.hidden[None], row.positions[:, None], kind)

    def finish(self, logits: Tensor) -> Tensor:
        scale = self.model.logit_scale
        return logits if scale is None else logits * scale


class HiddenOracle(Oracle):
    """Placeholders count as the first id where theirs is looked up."""

    def embed(self, ids: Tensor) -> Tensor:
        config = self.core.config
        return super().embed(ids.where((ids != config.image_token_id) & (ids != config.video_token_id), 0))


class MuseOracle(HiddenOracle):
    """Muse Glimmer: some layers have no positions; logits are scaled and capped."""

    def layer(self, index: int, row: Row) -> Tensor:
        kind = self.kinds[index]
        table = self.rotary(kind, row) if self.config.layer_rope_theta[index] else None
        return self.layers[index](
            row.hidden[None], attention_mask=self.mask(kind, row), position_embeddings=table, position_ids=None
        )[0]

    def finish(self, logits: Tensor) -> Tensor:
        return super().finish(logits * self.config.output_multiplier)


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
    "glm4v_moe": MRoPEOracle,
    "glm_ocr": MRoPEOracle,
    "glmga": MRoPEOracle,
    "cosmos3_omni": Qwen3Oracle,
    "cosmos3_edge": MRoPEOracle,
    "cohere_compass": CompassOracle,
    "gemma4_unified": UnifiedOracle,
    "idefics2": TilesOracle,
    "muse_glimmer": MuseOracle,
    "step3p7": StepOracle,
    "muse_spark": MuseOracle,
    "kimi_k25": HiddenOracle,
    "granite_docling": GraniteOracle,
    "ovis2": OvisOracle,
    "lfm3_vl": Lfm3Oracle,
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
