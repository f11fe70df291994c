"""TransPrune: the released scores and cuts, what the release cannot do, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
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

from vlmtok import kernels
from vlmtok.core.site import Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.pruners.transprune import TransPrune, combined_score, instruction_attention, transition_variation


def transitions(data):
    """[B, 2, 2, L] from the modules' inputs and outputs."""
    pairs = [(data["attn_in"], data["attn_out"]), (data["ffn_in"], data["ffn_out"])]
    stats = [torch.stack([y.norm(dim=-1) / x.norm(dim=-1), F.cosine_similarity(x, y, dim=-1)], 1) for x, y in pairs]
    return torch.stack(stats, 1)


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize("name", golden_names("transprune_ttv_case*.npz"))
def test_transition_variation_equals_the_release(name):
    data = golden(name)
    found = transition_variation(transitions(data))
    assert data["attn_in"].shape[0] == 1  # the release mixes the rows of a batch
    torch.testing.assert_close(found[:, 0], data["ttv_attn"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[:, 1], data["ttv_ffn"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), data["ttv_layer"], atol=1e-6, rtol=1e-5)
    paper = transition_variation(transitions(data), "paper").sum(1)
    torch.testing.assert_close(paper, data["paper_abs_ttv_layer"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", golden_names("transprune_ttv_case*.npz"))
def test_the_kernel_gives_the_same_transitions(name):
    data = golden(name)
    for i, module in enumerate(("attn", "ffn")):
        stats = kernels.transition_stats(data[f"{module}_in"], data[f"{module}_out"])
        torch.testing.assert_close(torch.stack(stats, 1), transitions(data)[:, i], atol=1e-6, rtol=1e-5)


def stage_view(data, layer):
    s, n = data["image_start"], data["n_image_cur"]
    x = rms_norm(data["hidden"], data["ln_weight"], data["rms_eps"])
    weights = data["q_weight"], data["k_weight"]
    logits = causal_logits(x, *weights, data["position_ids"][0], data["num_heads"], data["rope_theta"])
    return TokenView(
        data["hidden_batch1"][:, s : s + n],
        Site("decoder", layer, "start"),
        entered=data["n_image_orig"],
        columns=torch.arange(s, s + n)[None],
        signals=signals_of(logits, s, n),
        state={"variation": data["ttv_layers"].sum(0)[None, s : s + n]},
    )


@pytest.mark.parametrize("name", golden_names("transprune_stage_case*.npz"))
def test_a_stage_equals_the_release(name):
    data = golden(name)
    s, n = data["image_start"], data["n_image_cur"]
    ratios = tuple(data["ratios"].tolist()[1:])
    layers = (7, 9, 12)[: len(ratios)]
    method = TransPrune(ratios=ratios, layers=layers)
    view = stage_view(data, layers[data["stage"]])
    rows = view.signal("text_attention")
    torch.testing.assert_close(rows.mean(1)[0], data["iga_rows_headmean"], atol=1e-6, rtol=0)
    attention, variation = instruction_attention(rows)[0], view.state["variation"][0]
    torch.testing.assert_close(attention / (attention.sum() + 1e-8), data["iga_norm"], atol=1e-6, rtol=0)
    torch.testing.assert_close(variation / (variation.sum() + 1e-8), data["ttv_norm"], atol=1e-6, rtol=0)
    score = 2 * combined_score(variation, attention)
    torch.testing.assert_close(score, data["score"], atol=1e-6, rtol=0)
    reduction = method.reduce(view)
    assert reduction.keep[0].tolist() == data["keep_rel_sorted"].tolist()
    assert (reduction.keep[0] + s).tolist() == [i for i in data["keep_abs_sorted"].tolist() if s <= i < s + n]
    assert method.count(view.counts) == reduction.slots == data["keep_count"]
    hidden = data["hidden"]
    whole = torch.cat([hidden[:s], reduction.apply(view.tokens)[0][0], hidden[s + n :]])
    torch.testing.assert_close(whole, data["out_hidden"][0], atol=1e-5, rtol=0)
    # Gathering the sum equals gathering every layer's value.
    carried = reduction.gather(view.state["variation"])[0]
    kept = data["out_ttv_layers"].sum(0)[s : s + reduction.slots]
    torch.testing.assert_close(carried, kept, atol=1e-6, rtol=0)


def test_published_cost():
    """Image-token MACs by the formula of the paper's tables (arXiv 2507.20630), its layer ablation included."""

    def macs(n=576, **settings):
        d, m = 4096, 11008
        counts = visual_tokens_by_layer(TransPrune(**settings), 32, n)
        return sum(4 * k * d * d + 2 * k * k * d + 3 * k * d * m for k in counts) / 1e12

    assert visual_tokens_by_layer(TransPrune(), 32, 576) == [576] * 7 + [504] * 2 + [360] * 3 + [72] * 20
    assert macs() == pytest.approx(1.557, abs=5e-4)
    assert macs(2880) == pytest.approx(8.330, abs=1e-3)
    ablation = {(5, 7, 10): 1.348, (6, 8, 11): 1.453, (8, 10, 13): 1.662, (9, 11, 14): 1.767}
    for layers, cost in ablation.items():
        assert macs(layers=layers) == pytest.approx(cost, abs=1e-3)


# ---------------------------------------------------------------------- sites and state
def test_sites():
    sites = TransPrune().sites(layout(32))
    looks = [site.layer for site in sites if site.point == "end"]
    cuts = [(site.layer, site.positions) for site in sites if site.point == "start"]
    assert looks == [6, 7, 8, 9, 10, 11]
    assert cuts == [(7, "renumber"), (9, "renumber"), (12, "renumber")]
    assert TransPrune.scope == "sample"
    with pytest.raises(SiteError, match="layer 12 does not exist"):
        TransPrune().sites(layout(12))


def test_single_criteria_ask_for_what_they_use():
    only_transition = TransPrune(alpha=1.0).sites(layout(32))
    assert {name for site in only_transition for name in site.needs} == {"transition"}
    only_attention = TransPrune(alpha=0.0).sites(layout(32))
    assert all(site.point == "start" for site in only_attention)
    assert {name for site in only_attention for name in site.needs} == {"text_attention", "last_attention"}


def observed(method, layers, n=6, length=10, start=2, seed=0):
    """Looks at some layers without a cut between them; the transitions and the state."""
    generator = torch.Generator().manual_seed(seed)
    rows, state = [], {}
    for layer in layers:
        row = torch.rand(1, 2, 2, length, generator=generator)
        site = Site("decoder", layer, "end")
        columns = torch.arange(start, start + n)[None]
        view = TokenView(torch.zeros(1, n, 2), site, columns=columns, signals={"transition": row}, state=state)
        assert method.reduce(view) is None and method.count(view.counts) == n
        rows.append(row)
    return rows, state


def test_accumulates_over_layers():
    rows, state = observed(TransPrune(), (6, 7))
    whole = 0.0
    for row in rows:
        for module in (0, 1):
            ratio, cosine = row[0, module]
            whole = whole + ratio * torch.exp(1 - cosine) / torch.exp(1 - cosine).sum()
    torch.testing.assert_close(state["variation"][0], whole[2:8])


def cut(variation, text=None, last=None, layer=7):
    n = variation.shape[1]
    signals = {"text_attention": text, "last_attention": last}
    site = Site("decoder", layer, "start")
    return TokenView(torch.zeros(len(variation), n, 2), site, signals=signals, state={"variation": variation})


def test_alpha_one_and_zero_are_the_single_criteria():
    variation = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    text = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(1, 2, 3, 4)
    half = {"ratios": (0.5,), "layers": (7,)}
    assert TransPrune(alpha=1.0, **half).reduce(cut(variation, text)).keep.tolist() == [[2, 3]]
    assert TransPrune(alpha=0.0, **half).reduce(cut(variation, text)).keep.tolist() == [[0, 1]]
    # 0.7 (1 2 3 4) / 10 + 0.3 (4 3 2 1) / 10 rises, 0.3 and 0.7 the other way round falls
    assert TransPrune(alpha=0.7, **half).reduce(cut(variation, text)).keep.tolist() == [[2, 3]]
    assert TransPrune(alpha=0.3, **half).reduce(cut(variation, text)).keep.tolist() == [[0, 1]]


def test_each_criterion_counts_by_its_share():
    """Scaling one criterion changes nothing."""
    generator = torch.Generator().manual_seed(0)
    variation, text = torch.rand(1, 20, generator=generator), torch.rand(1, 2, 3, 20, generator=generator)
    once = TransPrune().reduce(cut(variation, text)).keep
    assert torch.equal(TransPrune().reduce(cut(1000 * variation, text)).keep, once)


@pytest.mark.parametrize("text", [None, torch.zeros(1, 2, 0, 4)])
def test_prompt_that_ends_with_the_picture(text):
    half = {"ratios": (0.5,), "layers": (7,)}
    variation = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    last = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 2, 4)
    assert TransPrune(**half).reduce(cut(variation, text, last)).keep.tolist() == [[0, 2]]
    assert TransPrune(alpha=0.0, **half).reduce(cut(variation, text, last)).keep.tolist() == [[1, 3]]


def test_cut_without_an_observed_layer_says_so():
    view = TokenView(
        torch.zeros(1, 4, 2), Site("decoder", 7, "start"), signals={"text_attention": torch.rand(1, 2, 3, 4)}
    )
    with pytest.raises(MissingSignal, match="observed no layer before decoder layer 7 start"):
        TransPrune().reduce(view)


# ---------------------------------------------------------------------- rules
def test_ties_and_nan():
    text = torch.ones(1, 2, 3, 6)
    variation = torch.ones(1, 6)
    variation[0, 1] = float("nan")
    method = TransPrune(ratios=(0.5,), layers=(7,))
    assert method.reduce(cut(variation, text)).keep.tolist() == [[0, 2, 3]]


def test_a_token_that_is_not_a_number_spoils_only_itself():
    row = torch.rand(1, 2, 8)
    row[0, :, 3] = float("nan")
    found = transition_variation(row)[0]
    others = [i for i in range(8) if i != 3]
    torch.testing.assert_close(found[others], transition_variation(row[:, :, others])[0])
    assert found[3].isnan()


def test_batch_equals_single_rows():
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(3, 2, 2, 16, generator=generator)
    text = torch.rand(3, 2, 4, 12, generator=generator)

    def both(part):
        state = {}
        columns = torch.arange(2, 14).expand(len(row[part]), 12)
        look = TokenView(
            torch.zeros(len(row[part]), 12, 2),
            Site("decoder", 6, "end"),
            columns=columns,
            signals={"transition": row[part]},
            state=state,
        )
        TransPrune().reduce(look)
        return TransPrune().reduce(cut(state["variation"], text[part])).keep

    assert torch.equal(both(slice(0, 3)), torch.cat([both(slice(i, i + 1)) for i in range(3)]))


@settings(deadline=None)
@given(
    n=st.integers(1, 40),
    before=st.integers(0, 40),
    layer=st.sampled_from((7, 9, 12, 8)),
    ratio=st.floats(0.01, 1.0),
    alpha=st.sampled_from((0.0, 0.5, 1.0)),
    rows=st.integers(0, 2),
)
def test_count_is_what_reduce_keeps(n, before, layer, ratio, alpha, rows):
    method = TransPrune(alpha=alpha, ratios=(ratio, ratio, ratio / 2))
    view = TokenView(
        torch.zeros(2, n, 2),
        Site("decoder", layer, "start"),
        entered=n + before,
        signals={"text_attention": torch.rand(2, 2, rows, n), "last_attention": torch.rand(2, 2, n)},
        state={"variation": torch.rand(2, n)},
    )
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 1.5},
        {"ratios": (0.5, 0.75, 0.1)},
        {"ratios": (0.5, 0.25)},
        {"layers": (0, 9, 12)},
        {"layers": (7, 7, 12)},
        {"layers": None},
        {"accumulate": (7, 8)},
        {"accumulate": ()},
        {"accumulate": 6},
        {"accumulate": (8, 6)},
        {"direction": "code"},
        {"positions": "some"},
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="TransPrune"):
        TransPrune(**bad)


def test_runs_on_meta_and_compiles():
    def choose(row, text):
        state = {}
        look = TokenView(
            row.new_empty(2, 12, 4), Site("decoder", 6, "end"), signals={"transition": row}, num_prefix=2, state=state
        )
        TransPrune().reduce(look)
        return TransPrune().reduce(cut(state["variation"].to(row.device), text)).keep

    meta = torch.empty(2, 2, 2, 16, device="meta"), torch.empty(2, 4, 3, 12, device="meta")
    assert choose(*meta).shape == (2, 10)
    real = torch.rand(2, 2, 2, 16), torch.rand(2, 4, 3, 12)
    assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(*real), choose(*real))


def test_spec_string_round_trip():
    (method,) = parse_methods("transprune:alpha=0.4:layers=(5;7;10)")
    assert (method.alpha, method.layers) == (0.4, (5, 7, 10))
    assert str(method) == "transprune:alpha=0.4:layers=(5;7;10)"
    assert parse_methods("transprune")[0].settings() == TransPrune().settings()
