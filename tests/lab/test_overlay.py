"""Overlays: patches land on the right pixels, whatever the preprocessing; colours say what became of them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from vlmtok import Site
from vlmtok.core.trace import PictureTrace, Trace
from vlmtok.errors import ParameterError
from vlmtok.lab import overlay as viz

torchvision = pytest.importorskip("torchvision.transforms")
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
    box = viz.region(size, normalised(torchvision.Resize(224), torchvision.CenterCrop(224)))
    short = min(size)
    left, top = (size[0] - short) / 2, (size[1] - short) / 2
    assert box == pytest.approx((left, top, left + short, top + short), abs=1.5)


@pytest.mark.parametrize("size", SIZES)
def test_plain_resize_shows_everything(size):
    box = viz.region(size, normalised(torchvision.Resize((224, 224))))
    assert box == pytest.approx((0, 0, *size), abs=1.5)
    assert viz.region(size) == (0, 0, *size)


@pytest.mark.parametrize("size", SIZES)
def test_padding_reaches_beyond_the_picture(size):
    side = max(size)
    left, top = -((side - size[0]) // 2), -((side - size[1]) // 2)
    assert viz.region(size, padded) == pytest.approx((left, top, left + side, top + side), abs=2)


def test_transformers_processors_are_read_the_same_way():
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    assert viz.region((300, 200), processor) == pytest.approx((50, 0, 250, 200), abs=1.5)


def test_crops_are_told_apart():
    def halves(image):
        whole = torchvision.ToTensor()(image.resize((64, 64)))
        return torch.stack([whole[:, :, :32], whole[:, :, 32:]])

    assert viz.region((200, 100), halves, 0) == pytest.approx((0, 0, 100, 100), abs=2)
    assert viz.region((200, 100), halves, 1) == pytest.approx((100, 0, 200, 100), abs=2)


@settings(max_examples=20, deadline=None)
@given(st.integers(40, 400), st.integers(40, 400), st.integers(0, 1000))
def test_any_crop_is_found(width, height, seed):
    g = torch.Generator().manual_seed(seed)
    wide, high = (int(s * (0.4 + 0.6 * torch.rand(1, generator=g).item())) for s in (width, height))
    left = int((width - wide) * torch.rand(1, generator=g).item())
    top = int((height - high) * torch.rand(1, generator=g).item())

    def crop(image):
        return torchvision.ToTensor()(image.crop((left, top, left + wide, top + high)).resize((64, 64)))

    found = viz.region((width, height), crop)
    assert found == pytest.approx((left, top, left + wide, top + high), abs=0.02 * max(width, height) + 1)


def trace(owner, grid=(2, 2), steps=(), parts=None):
    return PictureTrace(torch.tensor(owner), tuple(steps), grid, parts)


def test_kept_merged_and_dropped_look_different():
    image = Image.new("RGB", (80, 80), (200, 200, 200))
    owner = torch.tensor([0, 0, -1, -1])
    before = torch.tensor([0, 0, -1, 3])
    steps = [(Site("projected"), before), (Site("decoder", 3, "start"), owner)]
    drawn = viz.overlay(image, trace([0, 0, -1, -1], steps=steps))
    assert drawn.size == image.size
    merged, early, late = (drawn.getpixel(at) for at in ((20, 20), (20, 60), (60, 60)))
    assert merged == drawn.getpixel((60, 20)) and merged != (200, 200, 200)
    assert max(early) < max(late) < 200
    kept = viz.overlay(image, trace([0, 1, 2, 3]))
    assert kept.getpixel((20, 20)) == (200, 200, 200)


def test_patches_land_where_the_crop_put_them():
    image = Image.new("RGB", (160, 80), (200, 200, 200))
    preprocess = normalised(torchvision.Resize(32), torchvision.CenterCrop(32))
    drawn = viz.overlay(image, trace([-1, 1, 2, 3]), preprocess=preprocess)
    assert max(drawn.getpixel((60, 20))) < 60  # the first of four patches of the middle square
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

    for cell, colour in cells(viz.overlay(image, found)).items():
        assert (max(colour) < 60) if cell in dark else colour == KEPT
    # one crop alone: what it does not show is grey
    for (row, column), colour in cells(viz.overlay(image, found, part=2)).items():
        if row < 2 and column > 2:
            assert (max(colour) < 60) if (row, column) == (0, 3) else colour == KEPT
        else:
            assert colour not in (KEPT, (0, 0, 0)) and len(set(colour)) == 1
    assert viz.overlay(image, found, part=0).getpixel((10, 10)) == KEPT


def test_one_crop_with_its_separator_is_no_canvas():
    found = trace(range(5), (2, 2), parts=torch.tensor([0, 0, 0, 0, -1]))
    assert found.canvas is None and list(found.grids()) == [0]
    assert viz.overlay(Image.new("RGB", (8, 8), KEPT), found).getpixel((1, 1)) == KEPT


def test_of_a_clip_the_first_frame_is_drawn():
    parts = torch.tensor([1] * 6 + [2] * 6 + [-1])
    found = PictureTrace(torch.tensor([-1, *range(1, 7), -1, *range(8, 13)]), (), (2, 3), parts, video=True)
    assert found.canvas is None and {part: grid for part, (grid, _) in found.grids().items()} == {1: (2, 3), 2: (2, 3)}
    image = Image.new("RGB", (90, 60), KEPT)
    first, second = viz.overlay(image, found), viz.overlay(image, found, part=2)
    assert max(first.getpixel((10, 10))) < 60 and first.getpixel((45, 10)) == KEPT
    assert second.getpixel((10, 10)) == KEPT and max(second.getpixel((45, 10))) < 60


def test_parts_of_different_shapes():
    shapes, parts = {1: (1, 4), 2: (4, 2)}, torch.tensor([1] * 4 + [2] * 8)
    found = PictureTrace(torch.tensor([0, 1, 2, -1, *range(4, 12)]), (), None, parts, shapes=shapes)
    assert {part: grid for part, (grid, _) in found.grids().items()} == {1: (1, 4), 2: (4, 2)}
    drawn = viz.overlay(Image.new("RGB", (80, 20), KEPT), found, part=1)
    assert max(drawn.getpixel((70, 10))) < 60 and drawn.getpixel((50, 10)) == KEPT


def test_bad_input_says_what_is_wrong():
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ParameterError, match="PIL"):
        viz.overlay("cat.jpg", trace([0, 1, 2, 3]))
    with pytest.raises(ParameterError, match="picture 2"):
        viz.overlay(image, Trace([trace([0, 1, 2, 3])]), 2)
    with pytest.raises(ParameterError, match="no single grid"):
        viz.overlay(image, trace([0, 1, 2], None))
    with pytest.raises(ParameterError, match="part 7"):
        viz.overlay(image, trace([0, 1, 2, 3]), part=7)
    with pytest.raises(ParameterError, match="tensor of pixels"):
        viz.region((8, 8), lambda picture: "no pixels")
