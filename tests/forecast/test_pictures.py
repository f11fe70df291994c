"""`estimate` of pictures by their size, against reports of runs on such pictures through the hosts' processors."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace

import pytest
import torch
from families.build import TOWER_ONLY
from families.checkpoints import READERS, WITHOUT, save
from PIL import Image
from support import checkpoints
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.placeholders import placeholders

import vlmtok
from vlmtok import Method, Site, estimate, loading
from vlmtok.core.placing import PATCHES
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.forecast.subject import subject_of
from vlmtok.lab import prompts
from vlmtok.lab.tiny.families import FAMILIES
from vlmtok.loading import LoadError

SAVED = {**{name: lambda folder, name=name: save(name, folder) for name in READERS}, **checkpoints.FAMILIES}
SAVED["llava"] = checkpoints.llava
BROKEN = {"llama4": "transformers' own model cannot be called with hooks in this release"}
QUESTION = "what color is the circle ?"
SIZES = ((128, 96), (40, 200))
COMPARED = ("lines", "step", "cache", "layers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = {}

    def made(name):
        if name not in found:
            found[name] = SAVED[name](tmp_path_factory.mktemp(name.replace("-", "_")))
        return str(found[name])

    return made


@pytest.fixture(scope="module")
def loaded(folder):
    found = {}

    def load(name):
        if name not in found:
            found[name] = loading.load(folder(name))
        return found[name]

    return load


def run(model, inputs, spec):
    """The report of a prefill, and what ran."""
    with torch.no_grad(), vlmtok.compress(model.model, spec) as compression:
        model.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return compression.report(), compression


def around(model, inputs):
    """Text tokens in front of the first placeholder and behind the last."""
    from vlmtok.adapters import adapter_for

    adapter = adapter_for(model.model)
    numbers = [number for number in placeholders(adapter.core, adapter.spec) if number is not None]
    shown = torch.isin(inputs["input_ids"][0], torch.tensor(numbers)).nonzero().flatten().tolist()
    return shown[0], len(inputs["input_ids"][0]) - shown[-1] - 1


def same(report, planned):
    for name in COMPARED:
        assert getattr(planned, name) == getattr(report, name), name


METHODS = ("random:keep=0.5", "todre:keep=0.5:tau=none", "fastv:K=1:keep=0.5")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", [name for name in SAVED if name not in BROKEN])
def test_an_estimate_by_size_equals_the_report_of_such_a_picture(name, size, folder, loaded):
    model = loaded(name)
    inputs = prompts.encode_prompt(model, checkpoints.picture(*size), QUESTION)
    text = None if name in TOWER_ONLY else around(model, inputs)
    for spec in ("random:keep=0.5:stage=vision:layer=1",) if name in TOWER_ONLY else METHODS:
        try:
            report, compression = run(model, inputs, spec)
        except (MissingSignal, SiteError) as problem:  # of a family whose layers give no attention rows
            assert spec.startswith("fastv")
            with pytest.raises(type(problem)):
                estimate(folder(name), spec, image_size=size)
            continue
        assert any(site.after.low < site.before for site in report.sites)
        same(report, estimate(folder(name), spec, image_size=size, text_tokens=text, counts=compression))
        given = estimate(model, spec, image_size=size, text_tokens=text, counts=compression)  # with its own processor
        same(report, given)


@dataclass(eq=False)
class Noting(Method):
    """Notes rows and columns of what it is shown in a run, and of what it is asked about in an estimate."""

    unit: str = "picture"
    shown: set = field(default_factory=set)
    asked: set = field(default_factory=set)

    def sites(self, layout):
        return [Site("projected", scope=self.unit)]

    def reduce(self, view):
        if not view.tokens.is_meta:  # as its cost is counted
            self.shown.add((view.counts.n, view.counts.grid))

    def count(self, counts):
        if counts.n != PATCHES:  # what attaching asks about
            self.asked.add((counts.n, counts.grid))
        return counts.n


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", [name for name in SAVED if name not in BROKEN and name not in TOWER_ONLY])
def test_grids_of_an_estimate_are_those_of_the_run(name, size, loaded):
    """So that a method whose count refuses a grid is refused by the estimate."""
    model = loaded(name)
    inputs = prompts.encode_prompt(model, checkpoints.picture(*size), QUESTION)
    for unit in ("picture", "part"):
        in_run, planned = Noting(unit), Noting(unit)
        run(model, inputs, in_run)
        estimate(model, planned, image_size=size, text_tokens=around(model, inputs))
        assert in_run.shown and planned.asked == in_run.shown


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newlines_that_leave_with_a_cut_leave_in_an_estimate(name, size, loaded):
    model, spec = loaded(name), "visionzip:keep=4:contextual=2"
    inputs = prompts.encode_prompt(model, checkpoints.picture(*size), QUESTION)
    report, compression = run(model, inputs, spec)
    same(report, estimate(model, spec, image_size=size, text_tokens=around(model, inputs), counts=compression))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "idefics3", "qwen2_5_vl", "mistral3"])
def test_pictures_of_several_sizes_in_one_prompt(name, folder, loaded):
    model = loaded(name)
    processor, mark = model.processor, prompts.mark_of(model.processor)
    shown = [checkpoints.picture(*size) for size in SIZES]
    inputs = processor(images=[shown], text=[f"what {mark} color is {mark} ?"], return_tensors="pt")
    report, compression = run(model, dict(inputs), METHODS[0])
    source = subject_of(folder(name))
    sight = source.sight(SIZES, None)
    assert sum(one.tokens for picture in sight.pictures for one in picture) == report._runs[-1].visual
    # Marks stand in front of and behind pictures, too; what is left of the text lies between the two.
    first, last = around(model, dict(inputs))
    own = sum(one.tokens + one.inside + one.gap for picture in sight.pictures for one in picture)
    text = (first, inputs["input_ids"].shape[1] - own - first - last, last)
    same(report, estimate(source, METHODS[0], image_size=SIZES, text_tokens=text, counts=compression))


CLIPS = {
    "llava_onevision": "<video>",
    "qwen2_vl": "<|video_pad|>",
    "qwen2_5_vl": "<|video_pad|>",
    "qwen3_vl": "<|video_pad|>",
    "internvl": "<video>",
    "gemma4": "<|video|>",
}


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("spec", [METHODS[0], "evs:rate=0.5", "vidcom2:rate=0.5", "divprune:keep=0.5:scope=frame"])
@pytest.mark.parametrize("name", CLIPS)
def test_frames_equal_the_report_of_such_a_clip(name, spec, frames, folder, loaded):
    import numpy

    model = loaded(name)
    if name == "internvl" and ":rate=" in spec:
        spec += ":source=pictures"  # its processor writes frames so
    clip = numpy.stack([numpy.asarray(checkpoints.picture(64, 48))] * frames)
    made = model.processor(
        videos=[clip], text=[f"what color {CLIPS[name]} is ?"], do_sample_frames=False, return_tensors="pt"
    )
    inputs = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    report, compression = run(model, inputs, spec)
    planned = estimate(
        folder(name),
        spec,
        image_size=(64, 48),
        frames=frames,
        text_tokens=around(model, inputs),
        counts=compression,
    )
    same(report, planned)


@pytest.mark.parametrize("spec", ["evs:rate=0.5", "vidcom2:rate=0.5", "random:keep=0.5:scope=frame"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_told_in_numbers_equal_a_run(name, spec):
    family = FAMILIES[name]
    model, batch = family.build(), family.batch("3V2")
    (picture,) = batch.prompts[0].pictures
    with vlmtok.compress(model, spec) as compression, torch.no_grad():
        model.generate(**batch.inputs(), max_new_tokens=1)
        report = compression.report()
    behind = len(batch.prompts[0].ids) - int(picture.columns[-1]) - 1
    inside = int(picture.columns[-1] - picture.columns[0]) + 1 - len(picture.columns)
    text = (int(picture.columns[0]) + inside, behind)
    planned = estimate(
        model, spec, visual_tokens=len(picture.columns), frames=max(picture.shot.parts), text_tokens=text
    )
    assert planned.layers == report.layers and planned.cache == report.cache
    with pytest.raises(ParameterError, match="12 visual tokens as 5 frames"):
        estimate(model, spec, visual_tokens=12, frames=5)


def test_families_without_clips_refuse_frames(folder):
    for name in ("llava", "llava_next", "mistral3", "gemma3", "idefics3", "paddleocr_vl"):
        with pytest.raises(ParameterError, match=r"frames: .* takes pictures and no video"):
            estimate(folder(name), "random", image_size=(64, 48), frames=4)


def test_every_family_is_tried_or_named():
    assert set(SAVED) | {"smolvlm"} | set(WITHOUT) == set(ROWS)


# ---------------------------------------------------------------------- what prepares pictures
def test_the_settings_of_the_folder_decide(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder("qwen2_5_vl"), copy)
    stored = json.loads((copy / "processor_config.json").read_text())
    stored["image_processor"]["size"] = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    (copy / "processor_config.json").write_text(json.dumps(stored))
    tokens = [
        estimate(str(place), "random:keep=0.5", image_size=(128, 96)).layers[-1].before - 64
        for place in (folder("qwen2_5_vl"), copy)
    ]
    assert tokens == [48, 12]  # 128 x 96 is 8 x 6 squares of 16 pixels; 64 x 48, which is 4 x 3, is the most now


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "internvl", "gemma3"])
def test_a_folder_without_a_tokenizer_tells_the_same(name, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder(name), copy)
    for file in copy.glob("*token*"):
        file.unlink()
    for size in SIZES:
        found, wanted = (subject_of(place).sight((size,), None) for place in (str(copy), folder(name)))
        # The words between crops are the vocabulary's, which is not there.
        assert [[replace(one, gap=0) for one in picture] for picture in found.pictures] == [
            [replace(one, gap=0) for one in picture] for picture in wanted.pictures
        ]
        assert (found.crops, found.patches, found.grids) == (wanted.crops, wanted.patches, wanted.grids)


def test_what_is_missing_is_said(folder, tmp_path, loaded):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(f"{folder('llava_next')}/config.json", bare)
    size = {"image_size": (64, 48)}
    with pytest.raises(LoadError, match="neither preprocessor_config.json nor processor_config.json"):
        estimate(str(bare), "random", **size)
    model = loaded("llava_next")
    with pytest.raises(ParameterError, match="a model alone does not say how pictures are prepared; give processor="):
        estimate(model.model, "random", **size)
    with pytest.raises(ParameterError, match="a configuration does not say how pictures are prepared"):
        estimate(model.model.config, "random", **size)
    given = [estimate(one, "random", processor=model.processor, **size) for one in (model.model, model.model.config)]
    assert given[0].lines == given[1].lines == estimate(model, "random", **size).lines
    with pytest.raises(ParameterError, match="processor=CLIPImageProcessor lays out no prompts"):
        estimate(model.model, "random", processor=loaded("llava").processor.image_processor, **size)
    with pytest.raises(ParameterError, match="vit-b-16 is a tower"):
        estimate("vit-b-16", "tome", **size)
    with pytest.raises(LoadError, match=r"cannot take a picture of 4000 x 4 pixels"):
        estimate(folder("qwen2_5_vl"), "random", image_size=(4000, 4))


WRONG = [
    ({"image_size": 5}, "must be .width, height. in pixels"),
    ({"image_size": (5, 5, 5)}, "must be .width, height. in pixels"),
    ({"image_size": "640x480"}, "must be .width, height. in pixels"),
    ({"image_size": (5, 0)}, "image_size=0 must be an integer"),
    ({"image_size": (5, 2.5)}, "image_size=2.5 must be an integer"),
    ({"image_size": [(5, 5), (6, 6)], "pictures": 3}, "image_size has 2 sizes for 3 pictures"),
    ({"image_size": (5, 5), "visual_tokens": 576}, "image_size says how many visual_tokens there are"),
    ({"image_size": (5, 5), "crops": 1}, "image_size says how many crops there are"),
    ({"image_size": (5, 5), "frames": 0}, "frames=0 must be an integer"),
    ({"frames": 8}, "image_size=.width, height. says how large"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG)
def test_what_is_not_possible_says_so(wrong, says):
    with pytest.raises(ParameterError, match=says):
        estimate("llava-1.5-7b", "fastv", **wrong)


# ---------------------------------------------------------------------- crops, never guessed
def tower(report):
    return report.line("vision").before


def test_crops_of_next_are_derived_or_asked_for(folder):
    place, crops = (
        folder("llava_next"),
        "do(es)? not say how many: pass crops=, or image_size=",
    )
    for tokens in (60, 70, 16):
        with pytest.raises(ParameterError, match=crops):
            estimate(place, "fastv", visual_tokens=tokens)
    told = estimate(place, "fastv", visual_tokens=60, crops=5)
    shown = estimate(place, "fastv", image_size=(128, 96))
    # Three blocks of 17 tokens and 16 patches in the stem, for each of five crops.
    assert tower(told) == tower(shown) == 5 * tower(estimate(place, "fastv", visual_tokens=16, crops=1))
    assert round(tower(shown) / 1e6, 2) == 2.86
    # What a canvas leaves of crops need not be even.
    assert estimate(place, "todre", visual_tokens=70, crops=5).layers[-1].before == 70 + 64


def test_presets_of_next_ask_too():
    assert estimate("llava-next-7b", "fastv").line("vision") == estimate(
        "llava-next-7b", "fastv", visual_tokens=2880
    ).line("vision")
    with pytest.raises(ParameterError, match="pass crops="):
        estimate("llava-next-7b", "fastv", visual_tokens=2144)
    three = estimate("llava-next-7b", "fastv", visual_tokens=1728, crops=3)
    assert 5 * tower(three) == 3 * tower(estimate("llava-next-7b", "fastv"))


TILED = ["internvl", "qianfan_ocr", "idefics3", "gemma3", "aya_vision", "cohere2_vision"]


@pytest.mark.parametrize("name", TILED)
def test_crops_follow_where_all_are_alike(name, folder):
    """A tile's tokens, by the processor, are what the row says, and a number of tokens is a number of tiles."""
    place = folder(name)
    source = subject_of(place)
    sight = source.sight(((128, 96),), None)
    tokens = sum(one.tokens for one in sight.pictures[0])
    tile = source.shape.tile
    assert tokens == sight.crops * tile
    by_size, by_tokens = (
        estimate(place, "random", image_size=(128, 96)),
        estimate(place, "random", visual_tokens=tokens),
    )
    assert tower(by_size) == tower(by_tokens)
    assert tower(estimate(place, "random", crops=3)) == tower(estimate(place, "random", visual_tokens=3 * tile))
    with pytest.raises(
        ParameterError, match=rf"makes {tile} visual tokens of each row of its tower, so visual_tokens="
    ):
        estimate(place, "random", visual_tokens=2 * tile + 1)
    with pytest.raises(ParameterError, match="with crops=1 is not possible"):
        estimate(place, "random", visual_tokens=2 * tile, crops=1)


def test_every_family_whose_pictures_are_several_rows_is_known(folder):
    """Those for which some size gives more rows of the tower than pictures."""
    several = set()
    for name in SAVED:
        sight = subject_of(folder(name)).sight(((128, 96),), None)
        if sight.crops > 1:
            several.add(name)
    known = {name for name, row in ROWS.items() if (row.joins is not None or row.varies) and name not in WITHOUT}
    assert several == known - {"gemma3"}  # pan and scan is off
    assert known == {*TILED, "llama4", "llava_next", "llava_onevision", "lfm2_vl"}
    assert subject_of(folder("llama4")).shape.tile == 16
    with pytest.raises(ParameterError, match="does not say how many: pass crops="):
        estimate(folder("lfm2_vl"), "random", visual_tokens=75)


def test_blank_pictures_tell_what_any_picture_tells(folder, loaded):
    """Nothing depends on what a picture shows."""
    model = loaded("llava_next")
    noise = Image.effect_noise((128, 96), 80).convert("RGB")
    made = [prompts.encode_prompt(model, image, QUESTION) for image in (noise, Image.new("RGB", (128, 96)))]
    assert made[0]["input_ids"].tolist() == made[1]["input_ids"].tolist()
