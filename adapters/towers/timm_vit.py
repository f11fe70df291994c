"""timm: VisionTransformer (ViT, DeiT, AugReg, DeiT-3, DINOv2, SigLIP, MAE, CLIP) and Eva (EVA, EVA-02, DINOv3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Layout
from .. import forms, hosts
from ..base import Adapter, AttentionPool, BlockSpec, Host, MeanPool, TowerSpec
from . import tower_account
from .pooling import mean_of
from .tower import Tower

if TYPE_CHECKING:
    from ...core.attachment import Attachment
    from ...core.model_shape import ModelShape


def _fused(attn: Host, x: Tensor) -> Tensor:
    """q, k and v together, `[B, L, 3 H d]`."""
    made: Tensor
    if getattr(attn, "q_bias", None) is None:
        made = attn.qkv(x)
        return made
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        made = attn.qkv(x) + bias
        return made
    # EvaAttention multiplies by the weight itself here, so that what wraps the module counts for nothing in the host.
    return F.linear(x, attn.qkv.weight, bias)


def _project(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of timm's attention classes, normed, before rope."""
    heads = attn.num_heads
    norm = attn.q_norm if which == "q" else attn.k_norm
    if attn.qkv is None:
        made = (attn.q_proj if which == "q" else attn.k_proj)(x)
    else:
        if "fused" not in shared:
            shared["fused"] = _fused(attn, x)
        made = shared["fused"].chunk(3, -1)["qk".index(which)]
    projected: Tensor = norm(made.unflatten(-1, (heads, -1)).transpose(1, 2))
    return projected


def _rotate(attn: Host, table: Tensor) -> Callable[[Tensor], Tensor]:
    """Applies Eva's rope behind the prefix, with the function that the attention itself uses."""
    rotation = forms.beside(attn, "apply_rot_embed_cat")
    prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

    def rotate(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :prefix], rotation(x[:, :, prefix:], table, half=half)], 2).type_as(x)

    return rotate


def _scale(attn: Host) -> float:
    return float(attn.scale)


_BLOCK: dict[str, Any] = {
    "norm": "norm1",
    "attn": "attn",
    "mid": "norm2",
    "branch_end": "drop_path2",
    "mlp": "mlp",
    "project": _project,
    "scale": _scale,
    "heads": "num_heads",
    "bias": hosts.BIAS,
    "q": "q_norm",
    "k": "k_norm",
    "forms": (
        "timm.layers.attention:Attention",
        "timm.models.vision_transformer:Attention",
        "timm.layers.attention:AttentionRope",
        "timm.models.eva:EvaAttention",
    ),
}
VIT_BLOCK = BlockSpec(**_BLOCK)
EVA_BLOCK = BlockSpec(**_BLOCK, rope=hosts.ROPE, rotate=_rotate)


_POOLED = (
    "timm.models.vision_transformer:VisionTransformer",
    "timm.models.eva:Eva",
    "timm.models.naflexvit:NaFlexVit",
)
"""Classes whose `forward`, `forward_head` and `pool` are known to pool by `global_pool` what `norm` gives."""


def _mean(skip: int, with_max: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """timm's pools ``avg`` and ``avgmax``, as written in `global_pool_nlc`."""

    def make(tokens: Tensor, size: Tensor | None) -> Tensor:
        tokens, size = tokens[:, skip:], None if size is None else size[:, skip:]
        mean = mean_of(tokens, size)
        return 0.5 * (tokens.amax(dim=1) + mean) if with_max else mean

    return make


def _pools(model: Host) -> tuple[tuple[MeanPool | AttentionPool, ...], str]:
    """Where a model pools its tokens and sizes can count, and why not where they cannot."""
    kind, attention = model.global_pool, getattr(model, "attn_pool", None)
    if attention is None and kind not in ("avg", "avgmax"):
        return (), ""
    own = "pool" if hasattr(model, "pool") else "_pool"
    if any(forms.maker(model, name) not in _POOLED for name in ("forward", "forward_head", own)):
        return (), f"{type(model).__name__} pools in a way of its own"
    skip = 0 if getattr(model, "pool_include_prefix", False) else int(model.num_prefix_tokens)
    if attention is not None:
        if not forms.known(attention, ("timm.layers:AttentionPoolLatent",)):
            return (), f"{type(attention).__name__} takes no bias on its keys"
        skip = skip if hasattr(model, "pool_include_prefix") else 0  # Eva's reads the whole row
        return (AttentionPool(model, attention, hosts.BIAS, 4, skip, model.norm),), ""

    def same(now: Host) -> bool:
        return now.global_pool == kind and getattr(now, "attn_pool", None) is None

    make = _mean(skip, kind == "avgmax")
    return (MeanPool(model, model.norm, model.fc_norm, make, loose=True, same=same),), ""


class TimmViT(Adapter):
    """timm's VisionTransformer."""

    name = "timm-vit"
    targets = (("timm.models.vision_transformer", "VisionTransformer"),)
    block = VIT_BLOCK
    blocks: tuple[str, ...] = ("timm.models.vision_transformer:Block",)

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        for block in map(forms.inner, model.blocks):
            if not forms.known(block, self.blocks):
                names = " and ".join(name.rpartition(":")[2] for name in self.blocks)
                raise self.refuse(
                    f"its blocks are {forms.described(block)}; only {names} have a place between attention and MLP "
                    "that hooks can reach"
                )
            if not hasattr(block.attn, "k_norm"):
                raise self.refuse(f"its attention {type(block.attn).__name__} has no k_norm to read keys from")
            if getattr(block.attn, "num_kv_groups", 1) != 1:
                raise self.refuse("its attention groups queries")
        pool = getattr(model, "attn_pool", None)
        if getattr(pool, "pos_embed", None) is not None:
            raise self.refuse("its attention pooling has position embeddings for the whole grid")
        if not len(model.blocks):
            raise self.refuse("it has no blocks")

    def block_spec(self) -> BlockSpec:
        """Hook points of its blocks."""
        return self.block

    def embedding(self) -> nn.Module | None:
        """The module that makes tokens of pictures."""
        return getattr(self.model, "patch_embed", None)

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches of the configured size; None where it is made for any."""
        return getattr(self.embedding(), "grid_size", None)

    def stem(self) -> nn.Module | None:
        """The module from whose output the grid of a picture is read."""
        return getattr(self.embedding(), "proj", None)

    def tower(self) -> TowerSpec:
        """The tower as data."""
        return self._spec()

    def _spec(self, masked: bool = False) -> TowerSpec:
        model, grid = self.model, self.grid()
        pools, unpooled = _pools(model)
        return TowerSpec(
            block=self.block_spec(),
            blocks=tuple(map(forms.inner, model.blocks)),
            num_prefix=int(model.num_prefix_tokens),
            width=int(model.embed_dim),
            heads=int(forms.inner(model.blocks[0]).attn.num_heads),
            grid=None if grid is None else (int(grid[0]), int(grid[1])),
            stem=self.stem(),
            masked=masked,
            maps=(type(model).forward_intermediates,),
            has_class_token=bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None)),
            pools=pools,
            unpooled=unpooled,
        )

    def layout(self) -> Layout:
        """One stage: vision."""
        return Layout(self.name, {"vision": Tower.layout(self.tower())})

    def install(self, attachment: Attachment) -> None:
        """Hooks on the blocks."""
        attachment.drivers["vision"] = Tower(attachment, self.tower())

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return tower_account.of_timm(self)


class TimmEva(TimmViT):
    """timm's Eva: the same blocks with rotary tables."""

    name = "timm-eva"
    targets = (("timm.models.eva", "Eva"),)
    block = EVA_BLOCK
    blocks = ("timm.models.eva:EvaBlock",)
