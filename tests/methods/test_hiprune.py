"""HiPrune: the released choice, scores from attention, edges, and what no grid has."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.asking import llava
from support.decoder_by_hand import golden, golden_names

from vlmtok import HiPrune, Site, TokenView
from vlmtok.core.placing import place
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.pruners.hiprune import EDGES, anchors_and_registers, anchors_of, marked_cells

LAST = "received_attention@vision:feature"
MIDDLE = "received_attention@vision:1"
WHOLE = [name for name in golden_names("hiprune_*.npz") if "_x_" not in name]


def view(middle, last, grid):
    site = Site("features", needs=(MIDDLE, LAST))
    return TokenView(torch.randn(*last.shape, 3), site, grid=grid, signals={MIDDLE: middle, LAST: last})


@pytest.mark.parametrize("name", WHOLE)
def test_choice_equals_the_release(name):
    data = golden(name)
    grid, k = tuple(data["grid"].tolist()), data["budget"]
    keep, marked = anchors_and_registers(data["anchor_score"], data["register_score"], grid, k, data["alpha"])
    assert anchors_of(k, data["alpha"]) == data["anchors"].shape[1]
    assert torch.equal(marked, data["marked"].bool())
    assert torch.equal(keep, data["keep"])
    made = HiPrune(keep=k, alpha=data["alpha"]).reduce(view(data["anchor_score"], data["register_score"], grid))
    assert torch.equal(made.keep, data["keep"])


@pytest.mark.parametrize("name", golden_names("hiprune_*_attention.npz"))
def test_scores_follow_from_attention(name):
    """Column sums over the patches of a merged token, brought from the order of windows to that of rows."""
    data = golden(name)
    for kind in ("anchor", "register"):
        received = data[f"{kind}_attention"].mean(0).sum(0).view(-1, 4).mean(1)
        back = torch.stack([received[(data["window_index"] == j).nonzero()[0, 0]] for j in range(len(received))])
        assert torch.allclose(back, data[f"{kind}_score"][0], atol=1e-5)


def test_the_release_keeps_fewer_and_we_do_not():
    data = golden("hiprune_x_grid8x8_short.npz")
    grid, k = tuple(data["grid"].tolist()), data["budget"]
    keep, marked = anchors_and_registers(data["anchor_score"], data["register_score"], grid, k, data["alpha"])
    assert data["keep"].shape[1] < k == keep.shape[1]
    assert set(data["keep"][0].tolist()) <= set(keep[0].tolist())
    assert torch.equal(marked, data["marked"].bool())


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), at=st.integers(0, 35), edges=st.sampled_from(EDGES))
def test_neighbours_by_plain_loops(rows, columns, at, edges):
    n, at = rows * columns, at % (rows * columns)
    marked = set(marked_cells(torch.tensor([[at]]), (rows, columns), edges)[0].nonzero()[:, 0].tolist())
    if edges == "wrap":
        wanted = {min(max(at + step, 0), n - 1) for step in (0, -1, 1, -columns, columns)}
    else:
        r, c = divmod(at, columns)
        around = [(r, c), (r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c)]
        wanted = {i * columns + j for i, j in around if 0 <= i < rows and 0 <= j < columns}
    assert marked == wanted


def test_a_middle_layer_that_sees_the_whole_picture():
    def middle(depth, windowed=()):
        layout = llava()
        tower = replace(layout.stages["vision"], depth=depth, last=depth - 1, windowed=frozenset(windowed))
        return HiPrune().sites(replace(layout, stages={**layout.stages, "vision": tower}))[0].needs[0]

    assert middle(24) == "received_attention@vision:8"
    assert middle(12) == "received_attention@vision:4"
    assert middle(32, {i for i in range(32) if i % 8 != 7}) == "received_attention@vision:15"
    with pytest.raises(MissingSignal, match="has 4 layers"):
        place(HiPrune(object_layer=40), llava())


def test_no_grid_is_refused_in_words_unless_there_are_no_anchors():
    score = torch.rand(1, 30)
    with pytest.raises(ParameterError, match="30 tokens at features form no single grid"):
        HiPrune(keep=20, alpha=0.5).reduce(view(score, score, None))
    assert HiPrune(keep=20, alpha=0.0).reduce(view(score, score, None)).slots == 20


@settings(max_examples=60)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(2, 7),
    share=st.floats(0.05, 0.95),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    edges=st.sampled_from(EDGES),
    seed=st.integers(0, 99),
)
def test_choice_by_plain_loops(rows, columns, share, alpha, edges, seed):
    """Batches, odd grids, and as many anchors as fit with their neighbours."""
    n, g = rows * columns, torch.Generator().manual_seed(seed)
    middle, last, k = torch.rand(2, n, generator=g), torch.rand(2, n, generator=g), max(1, int(share * n))
    made = HiPrune(keep=k, alpha=alpha, edges=edges).reduce(view(middle, last, (rows, columns)))
    for row in range(2):
        marked: set[int] = set()
        for at in sorted(range(n), key=lambda i: -middle[row, i].item())[: min(round(k * alpha / 5), k // 5)]:
            r, c = divmod(at, columns)
            around = [(r, c), (r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c)]
            if edges == "wrap":
                marked |= {min(max(i * columns + j, 0), n - 1) for i, j in around}
            else:
                marked |= {i * columns + j for i, j in around if 0 <= i < rows and 0 <= j < columns}
        others = sorted(set(range(n)) - marked, key=lambda i: -last[row, i].item())
        assert made.keep[row].tolist() == sorted([*marked, *others[: k - len(marked)]])


def test_as_many_anchors_as_fit():
    """round(3 * 1.0 / 5) is one anchor, which with its neighbours would be five of three."""
    assert [anchors_of(k, 1.0) for k in (3, 4, 5, 8, 9, 10)] == [0, 0, 1, 1, 1, 2]


def test_alpha_of_one_and_nan():
    middle, last = torch.rand(1, 16), torch.rand(1, 16)
    middle[0, 2] = last[0, 7] = float("nan")
    for k in range(1, 16):
        kept = HiPrune(keep=k, alpha=1.0).reduce(view(middle, last, (4, 4))).keep[0].tolist()
        assert len(set(kept)) == k and (not {2, 7} & set(kept) or k > 14)
