"""Heads that pool a tower's tokens: a merged one counts there by its size, as an explicit computation has it."""

from __future__ import annotations

import pytest
import torch
from support.checks import assert_differs, assert_equal
from support.merging_by_hand import golden
from support.pooled import MEANS, Seen, by_hand, head_of, model_of, open_clip_model, prefix_of, sizes_by_hand
from torch import nn

import vlmtok
from vlmtok.errors import UnsupportedModel
from vlmtok.lab.tiny import towers

METHODS = ("tome:r=6", "pitome:ratio=0.7", "crossget:rv=5:guidance=none", "tca:reservoir_size=0:ratio=0.6")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MEANS)
def test_a_mean_weighs_tokens_by_size(name, method):
    row, model = MEANS[name], model_of(name)
    pictures = towers.pictures(2)
    with torch.no_grad(), Seen(row, model) as seen:
        bare = row.run(model, pictures)
        with vlmtok.compress(model, method, trace=True) as run:
            found = row.run(model, pictures)
            tokens, vector, vectors = seen.tokens, seen.vector, []
            for i in range(2):
                size = sizes_by_hand(run, i, prefix_of(run), tokens.shape[1])
                assert size.max() > 1, "nothing merged"
                vectors.append(by_hand(row, tokens[i], size))
        wanted = head_of(row, model, torch.stack(vectors), pictures)
        plain = head_of(row, model, vector, pictures)
        with vlmtok.compress(model, f"{method}:pooling=plain"):
            unweighted = row.run(model, pictures)
        assert torch.equal(row.run(model, pictures), bare), "removed"
    assert_equal(found, wanted)
    assert_equal(unweighted, plain)
    assert_differs(found, plain)


# ---------------------------------------------------------------------- attention pools
def attention_by_hand(attn, queries, tokens, size):
    """`nn.MultiheadAttention` over tokens `[B, L, C]`, each written out as often as it has size."""
    rows = []
    for row, counts in zip(tokens, size):
        copies = torch.cat([token.expand(int(count), -1) for token, count in zip(row, counts)])
        rows.append(attn(queries, copies[None], copies[None], need_weights=False)[0])
    return torch.cat(rows)


def siglip_pool(model, tokens, size):
    head = model.head
    pooled = attention_by_hand(head.attention, head.probe, tokens, size)
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def map_pool(model, tokens, size):
    """timm's, with each token written out as often as it has size."""
    rows = []
    for row, counts in zip(tokens, size):
        copies = torch.cat([token.expand(int(count), -1) for token, count in zip(row, counts)])
        rows.append(model.head(model.fc_norm(model.attn_pool(copies[None]))))
    return torch.cat(rows)


def coca_pool(model, tokens, size):
    visual = model.visual
    pool = visual.attn_pool
    pooled = attention_by_hand(pool.attn, pool.ln_q(pool.query)[None], pool.ln_k(tokens), size)
    return nn.functional.normalize(visual.ln_post(pooled)[:, 0] @ visual.proj, dim=-1)


ATTENTION = {
    "timm SigLIP": (lambda: towers.TOWERS["timm SigLIP"].build(), lambda m, x: m(x), lambda m: m.norm, map_pool),
    "timm EVA map": (
        lambda: towers.timm_vit("eva02_base_patch14_224", global_pool="map"),
        lambda m, x: m(x),
        lambda m: m.norm,
        map_pool,
    ),
    "HF SigLIP vision": (
        lambda: towers.TOWERS["HF SigLIP vision"].build(),
        lambda m, x: m(pixel_values=x).pooler_output,
        lambda m: m.post_layernorm,
        siglip_pool,
    ),
    "open_clip CoCa": (
        lambda: towers.TOWERS["open_clip CoCa"].build(),
        lambda m, x: m.encode_image(x),
        lambda m: m.visual.transformer,
        coca_pool,
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_pool_takes_sizes_where_it_is_asked_to(name):
    """Equal to a pool that reads each token as often as it has size; by default the pool knows nothing of sizes."""
    build, run_model, read, by_copies = ATTENTION[name]
    model, pictures, seen = build(), towers.pictures(2), []
    handle = read(model).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        with vlmtok.compress(model, "tome:r=6:pooling=attention", trace=True) as run:
            found = run_model(model, pictures)
            sizes = [sizes_by_hand(run, i, prefix_of(run), seen[-1].shape[1]) for i in range(2)]
        tokens = seen[-1]
        handle.remove()
        assert_equal(found, by_copies(model, tokens, sizes))
        with vlmtok.compress(model, "tome:r=6"):
            plain = run_model(model, pictures)
        assert_equal(plain, by_copies(model, tokens, [torch.ones(tokens.shape[1])] * 2))
    assert_differs(found, plain)


def test_parallel_attention_pools_take_sizes_and_the_second_of_a_cascade_does_not():
    pictures = towers.pictures(2)
    masks = []

    def note(module, args, kwargs, output):
        masks.append(kwargs.get("key_padding_mask") is not None)

    for kind, wanted in (("parallel", [True, True]), ("cascade", [True, False])):
        model = open_clip_model(attentional_pool=kind, attn_pooler_queries=3, attn_pooler_heads=2)
        for pool in (model.visual.attn_pool, model.visual.attn_pool_contrastive):
            pool.attn.register_forward_hook(note, with_kwargs=True)
        masks.clear()
        with torch.no_grad(), vlmtok.compress(model, "tome:r=6:pooling=attention"):
            model.encode_image(pictures)
        assert masks == wanted, kind


@pytest.mark.parametrize("name", ["timm ViT", "timm MAE average", "HF ViT classifier", "open_clip CLIP"])
def test_sizes_wanted_in_an_attention_pool_that_is_not_there(name):
    model = towers.TOWERS[name].build()
    with pytest.raises(UnsupportedModel, match="wants sizes in an attention pool, but this tower is read by none"):
        vlmtok.compress(model, "tome:r=2:pooling=attention")
    assert not list(vlmtok.core.hooks.hooks_of(model))


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize(
    "variant, method", [("pitome_mae_090", "pitome:preset=mae:ratio=0.9"), ("tome_r7", "tome:r=7")]
)
def test_the_released_mae_patch(variant, method):
    """Blocks, sizes and weights are those of the released code's run; its MAE patch pools them as
    ``sum(x * size)[1:] / patches``, in front of `fc_norm`."""
    from timm.models.vision_transformer import VisionTransformer

    data = golden("e2e_micro_vit.npz")
    model = VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=48,
        depth=6,
        num_heads=3,
        num_classes=10,
        mlp_ratio=2.0,
        global_pool="avg",
    )
    state = {key[2:]: value for key, value in data.items() if key.startswith("w.")}
    # An MAE has its norm behind the pool.
    model.load_state_dict(
        {key.replace("norm.", "fc_norm.") if key[:5] == "norm." else key: v for key, v in state.items()}
    )
    model.eval()
    tokens, size = golden("e2e_micro_vit_mae.npz")[f"{variant}.block5"], data[f"{variant}.size"]
    pooled = (tokens * size)[:, 1:].sum(1) / 64
    with torch.no_grad():
        head = nn.functional.layer_norm(pooled, (48,), state["norm.weight"], state["norm.bias"], model.fc_norm.eps)
        wanted = nn.functional.linear(head, state["head.weight"], state["head.bias"])
        plain = model.head(model.fc_norm(tokens[:, 1:].mean(1)))
        with vlmtok.compress(model, method):
            found = model(data["x"])
        with vlmtok.compress(model, f"{method}:pooling=plain"):
            unweighted = model(data["x"])
    assert_equal(found, wanted, 1e-4)
    assert_equal(unweighted, plain, 1e-4)
    assert_differs(found, unweighted)
