"""Sessions, overlays and measurements by hand: trivial values, directions, grids that are not square."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import vlmtok
from vlmtok import Site
from vlmtok.core.trace import PictureTrace, Trace
from vlmtok.cost.report import Report
from vlmtok.lab import overlay as viz
from vlmtok.lab.comparison import VisualTokens
from vlmtok.lab.paint import LINES
from vlmtok.lab.pieces import field
from vlmtok.lab.runners import Answer, Looker, Speaker
from vlmtok.lab.runners import divergence as computed_divergence
from vlmtok.lab.suite_measure import seconds_per_step
from vlmtok.timing import Timing


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) term by term."""
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))


# ---------------------------------------------------------------------- loyalty
@given(seed=st.integers(0, 1000))
def test_divergence_is_from_the_bare_model(seed):
    generator = torch.Generator().manual_seed(seed)
    bare, short = (3 * torch.randn(6, generator=generator) for _ in range(2))
    assert computed_divergence(bare, short) == pytest.approx(divergence(bare, short), rel=1e-4, abs=1e-6)
    assert computed_divergence(bare, bare) == pytest.approx(0.0, abs=1e-6)


def test_loyalty_of_answers():
    """Tokens of the bare answer at the same place; the divergence goes from the bare model to the compressed one."""
    one, two = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 0.5])
    speaker = Speaker.__new__(Speaker)
    bare, short = Answer("a b c d", (1, 2, 3, 4), output=one), Answer("a x", (1, 9), output=two)
    found = speaker.loyalty(bare, short)
    assert (found.same, found.tokens) == (False, 0.25)
    assert found.divergence == pytest.approx(divergence(one, two), rel=1e-4)
    assert found.divergence != pytest.approx(divergence(two, one), rel=1e-2)
    shifted = speaker.loyalty(bare, Answer("", (2, 3, 4), output=two))
    assert shifted.tokens == 0.0, "the same tokens at other places"
    longer = speaker.loyalty(short, bare)
    assert longer.tokens == 0.5 and speaker.loyalty(bare, bare).tokens == 1.0


def test_loyalty_of_towers():
    one, two = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 0.5])
    looker = Looker.__new__(Looker)
    classes = (("cat", 0.9),)
    found = looker.loyalty(Answer("cat", classes=classes, output=one), Answer("cat", classes=classes, output=two))
    assert found.same and found.tokens is None
    assert found.divergence == pytest.approx(divergence(one, two), rel=1e-4)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(one, two, dim=0)))
    plain = looker.loyalty(Answer("", output=torch.tensor([1.0, 1.0])), Answer("", output=torch.tensor([1.0, 0.5])))
    assert not plain.same and plain.cosine == pytest.approx(3 / math.sqrt(10)) and plain.divergence is None
    near = looker.loyalty(Answer("", output=torch.tensor([1.0, 1.0])), Answer("", output=torch.tensor([1.0, 0.95])))
    assert near.same


@pytest.mark.parametrize(
    ("passes", "words", "doubted"),
    [
        ({"decoder": 1, "decode steps": 3}, 4, False),
        ({"decoder": 1, "decode steps": 4}, 4, True),
        ({"decoder": 1, "decode steps": 2}, 4, True),
        ({"decoder": 4}, 4, False),
        ({"decoder": 2, "decode steps": 2}, 4, True),
        ({"vision": 1}, 4, False),
    ],
)
def test_doubt_about_the_books_of_an_answer(passes, words, doubted):
    report = Report("model", ["method"], "last pass")
    report.passes = passes
    found = Speaker.__new__(Speaker).doubt(report, Answer("", tuple(range(words))))
    assert (found is not None) == doubted


def test_tokens_by_layer_where_reports_count_none():
    """A cut at the start of layer 2 is felt there; one at the end of it in layer 3."""
    first, last = torch.tensor([0, 0, 2, 3, -1, 5]), torch.tensor([0, 0, -1, 3, -1, -1])
    tower = torch.tensor([0, 0, 2, 3, 4, 5])
    steps = ((Site("vision", 1), tower), (Site("decoder", 2, "start"), first), (Site("decoder", 2, "end"), last))
    trace = Trace([PictureTrace(last, steps, (2, 3))])
    found = VisualTokens.of(Report("model", ["method"], "last pass"), trace, depth=5)
    assert (found.bare, found.first, found.last) == (6, 5, 2)
    assert found.mean == pytest.approx((5 + 5 + 4 + 2 + 2) / 5)


# ---------------------------------------------------------------------- overlays
KEPT = (200, 200, 200)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (4, 1)])
@given(st.data())
def test_an_outline_stands_around_groups_and_what_is_left(grid, data):
    """Lines at the right and lower edge of a cell: borders of merged groups, and between what is left and dropped."""
    rows, columns = grid
    owner = data.draw(st.lists(st.integers(-1, 2), min_size=rows * columns, max_size=rows * columns))
    first = [owner.index(slot) if slot >= 0 else -1 for slot in owner]
    image = Image.new("RGB", (12 * columns, 10 * rows), KEPT)
    drawn = viz.overlay(image, PictureTrace(torch.tensor(first), (), grid), plain=True)

    def parted(one, other):
        if first[one] == first[other]:
            return False
        grouped = any(slot >= 0 and first.count(slot) > 1 for slot in (first[one], first[other]))
        return grouped or -1 in (first[one], first[other])

    for place in range(rows * columns):
        row, column = divmod(place, columns)
        right = column + 1 < columns and parted(place, place + 1)
        below = row + 1 < rows and parted(place, place + columns)
        x, y = 12 * column, 10 * row
        assert (drawn.getpixel((x + 11, y + 5)) in LINES) == right, (place, "right")
        assert (drawn.getpixel((x + 6, y + 9)) in LINES) == below, (place, "below")
        assert drawn.getpixel((x + 6, y + 5)) not in LINES and drawn.getpixel((x, y)) not in LINES


@pytest.mark.parametrize(("size", "grid"), [((200, 100), (2, 3)), ((100, 200), (3, 2)), ((120, 80), (2, 3))])
def test_a_canvas_lies_in_the_middle_of_the_picture(size, grid):
    """It fills one direction with square patches; where padding was cut off, the other one reaches beyond alike."""
    rows, columns = grid
    whole = field(size, grid, (0, 0, rows, columns))
    side = max(size[0] / columns, size[1] / rows)
    assert whole[2] - whole[0] == pytest.approx(side * columns) and whole[3] - whole[1] == pytest.approx(side * rows)
    assert (whole[0] + whole[2]) / 2 == pytest.approx(size[0] / 2)
    assert (whole[1] + whole[3]) / 2 == pytest.approx(size[1] / 2)
    cell = field(size, grid, (rows - 1, columns - 1, rows, columns))
    assert cell[2:] == pytest.approx(whole[2:]) and cell[2] - cell[0] == pytest.approx(side)


def test_a_canvas_that_was_stretched_fills_the_picture():
    assert field((300, 60), (6, 6), (0, 0, 6, 6)) == (0.0, 0.0, 300.0, 60.0)
    assert field((300, 60), (6, 6), (5, 0, 6, 1)) == pytest.approx((0.0, 50.0, 50.0, 60.0))


# ---------------------------------------------------------------------- classifiers and timings
class Dual(nn.Module):
    """A dual encoder with a bias, as SigLIP's."""

    def __init__(self):
        super().__init__()
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, images):
        return images.mean((2, 3))


def test_logits_have_the_models_scale_and_bias():
    images, names = torch.randn(3, 3, 4, 4), torch.randn(5, 3)
    cosines = F.normalize(images.mean((2, 3)), dim=-1) @ F.normalize(names, dim=-1).T
    found = vlmtok.zero_shot(Dual(), None, names)(images)
    assert torch.allclose(found, cosines * math.exp(1.5) - 3.0, atol=1e-5)
    own = vlmtok.zero_shot(Dual(), None, names, logit_scale=7.0)(images)
    assert torch.allclose(own, 7.0 * cosines, atol=1e-5)


def test_the_difference_of_an_answer_and_its_beginning_is_one_step():
    assert seconds_per_step(Timing((3.0, 5.0)), Timing((1.0, 2.0)), 2) == Timing((1.0, 1.5))
    assert seconds_per_step(Timing((3.0, 1.0)), Timing((1.0, 2.0)), 2) is None
