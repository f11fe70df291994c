"""FastV: the released selection, the released forward, and the rules every method keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import PlainLlama, Run, golden, golden_names, layout, visual_tokens_by_layer

from vlmtok.core.selection import keep_top
from vlmtok.core.site import Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.pruners.fastv import FastV, last_row_score


@pytest.mark.parametrize("name", golden_names("fastv_case*.npz"))
def test_selection_equals_the_release(name):
    data = golden(name)
    s, n = data["image_start"], data["n_image"]
    attention = data["attn_layer_Kminus1"][:, :, -1, s : s + n]
    torch.testing.assert_close(last_row_score(attention)[0], data["image_scores"], atol=1e-6, rtol=0)
    method = FastV(K=data["K"], keep=data["n_keep"])
    view = TokenView(torch.zeros(1, n, 4), Site("decoder", data["K"] - 1, "end"), signals={"last_attention": attention})
    kept = method.reduce(view).keep[0] + s
    inside = data["keep_abs_sorted"]
    assert kept.tolist() == [i for i in inside.tolist() if s <= i < s + n]
    assert kept.tolist() == sorted(data["top_index_by_score"].tolist())


@pytest.mark.parametrize("name", golden_names("fastv_case*.npz"))
def test_whole_forward_equals_the_release(name):
    data = golden(name)
    llama = PlainLlama(data)
    method = FastV(K=data["K"], keep=data["n_keep"])
    run = Run(llama, data["inputs_embeds"][0], data["image_start"], data["n_image"], method)
    length = data["inputs_embeds"].shape[1]
    assert run.plan[-1].tolist() == data["keep_abs_sorted"].tolist()
    assert run.positions[-1].tolist() == run.plan[-1].tolist()  # positions are kept
    assert run.lengths == [length] * data["K"] + [len(run.plan[-1])] * (llama.depth - data["K"])
    expected = data["logits"][0] if data["inplace"] else data["logits"][0][data["keep_abs_sorted"]]
    torch.testing.assert_close(llama.head(run.hidden), expected, atol=1e-4, rtol=0)


def test_ties_go_to_the_lowest_index_and_nan_loses():
    score = torch.tensor([[1.0, 2.0, 2.0, float("nan"), 2.0, 0.0]])
    assert keep_top(score, 2).tolist() == [[1, 2]]
    assert keep_top(score, 5).tolist() == [[0, 1, 2, 4, 5]]
    assert keep_top(torch.zeros(2, 40), 7).tolist() == [list(range(7))] * 2


def test_half_precision_scores_are_compared_in_fp32():
    attention = torch.rand(2, 4, 33, dtype=torch.float16)
    wide = keep_top(last_row_score(attention.float()), 9)
    assert torch.equal(keep_top(last_row_score(attention), 9), wide)


@settings(deadline=None)
@given(n=st.integers(1, 30), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), batch=st.integers(1, 3))
def test_count_is_what_reduce_keeps(n, keep, batch):
    method = FastV(keep=keep)
    view = TokenView(torch.zeros(batch, n, 2), Site("decoder", 1), signals={"last_attention": torch.rand(batch, 2, n)})
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)


def test_batch_equals_single_rows():
    attention = torch.rand(3, 4, 20)

    def one(rows):
        return FastV(keep=6).reduce(TokenView(rows.new_zeros(len(rows), 20, 2), signals={"last_attention": rows})).keep

    assert torch.equal(one(attention), torch.cat([one(attention[i : i + 1]) for i in range(3)]))


def test_sites():
    (site,) = FastV(K=3).sites(layout(32))
    assert (site.layer, site.point, site.positions, FastV.scope) == (2, "end", "keep", "sample")
    with pytest.raises(SiteError, match="layer 4 does not exist"):
        FastV(K=4).sites(layout(4))


def test_published_cost():
    """Image-token MACs of LLaVA-1.5 and LLaVA-NeXT by the formula of the papers' tables (arXiv 2507.20630)."""

    def macs(method, n):
        d, m = 4096, 11008
        cost = sum(4 * k * d * d + 2 * k * k * d + 3 * k * d * m for k in visual_tokens_by_layer(method, 32, n))
        return round(cost / 1e12, 3)

    assert [macs(FastV(K=2, keep=0.5), n) for n in (576, 2880)] == [2.007, 10.554]
    assert [macs(FastV(K=2, keep=0.25), n) for n in (576, 2880)] == [1.118, 5.800]


@pytest.mark.parametrize("bad", [{"K": 0}, {"K": 1.5}, {"keep": 0.0}, {"keep": 1.5}, {"positions": "drop"}])
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="FastV"):
        FastV(**bad)


def test_runs_on_meta_and_compiles():
    site = Site("decoder", 1)

    def choose(attention):
        view = TokenView(attention.new_empty(2, 20, 4), site, signals={"last_attention": attention})
        return FastV(keep=6).reduce(view).keep

    assert choose(torch.empty(2, 4, 20, device="meta")).shape == (2, 6)
    attention = torch.rand(2, 4, 20)
    assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(attention), choose(attention))


def test_spec_string_round_trip():
    (method,) = parse_methods("fastv:K=3:keep=0.25")
    assert (method.K, method.keep) == (3, 0.25) and str(method) == "fastv:K=3:keep=0.25"
