"""Vision-language families of transformers that cannot be carried, and why."""

from __future__ import annotations

_CROSS = "pictures enter through cross-attention"
_ENCODED = "it is an encoder-decoder; pictures are part of the encoder's input"
_DISCRETE = "pictures are discrete tokens of the vocabulary"
_OWN_PROMPT = "its own generate() builds the prompt"
_STREAMS = "its layers carry {} streams of hidden states"
_PLACES = "its layers count distances between tokens by their places in the cache, which a cut moves"
_INDEX = "its layers choose keys by an index {}, which a cut would have to follow"
_MARKED = (
    "marks and breaks of a picture are placeholders among its patches, so that methods would take them for patches"
)

_LOGITS = (
    "its forward takes no logits_to_keep, so that drafts of speculative decoding cannot be told from the prompt, and "
    "every row of a prompt goes through the head"
)

LOOKED_THROUGH = "5.24"
"""The newest transformers of which every type that takes pictures was looked at: it has a row or stands here."""

REFUSED: dict[str, str] = {
    "mllama": f"{_CROSS}, and its cache holds vision states",
    "florence2": _ENCODED,
    "idefics": _CROSS,
    "blip": _CROSS,
    "kosmos-2": _OWN_PROMPT,
    "kosmos-2.5": _OWN_PROMPT,
    "chameleon": _DISCRETE,
    "emu3": _DISCRETE,
    "apertus1p5": _DISCRETE,
    "molmo2": "its mask is built outside the language model in a form that cannot be rebuilt",
    "gemma3n": _STREAMS.format("four"),
    "glm5_next": _STREAMS.format("several"),
    "hy_v4_vl": _STREAMS.format("several"),
    "qwen4_exp": _STREAMS.format("several"),
    "ernie4_5_vl_moe": "its experts are chosen by moe_mm_token_type_ids, which a cut would have to follow",
    "inkling_mm_model": _PLACES,
    "inkling2": f"{_PLACES}; and every block reads the states of all blocks before it",
    "inkling2_loop": f"{_PLACES}; and every block reads the states of all blocks before it",
    "minimax_m3_vl": _INDEX.format("of blocks by their places in the cache"),
    "dots3_note": _INDEX.format("with a cache of its own"),
    "mistral_large4": _INDEX.format("that earlier layers hand on"),
    "granite4_vision": "pictures enter between its layers; the language model's input holds zeros in their place",
    "hunyuan_vl": _MARKED,
    "deepseek_ocr2": _MARKED,
    "unlimited_ocr": f"{_MARKED}; and the windows of its layers keep the prompt in sight by masks of their own",
    "phi4_multimodal": "its text model puts pictures among its embeddings itself, behind where a cut could act",
    "fuyu": "its encoder hands over all patches of a call as one, so that nothing tells pictures apart",
    "video_llava": "clips have a tower of their own, and every frame's class token is a placeholder among its patches",
    "nemotron_h_omni": _LOGITS,
    "diffusion_gemma": "it writes blocks of tokens by diffusion, and not one token after another",
    "shieldgemma2": "it judges pictures by the odds of one token, and writes no answer",
    "pi0": "it gives actions of a robot by flow matching, and not tokens",
    "git": "pictures stand in front of the text in a decoder of its own, without placeholders",
    "pix2struct": _ENCODED,
    "pp_formulanet": _ENCODED,
    "t5gemma2": _ENCODED,
    "udop": _ENCODED,
    "vision-encoder-decoder": _ENCODED,
    "minicpmv4_7": "positions of its crops lie on the canvas of the whole picture, by which grids cannot be told",
    "video_llama_3": _LOGITS,
    "minicpmv4_6": _LOGITS,
    "minicpm_ocr": _LOGITS,
    "qwen2_5_omni_thinker": _LOGITS,
    "qwen3_omni_moe_thinker": _LOGITS,
    "qwen2_5_omni": "it is several models, one of which speaks; of the one that sees, " + _LOGITS,
    "qwen3_omni_moe": "it is several models, one of which speaks; of the one that sees, " + _LOGITS,
}
"""Families that cannot be carried, with the reason."""
