"""open_clip: the vision towers of CLIP, CustomTextCLIP and CoCa (nn.MultiheadAttention), and timm trunks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.site import Layout
from .. import forms, hosts
from ..base import Adapter, AttentionPool, BlockSpec, Host, MeanPool, TextSpec, TowerSpec
from ..registry import listed
from . import tower_account
from .pooling import mean_of
from .text_tower import TextTower
from .tower import Tower

if TYPE_CHECKING:
    from ...core.attachment import Attachment
    from ...core.model_shape import ModelShape


def _project(attn: Host, x: Tensor, which: str, shared: dict[str, Tensor]) -> Tensor:
    """q or k of nn.MultiheadAttention, whose projection is a parameter of its own and no module to call."""
    width, heads = attn.embed_dim, attn.num_heads
    at = 0 if which == "q" else width
    bias = None if attn.in_proj_bias is None else attn.in_proj_bias[at : at + width]
    made = F.linear(x, attn.in_proj_weight[at : at + width], bias)
    return made.unflatten(-1, (heads, -1)).transpose(1, 2)


MHA_BLOCK = BlockSpec(
    norm="ln_1",
    attn="attn",
    mid="ln_2",
    branch_end="ls_2",
    mlp="mlp",
    project=_project,
    scale=lambda attn: float(attn.head_dim) ** -0.5,
    heads="num_heads",
    bias=hosts.KEY_BIAS,
    bias_rank=2,
    forms=("torch.nn.modules.activation:MultiheadAttention",),
)
BLOCKS = ("open_clip.transformer:ResidualAttentionBlock",)


def _mean(tokens: Tensor, size: Tensor | None) -> Tensor:
    """The mean of the patches behind the class token."""
    return mean_of(tokens[:, 1:], None if size is None else size[:, 1:])


def _pools(visual: Host) -> tuple[tuple[MeanPool | AttentionPool, ...], str]:
    """Where a tower pools its tokens and sizes can count, and why not where they cannot."""
    first, second = visual.attn_pool, getattr(visual, "attn_pool_contrastive", None)
    if first is None and visual.pool_type != "avg":
        return (), ""
    if forms.form(visual) != "open_clip.transformer:VisionTransformer":
        return (), f"{type(visual).__name__} pools in a way of its own"
    if first is not None:
        # In a cascade the second one pools what the first one gives, which are no tokens of ours.
        read = [first] if second is None or visual.attn_pool_type != "parallel" else [first, second]
        return tuple(AttentionPool(visual, pool.attn, hosts.KEY_BIAS) for pool in read), ""
    if not visual.final_ln_after_pool:
        return (), "no module stands behind its mean (final_ln_after_pool=False)"
    return (MeanPool(visual, visual.transformer, visual.ln_post, _mean, loose=True),), ""


class OpenClipVision(Adapter):
    """open_clip's VisionTransformer."""

    name = "open_clip-vit"
    targets = (("open_clip.transformer", "VisionTransformer"),)

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        transformer: Any = getattr(model, "transformer", None)
        blocks = tuple(map(forms.inner, getattr(transformer, "resblocks", ())))
        if not blocks:
            raise self.refuse("it has no residual blocks")
        for block in blocks:
            if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
                raise self.refuse(f"its blocks are {type(block).__name__} without nn.MultiheadAttention")
            if not forms.known(block, BLOCKS):
                raise self.refuse(f"its blocks are {forms.described(block)} and not ResidualAttentionBlock")
            if block.attn.in_proj_weight is None:
                raise self.refuse("its attention keeps q, k and v in separate weights")
        if not transformer.batch_first:
            raise self.refuse("it runs with the batch in the second dimension; build it with batch_first=True")

    def tower(self) -> TowerSpec:
        """The tower as data."""
        model = self.model
        pools, unpooled = _pools(model)
        return TowerSpec(
            block=MHA_BLOCK,
            blocks=tuple(map(forms.inner, model.transformer.resblocks)),
            num_prefix=1,
            width=int(model.transformer.width),
            heads=int(forms.inner(model.transformer.resblocks[0]).attn.num_heads),
            grid=(int(model.grid_size[0]), int(model.grid_size[1])),
            stem=model.conv1,
            maps=(type(model).forward_intermediates,),
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
        return tower_account.of_open_clip_tower(self)


def _inner(outer: Adapter, tower: nn.Module) -> Adapter:
    """The adapter of a tower inside a model of open_clip.

    Raises:
        UnsupportedModel: no row names it.
    """
    found = listed(tower)
    if found is None:
        raise outer.refuse(f"no adapter carries its tower {type(tower).__module__}.{type(tower).__name__}")
    return found


class OpenClipTimm(Adapter):
    """open_clip's TimmModel: the trunk is timm's business."""

    name = "open_clip-timm"
    targets = (("open_clip.timm_model", "TimmModel"),)

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        self.inner = _inner(self, model.trunk)

    def layout(self) -> Layout:
        """The trunk's."""
        return Layout(self.name, self.inner.layout().stages)

    def install(self, attachment: Attachment) -> None:
        """The trunk's."""
        self.inner.install(attachment)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return tower_account.of_open_clip_timm(self)


def text_spec(model: Host) -> TextSpec | None:
    """The text tower of a dual encoder as data, or None where its rows cannot be shortened.

    CLIP keeps the parts of its text tower on itself, CustomTextCLIP below `text`.
    """
    tower: Host = getattr(model, "text", model)
    blocks = tuple(map(forms.inner, getattr(getattr(tower, "transformer", None), "resblocks", ())))
    plain = all(
        isinstance(getattr(block, "attn", None), nn.MultiheadAttention) and forms.known(block, BLOCKS)
        for block in blocks
    )
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if not blocks or not plain or not tower.transformer.batch_first or pool not in ("argmax", "eos", "last"):
        return None  # a transformers encoder, custom attention, or pooling over all tokens
    if getattr(tower, "cls_emb", None) is not None or getattr(tower, "use_pad_mask", False):
        return None  # masks differ from row to row
    eos: Any = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))

    def end(ids: Tensor) -> Tensor:
        if pool == "last":
            return torch.full((ids.shape[0],), ids.shape[1] - 1, device=ids.device)
        return ids.argmax(1) if pool == "argmax" else ids.eq(eos).to(torch.int64).argmax(1)

    return TextSpec(
        block=replace(MHA_BLOCK, bias=hosts.BIAS),
        blocks=blocks,
        ids=tower.token_embedding,
        norm=tower.ln_final,
        width=int(tower.transformer.width),
        heads=int(blocks[0].attn.num_heads),
        mask=hosts.BIAS,
        end=end,
        causal=getattr(tower, "attn_mask", None) is not None,
    )


class OpenClip(Adapter):
    """A dual encoder of open_clip: the tower below `visual`, and the text tower."""

    name = "open_clip"
    targets = (
        ("open_clip.model", "CLIP"),
        ("open_clip.model", "CustomTextCLIP"),
        ("open_clip.coca_model", "CoCa"),
    )

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        self.vision = _inner(self, model.visual)
        self.text = text_spec(model)

    def layout(self) -> Layout:
        """The stages of the towers."""
        stages = dict(self.vision.layout().stages)
        if self.text is not None:
            stages["text"] = TextTower.text_layout(self.text)
        return Layout(self.name, stages)

    def install(self, attachment: Attachment) -> None:
        """Hooks on the towers."""
        self.vision.install(attachment)
        if self.text is not None:
            attachment.drivers["text"] = TextTower(attachment, self.text)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return tower_account.of_open_clip(self)
