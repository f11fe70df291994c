"""vLLM's frontend: pictures one by one through transformers' processor, and prompts as long as plans leave them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.model_executor.models.transformers.multimodal import (
    _MODALITY_TO_TOKEN_TYPE_ID,
    MultiModalProcessor,
    _get_embed_token_id,
)
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import EmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from vlmtok.serving import Item, ServingPlan

from .info import VlmtokInfo, refusing
from .settings import IDS, PLACEHOLDERS, SPEC, STAYS, TEXT, TYPES, as_bytes, field, foreign
from .versions import check_base


@dataclasses.dataclass
class Behind:
    """What stands in a prompt behind a picture.

    Attributes:
        ids: of text.
        pictures: how many more there are.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    pictures: int = 0


class VlmtokProcessor(MultiModalProcessor):
    """Processor of vLLM's Transformers backend, with specs.

    Every picture is processed by itself, so that nothing of it depends on its neighbours, and all that is made of it
    travels as one entry.
    """

    info: VlmtokInfo

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Processes a prompt; where a plan reads the text, that becomes part of each picture's identity."""
        chosen = self.info.plan(inputs.hf_processor_mm_kwargs)
        if chosen is not None and chosen.reads_text:
            behind = self._text_behind(list(inputs.prompt), inputs.mm_data_items)
            options = {**inputs.hf_processor_mm_kwargs, TEXT: behind}
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Identities of pictures: one plan, or one text behind it, makes of a picture what no other makes."""
        chosen = self.info.plan(inputs.hf_processor_mm_kwargs)
        options = foreign(inputs.hf_processor_mm_kwargs)
        if chosen is not None:
            options[SPEC] = chosen.key
        hashes = super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=options))
        texts: Mapping[str, list[Behind]] = inputs.hf_processor_mm_kwargs.get(TEXT, {})
        return {
            modality: [
                name if behind is None else f"{name}-{_digest(behind)}"
                for name, behind in zip(names, texts.get(modality) or [None] * len(names), strict=True)
            ]
            for modality, names in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]) -> Any:
        """Options for the pictures that no cache holds: each keeps the text behind it."""
        options = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        if TEXT not in options:
            return options
        texts = {
            modality: [one for one, cached in zip(behind, mm_is_cached[modality], strict=True) if not cached]
            for modality, behind in options[TEXT].items()
        }
        return {**options, TEXT: texts}

    def _get_hf_mm_inputs(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._get_hf_mm_inputs(mm_items, foreign(hf_kwargs))

    def _get_num_image_patches(self, hf_inputs: Any, mm_data: Any, num_images: int) -> Tensor:
        return torch.ones(num_images, dtype=torch.long)  # what is made of a picture is never sliced here

    # ------------------------------------------------------------------ one picture after the other
    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        chosen = self.info.plan(hf_kwargs)
        found: dict[str, list[Any]] = defaultdict(list)
        for modality, items in mm_items.items():
            if isinstance(items, EmbeddingItems):
                raise ValueError("vlmtok: pictures and clips are served, not embeddings made of them elsewhere")
            texts: Any = hf_kwargs.get(TEXT, {})
            texts = texts.get(modality) or [Behind()] * items.get_count()
            for index in range(items.get_count()):
                one = copy.copy(items)
                one.data = [items.data[index]]
                if isinstance(getattr(items, "metadata", None), list):
                    one.metadata = [items.metadata[index]]
                made = super()._apply_hf_processor_main(MultiModalDataItems({modality: one}), foreign(hf_kwargs))
                for name, value in self._entry(modality, made, chosen, texts[index]).items():
                    found[field(modality, name)].append(value)
        return BatchFeature(dict(found))

    def _entry(self, modality: str, made: BatchFeature, chosen: ServingPlan | None, behind: Behind) -> dict[str, Any]:
        """All that travels with a picture.

        Raises:
            ValueError: the plan cannot act on it, or reads a text that is not known here.
        """
        ids = made.pop(f"{modality}_replacement_ids")
        types = (ids == _get_embed_token_id(ids)).long() * _MODALITY_TO_TOKEN_TYPE_ID[modality]
        for name in (f"{modality}_replacement_sizes", "num_image_patches", "num_video_patches", "num_video_tokens"):
            made.pop(name, None)
        made.pop("attention_mask", None)
        given = {name: _tensor(value) for name, value in made.items()}
        inputs = {name: value for name, value in given.items() if value is not None}
        item = Item(ids, inputs, types)
        with refusing():
            left = self.info.counter.left(chosen, item)
        if chosen is not None and chosen.reads_text and behind.pictures and not left.placeholders.all():
            name = type(self.info.get_hf_processor()).__name__
            raise ValueError(
                f"vlmtok: {chosen.spec} reads all text behind a picture, and {name} writes marks of its own around "
                "later ones, which are not known yet; put one picture into the prompt"
            )
        return {
            **inputs,
            IDS: ids,
            TYPES: types,
            STAYS: left.stays,
            PLACEHOLDERS: left.placeholders,
            SPEC: as_bytes("" if chosen is None else chosen.spec),
            TEXT: torch.tensor(behind.ids, dtype=torch.long),
        }

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        return {
            name: MultiModalFieldConfig.batched(
                name.partition("/")[0], keep_on_cpu=not any(value.is_floating_point() for value in values)
            )
            for name, values in hf_inputs.items()
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        """What stands for each picture in the prompt: as many placeholders as its plan leaves."""
        updates = []
        for modality, items in out_mm_kwargs.items():
            replacements = []
            for item in items:
                ids, stays = item[field(modality, IDS)].data, item[field(modality, STAYS)].data.bool()
                replacements.append(PromptUpdateDetails.select_token_id(ids[stays].tolist(), _get_embed_token_id(ids)))
            updates.append(
                PromptReplacement(
                    modality=modality, target=self._target(modality), replacement=replacements.__getitem__
                )
            )
        return updates

    def _target(self, modality: str) -> list[int]:
        """Ids that stand for a picture in a prompt before it is laid out."""
        token = getattr(self.info.get_hf_processor(), f"{modality}_token")
        return list(self.info.get_tokenizer().encode(token, add_special_tokens=False))

    # ------------------------------------------------------------------ text behind pictures
    def _text_behind(self, prompt: list[int], mm_items: MultiModalDataItems) -> dict[str, list[Behind]]:
        """What stands behind each picture, by modality."""
        targets = {modality: self._target(modality) for modality in mm_items}
        found: dict[str, list[Behind]] = {modality: [] for modality in mm_items}
        before: list[Behind] = []
        at = 0
        while at < len(prompt):
            met = next((name for name, target in targets.items() if prompt[at : at + len(target)] == target), None)
            for behind in before:
                behind.pictures += met is not None
                behind.ids += [prompt[at]] if met is None else []
            if met is not None:
                before.append(Behind())
                found[met].append(before[-1])
            at += 1 if met is None else len(targets[met])
        return found


def _digest(behind: Behind) -> str:
    return hashlib.sha256(repr(behind).encode()).hexdigest()[:16]


def _tensor(value: Any) -> Tensor | None:
    """What a model is given; a list is of one picture."""
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        value = value[0][None]
    return value if isinstance(value, Tensor) else None


check_base(
    VlmtokProcessor,
    MultiModalProcessor,
    (
        *(
            "apply",
            "_get_mm_hashes",
            "_get_cache_missing_processor_kwargs",
            "_get_hf_mm_inputs",
            "_get_num_image_patches",
            "_apply_hf_processor_main",
        ),
        *("_get_mm_fields_config", "_get_prompt_updates"),
    ),
)
