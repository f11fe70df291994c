"""How TCA condenses: the released coresets and blocks, ties, and constant pictures."""

import pytest
import torch
import torch.nn.functional as F
from support.decoder_by_hand import golden, golden_names
from support.tca_views import mid_view

from vlmtok.errors import ParameterError
from vlmtok.mergers.condensation import (
    condensation,
    condense,
    coreset,
    cross_head_rank,
    from_ratio,
)
from vlmtok.mergers.tca import TCA


@pytest.mark.parametrize("name", golden_names("tca_coreset_*.npz"))
def test_coreset_equals_the_release(name):
    data = golden(name)
    x, expected = data["tokens"].transpose(0, 1), data["out"].transpose(0, 1)
    centers, joins, weight = coreset(x, data["k"], data["first"])
    k = min(data["k"], x.shape[1])
    assert centers.shape == (x.shape[0], k) and torch.equal(centers[:, 0], data["first"])
    out = torch.zeros(x.shape[0], k, x.shape[2])
    out.scatter_add_(1, joins.unsqueeze(-1).expand_as(x), x * weight.unsqueeze(-1))
    chosen = x.gather(1, centers.unsqueeze(-1).expand(-1, -1, x.shape[2]))
    torch.testing.assert_close(chosen, data["centers"].transpose(0, 1)[:, :k], atol=1e-6, rtol=0)
    torch.testing.assert_close(out, expected[:, :k], atol=1e-5, rtol=0)
    assert (expected[:, k:] == 0).all()  # where the release has fewer tokens than centres it adds zeros; we add none


def attention_of(data, cache=True):
    """The released block's attention from its weights: the rows behind attention and the class token's weights."""
    x = data["x"].transpose(0, 1)
    heads, width = data["heads"], x.shape[-1]
    if cache and "cache" in data:
        x = torch.cat([x, data["cache"][data["anchor"]].unsqueeze(1)], 1)
    h = F.layer_norm(x, (width,), data["sd.ln_1.weight"], data["sd.ln_1.bias"])
    q, k, v = F.linear(h, data["sd.attn.in_proj_weight"], data["sd.attn.in_proj_bias"]).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    p = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)
    out = F.linear((p @ v).transpose(1, 2).flatten(2), data["sd.attn.out_proj.weight"], data["sd.attn.out_proj.bias"])
    n = data["x"].shape[0]
    return (x + out)[:, :n], p[:, :, 0, 1:n]


@pytest.mark.parametrize("name", golden_names("tca_block_*.npz"))
def test_block_equals_the_release(name):
    """Up to the MLP; a rate of 0 condenses nothing."""
    data = golden(name)
    method = TCA(drop_rate=float(data["drop_rate"]), first=int(data["first"][0]) if "first" in data else "top")
    if data["drop_rate"] == 0:
        tokens = data["x"].transpose(0, 1)[:, 1:]
        assert method.reduce(mid_view(torch.rand(1, data["heads"], tokens.shape[1]), tokens)) is None
        return
    x, attention = attention_of(data)
    if len(data["first"]) > 1:
        method = TCA(drop_rate=data["drop_rate"])
        method._first = lambda *_: data["first"]  # the release drew one for each row
    view = mid_view(attention, x[:, 1:])
    reduction = method.reduce(view)
    torch.testing.assert_close(attention, data["attn_cls"], atol=1e-6, rtol=0)
    torch.testing.assert_close(attention.mean(1), data["score"], atol=1e-6, rtol=0)
    torch.testing.assert_close(cross_head_rank(attention), data["rank_unused"], atol=1e-6, rtol=0)
    kept = data["keep_idx"].shape[1]
    assert torch.equal(reduction.keep[:, :kept], data["keep_idx"])
    assert method.count(view.counts) == reduction.slots == data["pre_mlp"].shape[0] - 1
    out = torch.cat([x[:, :1], reduction.apply(x[:, 1:])[0]], 1)
    rounded = "half" in name  # there the release rounds merged tokens to fp16; we never do
    torch.testing.assert_close(out, data["pre_mlp"].transpose(0, 1), atol=4e-3 if rounded else 1e-5, rtol=1e-5)


def test_centers_that_copy_each_other_keep_themselves():
    x = torch.ones(1, 6, 3)
    centers, joins, weight = coreset(x, 4, torch.tensor([2]))
    assert centers.tolist() == [[2, 0, 1, 3]]
    assert joins.tolist() == [[1, 2, 0, 3, 0, 0]]
    torch.testing.assert_close(weight, torch.tensor([[1.0, 1.0, 1 / 3, 1.0, 1 / 3, 1 / 3]]))


def test_constant_picture_stays_constant_but_for_the_fused_token():
    x = torch.full((1, 30, 4), 2.0)
    attention = torch.full((1, 2, 30), 1 / 40)
    reduction = TCA(ratio=0.5).reduce(mid_view(attention, x))
    out, size = reduction.apply(x)
    torch.testing.assert_close(out[:, :-1], x[:, : out.shape[1] - 1])
    assert size.sum() == 30


def test_rank_spares_what_one_loud_head_drowns():
    attention = torch.tensor([[[0.9, 0.03, 0.04, 0.03], [0.0, 0.1, 0.2, 0.1], [0.0, 0.1, 0.2, 0.1]]])
    assert attention.mean(1).argmax() == 0
    rank = cross_head_rank(attention)
    assert rank.argmax() == 2
    torch.testing.assert_close(rank[0], torch.tensor([3 + 0 + 0, 1 + 2 + 2, 2 + 3 + 3, 0 + 1 + 1]) / 12)


def test_ties_go_to_the_lowest_index_and_nan_loses():
    x = torch.randn(1, 30, 4)
    attention = torch.full((1, 2, 30), 0.02)
    reduction = TCA(ratio=0.5).reduce(mid_view(attention, x))
    kept = condensation(30, from_ratio(0.5, 30)).kept
    assert reduction.keep[0, :kept].tolist() == list(range(kept))
    attention[0, :, 3] = float("nan")
    assert 3 not in TCA(ratio=0.5).reduce(mid_view(attention, x)).keep[0, :kept].tolist()
    assert 3 not in TCA(ratio=0.5, score="rank").reduce(mid_view(attention, x)).keep[0, :kept].tolist()


def test_first_centre():
    x, attention = torch.randn(2, 40, 4), torch.rand(2, 3, 40)
    kept = condensation(40, from_ratio(0.6, 40)).kept
    order = attention.mean(1).argsort(dim=1, descending=True)

    def first(layer=3, **settings):
        return TCA(ratio=0.6, **settings).reduce(mid_view(attention, x, layer)).keep[:, kept].tolist()

    assert first() == order[:, kept].tolist()
    assert first(first=2) == order[:, kept + 2].tolist()
    assert first(first=(5, 1, 0)) == order[:, kept + 5].tolist()
    assert first(6, first=(5, 1, 0)) == order[:, kept + 1].tolist()
    draws = {str(first(layer, first="random", seed=seed)) for layer in (3, 6) for seed in range(8)}
    assert len(draws) > 2
    assert first(first="random", seed=4) == first(first="random", seed=4)
    with pytest.raises(ParameterError, match="does not exist"):
        first(first=1000)
    with pytest.raises(ParameterError, match="one index for each"):
        first(first=(1, 2))


def test_condense_is_usable_alone():
    x, score = torch.randn(1, 10, 3), torch.arange(10.0).unsqueeze(0)
    plan = condensation(10, 3)
    out, _ = condense(x, score, score / 100, plan, torch.tensor([0])).apply(x)
    assert out.shape[1] == plan.slots
    assert torch.equal(out[:, : plan.kept], x.flip(1)[:, : plan.kept])
    torch.testing.assert_close(out[:, -1], 0.01 * x[:, 1] + 0.0 * x[:, 0])
