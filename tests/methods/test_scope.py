"""SCOPE: the released choice, plain loops, and the rules every method keeps."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.pruners.scope import SCOPE, saliency_coverage

NAME = "cls_attention@vision:feature"


def view(x, attention, name=NAME):
    return TokenView(x, Site("features"), signals={name: attention})


@pytest.mark.parametrize("name", golden_names("scope_*.npz"))
def test_choice_equals_the_release(name):
    data = golden(name)
    order = saliency_coverage(data["x"], data["k"], data["cls_attn"], data["alpha"])
    assert torch.equal(order, data["order"])
    heads = data["cls_attn"].unsqueeze(1) * torch.tensor([0.5, 0.25, 0.25])[:, None]
    reduction = SCOPE(keep=data["k"], alpha=data["alpha"]).reduce(view(data["x"], heads))
    if data["k"] == data["x"].shape[1]:
        assert reduction is None
    else:
        assert torch.equal(reduction.keep, data["keep_sorted"])


def replay(x, order, a, alpha):
    """Scores of the tokens chosen, the best scores there were, and gains, in plain loops and float64."""
    unit = F.normalize(x.double(), dim=-1)
    s = (unit @ unit.T).tolist()
    n, cover, taken, best, gains = len(x), [0.0] * len(x), [], [], []
    for t, pick in enumerate(order):
        gain = [sum(max(0.0, s[i][j] - cover[i]) for i in range(n)) for j in range(n)]
        score = [gain[j] * a[j].item() ** alpha for j in range(n)]
        taken.append(score[pick])
        best.append(max(score[j] for j in range(n) if j not in order[:t]))
        gains.append(gain[pick])
        cover = [max(cover[i], s[i][pick]) for i in range(n)]
    return taken, best, gains


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 16), k=st.integers(1, 16), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=st.integers(0, 99))
def test_every_step_is_the_best_by_plain_loops(n, k, alpha, seed):
    g = torch.Generator().manual_seed(seed)
    x, a = torch.randn(1, n, 5, generator=g), torch.rand(1, n, generator=g) + 0.01
    order = saliency_coverage(x, min(k, n), a, alpha)[0].tolist()
    taken, best, gains = replay(x[0], order, a[0], alpha)
    assert len(set(order)) == len(order)
    assert taken == pytest.approx(best, abs=1e-5)
    if alpha == 0:
        assert all(late <= early + 1e-5 for early, late in pairwise(gains))  # coverage is submodular


def test_alpha_weighs_saliency():
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(1, 30, 8, generator=g), torch.rand(1, 30, generator=g)
    strong = saliency_coverage(x, 8, a, 30.0)
    assert sorted(strong[0].tolist()) == sorted(a[0].argsort(descending=True)[:8].tolist())
    assert torch.equal(saliency_coverage(x, 8, torch.ones(1, 30)), saliency_coverage(x, 8, a, 0.0))
    assert torch.equal(saliency_coverage(x, 8, 7.0 * a), saliency_coverage(x, 8, a))


def test_ties_zero_and_nan_tokens():
    x = torch.eye(3)[[0, 1, 2, 0, 1, 2]].unsqueeze(0)
    assert saliency_coverage(x, 6, torch.ones(1, 6))[0].tolist() == [0, 1, 2, 3, 4, 5]
    x = torch.randn(1, 10, 4)
    x[0, 2], x[0, 6] = 0.0, float("nan")
    a = torch.rand(1, 10) + 0.1
    order = saliency_coverage(x, 10, a)[0].tolist()
    assert order[-2:] == [2, 6] and sorted(order) == list(range(10))
    a[0, 4] = float("nan")
    assert set(saliency_coverage(x, 10, a)[0, -2:].tolist()) == {4, 6}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)))
def test_count_is_what_reduce_keeps(n, keep):
    method = SCOPE(keep=keep)
    seen = view(torch.randn(2, n, 4), torch.rand(2, 3, n))
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert (reduction.keep.diff(dim=1) > 0).all()


def test_batch_equals_single_rows():
    x, a = torch.randn(3, 25, 6), torch.rand(3, 25)
    together = saliency_coverage(x, 9, a)
    assert torch.equal(torch.cat([saliency_coverage(x[i : i + 1], 9, a[i : i + 1]) for i in range(3)]), together)
    assert torch.equal(saliency_coverage(x, 4, a), together[:, :4])


def test_half_precision_autocast_meta_and_compiled():
    x, a = torch.randn(2, 20, 8).bfloat16(), torch.rand(2, 3, 20)
    method = SCOPE(keep=6)

    def choice(x, a):
        return method.reduce(view(x, a)).keep

    expected = choice(x.float(), a)
    assert torch.equal(choice(x, a), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choice(x.float(), a), expected)
    assert choice(x.to("meta"), a.to("meta")).shape == (2, 6)
    assert torch.equal(torch.compile(choice, fullgraph=True, backend="eager")(x, a), expected)


def test_sites_and_parameters():
    def layout(prefix):
        return Layout(
            "by hand",
            {"vision": StageLayout(4, 8, 2, 2, provides=tower_signals(prefix)), "features": StageLayout(1, 8, 0, 0)},
        )

    assert SCOPE().sites(layout(1)) == [Site("features", needs=(NAME,))]
    name = "received_attention@vision:feature"
    assert SCOPE().sites(layout(0)) == [Site("features", needs=(name,))]
    spread = dict(layout(1).stages, projected=StageLayout(1, 8, 0, 0))
    assert SCOPE().sites(Layout("both", spread)) == [Site("features", needs=(NAME,))]
    del spread["features"]
    packed = Layout("packed crops", spread)
    assert SCOPE().sites(packed) == [Site("projected", needs=(NAME,), separators="drop")]
    assert SCOPE(separators="keep").sites(packed) == [Site("projected", needs=(NAME,))]
    assert "projected" in SCOPE().remarks(packed)[0] and SCOPE().remarks(layout(1)) == []
    spread["vision"] = replace(spread["vision"], carries=frozenset({"keys"}))
    for stages in (spread, {"projected": spread["projected"]}):
        with pytest.raises(SiteError, match="features"):
            SCOPE().sites(Layout("neither", stages))
    x, received = torch.randn(2, 12, 4), torch.rand(2, 12)
    assert torch.equal(
        SCOPE(keep=4).reduce(view(x, received, name)).keep, SCOPE(keep=4).reduce(view(x, received.unsqueeze(1))).keep
    )
    for wrong in ({"keep": 0}, {"alpha": -1}, {"alpha": "1"}, {"separators": "none"}):
        with pytest.raises(ParameterError):
            SCOPE(**wrong)
    for spec in ("scope", "scope:keep=64:alpha=0.5", "scope:separators=keep"):
        assert str(parse_methods(spec)[0]) == spec
