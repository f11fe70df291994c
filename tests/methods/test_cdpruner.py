"""CDPruner: the released choice, brute force, its edges done right, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.cdpruner import CDPruner, dpp_map, instruction_relevance, scale_relevance


def view(x, **more):
    return TokenView(x, Site("projected"), **more)


def kept(data, **settings):
    """What the method keeps of a reference file, as a mask."""
    relevance = instruction_relevance(data["image_embeds"], data["text_embeds"])
    method = CDPruner(keep=data["k"], **settings)
    reduction = method.reduce(view(data["features"], signals={"relevance": relevance}))
    if reduction is None:
        return torch.ones(data["features"].shape[:2], dtype=torch.bool)
    return torch.zeros(data["features"].shape[:2], dtype=torch.bool).scatter(1, reduction.keep, True)


@pytest.mark.parametrize("name", golden_names("cdpruner_[a-w]_*.npz"))
def test_choice_equals_the_release(name):
    data = golden(name)
    # The release couples the rows of a batch; alone, each is what it gives for one row.
    assert data["features"].shape[0] == 1 or "index_mask_solo" in data
    assert torch.equal(kept(data), data["index_mask"])


def test_rows_do_not_depend_on_each_other():
    data = golden("cdpruner_x_batch_coupling_b3.npz")
    assert torch.equal(kept(data), data["index_mask_solo"])
    assert not torch.equal(data["index_mask"], data["index_mask_solo"])


def test_edges_where_the_release_keeps_too_few():
    for name in golden_names("cdpruner_x_edge_*.npz"):
        data = golden(name)
        assert kept(data).sum() == data["k"] > data["index_mask"].sum()


def test_constant_relevance_leaves_diversity_alone():
    data = golden("cdpruner_x_edge_constant_relevance.npz")
    plain = CDPruner(keep=data["k"]).reduce(view(data["features"])).keep
    assert torch.equal(kept(data)[0].nonzero().flatten(), plain[0])


def test_tokens_that_are_equally_relevant_tie_whatever_their_length():
    torch.manual_seed(0)
    x = torch.randn(6, 16, 32)
    for scale in (1.0, 7.3, 1e-3):
        assert dpp_map(x * scale, 1).tolist() == [[0]] * 6
        assert dpp_map(x * scale, 1, torch.full((6, 16), 0.7)).tolist() == [[0]] * 6


def log_det(x, relevance, chosen):
    unit = F.normalize(x.double(), dim=-1)[list(chosen)]
    r = relevance.double()[list(chosen)]
    return torch.logdet(r[:, None] * (unit @ unit.T) * r).item()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 12), k=st.integers(1, 6), seed=st.integers(0, 999))
def test_every_step_is_the_best_by_brute_force(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    x, relevance = torch.randn(1, n, 8, generator=g), torch.rand(1, n, generator=g) + 0.05
    k = min(k, n)
    order = dpp_map(x, k, relevance)[0].tolist()
    for t in range(k):
        best = max(log_det(x[0], relevance[0], [*order[:t], j]) for j in range(n) if j not in order[:t])
        assert log_det(x[0], relevance[0], order[: t + 1]) == pytest.approx(best, abs=1e-4)


def test_beyond_the_rank_the_most_relevant_follow():
    data = golden("cdpruner_x_edge_rank_deficient_n20_d8_k12.npz")
    relevance = scale_relevance(instruction_relevance(data["image_embeds"], data["text_embeds"]), negate=True)
    order = dpp_map(data["features"], 12, relevance)[0].tolist()
    rest = sorted((i for i in range(20) if i not in order[:8]), key=lambda i: -relevance[0, i].item())
    assert order[8:] == rest[:4]


def test_copies_come_last():
    x = torch.eye(4)[[0, 0, 0, 1, 1, 2]].unsqueeze(0)
    assert dpp_map(x, 6)[0].tolist() == [0, 3, 5, 1, 2, 4]
    weight = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.8]])
    assert dpp_map(x, 6, weight)[0].tolist() == [1, 5, 3, 2, 4, 0]


def test_two_halves():
    """`split=2`, as some engines choose: the halves of the tokens know nothing of each other."""
    x, relevance = torch.randn(2, 31, 40), torch.rand(2, 31)
    scaled = scale_relevance(relevance, negate=True)
    made = CDPruner(keep=11, split=2).reduce(view(x, signals={"relevance": relevance})).keep
    apart = dpp_map(x[:, :16], 6, scaled[:, :16]), dpp_map(x[:, 16:], 5, scaled[:, 16:]) + 16
    assert torch.equal(made, torch.cat(apart, 1).sort(1).values)
    whole = CDPruner(keep=11).reduce(view(x, signals={"relevance": relevance})).keep
    assert torch.equal(whole, dpp_map(x, 11, scaled).sort(1).values) and not torch.equal(whole, made)
    assert any("split=2" in line for line in CDPruner.deviations)


def test_tiny_relevance_is_not_taken_for_span():
    x = torch.eye(6).unsqueeze(0)
    relevance = torch.tensor([[1.0, 1e-6, 2e-6, 3e-6, 0.5, 0.4]])
    assert dpp_map(x, 6, relevance)[0].tolist() == [0, 4, 5, 3, 2, 1]


def test_nan_and_separators_come_last():
    x = torch.randn(1, 10, 12)
    x[0, 4] = float("nan")
    relevance = torch.rand(1, 10)
    relevance[0, 7] = float("nan")
    order = dpp_map(x, 10, scale_relevance(relevance))[0].tolist()
    assert order[-1] == 4 and sorted(order) == list(range(10))
    part = torch.zeros(1, 10, dtype=torch.int64)
    part[0, ::3] = -1
    reduction = CDPruner(keep=5).reduce(view(torch.randn(1, 10, 12), part=part))
    assert (part[0, reduction.keep[0]] == 0).all()


def test_scaling():
    r = torch.tensor([[0.2, 0.6, 0.4], [3.0, 3.0, 3.0]])
    torch.testing.assert_close(scale_relevance(r), torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scale_relevance(r, negate=True)[0], torch.tensor([1.0, 0.0, 0.5]), atol=1e-5, rtol=0)
    soft = scale_relevance(r, theta=0.5)
    torch.testing.assert_close(soft[0], torch.exp(0.5 * torch.tensor([0.0, 1.0, 0.5])), atol=1e-5, rtol=0)
    assert (scale_relevance(r) > 0).all()


def test_relevance_is_a_mean_of_cosines():
    x, text = torch.randn(2, 5, 4), torch.randn(3, 4)
    expected = torch.stack([F.cosine_similarity(x, t, -1) for t in text]).mean(0)
    torch.testing.assert_close(instruction_relevance(x, text), expected)
    torch.testing.assert_close(instruction_relevance(x, text.expand(2, 3, 4)), expected)


def test_relevance_comes_from_the_user_then_from_text_then_from_nowhere():
    x, text, own = torch.randn(2, 20, 8), torch.randn(2, 3, 8), torch.rand(2, 20)

    def choice(signals, **settings):
        return CDPruner(keep=6, **settings).reduce(view(x, signals=signals)).keep

    by_text = instruction_relevance(x, text.mean(1, keepdim=True))
    assert torch.equal(choice({"text": text}), choice({"relevance": by_text}))
    assert torch.equal(choice({"text": text, "relevance": own}), choice({"relevance": own}))
    assert torch.equal(choice({"text": None}), choice({}))
    assert torch.equal(choice({"text": text[:, :0]}), choice({}))
    assert torch.equal(choice({"relevance": own}, negate=False), choice({"relevance": -own}))
    assert not torch.equal(choice({"relevance": own}), choice({"relevance": -own}))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), width=st.integers(1, 12))
def test_count_is_what_reduce_keeps(n, keep, width):
    method = CDPruner(keep=keep)
    seen = view(torch.randn(2, n, width), signals={"relevance": torch.rand(2, n)})
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert (reduction.keep.diff(dim=1) > 0).all()


def test_batch_equals_single_rows():
    x, relevance = torch.randn(3, 30, 16), torch.rand(3, 30)
    together = dpp_map(x, 12, relevance)
    assert torch.equal(torch.cat([dpp_map(x[i : i + 1], 12, relevance[i : i + 1]) for i in range(3)]), together)
    assert torch.equal(dpp_map(x, 5, relevance), together[:, :5])


def test_half_precision_autocast_meta_and_compiled():
    x, relevance = torch.randn(2, 20, 16).bfloat16(), torch.rand(2, 20)
    method = CDPruner(keep=6)

    def choice(x, relevance):
        return method.reduce(view(x, signals={"relevance": relevance})).keep

    expected = choice(x.float(), relevance)
    assert torch.equal(choice(x, relevance), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choice(x.float(), relevance), expected)
    assert choice(x.to("meta"), relevance.to("meta")).shape == (2, 6)
    assert torch.equal(torch.compile(choice, fullgraph=True, backend="eager")(x, relevance), expected)


def test_sites_and_parameters():
    def layout(*given):
        return Layout("by hand", {"projected": StageLayout(1, 8, 0, 0, provides=frozenset(given))})

    assert CDPruner().sites(layout("text")) == [Site("projected", needs=("text",))]
    assert CDPruner().sites(layout()) == [Site("projected", needs=("relevance",))]
    assert CDPruner.scope == "part"
    for wrong in (
        {"keep": 0},
        {"negate": 1.5},
        {"theta": 1.0},
        {"split": 3},
        {"split": True},
        {"positions": "shuffle"},
    ):
        with pytest.raises(ParameterError):
            CDPruner(**wrong)
    for spec in ("cdpruner", "cdpruner:keep=64:negate=false:theta=0.5", "cdpruner:split=2"):
        assert str(parse_methods(spec)[0]) == spec
