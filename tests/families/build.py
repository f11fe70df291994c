"""Tiny random models of vision-language families, built in code, and the pictures they take.

Weights are multiplied, or a picture would change logits by less than the tolerances of the tests; rows of the head that
belong to placeholders and marks are zero, so that greedy decoding never writes one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import transformers as tf
from torch import Tensor, nn

from .prompts import AUDIO, BOS, END, IMAGE, MARK, PAD, START, VIDEO, VOCAB, WORDS, Batch, Prompt, write
from .shots import (
    GLM_VIDEO,
    PATCH,
    PATCH_VALUES,
    SIDE,
    AnyRes,
    Maker,
    by_sample,
    marked,
    naflex,
    one_crop,
    packed,
    packed_clip,
    plain,
    pooled_clip,
    pooled_frames,
    pooled_patches,
    queries,
    rows_with_breaks,
    tiles,
)

DEPTH, WIDTH = 4, 64

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
PACKED = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": WIDTH,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION_IDS = {"vision_start_token_id": START, "vision_end_token_id": END}


@dataclass(frozen=True)
class Family:
    """A family and its prompts.

    Attributes:
        name: ``config.model_type``, or that with a word on what is special.
        make: builds the model.
        shots: pictures and clips, by letter: ``I`` and ``J`` take one run of placeholders each (of different lengths
            where the family allows that), ``M`` is one that is cut into crops, ``V`` and ``W`` are clips.
        rows: patterns of the two rows of the usual batch.
        several: patterns of a batch with several pictures in a row, some cut into crops, and a text row.
        clips: patterns of a batch with clips, or None.
        types: see `Batch`.
        prefix: see `Batch`.
        join: see `Batch`.
        extra: see `Batch`.
        attentions: attention implementations that the host runs with.
        positions: ``1d`` or ``mrope``.
        gain: factor on the matrices of the text model and its head, and
        tower_gain: on those of the tower and the projector.
        beams: whether the host's own beam search works with pictures.
    """

    name: str
    make: Callable[[], nn.Module]
    shots: Mapping[str, Maker]
    rows: tuple[str, ...] = ("3I6", "2J4")
    several: tuple[str, ...] = ("2I3J5", "4J3", "7")
    clips: tuple[str, ...] | None = None
    types: str | None = None
    prefix: bool = False
    join: Mapping[str, Callable[[list[list[Tensor]]], Tensor]] = field(default_factory=dict)
    extra: Callable[[tuple[Prompt, ...]], dict[str, Tensor]] | None = None
    attentions: tuple[str, ...] = ("sdpa", "eager")
    positions: str = "1d"
    gain: float = 8.0
    tower_gain: float = 4.0
    beams: bool = True

    def build(self, attention: str = "sdpa") -> nn.Module:
        """A model of its own, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().eval()
        model.set_attn_implementation(attention)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    if parameter.min() == parameter.max():  # what the host starts from zeros or ones
                        parameter.normal_(std=0.1, generator=generator)
                    text = any(part in name for part in ("language_model", "text_model", "lm_head"))
                    parameter.mul_(self.gain if text else self.tower_gain)
            head = model.get_output_embeddings().weight
            head[: WORDS.start] = 0
            head[MARK:] = 0
        for part in (model, getattr(model, "language_model", None)):  # BLIP-2 lets its text model generate
            if hasattr(part, "generation_config"):
                part.generation_config.eos_token_id = None
                part.generation_config.pad_token_id = PAD
        return model

    def prompt(self, pattern: str, seed: int = 0) -> Prompt:
        """One prompt."""
        return write(pattern, self.shots, seed)

    def batch(self, *patterns: str, seed: int = 0) -> Batch:
        """Prompts with different words and pictures."""
        return self.collect(*(self.prompt(pattern, 10 * seed + row) for row, pattern in enumerate(patterns)))

    def collect(self, *prompts: Prompt) -> Batch:
        """Prompts as a batch."""
        return Batch(prompts, self.types, self.prefix, self.join, self.extra)


# ---------------------------------------------------------------------- models
def llava() -> nn.Module:
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )


PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def llava_next() -> nn.Module:
    return tf.LlavaNextForConditionalGeneration(
        tf.LlavaNextConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER),
            text_config=tf.MistralConfig(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def llava_onevision(aspect: str = "anyres_max_9") -> nn.Module:
    return tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(
            vision_config=tf.SiglipVisionConfig(**TOWER, vision_use_head=False),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=aspect,
        )
    )


def qwen2_vl() -> nn.Module:
    vision = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "hidden_size": WIDTH}
    return tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            vision_config=vision,
            text_config=dict(**TEXT, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def qwen2_5_vl() -> nn.Module:
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            vision_config=dict(**PACKED, window_size=16, fullatt_block_indexes=[1]),
            text_config=dict(**TEXT, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def qwen3_vl(experts: bool = False) -> nn.Module:
    model = tf.Qwen3VLMoeForConditionalGeneration if experts else tf.Qwen3VLForConditionalGeneration
    return model(
        model.config_class(
            vision_config=dict(**PACKED, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            text_config=dict(**TEXT, **(EXPERTS if experts else {}), head_dim=16, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def qwen3_5(experts: bool = False) -> nn.Module:
    model = tf.Qwen3_5MoeForConditionalGeneration if experts else tf.Qwen3_5ForConditionalGeneration
    recurrent = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    if experts:
        recurrent |= {**EXPERTS, "shared_expert_intermediate_size": 64}
    return model(
        model.config_class(
            vision_config=dict(**PACKED, num_position_embeddings=64),
            text_config=dict(**TEXT, **recurrent, head_dim=16, rope_parameters={**MROPE, "partial_rotary_factor": 1.0}),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **VISION_IDS,
        )
    )


def _glm(model: type[nn.Module], config: type) -> nn.Module:
    return model(
        config(
            vision_config={**PACKED, "image_size": SIDE, "model_type": "glm4v_vision"},
            text_config={
                **TEXT,
                "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
                "model_type": "glm4v_text",
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=GLM_VIDEO[0],
            video_end_token_id=GLM_VIDEO[1],
        )
    )


def glm4v() -> nn.Module:
    return _glm(tf.Glm4vForConditionalGeneration, tf.Glm4vConfig)


def glm46v() -> nn.Module:
    return _glm(tf.Glm46VForConditionalGeneration, tf.Glm46VConfig)


def paddleocr_vl() -> nn.Module:
    return tf.PaddleOCRVLForConditionalGeneration(
        tf.PaddleOCRVLConfig(
            vision_config=dict(TOWER),
            text_config=dict(**TEXT, head_dim=16, rope_parameters=MROPE),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
            **VISION_IDS,
        )
    )


def internvl() -> nn.Module:
    vision = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [4, 4]}
    return tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            vision_config=tf.InternVLVisionConfig(**vision),
            text_config=tf.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
            tie_word_embeddings=False,
        )
    )


FINE = {**TOWER, "patch_size": 4}


def smolvlm() -> nn.Module:
    return tf.SmolVLMForConditionalGeneration(
        tf.SmolVLMConfig(
            vision_config=dict(FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
    )


def idefics3() -> nn.Module:
    return tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            vision_config=dict(FINE), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
    )


def mistral3() -> nn.Module:
    return tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            vision_config=tf.PixtralVisionConfig(**{**TOWER, "image_size": 64}, head_dim=8),
            text_config=tf.MistralConfig(**TEXT, sliding_window=None),
            image_token_id=IMAGE,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )


WINDOWED = {
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 16,
}


def gemma3() -> nn.Module:
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            vision_config=dict(**FINE, vision_use_head=False),
            text_config=tf.Gemma3TextConfig(**TEXT, **WINDOWED),
            image_token_id=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
            mm_tokens_per_image=16,
            tie_word_embeddings=False,
        )
    )


def gemma4(bidirectional: str | None = "vision") -> nn.Module:
    text = {
        **TEXT,
        "num_hidden_layers": 6,
        "head_dim": 16,
        "global_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "use_bidirectional_attention": bidirectional,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    return tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            vision_config=tf.Gemma4VisionConfig(**vision),
            text_config=tf.Gemma4TextConfig(**text),
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            boi_token_id=START,
            eoi_token_id=END,
            tie_word_embeddings=False,
        )
    )


def paligemma(second: bool = False) -> nn.Module:
    text = tf.Gemma2Config(**TEXT, **WINDOWED) if second else tf.GemmaConfig(**TEXT, head_dim=16)
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            vision_config=dict(**TOWER, projection_dim=WIDTH, model_type="siglip_vision_model", vision_use_head=False),
            text_config=text,
            image_token_id=IMAGE,
            projection_dim=WIDTH,
            hidden_size=WIDTH,
            tie_word_embeddings=False,
        )
    )


def llama4(floor_scale: int = 8192) -> nn.Module:
    vision = {
        **FINE,
        "intermediate_size": 128,
        "vision_output_dim": WIDTH,
        "projector_input_dim": WIDTH,
        "projector_output_dim": WIDTH,
    }
    text = dict(
        **TEXT,
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=2,
        attention_chunk_size=16,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
        floor_scale=floor_scale,
    )
    return tf.Llama4ForConditionalGeneration(
        tf.Llama4Config(
            vision_config=tf.Llama4VisionConfig(**vision),
            text_config=tf.Llama4TextConfig(**text),
            image_token_id=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )


def aya_vision() -> nn.Module:
    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(
            vision_config=tf.SiglipVisionConfig(**FINE, vision_use_head=False),
            text_config=tf.Cohere2Config(**text),
            image_token_id=IMAGE,
            downsample_factor=2,
            tie_word_embeddings=False,
        )
    )


def cohere2_vision() -> nn.Module:
    text = {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return tf.Cohere2VisionForConditionalGeneration(
        tf.Cohere2VisionConfig(
            vision_config=tf.SiglipVisionConfig(**FINE, vision_use_head=False),
            text_config=tf.Cohere2Config(**text),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=64,
            tie_word_embeddings=False,
        )
    )


def lfm2_vl() -> nn.Module:
    vision = {**TOWER, "num_patches": 64, "patch_size": 4, "vision_use_head": False}
    vision.pop("image_size")
    text = {**TEXT, "layer_types": ["conv", "full_attention"] * 2}
    return tf.Lfm2VlForConditionalGeneration(
        tf.Lfm2VlConfig(
            vision_config=tf.Siglip2VisionConfig(**vision),
            text_config=tf.Lfm2Config(**text),
            image_token_id=IMAGE,
            projector_hidden_size=WIDTH,
            downsample_factor=2,
            tie_word_embeddings=False,
        )
    )


def _queries(model: type[nn.Module], config: type, vision: type, qformer: type, text: object) -> nn.Module:
    return model(
        config(
            vision_config=vision(**TOWER, initializer_range=0.02).to_dict(),
            qformer_config=qformer(
                vocab_size=VOCAB,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                encoder_hidden_size=32,
                hidden_dropout_prob=0.0,
            ).to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=8,
            image_token_index=IMAGE,
        )
    )


def blip_2() -> nn.Module:
    text = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return _queries(tf.Blip2ForConditionalGeneration, tf.Blip2Config, tf.Blip2VisionConfig, tf.Blip2QFormerConfig, text)


def instructblip() -> nn.Module:
    return _queries(
        tf.InstructBlipForConditionalGeneration,
        tf.InstructBlipConfig,
        tf.InstructBlipVisionConfig,
        tf.InstructBlipQFormerConfig,
        tf.LlamaConfig(**TEXT),
    )


# ---------------------------------------------------------------------- families
def _images_per_prompt(prompts: tuple[Prompt, ...]) -> dict[str, Tensor]:
    """Pictures of each row of LLaVA-OneVision: several in a row are not cut into crops."""
    counts = [sum(not picture.shot.video for picture in prompt.pictures) for prompt in prompts]
    return {"batch_num_images": torch.tensor(counts)} if any(counts) else {}


MM = "mm_token_type_ids"
QWEN = {"I": packed(4, 4, PATCH_VALUES), "J": packed(2, 4, PATCH_VALUES)}
RUN_CLIPS = {"V": packed_clip(3, 2, 2, "run"), "W": packed_clip(2, 2, 5, "run")}
STAMPED_CLIPS = {"V": packed_clip(3, 2, 2, "stamped"), "W": packed_clip(2, 2, 5, "stamped")}
GLM_CLIPS = {"V": packed_clip(3, 2, 2, "glm"), "W": packed_clip(2, 2, 5, "glm")}
LARGE, WIDE = AnyRes(40, 60, (64, 64)), AnyRes(30, 62, (32, 64))
SPLIT = marked([(START, MARK), (START, MARK + 1), (MARK + 8, MARK + 8, START, MARK + 9)], (START,))
WHOLE = marked([(START, MARK + 9)], (START,))
MIXED_CLIPS = ("2I3V4", "3W2J3")

FAMILIES = {
    family.name: family
    for family in (
        Family("llava", llava, {"I": plain(), "J": plain()}),
        Family("llava_next", llava_next, {"I": LARGE, "J": WIDE}),
        Family(
            "llava_onevision",
            llava_onevision,
            {"I": LARGE, "J": WIDE, "S": one_crop, "V": pooled_clip(3), "W": pooled_clip(3)},
            several=("2S3S5", "4J3", "7"),
            clips=("2I3V4", "3W5"),
            extra=_images_per_prompt,
            tower_gain=2.0,
        ),
        Family("qwen2_vl", qwen2_vl, QWEN | RUN_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen2_5_vl", qwen2_5_vl, QWEN | RUN_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen3_vl", qwen3_vl, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope"),
        Family("qwen3_5", qwen3_5, QWEN | STAMPED_CLIPS, clips=MIXED_CLIPS, types=MM, positions="mrope", gain=4.0),
        Family(
            "qwen3_vl_moe",
            functools.partial(qwen3_vl, True),
            QWEN | STAMPED_CLIPS,
            clips=MIXED_CLIPS,
            types=MM,
            positions="mrope",
        ),
        Family(
            "qwen3_5_moe",
            functools.partial(qwen3_5, True),
            QWEN | STAMPED_CLIPS,
            clips=MIXED_CLIPS,
            types=MM,
            positions="mrope",
            gain=4.0,
        ),
        Family("glm4v", glm4v, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
        Family("glm46v", glm46v, QWEN | GLM_CLIPS, clips=("2V4", "3W3"), types=MM, positions="mrope"),
        Family(
            "paddleocr_vl",
            paddleocr_vl,
            {"I": packed(4, 4, 3, PATCH, PATCH), "J": packed(2, 4, 3, PATCH, PATCH)},
            types=MM,
            positions="mrope",
        ),
        Family("internvl", internvl, {"I": tiles(), "J": tiles(), "M": tiles(3)}, several=("2M3J5", "4I3", "7")),
        Family(
            "smolvlm",
            smolvlm,
            {"I": WHOLE, "J": WHOLE, "M": SPLIT},
            several=("2M3J5", "4I3", "7"),
            join={"pixel_values": by_sample},
        ),
        Family(
            "idefics3",
            idefics3,
            {"I": WHOLE, "J": WHOLE, "M": SPLIT},
            several=("2M3J5", "4I3", "7"),
            join={"pixel_values": by_sample},
        ),
        Family("mistral3", mistral3, {"I": rows_with_breaks(4, 4), "J": rows_with_breaks(2, 3)}),
        Family(
            "gemma3",
            gemma3,
            {
                "I": tiles(),
                "J": tiles(),
                "M": marked([(MARK, START), (END, MARK + 1, START), (END, MARK + 2, START)], (END,), 16, "first"),
            },
            several=("2M3J5", "4I3", "7"),
            types="token_type_ids",
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "gemma4",
            gemma4,
            {
                "I": pooled_patches(4, 4),
                "J": pooled_patches(2, 4),
                "V": pooled_frames(2, 2, 3),
                "W": pooled_frames(3, 2, 3),
            },
            clips=MIXED_CLIPS,
            types=MM,
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "paligemma",
            paligemma,
            {"I": plain(), "J": plain()},
            rows=("I^6", "J^3"),
            several=("IJ^4", "J^3"),
            types="token_type_ids",
            prefix=True,
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "paligemma2",
            functools.partial(paligemma, True),
            {"I": plain(), "J": plain()},
            rows=("I^6", "J^3"),
            several=("IJ^4", "J^3"),
            types="token_type_ids",
            prefix=True,
            attentions=("eager",),
            gain=2.0,
            tower_gain=2.0,
        ),
        Family(
            "llama4",
            llama4,
            {
                "I": marked([(START, MARK)], (END,)),
                "J": marked([(START, MARK)], (END,)),
                "M": marked([(START,), (MARK + 1,), (MARK + 2, MARK)], (END,)),
            },
            several=("2M3J5", "4I3", "7"),
            beams=False,
        ),
        Family(
            "aya_vision",
            aya_vision,
            {
                "I": marked([(START, MARK)], (END,)),
                "J": marked([(START, MARK)], (END,)),
                "M": marked([(START, MARK + 1), (MARK + 2,), (MARK,)], (END,)),
            },
            several=("2M3J5", "4I3", "7"),
        ),
        Family(
            "cohere2_vision",
            cohere2_vision,
            {
                "I": marked([(START,)], (MARK, END)),
                "J": marked([(START,)], (MARK, END)),
                "M": marked([(START,), (MARK,), (MARK,)], (MARK, END)),
            },
            several=("2M3J5", "4I3", "7"),
        ),
        Family(
            "lfm2_vl",
            lfm2_vl,
            {
                "I": naflex([(4, 4)], False),
                "J": naflex([(2, 4)], False),
                "M": naflex([(4, 4), (4, 4), (2, 4)], True),
            },
            several=("2M3J5", "4I3", "7"),
        ),
    )
}

"""Families whose language model can be cut, by name."""


def _question(prompts: tuple[Prompt, ...]) -> dict[str, Tensor]:
    """What InstructBLIP's Q-Former reads besides the picture."""
    return {"qformer_input_ids": torch.arange(5 * len(prompts)).view(-1, 5) + 7}


TOWER_ONLY = {
    family.name: family
    for family in (
        Family("blip-2", blip_2, {"I": queries}, rows=("I3", "I5")),
        Family("instructblip", instructblip, {"I": queries}, rows=("I3", "I5"), extra=_question),
    )
}
"""Families of which only the tower can be cut."""


@functools.cache
def shared(name: str, attention: str = "sdpa") -> nn.Module:
    """A model that the tests of one process share; they leave it as it was."""
    return {**FAMILIES, **TOWER_ONLY}[name].build(attention)
