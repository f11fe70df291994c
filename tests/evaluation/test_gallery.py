"""Folders of anybody's files: what becomes a picture, and what is said of the rest."""

import contextlib
import os

import numpy as np
import pytest
from PIL import Image

from vlmtok.errors import ParameterError
from vlmtok.evaluation.gallery import gallery, picture
from vlmtok.loading import LoadError, open_picture

GRADIENT = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.fixture
def folder(tmp_path):
    """Pictures of all modes, and files that are none."""
    rgb = Image.fromarray((GRADIENT[..., None] / 257 * np.array([1, 0.5, 0.2])).astype(np.uint8))
    rgb.save(tmp_path / "plain.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "print.jpg")
    rgb.convert("RGBA").save(tmp_path / "alpha.png")
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(GRADIENT.astype(np.uint16)).save(tmp_path / "scan.png")
    other = Image.new("RGB", rgb.size, "blue")
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[other, other])
    (tmp_path / "inner").mkdir()
    rgb.save(tmp_path / "inner" / "deep.webp")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "plain.png").read_bytes()[:200])
    Image.fromarray((GRADIENT / 65535).astype(np.float32)).save(tmp_path / "height.tiff")
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    Image.new("1", (10000, 10000)).save(tmp_path / "large.png")
    return tmp_path


PICTURES = ["alpha.png", "grey.png", "moving.gif", "palette.gif", "plain.png", "print.jpg", "scan.png"]
SKIPPED = {
    "bomb.png": "exceeds limit",
    "cut.png": "cannot read picture",
    "empty.jpg": "is empty",
    "height.tiff": "no known range",
    "large.png": "exceeds limit",
    "notes.txt": "no picture that Pillow can read",
}


def test_every_file_is_a_picture_or_said_to_be_none(folder):
    said = []
    found = gallery(folder, progress=lambda what, done, steps: said.append((what, steps)))
    assert [found.name(path) for path in found.paths] == [*PICTURES, "inner/deep.webp"] and len(found) == 8
    assert {found.name(path) for path in found.skipped} == set(SKIPPED)
    for path, why in found.skipped.items():
        assert SKIPPED[found.name(path)] in why and "\n" not in why
    assert sorted(found.notes())[0].startswith("skipped bomb.png: ")
    assert len(said) == 14 and said[0] == ("opening alpha.png", 14)
    for path in found.paths:
        assert picture(path).mode == "RGB" and picture(path).size == (64, 64)


def test_sixteen_bits_are_not_cut_off(folder):
    """Pillow's own conversion makes all but the darkest 0.4 % white."""
    made = np.asarray(open_picture(folder / "scan.png"))
    assert np.array_equal(made[..., 0], (GRADIENT.astype(np.uint16) >> 8)) and np.ptp(made) == 255
    assert np.asarray(Image.open(folder / "scan.png").convert("RGB")).mean() > 253


def test_the_first_frame_of_an_animation(folder):
    moving = np.asarray(open_picture(folder / "moving.gif")).astype(int)
    plain = np.asarray(open_picture(folder / "plain.png")).astype(int)
    assert abs(moving - plain).mean() < 10


def test_a_limit(folder):
    assert len(gallery(folder, limit=3)) == 3
    with pytest.raises(ParameterError, match="limit=0"):
        gallery(folder, limit=0)


def test_folders_that_hold_nothing(folder, tmp_path_factory):
    with pytest.raises(LoadError, match="there is no folder '.*nowhere'$"):
        gallery(folder / "nowhere")
    with pytest.raises(LoadError, match="it is a file"):
        gallery(folder / "plain.png")
    bare = tmp_path_factory.mktemp("bare")
    with pytest.raises(LoadError, match="no picture in folder .*: it is empty"):
        gallery(bare)
    (bare / "notes.txt").write_text("no picture")
    with pytest.raises(LoadError, match=r"skipped notes\.txt: .* no picture that Pillow"):
        gallery(bare)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_changed_files_are_load_errors_or_pictures(tmp_path, kind):
    """Whatever a decoder raises on bytes that were changed."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    for number in range(40):
        data = bytearray(whole[: random.integers(1, len(whole)) if number % 3 == 0 else None])
        for place in random.integers(0, min(len(data), 90 if number % 2 else len(data)), 5):
            data[place] = random.integers(256)
        (tmp_path / "changed").write_bytes(data)
        with contextlib.suppress(LoadError):
            assert picture(tmp_path / "changed").mode == "RGB"


def test_a_decoder_that_raises_anything_is_a_load_error(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(image):
        raise RuntimeError("Failed to decode image: no item")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    with pytest.raises(LoadError, match="cannot read picture .*a.png': Failed to decode image"):
        open_picture(tmp_path / "a.png")


def test_links_and_devices_are_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    found = gallery(tmp_path)
    assert len(found) == 1 and not found.skipped
