"""VidCom2: the released choice, vLLM's count, plain loops, and what is no whole clip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.vidcom2 import VidCom2, frame_budgets, redundancy

EXACT = [name for name in golden_names("vidcom2_*.npz") if "_x_" not in name]


def view(x, frames):
    return TokenView(x, Site("projected", scope="clip"), frames=frames)


def kept(x, frames, **settings):
    made = VidCom2(**settings).reduce(view(x[None], frames))
    if made is None:
        return list(range(len(x)))
    valid = torch.ones_like(made.keep, dtype=torch.bool) if made.valid is None else made.valid
    return made.keep[valid].tolist()


@pytest.mark.parametrize("name", EXACT)
def test_choice_equals_the_release_and_the_engine(name):
    data = golden(name)
    frames = data["frames"]
    alike, inside = redundancy(data["x"].view(1, frames, -1, data["x"].shape[-1]))
    for found, wanted in ((alike, "video_score"), (inside, "frame_score"), (alike + inside, "score")):
        assert torch.allclose(found[0], data[wanted], atol=1e-5)
    assert torch.equal(frame_budgets(alike, data["base"])[0], data["budget_released"])
    assert kept(data["x"], frames, rate=data["q"]) == data["keep_exact"].tolist()
    if data["q"] > 0:
        assert kept(data["x"], frames, rate=data["q"], counts="released") == data["keep_released"].tolist()


def test_half_precision_is_computed_in_single():
    data = golden("vidcom2_x_bf16.npz")
    x = data["x"].bfloat16()
    assert kept(x, data["frames"], rate=data["q"]) == data["keep_exact_fp32"].tolist()
    assert kept(x, data["frames"], rate=data["q"], counts="released") == data["keep_released_fp32"].tolist()


def test_equal_frames_have_equal_budgets():
    data = golden("vidcom2_x_equal_frames.npz")
    alike, _ = redundancy(data["x"].view(1, data["frames"], -1, data["x"].shape[-1]))
    assert torch.equal(frame_budgets(alike, data["base"])[0], data["budget_released"])
    assert len(kept(data["x"], data["frames"], rate=data["q"])) == data["keep_count_exact"]


def by_loops(x, frames, rate):
    """Score of each token and budget of each frame, in float64."""
    cells, width = len(x) // frames, x.shape[1]
    x = x.double()
    variance = x.var(0, correction=0)
    chosen = sorted(range(width), key=lambda c: (variance[c].item(), c))[: max(1, width // 2)]
    y = [row[chosen] / max(row[chosen].norm().item(), 1e-12) for row in x]
    whole = sum(y) / len(y)
    alike, score = [], []
    for t in range(frames):
        mine = y[t * cells : (t + 1) * cells]
        centre = sum(mine) / cells
        for one in mine:
            a, b = (
                sum(math.exp(-float((one - c).square().sum()) / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2))
                for c in (whole, centre)
            )
            alike.append(a)
            score.append(a + b)
    unique = [-sum(alike[t * cells : (t + 1) * cells]) / cells for t in range(frames)]
    weights = [math.exp((u - max(unique)) / 0.01) for u in unique]
    shares = [min(1.0, (1 - rate) * (1 + w / sum(weights) - 1 / frames)) for w in weights]
    return score, [share * cells for share in shares]


@settings(max_examples=25)
@given(
    frames=st.integers(1, 5), cells=st.integers(1, 6), rate=st.sampled_from([0.3, 0.5, 0.75]), seed=st.integers(0, 99)
)
def test_by_plain_loops(frames, cells, rate, seed):
    x = torch.randn(frames * cells, 6, generator=torch.Generator().manual_seed(seed))
    score, budgets = by_loops(x, frames, rate)
    if any(abs(b % 1 - 0.5) < 1e-3 for b in budgets):
        return  # which way it rounds hangs on the dtype
    wanted = []
    for t, budget in enumerate(budgets):
        order = sorted(range(t * cells, (t + 1) * cells), key=lambda i: score[i])
        wanted += order[: max(1, round(budget))]
    assert kept(x, frames, rate=rate, counts="released") == sorted(wanted)
    n, k = len(x), max(frames, int(len(x) * (1 - rate)))
    exact = sorted(range(n), key=lambda i: (i not in wanted, score[i]))[:k]
    assert kept(x, frames, rate=rate) == sorted(exact)


def test_nan_is_dropped_first_and_constant_tokens_tie_to_the_lowest():
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    x[4] = float("nan")
    assert 4 not in kept(x, 3, rate=0.1)
    assert kept(torch.ones(12, 6), 3, rate=0.5) == [0, 1, 4, 5, 8, 9]
    assert kept(torch.ones(4, 1), 2, rate=0.5) == [0, 2]


def test_pictures_stay_and_broken_clips_are_refused():
    x = torch.randn(1, 12, 4)
    assert VidCom2().reduce(view(x, 0)) is None
    assert VidCom2(rate=0.0).reduce(view(x, 3)) is None
    with pytest.raises(ParameterError, match="clip of 5 frames has 12 tokens"):
        VidCom2().reduce(view(x, 5))


def test_settings():
    assert parse_methods("vidcom2:R_RATIO=0.25")[0].rate == 0.75
    for wrong in ({"rate": 1.0}, {"counts": "all"}, {"source": "all"}, {"positions": "none"}):
        with pytest.raises(ParameterError):
            VidCom2(**wrong)
    counts = Counts(Site("projected"), 100, 100, frames=20, cells=5)
    assert [VidCom2(rate=rate).count(counts) for rate in (0.0, 0.8, 0.9)] == [100, 20, 20]
    assert VidCom2(counts="released").count(counts) is None
