"""The learned scorer: the method, its network, and the recipe that trains it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import models
from support.checks import assert_differs, assert_equal, watched
from support.llava_by_oracle import ROWS, Top, assert_generates_as_the_oracle
from support.places import ROOT
from torch import Tensor, nn

import vlmtok
from vlmtok import Counts, Learned, Reduction, Site, TokenView
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.pruners.learned import ConvScorer, instruction_score, load_scorer


@pytest.fixture(scope="module")
def recipe():
    """`examples/train_scorer.py` as a module."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("train_scorer", ROOT / "examples" / "train_scorer.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["train_scorer"] = made
    spec.loader.exec_module(made)
    yield made
    sys.path[:] = before
    del sys.modules["train_scorer"]


def seeded(kernel=5):
    torch.manual_seed(0)
    return ConvScorer((4, 8), kernel).eval()


def view_of(attention: Tensor | None, last: Tensor, memory: nn.Module | None = None) -> TokenView:
    return TokenView(
        torch.zeros(len(last), last.shape[-1], 8),
        Site("projected"),
        signals={"text_attention": attention, "last_attention": last},
        memory=memory,
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- the method
def test_without_a_scorer_the_signal_is_the_score():
    attention, last = drawn(2, 4, 3, 10), drawn(2, 4, 10, seed=1)
    for given, rows in ((attention, attention.flatten(1, 2)), (None, last)):
        found = Learned(keep=4).reduce(view_of(given, last)).keep
        for row in range(2):
            score = [sum(float(r[n]) for r in rows[row]) / len(rows[row]) for n in range(10)]
            best = sorted(range(10), key=lambda n: (-score[n], n))[:4]
            assert found[row].tolist() == sorted(best)
    assert Learned(keep=1.0).reduce(view_of(attention, last)) is None
    assert Learned(keep=10).count(Counts(Site("projected"), 8, 8)) == 8


def test_a_scorer_has_the_last_word():
    class Backwards(nn.Module):
        def forward(self, attention: Tensor) -> Tensor:
            assert attention.shape[1] == 1
            return -attention[:, 0]

    attention, last = drawn(2, 4, 3, 10), drawn(2, 4, 10)
    score = instruction_score(attention)
    found = Learned(keep=3).reduce(view_of(attention, last, Backwards())).keep
    assert found.tolist() == score.argsort(1)[:, :3].sort(1).values.tolist()


def test_nan_loses_and_spreads_to_no_neighbour():
    attention = drawn(1, 4, 3, 12)
    attention[..., 5] = float("nan")
    clean = torch.where(attention.isnan(), 0.0, attention)
    net, last = seeded(), drawn(1, 4, 12)
    found = Learned(keep=6).reduce(view_of(attention, last, net)).keep[0].tolist()
    score = net(instruction_score(clean)[:, None])[0]
    score[5] = float("-inf")
    assert found == score.argsort(descending=True)[:6].sort().values.tolist() and 5 not in found


def test_a_scorer_in_half_precision_is_given_its_own():
    attention, last = drawn(2, 4, 3, 16), drawn(2, 4, 16)
    assert isinstance(Learned(keep=4).reduce(view_of(attention, last, seeded().bfloat16())), Reduction)


def test_a_scorer_of_another_shape_is_refused():
    attention, last = drawn(2, 4, 3, 16), drawn(2, 4, 16)
    with pytest.raises(
        ParameterError, match=r"Learned: the scorer made \[2, 1, 16\] of .* = \[2, 1, 16\], not \[B, N\]"
    ):
        Learned(keep=4).reduce(view_of(attention, last, nn.Identity()))


def test_settings(tmp_path):
    for wrong in ("no_such_word", 3, True):
        with pytest.raises(ParameterError, match="Learned: scorer="):
            Learned(scorer=wrong)
    missing = Learned(scorer="weights/none.safetensors")
    assert str(missing) == "learned:scorer=weights/none.safetensors"
    with pytest.raises(ParameterError, match="is no file"):
        vlmtok.compress(models.shared("HF LLaVA"), missing)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(ParameterError, match="does not hold the weights of a ConvScorer"):
        load_scorer(str(other))
    other.write_bytes(b"no weights")
    with pytest.raises(ParameterError, match="does not hold the weights of a ConvScorer"):
        load_scorer(str(other))
    with_module = Learned(keep=0.25, scorer=seeded())
    assert str(with_module) == "learned:keep=0.25:scorer=ConvScorer"
    assert with_module.settings() == {"keep": 0.25, "scorer": "ConvScorer", "positions": None, "min_tokens": 0}


# ---------------------------------------------------------------------- the network
@pytest.mark.parametrize("n", [1, 2, 9, 144, 577])
def test_the_network_takes_any_length_and_rows_do_not_meet(n):
    net, x = ConvScorer().eval(), drawn(3, 1, n)
    with torch.no_grad():
        found = net(x)
        assert found.shape == (3, n)
        for row in range(3):
            assert_equal(net(x[row : row + 1])[0], found[row])
        assert_equal(net(1e-4 * x), found, what="another scale")
    widths = [layer.out_channels for layer in net.pointwise]
    assert widths == [32, 64, 128, 256, 512] and [layer.groups for layer in net.depthwise] == [1, *widths[:-1]]


def test_weights_make_the_way_through_files_and_state_dicts(tmp_path):
    """`run.load_state_dict` fills what `build` made, and a path is the same as the module."""
    net, path = seeded(7), tmp_path / "scorer.safetensors"
    save_file(net.state_dict(), path)
    model, inputs = models.shared("HF LLaVA"), models.Batch.of("^3I5", "^2I1I4").inputs()
    outs = []
    other = ConvScorer((4, 8), 7)
    with torch.no_grad():
        for method in (Learned(4, net), Learned(4, str(path)), Learned(4, other)):
            with vlmtok.compress(model, method) as run:
                if method.scorer is other:
                    assert_differs(model(**inputs).logits, outs[0])
                    run.load_state_dict({f"0.{name}": value for name, value in net.state_dict().items()})
                assert sum(p.numel() for p in run.parameters()) == sum(p.numel() for p in net.parameters())
                outs.append(model(**inputs).logits)
                assert not any("no scorer" in note for note in run.report().notes)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    with torch.no_grad(), vlmtok.compress(model, Learned(4)) as run:
        assert_differs(model(**inputs).logits, outs[0])
        assert any("learned has no scorer" in note for note in run.report().notes)


# ---------------------------------------------------------------------- in a model
STACKS = {
    "alone": lambda: [Learned(5)],
    "with a network": lambda: [Learned(0.4, seeded())],
    "behind a tower's cut": lambda: [*vlmtok.parse_methods("pitome:ratio=0.8"), Learned(4)],
    "behind another cut": lambda: [Top(0.7, scope="sample"), Learned(4)],
    "before cuts between layers": lambda: [Learned(9), Top(0.5, "decoder", 2)],
    "with layers that skip": lambda: [Learned(6), vlmtok.IMA("block", 1, -1)],
}


@pytest.mark.parametrize("stack", STACKS)
def test_generation_equals_the_oracle(stack):
    """Its signal too: the oracle's own layer 0, on rows with text, without text behind a picture, with two."""
    if stack == "behind another cut":  # two methods at one place see each other's cut
        assert_generates_as_the_oracle(models.shared("HF LLaVA"), models.Batch.of("^3I5", "2I2"), STACKS[stack]())
        return
    assert_generates_as_the_oracle(models.shared("HF LLaVA"), models.Batch.of(*ROWS), STACKS[stack]())


def test_text_in_front_is_no_instruction_unless_none_is_behind():
    model, batch = models.shared("HF LLaVA"), models.Batch.of("^4I", "^4I2")
    methods = [Learned(4)]
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(model, methods):
        for row in range(2):
            model(**batch.alone(row).inputs())
    assert seen[0].signals["text_attention"] is None
    assert seen[1].signals["text_attention"].shape == (1, models.LM_HEADS, 2, models.PLACEHOLDERS)


def test_looking_ahead_is_booked_as_a_signal():
    """q of T rows, k of S rows, and H d T S for the products; the network is the method's own."""
    model, inputs = models.shared("HF LLaVA"), models.Batch.of("^3I5").inputs()
    with torch.no_grad(), vlmtok.kernels.use("torch"), vlmtok.compress(model, Learned(4, seeded())) as run:
        model(**inputs)
        report = run.report()
    width, kv, rows, row = models.LM_WIDTH, models.LM_WIDTH // 2, 5, 1 + 3 + 16 + 5
    assert report.line("signals").after.low == width * width * rows + width * kv * row + width * rows * row
    net = 16 * (1 * 5 + 1 * 4 + 4 * 5 + 4 * 8 + 8)
    assert report.line("method").after.low == net


def test_a_model_without_rows_in_layer_0_is_refused():
    from vlmtok.lab.tiny.families import shared

    with pytest.raises(
        MissingSignal, match="Learned needs the signal 'text_attention' .*layer 0 has no attention rows"
    ):
        vlmtok.compress(shared("qwen3_5"), Learned())


# ---------------------------------------------------------------------- the recipe
def test_labels_are_those_of_two_layers_by_hand(recipe):
    """R <- R + mean_h (A * dA)^+ R, from the first layer on, and the asked row of it."""
    attentions = [drawn(2, 3, 5, 5, seed=s).softmax(-1) for s in range(2)]
    gradients = [drawn(2, 3, 5, 5, seed=s) - 0.5 for s in (2, 3)]
    for row in (4, 2):
        for b in range(2):
            whole = torch.eye(5)
            for a, g in zip(attentions, gradients):
                mixed = torch.zeros(5, 5)
                for i in range(5):
                    for j in range(5):
                        mixed[i, j] = sum(max(float(a[b, h, i, j] * g[b, h, i, j]), 0.0) for h in range(3)) / 3
                whole = whole + mixed @ whole
            assert_equal(recipe.rollout(attentions, gradients, row)[b], whole[row])


@pytest.mark.parametrize("n", [1, 7, 144])
def test_targets_are_the_upper_half_as_a_distribution(recipe, n):
    given = drawn(4, n) + 0.1
    given[1], given[2] = 0.5, 0.0
    found = recipe.target(given)
    assert_equal(found.sum(1), torch.ones(4))
    half = -(-n // 2)
    assert ((found > 0).sum(1) == half).all()
    assert (found[1:3, :half] > 0).all(), "of equal ones the first stay"
    best = given[0].argsort(descending=True)[:half]
    assert_equal(found[0, best], given[0, best] / given[0, best].sum())


def test_gradients_reach_attention_and_labels_are_of_the_right_columns(recipe):
    """On the shipped model: what decides the answer is what is asked for, and layer 0's attention is the signal."""
    model = recipe.Checkpoint(recipe.FOLDER, attention="eager")
    part = recipe.draw(12, seed=5)
    found = recipe.labelled(model, part, size=4)
    assert found["right"].float().mean() > 0.8 and (found["relevance"] >= 0).all()
    for scene_and_question, relevance, right in zip(part, found["relevance"], found["right"]):
        cells = scene_and_question[1].cells
        if not cells or not right:
            continue
        rows = relevance.view(3, 4, 3, 4).sum((1, 3)).flatten()
        inside = rows[list(cells)].sum() / rows.sum()
        assert inside > 1.5 * len(cells) / 9
    methods = [Learned(8)]
    inputs = model.inputs([recipe.render(part[0][0])], [part[0][1].text])
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(model.model, methods):
        model.model(**inputs)
    assert_equal(found["attention"][0], instruction_score(seen[0].signals["text_attention"])[0])


def test_training_goes_on_where_it_stopped(recipe, tmp_path, monkeypatch):
    """Cut off behind epoch 59, with the state of epoch 50 on disk, it ends as if it had not been."""
    data = {"attention": drawn(40, 24), "right": torch.ones(40, dtype=torch.bool)}
    data["right"][7] = False
    data["relevance"] = F.pad(data["attention"], (1, 0))[:, :-1]  # the neighbour's: a convolution can tell
    whole = recipe.train(data, tmp_path / "whole.pt", 60, 3)

    def stop(message, epoch, *losses):
        if epoch == 60:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe.logger, "info", stop)
        recipe.train(data, tmp_path / "stopped.pt", 60, 3)
    assert torch.load(tmp_path / "stopped.pt", weights_only=True)["epoch"] == 50
    again = recipe.train(data, tmp_path / "stopped.pt", 60, 3)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)
    with torch.no_grad():
        wanted = recipe.target(data["relevance"])
        losses = [
            float(F.kl_div(net(data["attention"][:, None]).log_softmax(-1), wanted, reduction="batchmean"))
            for net in (ConvScorer(), whole)
        ]
    assert losses[1] < 0.9 * losses[0]
