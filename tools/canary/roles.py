"""Names that hosts have for the arguments and fields that hooks read, by role.

FOR THE MERGE: `adapters/hosts.py` has these as `Role`s of the same names. Once it is there, the table below is

    ROLES = {name: role.names for name, role in vars(hosts).items() if isinstance(role, hosts.Role)}
"""

from __future__ import annotations

ROLES: dict[str, tuple[str, ...]] = {
    "CACHE": ("cache", "past_key_values"),
    "MASK": ("attention_mask",),
    "POSITIONS": ("position_ids",),
    "IDS": ("input_ids",),
    "EMBEDDINGS": ("inputs_embeds",),
    "HIDDEN": ("hidden_states", "x", "q_x", "query"),
    "ROTARY": ("position_embeddings",),
    "LOGITS": ("logits_to_keep",),
    "LAYER_TYPE": ("layer_type",),
    "PIXELS": ("pixel_values",),
    "CLIP_PIXELS": ("pixel_values_videos",),
    "ENCODED": ("mm_encoder_outputs",),
    "CLIP_FRAMES": ("num_frames_per_video",),
    "IMAGE_SIZES": ("image_sizes",),
    "FEATURES": ("image_features",),
    "SEPARATOR": ("image_newline",),
    "LAST_HIDDEN": ("last_hidden_state",),
    "POOLED": ("pooler_output",),
}
