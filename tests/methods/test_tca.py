"""TCA: the schedule, a plain-loop tower, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tca_by_hand import STREAMS, small_tower, stream
from support.tca_views import layout, mid_view

from vlmtok.core.registry import create_method
from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.mergers.condensation import (
    condensation,
    from_drop_rate,
    from_ratio,
    schedule,
)
from vlmtok.mergers.reservoir import Reservoir
from vlmtok.mergers.tca import TCA


# ---------------------------------------------------------------------- schedule
def test_ratio_gives_the_token_counts_behind_the_published_flops():
    assert [n + 1 for n in schedule(0.9, 196)] == [179, 164, 149]
    assert [n + 1 for n in schedule(0.7, 196)] == [140, 101, 74]
    assert [n + 1 for n in schedule(0.5, 196)] == [101, 53, 29]
    assert schedule(1.0, 196) == [196] * 3


def image_gmacs(tokens):
    """CLIP ViT-B/16's image tower in units of 1e9 MACs; `tokens` enter the blocks, and leave attention in 3, 6, 9."""
    n, total, width = 197, 196 * 768 * 768 + 768 * 512, 768
    for layer in range(12):
        total += 4 * n * width**2 + 2 * n * n * width
        n = tokens[(3, 6, 9).index(layer)] + 1 if layer in (3, 6, 9) else n
        total += 8 * n * width**2
    return total / 1e9


def test_published_flops():
    assert image_gmacs([196] * 3) == pytest.approx(17.56, abs=0.02)
    assert image_gmacs(schedule(0.9, 196)) == pytest.approx(15.45, abs=0.02)
    assert image_gmacs(schedule(0.7, 196)) == pytest.approx(11.69, abs=0.03)


def test_drop_rates_give_the_released_counts():
    def after(rate, n=196):
        found = []
        for _ in range(3):
            n = TCA(drop_rate=rate).count(Counts(Site("vision", 3, "mid"), n, n, 1, 12))
            found.append(n + 1)
        return found

    assert after(0.035) == [182, 167, 155]
    assert after(0.1) == [143, 104, 77]
    assert after(0.105) == [140, 101, 74]
    assert after(0.175) == [98, 53, 29]
    assert after(0.0) == [197] * 3
    assert from_drop_rate(0.1, 49) == 5 and from_ratio(0.9, 196) == 8


@given(n=st.integers(0, 80), m=st.integers(0, 60), centers=st.integers(1, 8), fuse=st.booleans())
def test_condensation_splits_all_patches(n, m, centers, fuse):
    plan = condensation(n, m, centers, fuse)
    assert min(plan.kept, plan.middle, plan.fused) >= 0 and plan.centers <= plan.middle
    assert plan.kept + plan.middle + plan.fused <= n
    assert plan.kept + plan.middle + plan.fused == n or not fuse
    assert plan.slots <= n


# ---------------------------------------------------------------------- a whole tower, against plain loops
class Tower:
    """The same tower in torch with the method in it, through hand-built views."""

    def __init__(self, w, heads, method):
        self.w, self.heads, self.method = w, heads, method
        self.depth = 1 + max(int(key.split(".")[2]) for key in w if key.startswith("transformer"))
        self.sites = {(s.layer, s.point) for s in method.sites(layout(depth=self.depth))}
        self.memory = method.build(layout(depth=self.depth))

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def visit(self, x, layer, point, row, **signals):
        signals["protected"] = x[:, :1]
        view = TokenView(
            x[:, 1:], Site("vision", layer, point), num_prefix=1, depth=self.depth, signals=signals, row=row,
            memory=self.memory,
        )  # fmt: skip
        assert (layer, point) in self.sites
        return view

    @torch.no_grad()
    def __call__(self, images, text, patch):
        x = F.conv2d(images, self.w["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.w["class_embedding"].expand(len(x), 1, -1), x], 1) + self.w["positional_embedding"]
        x = self.norm(x, "ln_pre")
        row = {}
        for layer in range(self.depth):
            p = f"transformer.resblocks.{layer}"
            n, rows = x.shape[1], x
            if (layer, "start") in self.sites:
                view = self.visit(x, layer, "start", row)
                assert self.method.reduce(view) is None
                anchor = self.method.insert(view)
                rows = x if anchor is None else torch.cat([x, anchor], 1)
            h = self.norm(rows, f"{p}.ln_1")
            qkv = F.linear(h, self.w[f"{p}.attn.in_proj_weight"], self.w[f"{p}.attn.in_proj_bias"])
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
            a = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
            out = (a @ v).transpose(1, 2).flatten(2)
            out = F.linear(out, self.w[f"{p}.attn.out_proj.weight"], self.w[f"{p}.attn.out_proj.bias"])
            x = (rows + out)[:, :n]
            if (layer, "mid") in self.sites:
                reduction = self.method.reduce(self.visit(x, layer, "mid", row, cls_attention=a[:, :, 0, 1:n]))
                if reduction is not None:
                    x = torch.cat([x[:, :1], reduction.apply(x[:, 1:])[0]], 1)
            h = F.linear(self.norm(x, f"{p}.ln_2"), self.w[f"{p}.mlp.c_fc.weight"], self.w[f"{p}.mlp.c_fc.bias"])
            h = h * torch.sigmoid(1.702 * h)
            x = x + F.linear(h, self.w[f"{p}.mlp.c_proj.weight"], self.w[f"{p}.mlp.c_proj.bias"])
            if (layer, "end") in self.sites:
                assert self.method.reduce(self.visit(x, layer, "end", row)) is None
        feature = F.normalize(self.norm(x[:, 0], "ln_post") @ self.w["proj"], dim=-1)
        row["features"], row["text_features"] = feature, text.T
        logits = 100.0 * feature @ text
        return logits, self.method.finish(logits, row, self.memory), row


@pytest.mark.parametrize("name", STREAMS)
def test_tower_end_to_end(name):
    data = stream(name)
    method = TCA(drop_rate=data["drop_rate"], scale=1.0, lambd=3.0, beta=5.0)
    tower = Tower({key[3:]: value for key, value in data.items() if key.startswith("sd.")}, data["heads"], method)
    anchors = []
    for t, picture in enumerate(data["images"]):
        method.first = tuple(data["first"][t].tolist())
        logits, final, row = tower(picture.unsqueeze(0), data["text_weights"], data["patch"])
        torch.testing.assert_close(logits[0], data["clip_logits"][t].float(), atol=2e-4, rtol=0)
        torch.testing.assert_close(final[0], data["final"][t].float(), atol=2e-4, rtol=0)
        tokens = torch.cat([row[f"cls.{i}"] for i in range(12)])
        torch.testing.assert_close(tokens, data["cls"][t].float(), atol=2e-4, rtol=0)
        anchors.append(int(tower.memory.anchored.sum()))
    assert anchors == data["nanch"].tolist()
    assert anchors[0] == 0 < anchors[-1]  # the stream passes the point where anchors come in


def test_frozen_batch_equals_single_pictures():
    w, pictures, text, _ = small_tower(seed=1)
    method = TCA(ratio=0.7, batch_mode="synchronous", anchor_gate="per_class")
    tower = Tower(w, 2, method)
    for picture in pictures[:8]:
        tower(picture.unsqueeze(0), text, 4)
    assert tower.memory.active
    tower.memory.frozen = True
    together = tower(pictures[8:11], text, 4)[1]
    alone = torch.cat([tower(pictures[i : i + 1], text, 4)[1] for i in range(8, 11)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_anchor_is_the_nearest_valid_class():
    memory = Reservoir(2, "per_class")
    for label, value in ((0, [1.0, 0.0]), (0, [1.0, 0.2]), (1, [0.0, 1.0]), (2, [0.0, 1.0]), (2, [0.1, 1.0])):
        memory.add(label, torch.tensor([value, value]), torch.tensor(0.1), None, "fifo", classes=4)
    assert memory.anchored.tolist() == [True, False, True, False]
    found = memory.anchor(torch.tensor([[2.0, 0.1], [0.0, 3.0], [-1.0, -1.0]]), 1)
    torch.testing.assert_close(found[:2], torch.tensor([[1.0, 0.1], [0.05, 1.0]]))
    method = TCA(anchor_gate="per_class")
    view = TokenView(
        torch.zeros(1, 4, 2), Site("vision", 1, "start"), memory=memory, signals={"protected": torch.ones(1, 1, 2)}
    )  # fmt: skip
    assert method.insert(view).shape == (1, 1, 2)
    view.memory = Reservoir(2)
    assert method.insert(view) is None


# ---------------------------------------------------------------------- rules of every method
@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 60),
    ratio=st.floats(0.05, 1.0),
    rate=st.one_of(st.none(), st.floats(0.0, 0.6)),
    centers=st.integers(1, 9),
    fuse=st.booleans(),
    score=st.sampled_from(["attn_mean", "rank"]),
)
def test_count_is_what_reduce_keeps(n, ratio, rate, centers, fuse, score):
    method = TCA(ratio=ratio, drop_rate=rate, centers=centers, fuse=fuse, score=score)
    g = torch.Generator().manual_seed(n)
    view = mid_view(torch.rand(2, 2, n, generator=g), torch.randn(2, n, 5, generator=g))
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert 1 <= reduction.slots <= n
        assert all(len(set(row)) == len(row) for row in reduction.keep.tolist())
        out, size = reduction.apply(view.tokens)
        owner = reduction.assignment(n)
        assert out.isfinite().all()
        torch.testing.assert_close(size.sum(1) + (owner < 0).sum(1), torch.full((2,), float(n)))
        if fuse:
            assert (owner >= 0).all()
    for point in ("start", "end"):
        assert method.count(Counts(Site("vision", 1, point), n, n)) == n


def test_batch_equals_single_rows():
    x, attention = torch.randn(3, 40, 5), torch.rand(3, 2, 40)
    together = TCA(ratio=0.6).reduce(mid_view(attention, x))
    for i in range(3):
        alone = TCA(ratio=0.6).reduce(mid_view(attention[i : i + 1], x[i : i + 1]))
        for name in ("keep", "src", "dst", "keep_weight", "src_weight"):
            torch.testing.assert_close(getattr(together, name)[i : i + 1], getattr(alone, name))


FORMS = [{}, {"score": "rank"}, {"first": 1}, {"fuse": False}]


@pytest.mark.parametrize("form", [*FORMS, {"first": "random"}], ids=str)
def test_runs_on_meta(form):
    method = TCA(ratio=0.6, **form)
    view = mid_view(torch.zeros(2, 2, 40, device="meta"), torch.zeros(2, 40, 5, device="meta"))
    assert method.reduce(view).keep.shape == (2, method.count(view.counts))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_compiles_whole(form):
    method = TCA(ratio=0.6, **form)

    def run(attention, x):
        return method.reduce(mid_view(attention, x)).apply(x)[0]

    attention, x = torch.rand(2, 2, 40), torch.randn(2, 40, 5)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(attention, x), run(attention, x))


def test_without_a_class_token_it_only_condenses():
    with pytest.raises(MissingSignal, match="reservoir_size=0"):
        TCA(reservoir_size=3).sites(layout(prefix=0))
    method = TCA.preset("condense", ratio=0.6)
    for one in (method, TCA(ratio=0.6)):
        assert [(s.layer, s.point, s.needs) for s in one.sites(layout(prefix=0))] == [
            (layer, "mid", ("received_attention",)) for layer in (3, 6, 9)
        ]
        assert one.build(layout(prefix=0)) is None
    assert method.remarks(layout(prefix=0)) == [] == TCA().remarks(layout())
    assert "reservoir_size=0" in TCA().remarks(layout(prefix=0))[0]
    assert TCA().build(layout()).capacity == TCA(reservoir_size=3).build(layout()).capacity == 3
    assert method.build(layout()) is None
    x, received = torch.randn(1, 40, 5), torch.rand(1, 40)
    view = TokenView(x, Site("vision", 3, "mid"), signals={"received_attention": received})
    same = method.reduce(mid_view(received.unsqueeze(1), x))
    assert torch.equal(method.reduce(view).keep, same.keep)


def test_sites():
    def at(method, point, depth=12):
        return [s.layer for s in method.sites(layout(depth=depth)) if s.point == point]

    assert at(TCA(), "mid") == at(TCA(), "start") == [3, 6, 9]
    assert at(TCA(), "end") == list(range(12))
    assert at(TCA(), "mid", 24) == [6, 12, 18]
    assert at(TCA(layers=(3, 6, 9)), "mid", 24) == [3, 6, 9]
    assert at(TCA(layers=(0, -1)), "mid") == [0, 11] and at(TCA(layers=(0, -1)), "start") == [11]
    assert at(TCA(reservoir_size=0), "end") == []
    view = TokenView(torch.zeros(1, 3, 2), Site("vision", 0, "start"), memory=Reservoir(3))
    assert TCA().insert(view) is None


def test_parameters():
    for wrong in (
        {"ratio": 1.5}, {"drop_rate": -0.1}, {"centers": 0}, {"score": "mean"}, {"first": "last"}, {"first": -1},
        {"reservoir_size": -1}, {"policy": "lru"}, {"scale": 0}, {"batch_mode": "views"}, {"update": 2}, {"lambd": -1},
    ):  # fmt: skip
        with pytest.raises(ParameterError):
            TCA(**wrong)
    with pytest.raises(ParameterError):
        TCA.preset("cifar")
    for spec in ("tca", "tca:ratio=0.7:first=(1;2;3):policy=entropy", "tca:drop_rate=0.035:fuse=false"):
        assert str(parse_methods(spec)[0]) == spec
    eurosat = create_method("tca", preset="eurosat")
    assert (eurosat.reservoir_size, eurosat.scale, eurosat.lambd, eurosat.beta) == (2, 5.0, 8.0, 7.0)
    paper = TCA.preset("paper", ratio=0.7)
    assert (paper.score, paper.policy, paper.fuse, paper.ratio) == ("rank", "entropy", False, 0.7)


def test_half_precision_is_scored_in_fp32():
    x, attention = torch.randn(2, 40, 5).bfloat16(), torch.rand(2, 2, 40)
    a = TCA(ratio=0.6).reduce(mid_view(attention, x))
    b = TCA(ratio=0.6).reduce(mid_view(attention, x.float()))
    assert torch.equal(a.keep, b.keep) and torch.equal(a.dst, b.dst)
    assert a.apply(x)[0].dtype == torch.bfloat16
