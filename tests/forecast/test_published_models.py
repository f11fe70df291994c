"""Presets that are made of configurations: their sizes as published, and pictures as the hosts' processors say."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmtok import budget, estimate
from vlmtok.errors import ParameterError
from vlmtok.forecast.presets import PRESETS, preset
from vlmtok.forecast.published import PUBLISHED
from vlmtok.forecast.subject import subject_of

# Parameters, layers, width, blocks of the tower, width of the tower.
MODELS = {
    "llava-onevision-0.5b": (893_675_552, 24, 896, 26, 1152),
    "llava-onevision-7b": (8_030_807_584, 28, 3584, 26, 1152),
    "qwen2.5-vl-3b": (3_754_622_976, 36, 2048, 32, 1280),
    "qwen2.5-vl-7b": (8_292_166_656, 28, 3584, 32, 1280),
    "qwen3-vl-2b": (2_127_532_032, 28, 2048, 24, 1024),
    "qwen3-vl-4b": (4_437_815_808, 36, 2560, 24, 1024),
    "qwen3-vl-8b": (8_767_123_696, 36, 4096, 27, 1152),
    "internvl3-1b": (938_119_296, 24, 896, 24, 1024),
    "internvl3-8b": (7_944_300_032, 28, 3584, 24, 1024),
    "gemma3-4b": (4_300_079_472, 34, 2560, 27, 1152),
    "gemma3-12b": (12_187_325_040, 48, 3840, 27, 1152),
    "smolvlm2-256m": (256_484_928, 30, 576, 12, 768),
    "smolvlm2-2.2b": (2_246_784_880, 24, 2048, 27, 1152),
}


def sight(name, *sizes, frames=None):
    return subject_of(name).sight(sizes, frames)


def tokens(name, *sizes, frames=None):
    return sum(one.tokens for picture in sight(name, *sizes, frames=frames).pictures for one in picture)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_published_models(name):
    parameters, layers, width, blocks, tower = MODELS[name]
    row, shape = PUBLISHED[name], preset(name)
    config = row.model().config
    assert sum(parameter.numel() for parameter in row.model().parameters()) == parameters
    assert shape.language is not None and (shape.language.depth, shape.language.blocks[0].width) == (layers, width)
    vision = config.vision_config
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    assert (depth, vision.hidden_size) == (blocks, tower)
    kv, head = config.text_config.num_key_value_heads, shape.language.blocks[0].head_width
    assert shape.language.blocks[0].kv_bytes == 2 * kv * head * 2  # keys and values in half precision


def test_every_published_model_is_tried():
    written = {"llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-13b"}
    assert set(MODELS) == set(PUBLISHED) - written and set(PUBLISHED) <= set(PRESETS)


# Pictures whose tokens are known from the models' papers and cards: size, tokens without separators, rows of the tower.
KNOWN = [
    ("qwen2.5-vl-7b", (896, 896), 1024, 1),
    ("qwen2.5-vl-3b", (1260, 700), 45 * 25, 1),
    ("qwen3-vl-4b", (1024, 1024), 1024, 1),
    ("qwen3-vl-8b", (1280, 736), 40 * 23, 1),
    ("internvl3-8b", (448, 448), 256, 1),
    ("internvl3-8b", (896, 896), 5 * 256, 5),
    ("internvl3-1b", (448 * 4, 448 * 3), 13 * 256, 13),
    ("gemma3-4b", (300, 900), 256, 1),
    ("gemma3-12b", (896, 896), 256, 1),
    ("smolvlm2-256m", (2048, 2048), 17 * 64, 17),
    ("smolvlm2-2.2b", (1536, 1536), 17 * 81, 17),
    ("llava-onevision-7b", (2304, 2304), 7290, 37),
    ("llava-onevision-0.5b", (384, 384), 2 * 729, 2),
    ("llava-next-7b", (672, 672), 2880, 5),
    ("llava-1.5-7b", (640, 480), 576, 1),
]


@pytest.mark.parametrize(("name", "size", "count", "rows"), KNOWN)
def test_pictures_that_are_known(name, size, count, rows):
    found = sight(name, size)
    apart = sum(one.apart for one in found.pictures[0])
    assert tokens(name, size) - apart == count and found.crops == rows
    report = estimate(name, "fastv", image_size=size)
    inside = sum(one.inside + one.gap for one in found.pictures[0])
    assert report.layers[-1].before == count + apart + inside + 64
    assert any(f"of {size[0]} x {size[1]} pixels" in note for note in report.notes)


def test_grids_and_frames():
    assert sight("qwen2.5-vl-7b", (896, 448)).grids == ((1, 32, 64),)
    assert sight("qwen2.5-vl-7b", (448, 448), frames=8).grids == ((4, 32, 32),)
    assert tokens("qwen2.5-vl-7b", (448, 448), frames=8) == 4 * 16 * 16
    assert sight("qwen3-vl-8b", (512, 512), frames=7).grids[0][0] == 4  # an odd frame is shown twice
    # OneVision pools a frame to 14 x 14, and puts one separator behind all.
    clip = sight("llava-onevision-7b", (640, 360), frames=32)
    assert clip.crops == 32 and clip.pictures[0][0].parts == (196,) * 32 and clip.pictures[0][0].apart == 1
    assert tokens("internvl3-8b", (1920, 1080), frames=6) == 6 * 256
    with pytest.raises(ParameterError, match="gemma-3-4b-it takes pictures and no video"):
        sight("gemma3-4b", (64, 64), frames=2)


def test_a_picture_of_a_known_size_is_counted_where_nothing_is_said():
    report = estimate("qwen2.5-vl-7b", "fastv")
    assert report.lines == estimate("qwen2.5-vl-7b", "fastv", image_size=(896, 896)).lines
    assert "picture of 896 x 896 pixels, by the model's processor: 1,024 visual tokens" in report.notes[0]
    two = estimate("qwen2.5-vl-7b", "fastv", pictures=2)
    assert two.layers[-1].before == 2 * 1024 + 64


def test_a_budget_by_the_size_of_a_picture():
    made = budget("divprune", "qwen2.5-vl-7b", tokens=256, image_size=(896, 896))
    assert made.keep == pytest.approx(0.25, abs=0.005) and made.budget.bare == 1024
    frames = budget("divprune", "qwen2.5-vl-7b", tokens=0.5, image_size=(448, 448), frames=4)
    assert frames.budget.bare == 2 * 16 * 16


# ---------------------------------------------------------------------- any size
def host_counts(name, high, wide):
    """Tokens as the host's own count of them says, without pixels, and rows of the tower or None."""
    reader = PUBLISHED[name].reader()
    processor = reader.processor
    if name.startswith("smolvlm"):
        rows = processor.image_processor.get_number_of_image_patches(high, wide, {})
        rows = rows[0] if isinstance(rows, tuple) else rows
        return rows * processor.image_seq_len, rows
    told = processor._get_num_multimodal_tokens(image_sizes=[(high, wide)])
    count, rows = told.num_image_tokens[0], told.num_image_patches[0]
    if name.startswith("internvl"):
        return count - 2, rows  # its marks around a picture
    return count, None if name.startswith("llava") else rows


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-2b", "internvl3-1b", "smolvlm2-2.2b", "gemma3-4b"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(wide=st.integers(30, 1500), high=st.integers(30, 1500))
def test_sizes_agree_with_the_hosts_own_count(name, wide, high):
    _agrees(name, wide, high)


@pytest.mark.parametrize("name", ["llava-next-7b", "llava-onevision-0.5b"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(wide=st.integers(60, 1500), high=st.integers(60, 1500))
def test_canvases_agree_with_the_hosts_own_count(name, wide, high):
    _agrees(name, wide, high)


def _agrees(name, wide, high):
    found = sight(name, (wide, high))
    count, rows = host_counts(name, high, wide)
    assert sum(one.tokens for one in found.pictures[0]) == count
    for one in found.pictures[0]:
        assert not one.parts or sum(one.parts) + one.apart == one.tokens
    if found.grids:
        ((frames, high_patches, wide_patches),) = found.grids
        assert frames * high_patches * wide_patches == found.patches == rows == 4 * count
    elif rows is not None:
        assert found.crops == rows
