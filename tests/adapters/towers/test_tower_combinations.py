"""More than one method in a tower, and methods at odd places: they look ahead, read far signals, keep a state."""

from __future__ import annotations

import pytest
import torch
from support import models, oracle
from support.checks import assert_differs, assert_equal, assert_same
from support.player import Player

import vlmtok
from vlmtok import PiToMe, Reduction, Site, ToMe
from vlmtok.errors import PassError

MIXES = [
    "tome:r=4+pitome:ratio=0.8",
    "tome:r=4+pitome:ratio=0.8:point=end",
    "pitome:ratio=0.8:point=end+random:keep=0.6:stage=vision:layer=1",
    "tca:ratio=0.6:update=false+tome:r=3",
    "crossget:guidance=cross:rv=4",
    "crossget:guidance=attention:rv=3+tome:r=3",
]


@pytest.mark.parametrize("spec", MIXES)
@pytest.mark.parametrize("name", ["timm DINOv2 registers", "timm EVA-02", "open_clip CLIP", "HF CLIP vision"])
def test_several_methods_in_one_layer_equal_the_oracle(name, spec):
    """Where one method cuts, the signals of the next ones in that layer follow."""
    model, tower = models.shared(name), models.TOWERS[name]
    pictures, methods = tower.pictures(2), vlmtok.parse_methods(spec)
    vision = oracle.vision_of(model)
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found, tokens = tower.run(model, pictures), tower.tokens(model, pictures)
        memory = {at: run.memory(at) for at in range(len(methods))}
        for row in range(2):
            player = Player(methods, run.layout, memory)
            left = oracle.run_tower(vision, pictures[row : row + 1], player)
            wanted = vision.tokens(left.x[None])
            assert_equal(tokens[row : row + 1], wanted, what="tokens")
            assert_equal(found[row : row + 1], vision.answer(wanted, left.size))
    assert_differs(found, bare)


class Ahead(vlmtok.Random):
    """Cuts at a start by signals that must be computed ahead, after putting tokens in."""

    insertions = 0

    def sites(self, layout):
        names = ["keys", "received_attention", "protected_keys", "keys_full"]
        names += ["cls_attention"] if layout.gives("vision", "cls_attention") else []
        return [Site("vision", layer, "start", tuple(names)) for layer in (1, 2)]

    def insert(self, view):
        return view.tokens[:, : self.insertions] * 0.5 if self.insertions else None

    def reduce(self, view):
        score = view.signal("received_attention") * 10 + view.signal("keys").norm(dim=-1)
        if view.has("cls_attention"):
            score = score + view.signal("cls_attention").mean(1)
        k = self.count(view.counts)
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, :k])


class AheadInserting(Ahead):
    insertions = 2


@pytest.mark.parametrize("method", [Ahead(keep=0.7), AheadInserting(keep=0.7)], ids=["plain", "inserting"])
@pytest.mark.parametrize("name", ["timm ViT", "timm SigLIP", "timm EVA-02", "timm DINOv3", "open_clip CLIP", "HF ViT"])
def test_looking_ahead_at_a_start_equals_the_oracle(name, method):
    """Slots in an order of their own, signals of a block that has not run, inserted tokens among its keys."""
    model, tower = models.shared(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    vision = oracle.vision_of(model)
    methods = [method, ToMe(r=3)]
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found = tower.run(model, pictures)
        for row in range(2):
            player = Player(methods, run.layout)
            wanted = oracle.run_tower(vision, pictures[row : row + 1], player)
            assert_equal(found[row : row + 1], vision.answer(vision.tokens(wanted.x[None]), wanted.size))
    assert_differs(found, bare)


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF CLIP vision", "timm EVA-02"])
def test_looking_ahead_works_under_autocast(name):
    model, tower = models.shared(name), models.TOWERS[name]
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        vlmtok.compress(model, [Ahead(keep=0.7), ToMe(r=3)]),
    ):
        assert bool(tower.run(model, tower.pictures(2)).isfinite().all())


class Remote(vlmtok.Random):
    """Decides at one layer by what other layers told."""

    def sites(self, layout):
        needs = ("keys@vision:0", "cls_attention@vision:1", "received_attention@vision:-3", "protected@vision:0")
        return [Site("vision", 2, "mid", (*needs, "keys")), Site("vision", 3, "end", needs)]

    def reduce(self, view):
        score = view.signal("keys@vision:0").norm(dim=-1) + 5 * view.signal("cls_attention@vision:1").mean(1)
        score = score + view.signal("received_attention@vision:-3")
        score = score + (view.tokens @ view.signal("protected@vision:0")[:, 0].unsqueeze(-1)).squeeze(-1) * 0.01
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, : self.count(view.counts)])


@pytest.mark.parametrize("name", ["timm ViT", "timm DINOv3", "open_clip CLIP", "HF DINOv2"])
def test_signals_of_other_layers_follow_the_cuts_between(name):
    model, tower = models.shared(name), models.TOWERS[name]
    pictures = tower.pictures(2)
    vision, methods = oracle.vision_of(model), [Remote(keep=0.6), PiToMe(ratio=0.8)]
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        found = tower.run(model, pictures)
    with torch.no_grad():
        for row in range(2):
            wanted = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, run.layout))
            assert_equal(found[row : row + 1], vision.answer(vision.tokens(wanted.x[None]), wanted.size))


class Keeps(vlmtok.Random):
    """Writes into `state` and `row` at one layer, reads them at another."""

    def sites(self, layout):
        return [Site("vision", layer, "end") for layer in (0, 2, 3)]

    def reduce(self, view):
        if view.layer == 0:
            view.state["mark"] = view.tokens.norm(dim=-1)
            view.row["mean"] = view.tokens.mean((1, 2))
            return None
        score = view.state["mark"] + view.row["mean"][:, None]
        view.state["mark"] = score * 2
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, : self.count(view.counts)])


def test_state_follows_the_cuts_of_any_method():
    model, tower = models.shared("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures(2)
    vision, methods = oracle.vision_of(model), [Keeps(keep=0.6), ToMe(r=5), Keeps(keep=0.9)]
    with torch.no_grad():
        bare = tower.run(model, pictures)
        with vlmtok.compress(model, methods) as run:
            found = [tower.run(model, pictures) for _ in range(2)]
        assert_same(found[0], found[1], "state leaked from one forward into the next")
        for row in range(2):
            wanted = oracle.run_tower(vision, pictures[row : row + 1], Player(methods, run.layout))
            assert_equal(found[0][row : row + 1], vision.answer(vision.tokens(wanted.x[None]), wanted.size))
    assert_differs(found[0], bare)


def test_a_user_signal_is_seen_and_wins():
    model, tower = models.shared("timm ViT"), models.TOWERS["timm ViT"]
    pictures = tower.pictures(2)

    class Mine(vlmtok.Random):
        def sites(self, layout):
            return [Site("vision", 1, "end", ("mine", "keys"))]

        def reduce(self, view):
            assert torch.equal(view.signal("keys"), view.tokens[..., :2])
            score = view.signal("mine")
            return Reduction(score.argsort(dim=1, stable=True)[:, : self.count(view.counts)])

    signals = {"mine": lambda view: -view.columns.float(), "keys": lambda view: view.tokens[..., :2]}
    with torch.no_grad(), vlmtok.compress(model, Mine(keep=5), signals=signals, trace=True) as run:
        model(pictures)
        owner = run.trace()[0].owner
    assert (owner >= 0).tolist() == [False] * 31 + [True] * 5
    with pytest.raises(vlmtok.errors.MissingSignal, match="mine"):
        vlmtok.compress(model, Mine(keep=5), signals={"other": signals["mine"]})


@pytest.mark.parametrize("need", ["keys@vision:0", "nobody@vision:0"])
def test_a_user_signal_may_stand_for_one_with_a_place(need):
    """By the whole name that the method asks for, whether the model could give it or not."""
    model, tower = models.shared("timm ViT"), models.TOWERS["timm ViT"]

    class Mine(vlmtok.Random):
        def sites(self, layout):
            return [Site("vision", 1, "end", (need,))]

        def reduce(self, view):
            return Reduction(view.signal(need).argsort(dim=1, stable=True)[:, : self.count(view.counts)])

    last = {need: lambda view: -view.columns.float()}
    with torch.no_grad(), vlmtok.compress(model, Mine(keep=5), signals=last, trace=True) as run:
        model(tower.pictures(2))
        assert (run.trace()[0].owner >= 0).tolist() == [False] * 31 + [True] * 5
    if need.startswith("nobody"):
        with pytest.raises(vlmtok.errors.MissingSignal, match="nobody@vision:0"):
            vlmtok.compress(model, Mine(keep=5), signals={"nobody@vision:1": last[need]})


def test_a_proportional_method_refuses_a_model_called_with_a_mask():
    model = models.shared("HF ViT")
    mask = torch.ones(1, 37)
    mask[:, -3:] = 0
    with torch.no_grad(), vlmtok.compress(model, "tome:r=6"):
        try:
            found = model(pixel_values=models.pictures(1), attention_mask=mask)
        except PassError as refusal:
            assert "mask" in str(refusal)
        else:
            raise AssertionError(f"a mask of the uncut length was accepted: {found.last_hidden_state.shape}")
