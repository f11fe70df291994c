"""EVS: the engines' choice and count, plain loops, and what is no whole clip."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.evs import EVS, change_of_cells

EXACT = [name for name in golden_names("evs_*.npz") if "_x_" not in name]


def clip_of(data):
    return data["x"].view(1, data["frames"], -1, data["x"].shape[-1])


def view(x, frames, scope="clip"):
    return TokenView(x, Site("projected", scope=scope), frames=frames)


@pytest.mark.parametrize("name", EXACT)
def test_choice_equals_the_engines(name):
    data = golden(name)
    n = len(data["x"])
    assert torch.allclose(change_of_cells(clip_of(data)).flatten(), data["score"], atol=1e-5)
    method = EVS(rate=data["q"])
    assert method.count(Counts(Site("projected"), n, n, frames=data["frames"], cells=n // data["frames"])) == len(
        data["keep"]
    )
    reduction = method.reduce(view(data["x"][None], data["frames"]))
    if len(data["keep"]) == n:
        assert reduction is None
    else:
        assert torch.equal(reduction.keep[0], data["keep"])


def test_half_precision_is_scored_in_single():
    """As documented: as many tokens as the engines keep in bf16, and those that fp32 scores say."""
    data = golden("evs_x_bf16.npz")
    made = EVS(rate=data["q"]).reduce(view(data["x"][None].bfloat16(), data["frames"]))
    assert torch.equal(made.keep[0], data["keep_fp32"])
    assert len(data["keep"]) == made.slots
    assert set(made.keep[0].tolist()) != set(data["keep"].tolist())


@settings(max_examples=30)
@given(
    frames=st.integers(1, 6),
    cells=st.integers(1, 7),
    rate=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 0.99]),
    seed=st.integers(0, 99),
)
def test_by_plain_loops(frames, cells, rate, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, frames * cells, 5, generator=g)
    x[:, ::3] = x[:, :1].clone()  # equal cells: ties by position
    made = EVS(rate=rate).reduce(view(x, frames))
    n = frames * cells
    k = max(cells, int(n * (1.0 - rate)))
    if k == n:
        assert made is None
        return
    for row, keep in zip(x, made.keep.tolist()):
        change = [255.0] * cells + [
            1.0 - float(F.cosine_similarity(row[i].double(), row[i - cells].double(), dim=0)) for i in range(cells, n)
        ]
        assert keep == sorted(keep) and len(set(keep)) == k and keep[:cells] == list(range(cells))
        least = min(change[i] for i in keep)
        assert all(change[i] <= least + 1e-6 for i in range(n) if i not in keep)


def test_nan_loses_and_zero_tokens_have_changed():
    x = torch.ones(1, 8, 3)
    x[0, 5], x[0, 6] = float("nan"), 0.0
    kept = EVS(rate=0.25).reduce(view(x, 4)).keep[0].tolist()
    assert kept[:2] == [0, 1] and 6 in kept and 5 not in kept and 7 not in kept


def test_pictures_stay_and_broken_clips_are_refused():
    x = torch.randn(1, 12, 4)
    assert EVS().reduce(view(x, 0)) is None
    assert EVS().count(Counts(Site("projected"), 12, 12)) == 12
    with pytest.raises(ParameterError, match="clip of 4 frames has 11 tokens"):
        EVS().reduce(TokenView(x[:, :11], Site("projected"), frames=4))
    with pytest.raises(ParameterError, match="not of one size"):
        EVS(source="pictures").reduce(view(x, 0, "sample"))


def test_settings():
    assert parse_methods("evs:video_pruning_rate=0.5")[0].rate == 0.5
    for wrong in ({"rate": 1.0}, {"rate": -0.1}, {"source": "all"}, {"positions": "none"}, {"rate": "half"}):
        with pytest.raises(ParameterError):
            EVS(**wrong)
    counts = Counts(Site("projected"), 100, 100, frames=20, cells=5)
    assert [EVS(rate=rate).count(counts) for rate in (0.0, 0.8, 0.9, 0.99)] == [100, 19, 9, 5]
    levels = [EVS().at_level(level / 10, None, 100).count(counts) for level in range(11)]
    assert levels == sorted(levels) and levels[0] == 5 and levels[-1] == 100
