"""Gradients through compressed towers: in training, frozen in parts, and with checkpoints."""

from __future__ import annotations

import pytest
import torch
from support import hosts_of, models, oracle
from support.checks import Print, assert_differs, assert_equal
from support.player import Player

import vlmtok
from vlmtok.errors import PassError

TRAINED = [
    "timm DeiT-3",
    "timm EVA-02",
    "timm DINOv2 registers",
    "open_clip CustomTextCLIP",
    "HF CLIP vision",
    "HF DINOv2",
    "HF BLIP-2 vision",
]
METHODS = ["tome:r=6", "pitome:ratio=0.8", "pitome:ratio=0.8:point=end:weighted=false", "tca:ratio=0.6:update=false"]


def checkpointed(model, name):
    if name.startswith("HF"):
        hosts_of.checkpoint(model)
    else:
        getattr(model, "visual", model).set_grad_checkpointing(True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert_equal(found[name], value, 2e-5, f"gradient of {name}")


def explicit_loss(model, methods, layout, pictures):
    vision = oracle.vision_of(model)
    total = 0.0
    for row in range(len(pictures)):
        run = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, layout))
        total = total + vision.answer(vision.tokens(run.x[None]), run.size).square().sum()
    return total


@pytest.mark.parametrize("checkpoint", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_in_training_equal_an_explicit_implementation(name, spec, checkpoint):
    model, tower = models.fresh(name), models.TOWERS[name]
    methods = vlmtok.parse_methods(spec)
    if spec.startswith("tca"):
        methods = vlmtok.parse_methods(spec + ":reservoir_size=0")
    pictures = tower.pictures(2)
    model.train()
    bare = gradients(model, tower.run(model, pictures).square().sum())
    from vlmtok.adapters import adapter_for

    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    if checkpoint:
        checkpointed(model, name)
    before = Print.of(model)
    with vlmtok.compress(model, methods) as run:
        found = gradients(model, tower.run(model, pictures).square().sum())
        booked = dict(run._attachment.ledger.fired)
    before.assert_still(model)
    assert_gradients(found, wanted)
    assert set(booked.values()) == {1}, "blocks that autograd runs again were counted twice"
    some = max(wanted, key=lambda key: float((wanted[key] - bare[key]).abs().max()))
    assert_differs(wanted[some], bare[some])


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision", "open_clip CLIP"])
def test_gradients_in_eval_mode_too(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    from vlmtok.adapters import adapter_for

    methods = vlmtok.parse_methods("tome:r=6")
    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    with vlmtok.compress(model, methods):
        assert_gradients(gradients(model, tower.run(model, pictures).square().sum()), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision"])
def test_partly_frozen_towers_train(name):
    """Blocks whose input needs no gradient take the side channel, those behind the whole way."""
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    from vlmtok.adapters import adapter_for

    for p in model.parameters():
        p.requires_grad_(False)
    blocks = [m for m in model.modules() if type(m).__name__ in ("Block", "CLIPEncoderLayer")]
    for p in blocks[2].parameters():
        p.requires_grad_(True)
    methods = vlmtok.parse_methods("tome:r=6")
    wanted = gradients(model, explicit_loss(model, methods, adapter_for(model).layout(), pictures))
    assert wanted
    with vlmtok.compress(model, methods):
        assert_gradients(gradients(model, tower.run(model, pictures).square().sum()), wanted)


def test_stochastic_depth_acts_before_the_merge():
    """One picture, the same draws: a dropped MLP branch leaves the merged residual."""
    import timm

    model = models.randomize(
        timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=48,
            patch_size=8,
            depth=4,
            embed_dim=32,
            num_heads=4,
            num_classes=10,
            drop_path_rate=0.6,
        )
    ).train()
    picture = models.pictures(1)
    from vlmtok.adapters import adapter_for

    methods = vlmtok.parse_methods("tome:r=6")
    layout = adapter_for(model).layout()
    vision = oracle.vision_of(model)
    for block, host in zip(vision.blocks, model.blocks):
        out, mlp = block.out, block.mlp
        block.out = lambda x, out=out, host=host: host.drop_path1(out(x)[None])[0]
        block.mlp = lambda x, mlp=mlp, host=host: host.drop_path2(mlp(x)[None])[0]
    results = set()
    for seed in range(6):
        torch.manual_seed(seed)
        run = oracle.run_tower(vision, picture, Player(methods, layout))
        wanted = vision.head(vision.tokens(run.x[None]))
        torch.manual_seed(seed)
        with vlmtok.compress(model, methods):
            found = model(picture)
        assert_equal(found, wanted, what=f"seed {seed}")
        results.add(round(float(found.detach().sum()), 4))
    assert len(results) > 2, "stochastic depth never acted"


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["whole", "checkpointed"])
def test_two_forwards_before_backward_are_right_or_refused(name, checkpoint):
    """A contrastive loss runs the tower twice; a recomputed block must not follow the other forward's plan."""
    model, tower = models.fresh(name), models.TOWERS[name]
    one, other = tower.pictures(2, 1), tower.pictures(2, 2)
    model.train()
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, one).square().sum())
    if checkpoint:
        checkpointed(model, name)
    with vlmtok.compress(model, methods):
        first = tower.run(model, one).square().sum()
        second = tower.run(model, other).square().sum()
        model.zero_grad()
        if not checkpoint:
            first.backward()
            assert_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
            second.backward()
            return
        for loss, right in ((first, wanted), (first + second, None)):
            model.zero_grad()
            try:
                loss.backward(retain_graph=True)
            except PassError as refusal:
                assert "backward must follow its own forward" in str(refusal)
            else:
                assert right is not None, "a joint backward used one plan for two forwards"
                assert_gradients({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, right)


@pytest.mark.parametrize("name", ["timm ViT", "HF CLIP vision"])
def test_an_evaluation_between_forward_and_backward_does_no_harm(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    one, other = tower.pictures(2, 1), tower.pictures(3, 2)
    model.train()
    checkpointed(model, name)
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, one).square().sum())
        loss = tower.run(model, one).square().sum()
        with torch.no_grad():
            tower.run(model, other)
        assert_gradients(gradients(model, loss), wanted)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision"])
def test_backward_of_a_checkpointed_model_outside_with_is_never_silently_wrong(name):
    model, tower = models.fresh(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    model.train()
    methods = vlmtok.parse_methods("tome:r=6")
    with vlmtok.compress(model, methods):
        wanted = gradients(model, tower.run(model, pictures).square().sum())
    checkpointed(model, name)
    with vlmtok.compress(model, methods):
        loss = tower.run(model, pictures).square().sum()
    try:
        found = gradients(model, loss)
    except Exception:
        return
    assert_gradients(found, wanted)


def test_reentrant_checkpointing_is_refused():
    """It runs blocks without gradients first: the residual that a merge needs has no history."""
    import timm.layers

    for name in ("timm ViT", "HF CLIP vision"):
        model, tower = models.fresh(name), models.TOWERS[name]
        model.train()
        if name.startswith("HF"):
            hosts_of.checkpoint(model, reentrant=True)
        else:
            model.set_grad_checkpointing(True)
        usual = timm.layers.use_reentrant_ckpt()
        timm.layers.set_reentrant_ckpt(True)
        try:
            pictures = tower.pictures(2).requires_grad_()
            with (
                pytest.raises(PassError, match=r"use_reentrant=False|never ran with"),
                vlmtok.compress(model, "tome:r=6"),
            ):
                tower.run(model, pictures).square().sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(usual)


def test_gradients_reach_what_methods_insert():
    """Cross tokens train, also where the model is frozen and where blocks are checkpointed."""
    found = []
    for checkpoint in (False, True):
        model, tower = models.fresh("timm ViT"), models.TOWERS["timm ViT"]
        model.train()
        for p in model.parameters():
            p.requires_grad_(False)
        if checkpoint:
            model.set_grad_checkpointing(True)
        with vlmtok.compress(model, "crossget:guidance=cross:rv=4") as run:
            with torch.no_grad():
                for p in run.parameters():
                    p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
            tower.run(model, tower.pictures(2)).square().sum().backward()
            found.append([p.grad.clone() for p in run.parameters()])
            assert all(float(g.abs().max()) > 0 for g in found[-1])
    for one, other in zip(*found):
        assert_equal(one, other)
