"""Changes that a release of a host might bring, for `test_host_canary`: where, what, and what is said of it."""

from __future__ import annotations

LLAVA, CLIP, LLAMA = (f"models/{name}/modeling_{name}.py" for name in ("llava", "clip", "llama"))

PLAYED = [
    (
        LLAMA,
        r"\b(past_key_values|cache)\b",
        "store",
        "`forward` of the text model has no argument `cache` or `past_key",
    ),
    (
        LLAMA,
        r"\b(past_key_values|cache)\b",
        "store",
        "`forward` of layers has no argument `cache` or `past_key_values`",
    ),
    (LLAVA, r"\bmm_encoder_outputs\b", "encoded", "`forward` of the inner model has no argument `mm_encoder_outputs`"),
    (LLAVA, r"\battention_mask\b", "mask", "`forward` of the inner model has no argument `attention_mask`"),
    (LLAVA, r"\blogits_to_keep\b", "kept", "`forward` of the whole model has no argument `logits_to_keep`"),
    (LLAVA, r"\bpixel_values\b", "pixels", "`forward` of the inner model has no argument `pixel_values`"),
    (LLAVA, r"^ +attention_mask=attention_mask,$", "", "the text model does not get `attention_mask` (LlavaModel)"),
    (LLAVA, r"\blanguage_model\b", "decoder", "there is no `language_model` on the way to the text model"),
    (LLAVA, r"\bmulti_modal_projector\b", "bridge", "there is no `multi_modal_projector` on the way to the projector"),
    (LLAVA, r"\bself\.model\b", "self.core", "what `model` is made of cannot be read off the source"),
    (LLAVA, r"^class LlavaForCond\w+", "class Other", "no model for pictures and text has its type"),
    (LLAVA, r"AutoModel\.from_config\(config\.text", "build(config.text", "what `language_model` is made of cannot be"),
    (LLAVA, r"\bimage_features\b", "features", "`forward` of the projector has no argument `image_features`"),
    (LLAVA, r"get\(\"image\"\)|\[\"image\"\]", "seen", "the inner model reads no 'image' of encoded pictures"),
    (
        "models/llava/configuration_llava.py",
        "image_token_id",
        "picture_id",
        "its configuration has no `image_token_id`",
    ),
    (
        "models/llava/configuration_llava.py",
        "vision_feature_layer",
        "layer",
        "configuration has no `vision_feature_layer`",
    ),
    (LLAMA, r"\bposition_embeddings\b", "rotary", "`forward` of layers has no argument `position_embeddings`"),
    (LLAMA, r"\bposition_embeddings=position_embeddings,$", "", "layers do not get `position_embeddings`"),
    (LLAMA, r"\bself\.layers\b", "self.blocks", "the text model has no `layers` of a class that is known"),
    (
        LLAMA,
        r"^def apply_rotary_pos_emb\(q, k, cos, sin",
        "def apply_rotary_pos_emb(cos, sin, q, k",
        "takes neither (q, k",
    ),
    (LLAMA, r"\bapply_rotary_pos_emb\b", "turn", "the module of attention has no `apply_rotary_pos_emb`"),
    (LLAMA, r"\bself\.q_proj\b", "self.query", "attention has no `q_proj` (LlamaAttention)"),
    (LLAMA, r"\bself\.q_proj\b", "self.query", "attention has weights that no form knows: query"),
    (LLAMA, r"\bself\.scaling\b", "self.factor", "attention has no `scaling`"),
    (LLAMA, r"\bself\.input_layernorm\b", "self.norm_in", "layers have no norm called `input_layernorm`"),
    (
        LLAMA,
        r"def forward\(self, x, position_ids",
        "def forward(self, x, ids",
        "rotary embeddings are not made of hidden",
    ),
    (CLIP, r"\bCLIPEncoderLayer\b", "CLIPBlock", "there is no class CLIPEncoderLayer"),
    (
        CLIP,
        r"^class CLIPVisionModel\(",
        "class CLIPTower(",
        "transformers.models.clip.modeling_clip has no CLIPVisionModel",
    ),
    (CLIP, r"\blayer_norm2\b", "norm2", "its blocks have no `layer_norm2` (CLIPEncoderLayer)"),
    (
        CLIP,
        r"self\.mlp\(hidden_states\)",
        "hidden_states",
        "its blocks do not call layer_norm1, self_attn, layer_norm2, mlp",
    ),
    (CLIP, r"\bself\.scale\b", "self.scaling", "the attention of its blocks has no `scale` (CLIPAttention)"),
    (CLIP, r"\bself\.head_dim\b", "self.width", "the attention of its blocks has no `head_dim`"),
    (
        CLIP,
        r"\battention_mask\b",
        "bias",
        "the attention of its blocks has no argument `attn_mask` or `attention_mask`",
    ),
    (CLIP, r"\bself\.vision_model\b", "self.tower", "CLIPModel has no `vision_model`"),
    (CLIP, r"\bself\.final_layer_norm\b", "self.norm", "the text tower of CLIPModel has no `final_layer_norm`"),
    ("masking_utils.py", r"\blayer_idx\b", "layer", "create_causal_mask() has no argument `layer_idx`"),
    (
        "masking_utils.py",
        r"\ballow_is_causal_skip\b",
        "lazy",
        "create_causal_mask() has no argument `allow_is_causal_skip`",
    ),
    (
        "masking_utils.py",
        r"^(def create_causal_mask\()",
        r"\1length, ",
        "create_causal_mask() wants `length`, which it is",
    ),
    (
        "masking_utils.py",
        r'"full_attention": create',
        '"full": create',
        "masks of full_attention layers: the release has no",
    ),
    (
        "modeling_outputs.py",
        r"\blast_hidden_state\b",
        "rows",
        "the text model's output has no field `last_hidden_state`",
    ),
    ("cache_utils.py", r"\bget_seq_length\b", "length", "a cache has no `get_seq_length`"),
    ("cache_utils.py", r"\bself\.keys\b|^    keys\b", "self.k", "the `layers` of a cache have no `keys`"),
    ("cache_utils.py", r"\blayer_idx\b", "layer", "`get_mask_sizes` takes no count and layer"),
    ("cache_utils.py", r"^class Cache\b", "class Store", "there is no Cache"),
    ("__init__.py", r'"Cache",', "", "transformers gives out no `Cache`"),
    ("generation/utils.py", r"\bmm_encoder_outputs\b", "encoded", "it knows no mm_encoder_outputs"),
    (
        "modeling_layers.py",
        r"^(    gradient_checkpointing = False)$",
        r"\1\n    __call__ = None",
        "it wraps `__call__` of layers",
    ),
    ("models/auto/modeling_auto.py", r'\("llava", "Llava\w+"\),', "", "no model for pictures and text has its type"),
]
"""Of transformers: a file, a pattern in it, what takes its place, and a part of the sentence."""

OTHERS = [
    (
        "timm",
        "models/vision_transformer.py",
        r"\bself\.drop_path2\b",
        "self.drop2",
        "its blocks have no `drop_path2` (Block)",
    ),
    (
        "timm",
        "models/vision_transformer.py",
        r"^class Block\b",
        "class Layer",
        "timm.models.vision_transformer has no Block",
    ),
    (
        "timm",
        "models/vision_transformer.py",
        r"\bnum_prefix_tokens\b",
        "num_prefix",
        "the model has no `num_prefix_tokens`",
    ),
    ("timm", "layers/attention.py", r"\bself\.k_norm\b", "self.norm_k", "the attention of its blocks has no `k_norm`"),
    (
        "timm",
        "layers/attention.py",
        r"\battn_mask\b",
        "bias",
        "the attention of its blocks has no argument `attn_mask` or",
    ),
    ("timm", "models/eva.py", r"\brope\b", "table", "`forward` of its blocks has no argument `rope` (EvaBlock)"),
    ("timm", "models/eva.py", r"\bapply_rot_embed_cat\b", "turn", "of its blocks has no `apply_rot_embed_cat`"),
    (
        "timm",
        "models/eva.py",
        r"x = x \+ self\.drop_path2\(x_mlp\)",
        "x = x + x_mlp",
        "its blocks do not call norm1, attn",
    ),
    ("open_clip_torch", "transformer.py", r"\bself\.ls_2\b", "self.scale_2", "its blocks have no `ls_2`"),
    (
        "open_clip_torch",
        "transformer.py",
        r"\bself\.batch_first\b",
        "self.batched",
        "the tower's transformer has no `batch_first`",
    ),
    (
        "open_clip_torch",
        "transformer.py",
        r"nn\.MultiheadAttention",
        "Attention",
        "has no blocks with nn.MultiheadAttention",
    ),
    (
        "open_clip_torch",
        "transformer.py",
        r"q_x, k_x, v_x,$",
        "q_x, k_x, value=v_x,",
        "with q, k and v alone by position",
    ),
    (
        "open_clip_torch",
        "transformer.py",
        r"\bself\.ln_final\b",
        "self.norm",
        "the `text` of the model is of no class with",
    ),
    (
        "open_clip_torch",
        "model.py",
        r"\bself\.token_embedding\b",
        "self.embed",
        "the text tower has no `token_embedding` (CLIP)",
    ),
    ("open_clip_torch", "timm_model.py", r"\bself\.trunk\b", "self.inner", "the model has no `trunk` (TimmModel)"),
]
"""Of the others: the library in front."""

QWEN, GEMMA, PIXTRAL = (f"models/{name}/modeling_{name}.py" for name in ("qwen2_5_vl", "gemma4", "pixtral"))

PACKED_TOWERS = {
    "qwen2_5_vl_vision": (
        "Qwen2_5_VisionTransformerPretrainedModel",
        [
            (QWEN, r"\bself\.qkv\b", "self.fused", "the attention of its blocks has no `qkv`"),
            (QWEN, r"\bself\.num_heads\b", "self.heads", "the attention of its blocks has no `num_heads`"),
            (QWEN, r"\bself\.scaling\b", "self.factor", "the attention of its blocks has no `scaling`"),
            (QWEN, r"\bself\.norm2\b", "self.norm_mid", "its blocks have no `norm2`"),
            (QWEN, r"\bcu_seqlens\b", "bounds", "`forward` of its blocks has no argument `cu_seqlens`"),
            (
                QWEN,
                r"\bposition_embeddings\b",
                "turns",
                "`forward` of its blocks has no argument `position_embeddings`",
            ),
            (QWEN, r"\bgrid_thw\b", "sizes", "`forward` of the tower has no argument `grid_thw`"),
            (QWEN, r"\bapply_rotary_pos_emb_vision\b", "turn", "has no `apply_rotary_pos_emb_vision`"),
            (QWEN, r"\bALL_ATTENTION_FUNCTIONS\b", "TABLE", "has no `ALL_ATTENTION_FUNCTIONS`"),
            (
                QWEN,
                r"\bQwen2_5_VLVisionAttention\b",
                "QwenAttention",
                "the attention of its blocks is of no known form",
            ),
            (QWEN, r"\bQwen2_5_VLVisionBlock\b", "QwenBlock", "its tower holds no Qwen2_5_VLVisionBlock"),
            (QWEN, r"\bself\.patch_embed\b", "self.stem", "its tower has no `patch_embed.proj`"),
            (QWEN, r"\bget_vision_window_index\b", "windows", "of its tower has no `get_vision_window_index`"),
            ("vision_utils.py", r"\bwindow_size\b", "side", "`get_vision_window_index` has no argument `window_size`"),
            (
                "models/qwen2_5_vl/configuration_qwen2_5_vl.py",
                r"\bfullatt_block_indexes\b",
                "full_blocks",
                "the configuration of its tower has no `fullatt_block_indexes`",
            ),
        ],
    ),
    "gemma4_vision": (
        "Gemma4VisionModel",
        [
            (GEMMA, r"\bself\.k_norm\b", "self.norm_k", "the attention of its blocks has no `k_norm`"),
            (GEMMA, r"\bself\.pooler\b", "self.pool", "its tower has no `pooler`"),
            (GEMMA, r"\bpixel_position_ids\b", "places", "`forward` of the tower has no argument `pixel_position_ids`"),
        ],
    ),
    "pixtral": (
        "PixtralVisionModel",
        [
            (PIXTRAL, r"\bPixtralAttentionLayer\b", "PixtralLayer", "its tower holds no PixtralAttentionLayer"),
            (PIXTRAL, r"\bimage_sizes\b", "sizes", "`forward` of the tower has no argument `image_sizes`"),
        ],
    ),
}
"""By type of a tower that packs or pads pictures: its class, and changes as above."""
