"""What vLLM's frontend knows of a model: its processor, and what a spec leaves of its pictures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from PIL import Image
from vllm.model_executor.models.transformers.multimodal import MultiModalProcessingInfo

from vlmtok.errors import VlmtokError
from vlmtok.loading.models import configured
from vlmtok.serving import Counter, ServingPlan

from .process import building
from .settings import foreign, spec_of

LARGEST = 2048
"""Pixels of a side of blank pictures; a processor that asks for more makes no more tokens of them."""


@contextmanager
def refusing() -> Iterator[None]:
    """Context in which what vlmtok refuses becomes what vLLM's frontend answers with: HTTP 400 and the line."""
    try:
        yield
    except VlmtokError as problem:
        raise ValueError(f"vlmtok: {problem}") from None


class VlmtokInfo(MultiModalProcessingInfo):
    """Processing info of vLLM's Transformers backend, with specs."""

    def get_hf_processor(self, **options: Any) -> Any:
        """The processor of transformers, which knows nothing of specs."""
        return super().get_hf_processor(**foreign(options))

    def _get_num_mm_tokens(self, **sizes: Sequence[Sequence[int]]) -> Any:
        """Tokens of pictures of some sizes, as (height, width)."""
        options = self.ctx.model_config.get_multimodal_config().mm_processor_kwargs or {}
        processor = self.get_hf_processor()
        try:
            return processor._get_num_multimodal_tokens(**sizes, **foreign(options))
        except (AttributeError, KeyError, TypeError):  # LLaVA's counts by a crop size, which SigLIP's pictures lack
            if set(sizes) != {"image_sizes"}:
                raise
            return {"num_image_tokens": [self._shown(processor, *size) for size in sizes["image_sizes"]]}

    def _shown(self, processor: Any, height: int, width: int) -> int:
        """Tokens of a picture, by showing the processor a blank one."""
        blank = Image.new("RGB", (min(width, LARGEST), min(height, LARGEST)))
        made = processor(images=[blank], text=[processor.image_token], return_tensors="pt")
        return int((made["input_ids"] == processor.image_token_id).sum())

    @cached_property
    def _is_audio_model(self) -> bool:
        return False  # pictures and clips alone are served

    @cached_property
    def counter(self) -> Counter:
        """Plans and counts, on the model without data."""
        config = copy.deepcopy(self.get_hf_config())
        for one in (config, config.get_text_config()):
            one._attn_implementation = "eager"  # in one process with its engine, the configuration names vLLM's
        with refusing(), building():
            return Counter(configured(config), engine="vLLM")

    def plan(self, options: Mapping[str, Any]) -> ServingPlan | None:
        """The plan in force for a request.

        Args:
            options: of the request.

        Raises:
            ValueError: the spec cannot be served; the message says why.
        """
        spec = spec_of(self.ctx.get_merged_mm_kwargs(dict(options)), self.get_hf_config())
        if spec is None:
            return None
        with refusing():
            return self.counter.plan(spec)
