"""A vision-language family that no library knows: the standard parts under names of its own.

It calls its text model as most families do (embeddings, a 2-D mask, positions, a cache), so `generic-vlm` carries it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from support.hosts_of import cache_name, cache_of, caches_in, named_by_host, with_cache
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .build import TEXT, TOWER
from .prompts import IMAGE


class NovelConfig(tf.PreTrainedConfig):
    model_type = "novel_vlm"
    sub_configs = {"vision_config": tf.SiglipVisionConfig, "text_config": tf.LlamaConfig}

    def __init__(self, vision_config: Any = None, text_config: Any = None, image_token_id: int = IMAGE, **more: Any):
        self.vision_config = vision_config
        self.text_config = text_config
        self.image_token_id = image_token_id
        super().__init__(**more)


class NovelPreTrained(tf.PreTrainedModel):
    config_class = NovelConfig
    config: NovelConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_attention_backend = True


class NovelModel(NovelPreTrained):
    """Tower, projector and text model, under the usual names."""

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.vision_tower = tf.AutoModel.from_config(config.vision_config)
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = tf.AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        out = self.vision_tower(pixel_values)
        out.pooler_output = list(self.bridge(out.last_hidden_state))
        return out

    def more(self, embeds: Tensor) -> dict[str, Tensor]:
        """Further arguments of the text model."""
        return {}

    @named_by_host
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: tf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = dict(mm_encoder_outputs or {})
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values)
        if encoded.get("image") is not None:
            here = (input_ids == self.config.image_token_id)[..., None]
            inputs_embeds = inputs_embeds.masked_scatter(here, torch.cat(encoded["image"].pooler_output))
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **with_cache(self.language_model, cache),
            **self.more(inputs_embeds),
            **options,
        )


class NovelForConditionalGeneration(NovelPreTrained, tf.GenerationMixin):
    core: type[NovelModel] = NovelModel

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.model = self.core(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @named_by_host
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: tf.Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **with_cache(self.model, cache),
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **options,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        held = cache_of(out) if caches_in(out) else None
        return CausalLMOutputWithPast(logits=logits, **{cache_name(CausalLMOutputWithPast): held})


class TaggedText(tf.LlamaModel):
    """A text model that takes one more thing of each token."""

    def forward(self, *given: Any, token_tags: Tensor | None = None, **named: Any) -> Any:
        return super().forward(*given, **named)


class TaggedModel(NovelModel):
    """Hands its text model a tensor of each token that a cut would have to follow."""

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.language_model = TaggedText(config.text_config)

    def more(self, embeds: Tensor) -> dict[str, Tensor]:
        return {"token_tags": embeds[..., 0]}


class TaggedForConditionalGeneration(NovelForConditionalGeneration):
    core = TaggedModel


def novel(model: type[NovelForConditionalGeneration] = NovelForConditionalGeneration, **changes: Any) -> nn.Module:
    """A tiny one."""
    vision = tf.SiglipVisionConfig(**TOWER, vision_use_head=False)
    return model(NovelConfig(vision_config=vision, text_config=tf.LlamaConfig(**TEXT), **changes))
