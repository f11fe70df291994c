"""Recoverable Compression: the released selection, the described merge, LOF by plain loops, and edges."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.asking import llava
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok import Recoverable, Site, TokenView
from vlmtok.core.placing import place
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.mergers.prumerge import CLASSED, LATE, class_scores
from vlmtok.mergers.recoverable import outliers, share_of, two_choices


def view(x, q, k, relevance):
    """Features with projections, the class token first in each."""
    signals = {CLASSED[0]: q[:, :1], CLASSED[1]: k[:, :1], CLASSED[2]: k[:, 1:], "relevance": relevance}
    return TokenView(x[:, 1:], Site("features"), signals=signals)


def left(reduction, x):
    tokens, _ = reduction.apply(x)
    return tokens[0][reduction.valid[0]]


@pytest.mark.parametrize("name", golden_names("recoverable_*.npz"))
def test_selection_and_merge(name):
    data = golden(name)
    q, k, x = (data[key].unsqueeze(0) for key in ("q", "k", "x"))
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])
    assert torch.allclose(attention[0], data["cls_attention"], atol=1e-6)
    visual, text, _ = two_choices(attention, data["text_score"][None], (20, 20))
    assert sorted(data["by_visual"].tolist()) == visual[0].nonzero()[:, 0].tolist()
    assert sorted(data["by_text"].tolist()) == text[0].nonzero()[:, 0].tolist()
    made = Recoverable().reduce(view(x, q, k, data["text_score"][None]))
    kept = len(data["kept"])
    assert made.keep[0, :kept].tolist() == data["kept"].tolist()
    centres = len(data["fixed_centres"])
    assert made.keep[0, kept : kept + centres].tolist() == data["rest"][data["fixed_centres"]].tolist()
    found = left(made, x[:, 1:])
    if len(data["fixed_out"]):
        torch.testing.assert_close(found, data["fixed_out"], atol=2e-5, rtol=1e-5)
    else:  # the release returns nothing at all: the merged token stays
        torch.testing.assert_close(found, (attention[0][:, None] * x[0, 1:]).sum(0, keepdim=True), atol=2e-5, rtol=1e-5)


def lof_by_loops(values, k):
    n, k = len(values), min(k, len(values) - 1)
    gaps = [[abs(a - b) for b in values] for a in values]
    near = [sorted((j for j in range(n) if j != i), key=lambda j: (gaps[i][j], j))[:k] for i in range(n)]
    far = [gaps[i][near[i][-1]] for i in range(n)]
    density = [1 / (sum(max(gaps[i][j], far[j]) for j in near[i]) / k + 1e-10) for i in range(n)]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]


@settings(max_examples=40)
@given(n=st.integers(2, 40), some=st.integers(2, 40), k=st.sampled_from([1, 3, 20]), seed=st.integers(0, 999))
def test_outliers_by_plain_loops(n, some, k, seed):
    """Some of the values count, in any places; the others are never neighbours."""
    g = torch.Generator().manual_seed(seed)
    value = torch.rand(1, n, generator=g) ** 4
    valid = torch.randperm(n, generator=g)[None] < min(some, n)
    at = valid[0].nonzero()[:, 0].tolist()
    factors = lof_by_loops(value[0, at].double().tolist(), k)
    found = outliers(value, valid, k)[0]
    assert not found[~valid[0]].any()
    for i, factor in zip(at, factors):
        assert abs(factor - 1.5) < 1e-9 or bool(found[i]) == (factor > 1.5)


def test_shares_are_cut_off_as_released():
    found = torch.zeros(1, 200, dtype=torch.bool)
    for count in range(200):
        found[0, :count] = True
        assert share_of(found, 200, 200).item() == int(200 * (count / 200))


def test_a_merged_rest_by_hand():
    """Ten tokens, one stands out by attention, none by the text; one of the others is a centre."""
    torch.manual_seed(0)
    x, q, k, s = torch.randn(1, 31, 8), torch.randn(1, 31, 8), torch.randn(1, 31, 8), torch.rand(1, 30)
    made = Recoverable(neighbours=4, lof=(5, 5, 3)).reduce(view(x, q, k, s))
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])[0]
    visual, text, relevance = two_choices(attention[None], s, (5, 5))
    kept = (visual | text)[0]
    rest = (~kept).nonzero()[:, 0]
    factor = lof_by_loops(attention[rest].double().tolist(), 3)
    count = int(len(rest) * (sum(f > 1.5 for f in factor) / len(rest)))
    centres = rest[attention[rest].argsort(descending=True)[:count]]
    wanted = [x[0, 1:][kept]]
    for c in centres.tolist():
        others = [j for j in rest.tolist() if j != c]
        scores = F.cosine_similarity(k[0, 1 + c][None], k[0, 1:][others]) + 50 * relevance[0][others]
        joined = [others[i] for i in scores.argsort(descending=True)[:4].tolist()]
        wanted.append((x[0, 1 + c] + sum(attention[j] * x[0, 1 + j] for j in joined))[None])
    loose = [j for j in rest.tolist() if j not in centres.tolist()]
    assert count
    wanted.append(sum(attention[j] * x[0, 1 + j] for j in loose)[None])
    torch.testing.assert_close(left(made, x[:, 1:]), torch.cat(wanted), atol=1e-5, rtol=1e-5)


def test_behind_the_projector_slots_keep_the_order_of_the_picture():
    data = golden("recoverable_01_n144.npz")
    q, k, x = (data[key].unsqueeze(0) for key in ("q", "k", "x"))
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])
    signals = {LATE[0]: attention, LATE[1]: k[:, 1:], "relevance": data["text_score"][None]}
    late = Recoverable().reduce(TokenView(x[:, 1:], Site("projected"), signals=signals))
    early = Recoverable().reduce(view(x, q, k, data["text_score"][None]))
    kept = late.keep[0][late.valid[0]].tolist()
    assert kept == sorted(kept) and sorted(early.keep[0][early.valid[0]].tolist()) == kept


def test_rows_do_not_depend_on_each_other():
    torch.manual_seed(1)
    x, q, k, s = (torch.randn(3, 50, 6) for _ in range(3)), None, None, torch.rand(3, 49)
    x, q, k = x
    whole = Recoverable().reduce(view(x, q, k, s))
    for row in range(3):
        part = slice(row, row + 1)
        alone = Recoverable().reduce(view(x[part], q[part], k[part], s[part]))
        assert torch.equal(alone.keep[alone.valid], whole.keep[part][whole.valid[part]])


def test_it_wants_the_relevance_and_a_class_token():
    with pytest.raises(MissingSignal, match="'relevance'"):
        place(Recoverable(), llava())
    assert place(Recoverable(), llava(), frozenset({"relevance"}))[0]
    for wrong in ({"neighbours": 0}, {"lof": (1, 2)}, {"lof": (0, 1, 1)}, {"weight": -1.0}, {"separators": "all"}):
        with pytest.raises(ParameterError):
            Recoverable(**wrong)
    assert vlmtok.parse_methods("recoverable:lof=(5;5;3)")[0].lof == (5, 5, 3)
