"""PyramidDrop: the released selection and schedule, and the rules every method keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import (
    causal_logits,
    golden,
    golden_names,
    layout,
    rms_norm,
    signals_of,
    visual_tokens_by_layer,
)

from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.pruners.fastv import last_row_score
from vlmtok.pruners.pyramiddrop import PyramidDrop, share_of_entered


def view_of(data, layer):
    s, n = data["image_start"], data["n_image_cur"]
    x = rms_norm(data["hidden"].reshape(-1, data["hidden"].shape[-1]), data["ln_weight"], data["rms_eps"])
    weights = data["q_weight"], data["k_weight"]
    logits = causal_logits(x, *weights, data["position_ids"][0], data["num_heads"], data["rope_theta"])
    return TokenView(
        data["hidden"].reshape(1, len(x), -1)[:, s : s + n],
        Site("decoder", layer, "start"),
        depth=32,
        entered=data["n_image_orig"],
        columns=torch.arange(s, s + n)[None],
        signals=signals_of(logits, s, n),
    )


@pytest.mark.parametrize("name", golden_names("pyramiddrop_case*.npz"))
def test_a_stage_equals_the_release(name):
    data = golden(name)
    s, n = data["image_start"], data["n_image_cur"]
    method = PyramidDrop(ratios=tuple(data["ratios"].tolist()[1:]))
    view = view_of(data, 8 * (data["stage"] + 1))
    score = last_row_score(view.signal("last_attention"))[0]
    torch.testing.assert_close(score, data["score"], atol=1e-6, rtol=0)
    reduction = method.reduce(view)
    assert (reduction.keep[0] + s).tolist() == data["keep_abs_sorted"].tolist()
    assert method.count(view.counts) == data["keep_count"]
    hidden = data["hidden"][0]
    whole = torch.cat([hidden[:s], reduction.apply(view.tokens)[0][0], hidden[s + n :]])
    torch.testing.assert_close(whole, data["out_hidden"][0], atol=1e-5, rtol=0)


def test_default_stages():
    def cuts(depth):
        return [(site.layer, site.point) for site in PyramidDrop().sites(layout(depth))]

    assert cuts(32) == [(8, "start"), (16, "start"), (24, "start")]
    assert cuts(28) == [(7, "start"), (14, "start"), (21, "start")]
    assert cuts(2) == [(1, "start")]  # stages of one layer are one
    assert PyramidDrop().count(Counts(Site("decoder", 1, "start"), 64, 64, 0, 2)) == 8
    with pytest.raises(SiteError, match="layer 1 does not exist"):
        cuts(1)
    with pytest.raises(SiteError, match="layer 30 does not exist"):
        PyramidDrop(layers=(8, 16, 30)).sites(layout(24))
    assert {site.positions for site in PyramidDrop().sites(layout(32))} == {"renumber"}


def test_shares_are_of_what_entered_and_rounded_down():
    def count(n, entered, ratio):
        return share_of_entered(Counts(Site("decoder", 8, "start"), n, entered, 0, 32), ratio)

    assert (count(100, 100, 0.125), count(28, 57, 0.25), count(10, 100, 0.5), count(5, 5, 0.125)) == (12, 14, 10, 1)


def test_published_cost():
    """Image-token MACs of LLaVA-1.5 and LLaVA-NeXT by the formula of the papers' tables (arXiv 2507.20630)."""

    def macs(n):
        d, m = 4096, 11008
        cost = sum(4 * k * d * d + 2 * k * k * d + 3 * k * d * m for k in visual_tokens_by_layer(PyramidDrop(), 32, n))
        return cost / 1e12

    assert macs(576) == pytest.approx(1.777, abs=5e-4)
    assert macs(2880) == pytest.approx(9.465, abs=1e-3)


@settings(deadline=None)
@given(n=st.integers(1, 40), before=st.integers(0, 40), stage=st.integers(0, 3), ratio=st.floats(0.01, 1.0))
def test_count_is_what_reduce_keeps(n, before, stage, ratio):
    method = PyramidDrop(layers=(3, 5, 9), ratios=(ratio, ratio, ratio / 2))
    layer = (3, 5, 9, 4)[stage]
    signals = {"last_attention": torch.rand(2, 2, n)}
    view = TokenView(torch.zeros(2, n, 2), Site("decoder", layer, "start"), entered=n + before, signals=signals)
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    assert reduction is None or layer != 4


@pytest.mark.parametrize(
    "bad",
    [
        {"ratios": ()},
        {"ratios": (0.5, 0.75)},
        {"ratios": (0.5, 0.0)},
        {"ratios": 0.5},
        {"layers": (8, 16)},
        {"layers": (0, 8, 16)},
        {"layers": (8, 8, 16)},
        {"layers": (16, 8, 24)},
        {"layers": 8},
        {"positions": "some"},
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="PyramidDrop"):
        PyramidDrop(**bad)


def test_runs_on_meta_and_compiles():
    site = Site("decoder", 8, "start")

    def choose(attention):
        view = TokenView(attention.new_empty(2, 20, 4), site, depth=32, signals={"last_attention": attention})
        return PyramidDrop().reduce(view).keep

    assert choose(torch.empty(2, 4, 20, device="meta")).shape == (2, 10)
    attention = torch.rand(2, 4, 20)
    assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(attention), choose(attention))


def test_spec_string_round_trip():
    (method,) = parse_methods("pyramiddrop:layers=(4;9):ratios=(0.5;0.1)")
    assert str(method) == "pyramiddrop:layers=(4;9):ratios=(0.5;0.1)"
