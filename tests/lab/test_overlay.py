"""Overlays: patches land on the right pixels, whatever the preprocessing; colours say what became of them."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from vlmtok import Site
from vlmtok.core.trace import PictureTrace, Trace
from vlmtok.errors import ParameterError
from vlmtok.lab import overlay as viz
from vlmtok.lab import panels, pieces, states
from vlmtok.lab.region import region

torchvision = pytest.importorskip("torchvision.transforms")
plain = partial(viz.overlay, plain=True)
SIZES = [(640, 480), (300, 500), (97, 203), (224, 224)]


def normalised(*steps):
    plain = torchvision.Normalize((0.48, 0.45, 0.4), (0.26, 0.26, 0.27))
    return torchvision.Compose([*steps, torchvision.ToTensor(), plain])


def padded(image):
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return normalised(torchvision.Resize((224, 224)))(square)


@pytest.mark.parametrize("size", SIZES)
def test_resize_and_centre_crop_shows_the_middle(size):
    box = region(size, normalised(torchvision.Resize(224), torchvision.CenterCrop(224)))
    short = min(size)
    left, top = (size[0] - short) / 2, (size[1] - short) / 2
    assert box == pytest.approx((left, top, left + short, top + short), abs=1.5)


@pytest.mark.parametrize("size", SIZES)
def test_plain_resize_shows_everything(size):
    box = region(size, normalised(torchvision.Resize((224, 224))))
    assert box == pytest.approx((0, 0, *size), abs=1.5)
    assert region(size) == (0, 0, *size)


@pytest.mark.parametrize("size", SIZES)
def test_padding_reaches_beyond_the_picture(size):
    side = max(size)
    left, top = -((side - size[0]) // 2), -((side - size[1]) // 2)
    assert region(size, padded) == pytest.approx((left, top, left + side, top + side), abs=2)


def test_transformers_processors_are_read_the_same_way():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    assert region((300, 200), processor) == pytest.approx((50, 0, 250, 200), abs=1.5)


def test_crops_are_told_apart():
    def halves(image):
        whole = torchvision.ToTensor()(image.resize((64, 64)))
        return torch.stack([whole[:, :, :32], whole[:, :, 32:]])

    assert region((200, 100), halves, 0) == pytest.approx((0, 0, 100, 100), abs=2)
    assert region((200, 100), halves, 1) == pytest.approx((100, 0, 200, 100), abs=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 400), st.integers(40, 400), st.integers(0, 1000))
def test_any_crop_is_found(width, height, seed):
    g = torch.Generator().manual_seed(seed)
    wide, high = (int(s * (0.4 + 0.6 * torch.rand(1, generator=g).item())) for s in (width, height))
    left = int((width - wide) * torch.rand(1, generator=g).item())
    top = int((height - high) * torch.rand(1, generator=g).item())

    def crop(image):
        return torchvision.ToTensor()(image.crop((left, top, left + wide, top + high)).resize((64, 64)))

    found = region((width, height), crop)
    assert found == pytest.approx((left, top, left + wide, top + high), abs=0.02 * max(width, height) + 1)


def trace(owner, grid=(2, 2), steps=(), parts=None):
    return PictureTrace(torch.tensor(owner), tuple(steps), grid, parts)


def test_kept_merged_and_dropped_look_different():
    image = Image.new("RGB", (80, 80), (200, 200, 200))
    owner = torch.tensor([0, 0, -1, -1])
    before = torch.tensor([0, 0, -1, 3])
    steps = [(Site("projected"), before), (Site("decoder", 3, "start"), owner)]
    drawn = plain(image, trace([0, 0, -1, -1], steps=steps))
    assert drawn.size == image.size
    merged, early, late = (drawn.getpixel(at) for at in ((20, 20), (20, 60), (60, 60)))
    assert merged == drawn.getpixel((60, 20)) and merged != (200, 200, 200)
    assert max(early) < max(late) < 200
    kept = plain(image, trace([0, 1, 2, 3]))
    assert kept.getpixel((20, 20)) == (200, 200, 200)


def test_patches_land_where_the_crop_put_them():
    image = Image.new("RGB", (160, 80), (200, 200, 200))
    preprocess = normalised(torchvision.Resize(32), torchvision.CenterCrop(32))
    drawn = plain(image, trace([-1, 1, 2, 3]), preprocess=preprocess)
    assert max(drawn.getpixel((60, 20))) < 80  # the first of four patches of the middle square
    assert drawn.getpixel((100, 20)) == (200, 200, 200)
    assert drawn.getpixel((10, 40)) != (200, 200, 200)  # cropped away


KEPT = (200, 200, 200)


def test_a_canvas_and_its_thumbnail():
    # a 2 x 2 thumbnail, then three rows of five patches with a separator behind each: crops of 2 x 3, 2 x 2 in the
    # first two rows, of 1 x 3, 1 x 2 in the last
    parts = torch.tensor([0] * 4 + [1, 1, 1, 2, 2, -1] * 2 + [3, 3, 3, 4, 4, -1])
    gone = {4, 7, 18}  # the first patches of crops 1 and 2, and the third of the last row
    found = trace([-1 if i in gone else i for i in range(len(parts))], None, parts=parts)
    grids = {part: grid for part, (grid, _) in found.grids().items()}
    assert grids == {0: (2, 2), 1: (2, 3), 2: (2, 2), 3: (1, 3), 4: (1, 2)}
    assert found.canvas[0] == (3, 5) and found.canvas[1].tolist() == (parts > 0).nonzero()[:, 0].tolist()
    assert [found.place(part) for part in range(5)] == [None, (0, 0, 2, 3), (0, 3, 2, 5), (2, 0, 3, 3), (2, 3, 3, 5)]
    image = Image.new("RGB", (100, 60), KEPT)
    dark = {(0, 0), (0, 3), (2, 2)}

    def cells(drawn):
        return {(y, x): drawn.getpixel((20 * x + 10, 20 * y + 10)) for y in range(3) for x in range(5)}

    for cell, colour in cells(plain(image, found)).items():
        assert (max(colour) < 80) if cell in dark else colour == KEPT
    # one crop alone: what it does not show is grey
    for (row, column), colour in cells(plain(image, found, part=2)).items():
        if row < 2 and column > 2:
            assert (max(colour) < 80) if (row, column) == (0, 3) else colour == KEPT
        else:
            assert colour not in (KEPT, (0, 0, 0)) and len(set(colour)) == 1
    assert plain(image, found, part=0).getpixel((10, 10)) == KEPT


def test_one_crop_with_its_separator_is_no_canvas():
    found = trace(range(5), (2, 2), parts=torch.tensor([0, 0, 0, 0, -1]))
    assert found.canvas is None and list(found.grids()) == [0]
    assert plain(Image.new("RGB", (8, 8), KEPT), found).getpixel((1, 1)) == KEPT


def test_of_a_clip_the_first_frame_is_drawn():
    parts = torch.tensor([1] * 6 + [2] * 6 + [-1])
    found = PictureTrace(torch.tensor([-1, *range(1, 7), -1, *range(8, 13)]), (), (2, 3), parts, video=True)
    assert found.canvas is None and {part: grid for part, (grid, _) in found.grids().items()} == {1: (2, 3), 2: (2, 3)}
    image = Image.new("RGB", (90, 60), KEPT)
    first, second = plain(image, found), plain(image, found, part=2)
    assert max(first.getpixel((10, 10))) < 80 and first.getpixel((45, 10)) == KEPT
    assert second.getpixel((10, 10)) == KEPT and max(second.getpixel((45, 10))) < 80


def test_parts_of_different_shapes():
    shapes, parts = {1: (1, 4), 2: (4, 2)}, torch.tensor([1] * 4 + [2] * 8)
    found = PictureTrace(torch.tensor([0, 1, 2, -1, *range(4, 12)]), (), None, parts, shapes=shapes)
    assert {part: grid for part, (grid, _) in found.grids().items()} == {1: (1, 4), 2: (4, 2)}
    drawn = plain(Image.new("RGB", (80, 20), KEPT), found, part=1)
    assert max(drawn.getpixel((70, 10))) < 80 and drawn.getpixel((50, 10)) == KEPT


def test_bad_input_says_what_is_wrong():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ParameterError, match="PIL"):
        plain("cat.jpg", trace([0, 1, 2, 3]))
    with pytest.raises(ParameterError, match="picture 2"):
        plain(image, Trace([trace([0, 1, 2, 3])]), 2)
    with pytest.raises(ParameterError, match="no single grid"):
        plain(image, trace([0, 1, 2], None))
    with pytest.raises(ParameterError, match="part 7"):
        plain(image, trace([0, 1, 2, 3]), part=7)
    with pytest.raises(ParameterError, match="tensor of pixels"):
        region((8, 8), lambda picture: "no pixels")


# ---------------------------------------------------------------------- moments, sheets, odd sizes
def three_cuts():
    """Four patches: two merge in the tower, one leaves before the language model, one inside it."""
    moments = [[0, 0, 2, 3], [0, 0, -1, 3], [0, 0, -1, -1]]
    sites = [Site("vision", 4, "mid"), Site("projected"), Site("decoder", 1)]
    steps = [(site, torch.tensor(owner)) for site, owner in zip(sites, moments)]
    return PictureTrace(torch.tensor(moments[-1]), tuple(steps), (2, 2), methods=("tome", "todre", "fastv"))


def test_each_moment_can_be_drawn():
    image, found = Image.new("RGB", (80, 80), KEPT), three_cuts()
    looks = [plain(image, found, step=step) for step in range(4)]
    at = [[drawn.getpixel(place) for place in ((20, 20), (60, 20), (20, 60), (60, 60))] for drawn in looks]
    assert at[0] == [KEPT] * 4
    assert at[1][0] == at[1][1] != KEPT and at[1][2:] == [KEPT] * 2
    assert max(at[2][2]) < 80 and at[2][3] == KEPT
    assert max(at[3][2]) < max(at[3][3]) < 200
    assert plain(image, found).tobytes() == looks[3].tobytes() == plain(image, found, step=-1).tobytes()
    for step in (4, -5, True, 1.0):
        with pytest.raises(ParameterError, match="3 cuts changed something"):
            plain(image, found, step=step)


def test_moments_say_where_and_whose():
    found = states.states_of(three_cuts())
    assert [state.title for state in found] == [
        "before any cut: 4 of 4 tokens",
        "vision tower, inside layer 4 (tome): 3 of 4 tokens",
        "in front of the language model (todre): 2 of 4 tokens",
        "language model, behind layer 1 (fastv): 1 of 4 tokens",
    ]
    assert [state.where for state in found[1:]] == [
        "in the vision tower, inside layer 4",
        "in front of the language model",
        "in the language model, behind layer 1",
    ]
    assert states.gone_at(found) == [None, None, 2, 3]


def test_cuts_that_change_nothing_are_no_moments():
    same = torch.arange(4)
    steps = [(Site("vision", 0), same), (Site("vision", 1), torch.tensor([0, -1, 2, 3])), (Site("vision", 2), same[:2])]
    found = states.states_of(PictureTrace(torch.tensor([0, -1, 2, -1]), tuple(steps), (2, 2)))
    assert [state.label for state in found] == ["before any cut", "vision tower, behind layer 1", "at the end"]
    assert found[-1].owner.tolist() == [0, -1, 2, -1]


@pytest.mark.parametrize(("count", "most"), [(0, 6), (1, 6), (6, 6), (7, 6), (12, 6), (24, 6), (25, 6)])
def test_few_are_taken_evenly_and_the_last_is_among_them(count, most):
    found = states.spread(count, most)
    assert found == sorted(set(found)) and len(found) == min(count, most)
    assert not found or found[-1] == count - 1
    gaps = [b - a for a, b in zip([-1, *found], found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def halving(cuts, patches=64):
    """One patch leaves at each cut."""
    owner = torch.arange(patches)
    steps = []
    for cut in range(cuts):
        owner = owner.clone()
        owner[cut] = -1
        steps.append((Site("vision", cut, "mid"), owner))
    return PictureTrace(owner, tuple(steps), (8, 8), methods=("tome",) * cuts)


def test_a_sheet_has_the_original_and_a_panel_a_cut(monkeypatch):
    image = Image.effect_noise((320, 320), 90).convert("RGB")
    drawn = {}
    monkeypatch.setattr(panels, "_sheet", lambda shown, head, swatches, caption: drawn.update(locals()) or shown[0][0])
    viz.overlay(image, three_cuts())
    pictures, titles = zip(*drawn["shown"])
    assert pictures[0].tobytes() == image.tobytes() and titles[0] == "the picture, 320 x 320 pixels"
    assert list(titles[1:]) == [state.title for state in states.states_of(three_cuts())[1:]]
    for number, panel in enumerate(pictures[1:], 1):
        assert panel.tobytes() == plain(image, three_cuts(), step=number).tobytes()
    assert drawn["head"] == "tome + todre + fastv"
    assert [words for _, words in drawn["swatches"]] == [
        "kept",
        "merged, a colour a group",
        "dropped before the language model",
        "dropped inside the language model",
    ]
    assert drawn["caption"] == (
        "one colour and outline is one merged group; dark ones left before the language model; "
        "dim ones left in the language model, at layer 1"
    )
    viz.overlay(image, halving(24))
    assert len(drawn["shown"]) == 7 and "6 of 24 cuts are drawn, evenly spaced" in drawn["caption"]
    assert [title.split(" (")[0] for _, title in drawn["shown"][1:]] == [
        f"vision tower, inside layer {layer}" for layer in (3, 7, 11, 15, 19, 23)
    ]
    viz.overlay(image, halving(24), step=2, title="mine")
    assert [title for _, title in drawn["shown"]][1:] == ["vision tower, inside layer 1 (tome): 62 of 64 tokens"]
    assert drawn["head"] == "mine" and "evenly" not in drawn["caption"]
    viz.overlay(image, trace([0, 1, 2, 3]))
    assert drawn["shown"][1][1] == "before any cut: 4 of 4 tokens" and drawn["caption"] == "every patch stayed"


@pytest.mark.parametrize("size", [(640, 40), (40, 640), (12, 12), (11, 11), (5, 7), (1, 1), (1, 900), (900, 3)])
@pytest.mark.parametrize("grid", [(24, 24), (2, 3)])
@pytest.mark.parametrize("cropped", [False, True])
def test_odd_pictures_are_drawn_so_that_every_patch_shows(size, grid, cropped):
    image = Image.new("RGB", size, KEPT)
    n = grid[0] * grid[1]
    owner = torch.tensor([-1 if patch % 2 else patch for patch in range(n)])
    found = PictureTrace(owner, ((Site("projected"), owner),), grid)
    preprocess = normalised(torchvision.Resize(48), torchvision.CenterCrop(48)) if cropped and max(size) < 900 else None
    drawn = plain(image, found, preprocess=preprocess)
    assert drawn.width % image.width == 0 and drawn.height % image.height == 0
    (piece,) = pieces.pieces_of(found, size, preprocess, None)
    placed = piece.scaled(drawn.width / image.width, drawn.height / image.height)
    for place in range(n):
        left, top, right, bottom = placed.cell(place)
        if 0 <= left <= right < drawn.width and 0 <= top <= bottom < drawn.height:
            dark = max(drawn.getpixel((left, top))) < 80
            assert dark == (place % 2 == 1), (place, drawn.size)
    sheet = viz.overlay(image, found, preprocess=preprocess)
    assert 400 < sheet.width < 3600 and 100 < sheet.height < 3600


def test_tiny_pictures_are_placed_as_large_ones_are():
    crop = normalised(torchvision.Resize(48), torchvision.CenterCrop(48))
    for size in ((10, 5), (2, 1), (1, 1), (3, 9)):
        short, (width, height) = min(size), size
        left, top = (width - short) / 2, (height - short) / 2
        assert region(size, crop) == pytest.approx((left, top, left + short, top + short), abs=0.05 * max(size))


def test_what_little_the_model_saw_is_drawn_large():
    crop = normalised(torchvision.Resize(48), torchvision.CenterCrop(48))
    found = trace([0, -1, 2, 3])
    few = pieces.pieces_of(found, (640, 40), crop, None)
    left, top, right, bottom = pieces.worth_showing((640, 40), few)
    assert 290 <= left <= 300 and 340 <= right <= 350 and (top, bottom) == (0, 40)
    whole = pieces.pieces_of(found, (640, 40), None, None)
    assert pieces.worth_showing((640, 40), whole) == (0, 0, 640, 40)


def test_a_sheet_holds_long_words():
    sheet = viz.overlay(Image.new("RGB", (40, 40), KEPT), trace([0, -1, 2, 3]), title="x" * 400 + " y")
    assert sheet.width < 1000 and sheet.height > 500


def test_a_cell_smaller_than_a_pixel_has_one():
    piece = pieces.Piece((0.0, 0.0, 3.0, 2.0), (6, 9), list(range(54)))
    for place in range(54):
        left, top, right, bottom = piece.cell(place)
        assert (left, top) <= (right, bottom) and left <= right and top <= bottom
