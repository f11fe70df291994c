"""A Llama of a reference file as the language model of a LLaVA, whose projector gives the file's visual tokens."""

from __future__ import annotations

import torch
from torch import nn


class Shown(nn.Module):
    """Stands for a projector: whatever the picture, it gives the visual tokens of the file."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, features):
        return self.tokens.expand(len(features), -1, -1)


def llava_of(data, attention):
    """A LLaVA whose language model is that of the file, and the ids of its prompt.

    Text of the prompt has ids behind the vocabulary of the file, which hold its embeddings and are never generated.
    """
    import transformers as tf

    vocabulary, start, n = data["vocab_size"], data["image_start"], data["n_image"]
    before, picture, after = data["inputs_embeds"][0].split([start, n, data["n_text_after"]])
    text = torch.cat([before, after])
    image = vocabulary + len(text)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=tf.LlamaConfig(
            vocab_size=image + 1,
            hidden_size=data["hidden_size"],
            intermediate_size=data["intermediate_size"],
            num_hidden_layers=data["num_layers"],
            num_attention_heads=data["num_heads"],
            num_key_value_heads=data.get("num_kv_heads", data["num_heads"]),
            rms_norm_eps=data["rms_eps"],
            rope_theta=data["rope_theta"],
            pad_token_id=0,
            eos_token_id=None,
        ),
        image_token_id=image,
        attn_implementation=attention,
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    weights = {key[3:]: value for key, value in data.items() if key.startswith("sd/")}
    blank = torch.zeros(1, data["hidden_size"])
    weights["model.embed_tokens.weight"] = torch.cat([weights["model.embed_tokens.weight"], text, blank])
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], 0 * text, blank])
    inner = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    model.model.language_model.load_state_dict(inner)
    model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    model.model.multi_modal_projector = Shown(picture[None])
    ids = torch.arange(vocabulary, image)
    return model, torch.cat([ids[:start], torch.full((n,), image), ids[start:]])[None]
