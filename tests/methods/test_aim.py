"""AIM: the released merge, importance and schedule, its published cost, and the rules every method keeps."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import GOLDEN, PlainLlama, Run, golden, golden_names, layout, visual_tokens_by_layer

from vlmtok.core.registry import create_method
from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.mergers.aim import AIM, iterative_merge, merged_count, pagerank_importance, retention

CASES = json.loads((GOLDEN / "aim.json").read_text())
MERGES = [name for name in CASES if name.startswith("aim_merge_")]


def lcg(shape, seed):
    """The portable generator of the reference inputs: x <- (1664525 x + 1013904223) mod 2^32, value x / 2^31 - 1."""
    count, x, values = torch.Size(shape).numel(), seed, []
    for _ in range(count):
        x = (1664525 * x + 1013904223) % 2**32
        values.append(x / 2**31 - 1)
    return torch.tensor(values, dtype=torch.float64).float().reshape(shape)


def input_of(case):
    shape, seed = re.match(r"lcg\(\(([\d,]+)\),(\d+)\)", case["input"]).groups()
    return lcg([int(n) for n in shape.split(",")], int(seed))


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("passes", [1, 2])
def test_merge_equals_the_release(name, passes):
    x = input_of(CASES[name])
    expected = torch.tensor(CASES[name][f"out{passes}"])
    view = TokenView(x, Site("projected"))
    method = AIM(passes=passes)
    reduction = method.reduce(view)
    torch.testing.assert_close(reduction.apply(x)[0], expected, atol=1e-5, rtol=0)
    assert reduction.slots == method.count(view.counts) == expected.shape[1]


@pytest.mark.parametrize("above", [float("-inf"), -torch.finfo(torch.float32).max])
def test_importance_equals_the_release(above):
    case = CASES["aim_importance"]
    logits = input_of(case).masked_fill(torch.ones(6, 6).triu(1).bool(), above)
    plain = pagerank_importance(logits, case["tau"], case["iters"], case["d"])
    torch.testing.assert_close(plain, torch.tensor(case["out"]), atol=1e-5, rtol=0)
    damped = pagerank_importance(logits, case["tau"], case["iters"], 0.1)
    torch.testing.assert_close(damped, torch.tensor(CASES["aim_importance_d0.1"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(pagerank_importance(logits), plain)  # the defaults are the release's


def test_schedule_equals_the_release():
    assert retention(28, 14, 21) == CASES["aim_retain_28"]
    assert retention(32, 13, 20) == CASES["aim_retain_32_vicuna"]
    for method, name in ((AIM(passes=0), "aim_retain_28"), (AIM.preset("vicuna", passes=0), "aim_retain_32_vicuna")):
        shares = CASES[name]
        assert visual_tokens_by_layer(method, len(shares), 1001) == [int(1001 * share) for share in shares]


def test_published_cost():
    """LLaVA-OneVision-7B, 32 frames of 196 tokens and 100 text tokens: 99.46, 22.89 and 14.75 TFLOPs.

    Two FLOPs a multiply-add, full attention; softmax, norms and activations, which the paper's tool adds (99.63 and
    14.76), are left out.
    """
    d, kv, m = 3584, 512, 18944

    def cost(visual):
        rows = [n + 100 for n in visual]
        return sum(2 * (2 * n * d * d + 2 * n * d * kv + 3 * n * d * m) + 4 * n * n * d for n in rows) / 1e12

    entered = 32 * AIM().count(Counts(Site("projected"), 196, 196))
    assert entered == 32 * 49
    assert cost([32 * 196] * 28) == pytest.approx(99.456, abs=1e-3)
    assert cost([entered] * 28) == pytest.approx(22.885, abs=1e-3)
    assert cost(visual_tokens_by_layer(AIM(passes=0), 28, entered)) == pytest.approx(14.748, abs=1e-3)


# ---------------------------------------------------------------------- merging
def merged_by_loops(x, passes):
    """The merge of one row, written out."""
    n = len(x)
    for i in range(1, passes + 1):
        r = min(n >> i, len(x) // 2)
        if r == 0:
            break
        even, odd = x[0::2], x[1::2]
        unit = x / x.norm(dim=1, keepdim=True)
        similarity = unit[0::2] @ unit[1::2].T
        best, partner = similarity.max(1)
        order = sorted(range(len(even)), key=lambda a: -best[a].item())
        out = []
        for j in range(len(odd)):
            joining = [even[a] for a in order[:r] if partner[a] == j]
            out.append(torch.stack([odd[j], *joining]).mean(0))
        x = torch.stack([even[a] for a in order[r:]] + out)
    return x


@settings(deadline=None)
@given(n=st.integers(1, 40), passes=st.integers(1, 4), seed=st.integers(0, 99))
def test_merge_equals_plain_loops(n, passes, seed):
    x = torch.randn(2, n, 5, generator=torch.Generator().manual_seed(seed))
    plan = iterative_merge(x, passes)
    if plan is None:
        assert n == 1 and merged_count(n, passes) == 1
        return
    assert plan.slots == merged_count(n, passes)
    expected = torch.stack([merged_by_loops(row, passes) for row in x])
    torch.testing.assert_close(plan.apply(x)[0], expected, atol=1e-5, rtol=0)
    sizes = plan.apply(x)[1]
    assert sizes.sum(1).tolist() == [n, n] and (plan.assignment(n) >= 0).all()


def test_sizes_do_not_weigh():
    x = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(0))
    with_sizes = iterative_merge(x).apply(x, torch.tensor([[1.0, 9, 2, 7, 3, 5, 8, 4]]))[0]
    torch.testing.assert_close(with_sizes, iterative_merge(x).apply(x)[0])


# ---------------------------------------------------------------------- pruning
def decoder_view(n, layer, entered=None, depth=28, prefix=3, suffix=4, batch=2):
    length = prefix + n + suffix
    logits = torch.randn(batch, 2, length, length, generator=torch.Generator().manual_seed(n))
    logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return TokenView(
        torch.zeros(batch, n, 2),
        Site("decoder", layer, "end"),
        depth=depth,
        entered=entered,
        columns=torch.arange(prefix, prefix + n).expand(batch, n),
        signals={"attention_logits": logits},
    )


def test_keeps_the_most_important_visual_tokens_in_order():
    view = decoder_view(8, 15)
    reduction = AIM().reduce(view)
    importance = pagerank_importance(view.signal("attention_logits"))[:, 3:11]
    assert reduction.keep.tolist() == importance.topk(5).indices.sort().values.tolist()


def test_damping_weakens_the_preference_for_early_tokens():
    logits = torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    first = [pagerank_importance(logits, damping=d)[0, 0].item() for d in (0.0, 0.2, 1.0)]
    assert first == sorted(first, reverse=True) and first[-1] == pytest.approx(1 / 12)


def test_last_site_leaves_no_visual_token():
    sites = AIM().sites(layout(28))
    last = sites[-1]
    assert (last.layer, last.needs) == (20, ())
    view = TokenView(torch.zeros(2, 5, 3), last, depth=28, entered=40)
    reduction = AIM().reduce(view)
    assert reduction.slots == AIM().count(view.counts) == 0
    assert reduction.apply(view.tokens)[0].shape == (2, 0, 3)
    assert reduction.assignment(5).tolist() == [[-1] * 5] * 2


def test_equals_masking_at_kept_positions():
    """Dropping rows and keeping positions is what the release's masks compute."""
    data = golden(golden_names("transprune_e2e_case*.npz")[0])
    llama = PlainLlama(data)
    run = Run(llama, data["inputs_embeds"][0], data["image_start"], data["n_image"], AIM(passes=0, first=2, last=5))
    n, text = data["n_image"], data["inputs_embeds"].shape[1] - data["n_image"]
    assert [length - text for length in run.lengths] == [n, n, n * 3 // 4, n // 2, n // 4, 0]
    h = data["inputs_embeds"][0]
    everything = torch.arange(len(h))
    for layer in range(llama.depth):
        gone = set(range(len(h))) - set(run.plan[layer].tolist())
        h, _, _ = llama.layer(layer, h, everything, hidden=sorted(gone))
    torch.testing.assert_close(run.hidden, h[run.plan[-1]], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- rules
def test_sites():
    sites = AIM().sites(layout(28))
    assert (sites[0].stage, sites[0].scope) == ("projected", "part")
    assert [site.layer for site in sites[1:]] == list(range(13, 21))
    assert {(site.point, site.positions) for site in sites[1:]} == {("end", "keep")} and AIM.scope == "sample"
    assert [site.stage for site in AIM(prune=False).sites(layout(28))] == ["projected"]
    assert {site.stage for site in AIM(passes=0).sites(layout(28))} == {"decoder"}
    assert [site.layer for site in create_method("aim", preset="vicuna", passes=0).sites(layout(32))] == list(
        range(12, 20)
    )
    with pytest.raises(SiteError, match="layer 28 does not exist"):
        AIM(last=28).sites(layout(28))
    with pytest.raises(SiteError, match="last=3 lies before first=14"):
        AIM(last=3).sites(layout(28))


@settings(deadline=None)
@given(n=st.integers(0, 30), before=st.integers(0, 30), layer=st.integers(0, 26), depth=st.sampled_from((28, 27)))
def test_count_is_what_reduce_keeps(n, before, layer, depth):
    view = decoder_view(n, layer, n + before, depth)
    reduction = AIM().reduce(view)
    assert AIM().count(view.counts) == (n if reduction is None else reduction.slots)


@settings(deadline=None)
@given(n=st.integers(1, 50), passes=st.integers(0, 6))
def test_merge_count_is_what_reduce_keeps(n, passes):
    view = TokenView(torch.randn(1, n, 3), Site("projected"))
    reduction = AIM(passes=passes).reduce(view)
    assert AIM(passes=passes).count(view.counts) == (n if reduction is None else reduction.slots)


def test_batch_equals_single_rows():
    x = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    whole = iterative_merge(x)
    for b in range(3):
        one = iterative_merge(x[b : b + 1])
        assert torch.equal(whole.keep[b : b + 1], one.keep) and torch.equal(whole.src[b : b + 1], one.src)
    logits = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([pagerank_importance(logits[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(pagerank_importance(logits), rows)


@pytest.mark.parametrize(
    "bad",
    [
        {"passes": -1},
        {"passes": 0, "prune": False},
        {"prune": "yes"},
        {"first": 0},
        {"first": 9, "last": 8},
        {"tau": 0.0},
        {"iterations": 0},
        {"damping": 1.5},
        {"positions": "some"},
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="AIM"):
        AIM(**bad)


def test_unknown_preset():
    with pytest.raises(ParameterError, match="preset='llava'"):
        AIM.preset("llava")


def test_runs_on_meta_and_compiles():
    sites = Site("projected"), Site("decoder", 15, "end")

    def choose(x, logits):
        merge = AIM().reduce(TokenView(x, sites[0]))
        signals = {"attention_logits": logits}
        prune = AIM().reduce(TokenView(x, sites[1], depth=28, signals=signals))
        return merge.keep, merge.src, merge.dst, prune.keep

    meta = choose(torch.empty(2, 16, 4, device="meta"), torch.empty(2, 2, 20, 20, device="meta"))
    assert (meta[0].shape, meta[3].shape) == ((2, 4), (2, 10))
    real = torch.randn(2, 16, 4), torch.randn(2, 2, 20, 20)
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*real), choose(*real)))


def test_spec_string_round_trip():
    (method,) = parse_methods("aim:passes=1:damping=0.1")
    assert (method.passes, method.damping) == (1, 0.1) and str(method) == "aim:passes=1:damping=0.1"
