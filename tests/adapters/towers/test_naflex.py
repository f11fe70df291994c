"""timm's NaFlexVit: rows of patches with coordinates against a loop, their masks and pools, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import models, oracle
from support.checks import assert_differs, assert_equal, assert_same
from support.player import Player
from support.tower_specs import Grids
from torch import Tensor

import vlmtok
from vlmtok.errors import PassError, UnsupportedModel
from vlmtok.lab.tiny.towers import timm_vit

GRIDS = ((4, 6), (8, 3), (2, 12))
"""Of pictures with 24 patches each."""

MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("naflexvit_base_patch16_gap", {}),
    "average and maximum": ("naflexvit_base_patch16_gap", {"global_pool": "avgmax", "fc_norm": True}),
    "maximum": ("naflexvit_base_patch16_gap", {"global_pool": "max"}),
    "average with registers": ("naflexvit_base_patch16_gap", {"pool_include_prefix": True}),
    "class token": ("naflexvit_base_patch16_gap", {"class_token": True, "global_pool": "token"}),
    "attention": ("naflexvit_base_patch16_map", {}),
    "axial rope": ("naflexvit_base_patch16_gap", {"rope_type": "axial", "pos_embed": "none"}),
    "mixed rope": ("naflexvit_base_patch16_gap", {"rope_type": "mixed", "pos_embed": "none"}),
    "dinov3 rope": ("naflexvit_base_patch16_gap", {"rope_type": "dinov3", "rope_rotate_half": True}),
    "factorized": ("naflexvit_base_patch16_parfac_gap", {}),
    "keys alone are masked": ("naflexvit_base_patch16_gap", {"use_key_only_attn_mask": True}),
    "patches of any size": ("naflexvit_base_patch16_gap", {"enable_patch_interpolator": True}),
}
METHODS = ("tome:r=3", "pitome:ratio=0.8", "crossget:rv=3", "random:keep=0.5")


def built(kind: str, **changes: Any) -> Any:
    name, given = MADE[kind]
    return timm_vit(name, pos_embed_grid_size=(6, 6), **given, **changes).requires_grad_(False)


def rows(grids: tuple[tuple[int, int], ...] = GRIDS, padding: int = 0, side: int = models.PATCH) -> dict[str, Tensor]:
    """Patches of pictures as timm's collator gives them."""
    count = max(h * w for h, w in grids) + padding
    generator = torch.Generator().manual_seed(3)
    shape = (side, side, 3) if side != models.PATCH else (side * side * 3,)
    patches = torch.zeros(len(grids), count, *shape)
    coords, valid = torch.zeros(len(grids), count, 2, dtype=torch.int64), torch.zeros(len(grids), count).bool()
    for row, (h, w) in enumerate(grids):
        patches[row, : h * w] = torch.randn(h * w, *shape, generator=generator)
        coords[row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[row, : h * w] = True
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


def one(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1] for name, value in batch.items()}


def by_loop(model: Any, methods: list[Any], run: Any, batch: dict[str, Tensor], row: int) -> Tensor:
    """Logits of one picture, block by block; pools written out, merged tokens weighted by size in means."""
    vision, given = oracle.vision_of(model), one(batch, row)
    parts = model._forward_embeds(given["patches"], given["patch_coord"], None, None)
    vision.embed, vision.grid = (lambda x: parts["patches"]), None
    table = parts["rope_embeds"]
    if table is not None and not model.rope_is_mixed:
        vision.rope = lambda x: table[0, 0].chunk(2, -1)
    seen = oracle.run_tower(vision, given["patches"], Player(methods, run.layout, {0: run.memory(0)}))
    x, skip = model.norm(seen.x[None]), 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.attn_pool is not None:
        return model.head(model.fc_norm(model.attn_pool(x[:, skip:])))
    tokens, share = x[0, skip:], seen.size[skip:] / seen.size[skip:].sum()
    mean, most = (tokens * share[:, None]).sum(0), tokens.amax(0)
    pooled = {"avg": mean, "max": most, "avgmax": 0.5 * (mean + most), "token": x[0, 0]}[model.global_pool]
    return model.head(model.fc_norm(pooled[None]))


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "mixed rope"])
@torch.no_grad()
def test_rows_of_patches_equal_a_loop(kind: str, spec: str) -> None:
    model, methods, side = (
        built(kind),
        vlmtok.parse_methods(spec),
        12 if kind == "patches of any size" else models.PATCH,
    )
    batch = rows(side=side)
    kept = {name: value.clone() for name, value in batch.items()}
    bare = model(batch)
    with vlmtok.compress(model, methods) as run:
        found = model(batch)
        apart = model(batch["patches"], patch_coord=batch["patch_coord"], patch_valid=batch["patch_valid"])
        alone = torch.cat([model(one(batch, row)) for row in range(3)])
    assert_same(found, apart)
    if not spec.startswith("random"):
        assert_equal(found, alone, 1e-5)
    for row in range(3):
        if spec.startswith("random") and row:
            continue
        assert_equal(found[row : row + 1], by_loop(model, methods, run, batch, row), 2e-5, f"picture {row}")
    assert_differs(found, bare)
    assert_same(model(batch), bare)
    for name, value in batch.items():
        assert torch.equal(value, kept[name]), f"{name} of the caller is the caller's"


@torch.no_grad()
def test_rope_that_is_made_for_each_layer_follows() -> None:
    """Mixed tables come by a layer at a time: each picture alone is what it is in the batch, and turned alike."""
    model, batch = built("mixed rope"), rows()
    with vlmtok.compress(model, "tome:r=3"):
        together, alone = model(batch), torch.cat([model(one(batch, row)) for row in range(3)])
    assert_equal(together, alone, 1e-5)
    still = built("mixed rope")
    for name, parameter in still.named_parameters():
        if name.startswith("rope"):
            parameter.zero_()
    with vlmtok.compress(still, "tome:r=3"):
        assert_differs(still(batch), together)


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_looking_on_changes_no_bit(kind: str) -> None:
    class Idle(vlmtok.Method):
        proportional = True

        def sites(self, layout: Any) -> list[vlmtok.Site]:
            return [vlmtok.Site("vision", layer, "mid", needs=("received_attention",)) for layer in range(3)]

        def reduce(self, view: Any) -> None:
            assert view.signal("received_attention").sum() > 0

        def __str__(self) -> str:
            return "idle"

    model, batch, x = built(kind), rows(), models.pictures(2)
    with vlmtok.compress(model, Idle()):
        found, seen = model(batch), model(x)
    assert_same(found, model(batch))
    assert_same(seen, model(x))


@pytest.mark.parametrize("kind", ["average", "attention"])
@torch.no_grad()
def test_padding_is_refused_and_a_cut_batch_is_what_it_should_be(kind: str) -> None:
    model, padded = built(kind), rows(padding=5)
    cut = {name: value[:, :24] for name, value in padded.items()}
    assert_equal(model(padded), model(cut), 1e-5)  # the host's own rule: padding counts for nothing
    with vlmtok.compress(model, "tome:r=3"):
        with pytest.raises(PassError, match=r"rows of 29 patches of which 24, 24, 24 are real.*patches\[:, :n\]"):
            model(padded)
        with pytest.raises(PassError, match="of which 24, 12 are real"):
            model(rows(((4, 6), (3, 4))))
        assert_equal(model(cut), model(rows()))
        assert model(models.pictures(2)).shape == (2, models.CLASSES)


@torch.no_grad()
def test_rows_of_patches_go_through_the_model_itself() -> None:
    model, batch = built("average"), rows()
    with vlmtok.compress(model, "tome:r=3"):
        with pytest.raises(PassError, match="call the model itself"):
            model.forward_features(**batch)
        with pytest.raises(PassError, match="call the model itself"):
            model.forward_intermediates(batch, output_fmt="NLC")
        with pytest.raises(PassError, match="hides tokens"):
            model({**batch, "attn_mask": torch.full((3, 1, 28, 28), -1e4).triu(1)})
        assert_equal(model.forward_head(model.forward_features(models.pictures(2))), model(models.pictures(2)))
        model(batch)


@torch.no_grad()
def test_grids_that_pictures_have() -> None:
    model, seen = built("average"), Grids()
    with vlmtok.compress(model, seen):
        model(models.pictures(2, size=(32, 64)))
        model(rows())
    assert seen.seen == [(4, 8)] * 3 + [None] * 3


@torch.no_grad()
def test_reports_of_rows_and_of_pictures() -> None:
    from support import referee

    for kind in ("average", "attention", "axial rope"):
        for given in (rows(), models.pictures(2)):
            model = built(kind)
            with referee.counter() as bare:
                model(given)
            with vlmtok.kernels.use("torch"), vlmtok.compress(model, "pitome:ratio=0.8") as run:
                with referee.counter() as counter:
                    model(given)
                report = run.report()
            assert 2 * report.macs.before == bare.get_total_flops()
            assert 2 * report.macs.after.low == counter.get_total_flops() < bare.get_total_flops()


def test_sizes_in_the_attention_pool() -> None:
    model, batch = built("attention"), rows()
    with torch.no_grad(), vlmtok.compress(model, "tome:r=3:pooling=attention"):
        weighted = model(batch)
        alone = torch.cat([model(one(batch, row)) for row in range(3)])
    assert_equal(weighted, alone, 1e-5)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=3"):
        assert_differs(model(batch), weighted)


def test_what_of_a_naflexvit_cannot_be_carried() -> None:
    with pytest.raises(UnsupportedModel, match="groups queries|has no k_norm"):
        vlmtok.compress(built("axial rope", num_kv_heads=2, qkv_fused=False), "tome:r=3")
    with pytest.raises(UnsupportedModel, match="ParallelScalingBlock"):
        vlmtok.compress(
            timm_vit("naflexvit_base_patch16_gap", pos_embed_grid_size=(6, 6), block_fn=_parallel()), "tome"
        )


def _parallel() -> Any:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock
