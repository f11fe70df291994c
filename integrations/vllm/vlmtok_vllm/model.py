"""The class that vLLM runs: its Transformers backend, with a tower and a projector that stay transformers' own.

vLLM replaces modules of a model by its own ones, sharded and fused. In front of the language model nothing is replaced
here, so that vlmtok's hooks act there as they do in transformers; every rank of a tensor-parallel group has that part
whole. Behind it everything is vLLM's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import MultiModalDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vlmtok.adapters import adapter_for

from vlmtok.errors import VlmtokError
from vlmtok.serving import Counter, Encoder, ServingPlan

from .batches import Piece, batches, pieces
from .carried import Carried
from .info import VlmtokInfo
from .positions import whole_prompt
from .process import building, remember
from .processor import VlmtokProcessor
from .settings import spec_of
from .versions import check_base


@MULTIMODAL_REGISTRY.register_processor(VlmtokProcessor, info=VlmtokInfo, dummy_inputs=MultiModalDummyInputsBuilder)
class VlmtokForConditionalGeneration(TransformersMultiModalForCausalLM):
    """Serves every family that vLLM's Transformers backend and vlmtok's adapter both carry."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _check_settings(vllm_config)
        remember(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        try:
            adapter: Any = adapter_for(self.model)
            self._counter = Counter(self.model, engine="vLLM")
            spec = spec_of(self.model_config.multimodal_config.mm_processor_kwargs or {}, self.config)
            if spec is not None:
                self._counter.plan(spec)
        except VlmtokError as problem:
            raise ValueError(f"vlmtok: {problem}") from None
        moves = self.model_config.uses_mrope
        text = self.model.get_submodule(adapter.spec.lm)
        levels = 0
        if adapter.spec.deepstack is not None:
            levels = len(self.config.vision_config.deepstack_visual_indexes)
        if (moves or levels) and self.parallel_config.pipeline_parallel_size > 1:
            raise ValueError(
                f"vlmtok: {self.config.model_type} gives tokens of pictures positions or features of their own, which "
                "do not reach later stages of a pipeline; use tensor parallelism"
            )
        scheduler = vllm_config.scheduler_config
        self.vlmtok_carried = Carried(
            self.text_config.hidden_size,
            levels,
            moves,
            scheduler.max_num_batched_tokens,
            self.model_config.dtype,
            self.device_config.device,
        )
        for level in range(levels):
            text.layers[level].register_forward_hook(self.vlmtok_carried.behind(level))
        self._encoder: Encoder | None = None

    # ------------------------------------------------------------------ what vLLM makes of the modules
    def recursive_replace(self) -> None:
        """Replaces modules of the language model alone."""
        with self._front_aside():
            super().recursive_replace()

    @contextmanager
    def _front_aside(self) -> Iterator[None]:
        """Context in which the inner model has nothing but its language model."""
        first = adapter_for(self.model).spec.lm.partition(".")[0]
        aside = {name: self.model._modules.pop(name) for name in list(self.model._modules) if name != first}
        try:
            yield
        finally:
            kept = dict(self.model._modules)
            self.model._modules.clear()
            self.model._modules.update({**aside, **kept})

    # ------------------------------------------------------------------ pictures
    @torch.no_grad()
    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """What the language model is given of each picture or clip, `[K, wide]` each, as its plan leaves it."""
        given = pieces(kwargs, self.vlmtok_carried.stacked.device)
        made: list[Tensor | None] = [None] * len(given)
        with gpu_sync_allowed():  # where pictures stand in a row is read back
            for group in batches(given, alone=self.vlmtok_carried.moves):
                chosen = None if not group[0].spec else self._counter.plan(group[0].spec)
                for piece, rows in zip(group, self._encode(chosen, group), strict=True):
                    made[piece.index] = rows
        return [rows for rows in made if rows is not None]

    def _encode(self, chosen: ServingPlan | None, group: Sequence[Piece]) -> list[Tensor]:
        if self._encoder is None:
            with building():
                self._encoder = Encoder(self.model)
        text = group[0].text if len(group[0].text) else None
        found = self._encoder.encode(chosen, [piece.item for piece in group], [piece.left for piece in group], text)
        rows = [self.vlmtok_carried.join(one.rows, one.stacked, one.positions) for one in found]
        if self.tp_group.world_size > 1:  # near ties must fall alike on all ranks
            rows = [self.tp_group.broadcast(one.contiguous(), src=0) for one in rows]
        return rows

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings of a step's tokens; what pictures bring beside theirs is kept for its forward."""
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            flat = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in multimodal_embeddings])
            multimodal_embeddings = [self.vlmtok_carried.take(flat, is_multimodal)]
        else:
            self.vlmtok_carried.forget()
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """A step, with the positions that tokens of pictures kept."""
        positions = self.vlmtok_carried.positions(positions)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions of a prompt, int64 `[3, L]`, and what to add to a column's number behind it.

        Text stands where it stands behind whole pictures. Tokens of a picture get the position of its first one, and
        bring the rest with them.
        """
        full = whole_prompt(input_tokens, mm_features)
        types = torch.tensor(full.types, dtype=torch.int)[None]
        names = {"image_grid_thw", "video_grid_thw", "second_per_grid_ts"}
        inputs: dict[str, Tensor] = {}
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            for name, element in feature.data.items():
                short = name.partition("/")[2]
                if short in names:
                    inputs[short] = torch.cat([inputs[short], element.data]) if short in inputs else element.data
        taken = _parameters(self.model.get_rope_index)
        inputs["mm_token_type_ids"] = types
        positions, delta = self.model.get_rope_index(
            input_ids=torch.tensor(full.ids)[None],
            **{name: value for name, value in inputs.items() if taken is None or name in taken},
            **{
                name: None
                for name in ("image_grid_thw", "video_grid_thw")
                if taken and name in taken and name not in inputs
            },
        )
        positions = positions[:, 0]
        end = int(delta.flatten()[0]) + len(full.ids)
        positions = full.shortened(positions)
        return positions, end - len(input_tokens)


def _parameters(function: Any) -> set[str] | None:
    """Names of a function's parameters, or None where it takes any."""
    found = inspect.signature(function).parameters
    return None if any(one.kind is one.VAR_KEYWORD for one in found.values()) else set(found)


def _check_settings(config: VllmConfig) -> None:
    """Refuses settings of vLLM that would lead around the hooks.

    Raises:
        ValueError: the message names the setting.
    """
    if config.compilation_config.compile_mm_encoder:
        raise ValueError("vlmtok: compile_mm_encoder compiles the tower, and hooks would not run; leave it off")
    if config.lora_config is not None and getattr(config.lora_config, "enable_tower_connector_lora", False):
        raise ValueError(
            "vlmtok: enable_tower_connector_lora is for towers of vLLM's own, and here they are transformers'"
        )
    if config.model_config.is_moe:
        raise ValueError(
            "vlmtok: models with experts need another class of vLLM's Transformers backend, not served yet"
        )
    if config.model_config.is_mm_prefix_lm and current_platform.is_cpu():
        raise ValueError(
            f"vlmtok: tokens of a picture see each other in {config.model_config.hf_config.model_type}, and vLLM's "
            "attention for CPUs lets them see what stands before alone, so that answers are wrong; it needs a GPU"
        )
    multimodal = config.model_config.multimodal_config
    if multimodal is not None and multimodal.mm_encoder_tp_mode == "data":
        raise ValueError(
            "vlmtok: mm_encoder_tp_mode='data' shards towers of vLLM's own; here every rank runs its own whole"
        )


check_base(
    VlmtokForConditionalGeneration,
    TransformersMultiModalForCausalLM,
    ("recursive_replace", "embed_multimodal", "embed_input_ids", "forward", "get_mrope_input_positions"),
)
