"""What the hooks lean on in timm, open_clip or transformers alone, one sentence a fact."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable

import pytest
import torch
from support import hosts_of, models
from support.facts import Call, Facts, assert_holds, begun, calls_of, close, one
from support.tower_facts import EVA, HF, OPEN_CLIP, TIMM, Host, first_of, heads_of, host
from torch import Tensor, nn
from vlmtok.adapters.base import child
from vlmtok.adapters.towers import hf_rows

fact = Facts()


# ---------------------------------------------------------------------- timm
@fact("timm: num_prefix_tokens counts the protected tokens, patch_embed.grid_size rows and columns of patches", TIMM)
def _(at: Host) -> bool:
    side = models.SIDE // models.PATCH
    return at.model.num_prefix_tokens == models.TOWERS[at.name].prefix and at.model.patch_embed.grid_size == (
        side,
        side,
    )


@fact("timm: q_norm and k_norm are called once each, whether or not the model norms q and k", TIMM)
def _(at: Host) -> bool:
    return sorted(begun(at.calls, at.path(1, "attn.q_norm"), at.path(1, "attn.k_norm"))) == [
        at.path(1, "attn.k_norm"),
        at.path(1, "attn.q_norm"),
    ]


@fact("timm: an unfused attention adds attn_mask [B, 1, 1, L] as the fused one does", ["timm ViT", "timm EVA-02"])
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    bias, out, fused = torch.randn(2, 1, 1, at.row(1).shape[1]), [], attn.fused_attn
    try:
        for attn.fused_attn in (True, False):
            with torch.no_grad():
                out.append(attn(*call.args, **{**call.kwargs, "attn_mask": bias}))
    finally:
        attn.fused_attn = fused
    return close(*out) and not close(out[0], call.output)


@fact("timm: every block of Eva gets the rotary table of the patches by name, as [N, D] or [H, N, D]", EVA)
def _(at: Host) -> bool:
    tables = [at.call(i).kwargs["rope"] for i in range(models.DEPTH)]
    if at.name == "timm EVA":
        return tables == [None] * models.DEPTH
    return all(table.shape[-2] == models.PATCHES for table in tables)


@fact(
    "timm: Eva turns what stands behind the prefix with apply_rot_embed_cat of its attention's module",
    [n for n in EVA if n != "timm EVA"],
)
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    table, prefix = call.kwargs["rope"], at.model.num_prefix_tokens
    turn = sys.modules[type(attn).__module__].apply_rot_embed_cat
    each = table[None, None].expand(2, 1, -1, -1) if table.dim() == 2 else table[None]
    x = heads_of(at, "k")[:, :, prefix:]
    half = getattr(attn, "rotate_half", False)
    same = close(turn(x, table, half=half), turn(x, each, half=half))
    with torch.no_grad():
        return (
            same
            and attn.num_prefix_tokens == prefix
            and close(attn(*call.args, **{**call.kwargs, "rope": each}), call.output)
        )


@fact("timm: a distilled DeiT has two protected tokens, and its heads read no others")
def _() -> bool:
    model, x = models.shared("timm DeiT distilled"), torch.randn(2, 9, models.WIDTH)
    with torch.no_grad():
        same = torch.equal(model.forward_head(x), model.forward_head(torch.cat([x[:, :2], x[:, 5:]], 1)))
        return same and model.num_prefix_tokens == 2 and not close(model.forward_head(x), model.forward_head(x[:, 1:]))


@fact("timm: attention pooling has no position embeddings of its own and takes any number of tokens", ["timm SigLIP"])
def _(at: Host) -> bool:
    pool = at.model.attn_pool
    with torch.no_grad():
        return pool.pos_embed is None and pool(torch.randn(2, 5, models.WIDTH)).shape == (2, models.WIDTH)


@fact("timm: BEiT and Swin are classes of their own, no VisionTransformer in disguise")
def _() -> bool:
    from timm.models import beit, swin_transformer, vision_transformer

    return not any(
        issubclass(kind, vision_transformer.VisionTransformer) for kind in (beit.Beit, swin_transformer.SwinTransformer)
    )


# ---------------------------------------------------------------------- open_clip
@fact("open_clip: attention is nn.MultiheadAttention, batch first, called with q, k, v by position", OPEN_CLIP)
def _(at: Host) -> bool:
    attn, call = at.module(1, "attn"), at.call(1, "attn")
    return (
        type(attn) is nn.MultiheadAttention
        and attn.batch_first
        and len(call.args) == 3
        and not call.kwargs["need_weights"]
    )


@fact("open_clip: a plain tower shows its depth and grid as transformer.resblocks and grid_size", OPEN_CLIP)
def _(at: Host) -> bool:
    visual = at.model.visual
    side = models.SIDE // models.PATCH
    return len(visual.transformer.resblocks) == models.DEPTH and tuple(visual.grid_size) == (side, side)


def text_calls(name: str) -> tuple[nn.Module, nn.Module, Tensor, list[Call], Tensor]:
    model = models.shared(name)
    ids = torch.randint(1, 62, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 7] = 63
    with torch.no_grad():
        calls, out = calls_of(model, lambda: model.encode_text(ids))
    return model, getattr(model, "text", model), ids, calls, out


@fact(
    "open_clip: a text tower calls token_embedding with the ids, its blocks with the causal mask, then ln_final",
    OPEN_CLIP[:2],
)
def _(at: Host) -> bool:
    model, text, ids, calls, _ = text_calls(at.name)
    root = "" if text is model else "text."
    paths = [f"{root}token_embedding", f"{root}transformer.resblocks.0.attn", f"{root}ln_final"]
    ordered = begun(calls, *paths) == paths
    mask = one(calls, paths[1]).kwargs["attn_mask"]
    return ordered and torch.equal(one(calls, paths[0]).args[0], ids) and torch.equal(mask, text.attn_mask[:12, :12])


@fact("open_clip: the text feature is read off ln_final's output at the column of the highest id", OPEN_CLIP[:2])
def _(at: Host) -> bool:
    model, text, ids, calls, out = text_calls(at.name)
    rows = one(calls, "ln_final" if text is model else "text.ln_final").output
    return close(rows[torch.arange(2), ids.argmax(1)] @ text.text_projection, out)


# ---------------------------------------------------------------------- transformers
@fact("transformers: a tower's config.model_type is a row's, and its layers are of the class that the row names", HF)
def _(at: Host) -> bool:
    row = hf_rows.ROWS[at.model.config.model_type]
    return {type(at.module(i)).__name__ for i in range(models.DEPTH)} == {row.layer} and row.block is at.spec


@fact(
    "transformers: eager attention adds attention_mask [B, 1, 1, L] as sdpa does",
    ["HF CLIP vision", "HF SigLIP vision", "HF ViT", "HF DINOv2"],
)
def _(at: Host) -> bool:
    attn, call = at.module(1, at.spec.attn), at.call(1, at.spec.attn)
    given = dict(inspect.signature(attn.forward).bind(*call.args, **call.kwargs).arguments)
    given["attention_mask"] = torch.randn(2, 1, 1, at.row(1).shape[1])
    out, kind = [], at.model.config._attn_implementation
    try:
        for other in ("sdpa", "eager"):
            at.model.set_attn_implementation(other)
            with torch.no_grad():
                out.append(first_of(attn(**given)))
    finally:
        at.model.set_attn_implementation(kind)
    return close(*out) and not close(out[0], first_of(call.output))


@fact(
    "transformers: hidden_states are recorded by forward hooks, which see what a hook placed with prepend=True returns",
    HF,
)
def _(at: Host) -> bool:
    model = copy.deepcopy(at.model)
    with torch.no_grad():
        model(pixel_values=at.pictures, output_hidden_states=True)  # from now on its own hooks are there
        child(model, at.blocks[1]).register_forward_hook(lambda m, a, k, y: y[:, :9], with_kwargs=True, prepend=True)
        found = model(pixel_values=at.pictures, output_hidden_states=True).hidden_states
    return [h.shape[1] for h in found[1:4]] == [at.row(1).shape[1], 9, 9]


@fact("transformers: checkpointing leaves a layer's own hooks outside; inner modules are called again alone", HF)
def _(at: Host) -> bool:
    model, seen = copy.deepcopy(at.model).train(), []
    hosts_of.checkpoint(model)
    child(model, at.blocks[1]).register_forward_pre_hook(lambda m, a, k: seen.append("layer"), with_kwargs=True)
    child(model, at.path(1, at.spec.mid)).register_forward_pre_hook(lambda m, a: seen.append("inside"))
    model(pixel_values=at.pictures).last_hidden_state.sum().backward()
    return seen == ["layer", "inside", "inside"]


@fact("transformers: CLIPModel and SiglipModel keep the tower at vision_model, get_image_features gives pooler_output")
def _() -> bool:
    pictures = models.pictures(2)
    for name in ("HF CLIPModel", "HF SiglipModel"):
        model = models.shared(name)
        with torch.no_grad():
            calls, out = calls_of(model, lambda model=model: model.get_image_features(pixel_values=pictures))
        if begun(calls, "vision_model") != ["vision_model"] or out.pooler_output.shape[0] != 2:
            return False
    return True


@fact("transformers: CLIP's text model gets ids by name and reads its last norm's output at the end of text")
def _() -> bool:
    model = models.shared("HF CLIPModel")
    ids = torch.randint(3, 50, (2, 9))
    ids[:, 6] = model.config.text_config.eos_token_id
    with torch.no_grad():
        calls, out = calls_of(model, lambda: model.get_text_features(input_ids=ids))
    end = (ids == model.config.text_config.eos_token_id).int().argmax(1)
    rows = one(calls, "text_model.final_layer_norm").output[torch.arange(2), end]
    named = one(calls, "text_model").kwargs["input_ids"] is ids
    return named and close(model.text_projection(rows), out.pooler_output)


@pytest.mark.parametrize(("sentence", "name", "holds"), fact.rows)
def test_a_fact_that_hooks_lean_on(sentence: str, name: str, holds: Callable[..., bool]) -> None:
    assert_holds(sentence, holds, host(name) if name else None)
