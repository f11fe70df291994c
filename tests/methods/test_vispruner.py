"""VisPruner and FasterVLM: the released choice in its order, plain loops, and lists that the release cannot take."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok import FasterVLM, Site, TokenView, VisPruner, parse_methods
from vlmtok.errors import ParameterError
from vlmtok.pruners.vispruner import important_and_diverse, without_duplicates

NAME = "cls_attention@vision:feature"
BOTH = [name for name in golden_names("vispruner_*.npz") if "fastervlm" not in name]


def view(x, attention, name=NAME):
    return TokenView(x, Site("features"), signals={name: attention})


@pytest.mark.parametrize("name", BOTH)
def test_choice_equals_the_release(name):
    data = golden(name)
    x, k, ratio = data["features"], data["visual_token_num"], data["important_ratio"]
    assert int(k * ratio) == data["important_num"]
    important, diverse = important_and_diverse(data["score"], x, k, data["important_num"])
    assert torch.equal(important, data["important"]) and torch.equal(diverse, data["diverse_order"])
    made = VisPruner(keep=k, important=ratio).reduce(view(x, data["cls_attention"]))
    assert torch.equal(made.keep, data["keep"])
    if ratio == 1:
        assert torch.equal(FasterVLM(keep=k).reduce(view(x, data["cls_attention"])).keep, data["keep"])


@pytest.mark.parametrize("name", golden_names("vispruner_fastervlm*.npz"))
def test_fastervlm_equals_the_release(name):
    data = golden(name)
    x = torch.randn(*data["score"].shape, 4)
    made = FasterVLM(keep=data["visual_token_num"]).reduce(view(x, data["cls_attention"]))
    assert torch.equal(made.keep, data["keep"])
    assert torch.equal(
        VisPruner(keep=data["visual_token_num"], important=1.0).reduce(view(x, data["cls_attention"])).keep,
        data["keep"],
    )


def by_loops(x, order, k, exact=False):
    """The removal, list by list, in float64; None where a choice hangs on rounding."""
    unit = F.normalize(x.double(), dim=-1)
    order = list(order)
    while len(order) > k:
        first, second = order[0::2], order[1::2]
        nearest = {a: max(float(unit[a] @ unit[b]) for b in second) for a in first}
        values = sorted(nearest.values())
        if not exact and any(after - before < 1e-6 for before, after in pairwise(values)):
            return None
        ranked = sorted(first, key=lambda a: -nearest[a])
        order = ranked[min(8, len(order) - k, len(first)) :] + second
    return order


@settings(max_examples=40)
@given(n=st.integers(2, 60), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_the_removal_by_plain_loops(n, share, seed):
    """Odd lists, and rounds of fewer than 8, included."""
    g = torch.Generator().manual_seed(seed)
    x, order, k = torch.randn(1, n, 5, generator=g), torch.randperm(n, generator=g)[None], max(1, int(share * n))
    wanted = by_loops(x[0], order[0].tolist(), k)
    found = without_duplicates(x, order, k)[0].tolist()
    assert len(found) == k == len(set(found))
    if wanted is not None:
        assert found == wanted


def test_tokens_that_cannot_be_normalised_compare_as_nothing():
    x = torch.randn(1, 20, 4)
    x[0, 3], x[0, 4] = 0.0, float("nan")
    kept = VisPruner(keep=10, important=0.5).reduce(view(x, torch.rand(1, 2, 20))).keep
    assert kept.shape == (1, 10) and len(set(kept[0].tolist())) == 10
    # Dealt into 0, 1 and 2, 3: beside NaN both of the first are nearest to it, at 0, and the earlier one leaves.
    against = torch.tensor([[[1.0, 0.0], [0.5, 0.8], [-1.0, 0.0], [float("nan"), 0.0]]])
    assert without_duplicates(against, torch.tensor([[0, 2, 1, 3]]), 3).tolist() == [[1, 2, 3]]


def test_the_important_ones_are_cut_off_not_rounded():
    """23 at 0.5 are 11.5: the twelfth by attention takes its chance with the others."""
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    score = torch.arange(40.0, 0, -1)[None]
    x[0, 11] = x[0, 12]  # a near duplicate in the other half, so that it leaves in the first round
    kept = VisPruner(keep=23, important=0.5).reduce(view(x, score[:, None])).keep[0].tolist()
    assert kept[:11] == list(range(11)) and 11 not in kept


def test_received_attention_stands_in_for_the_class_token():
    x, score = torch.randn(2, 9, 4), torch.rand(2, 9)
    for method in (VisPruner(keep=4), FasterVLM(keep=4)):
        one = method.reduce(view(x, score, "received_attention@vision:feature"))
        other = method.reduce(view(x, score[:, None]))
        assert torch.equal(one.keep, other.keep)


def test_equal_similarities_go_by_their_places():
    """One-hot tokens: similarities are exactly 0 or 1, and every sort keeps the order of equals."""
    g = torch.Generator().manual_seed(0)
    x = F.one_hot(torch.randint(0, 4, (1, 50), generator=g), 4).float()
    order = torch.randperm(50, generator=g)[None]
    for k in (1, 9, 20, 33):
        assert without_duplicates(x, order, k)[0].tolist() == by_loops(x[0], order[0].tolist(), k, exact=True)


def test_settings():
    made = parse_methods("vispruner:visual_token_num=64:important_ratio=0.75")[0]
    assert (made.keep, made.important) == (64, 0.75)
    for kind, wrong in ((VisPruner, {"important": 1.5}), (VisPruner, {"keep": 0}), (FasterVLM, {"separators": "all"})):
        with pytest.raises(ParameterError):
            kind(**wrong)
