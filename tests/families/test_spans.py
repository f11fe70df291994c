"""Where pictures stand, and how their tokens fall into parts, rows and columns: what views show is what the host packs.

Tokens identify themselves: a view row is found by its embeddings, so that nothing here trusts the library's columns.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
from vlmtok.adapters.language.parts import PARTS
from vlmtok.adapters.language.parts import Look as Shown

import vlmtok
from vlmtok import Method, Site
from vlmtok.core.pictures import Picture

from .build import FAMILIES, PINPOINTS, llava_onevision, shared
from .harness import BY_CROP, batch, generate
from .methods import Look, Top
from .oracle import Cut, oracle
from .prompts import FIRST_FRAME, IMAGE, write
from .shots import AnyRes, packed_clip

RUN_CLIPS = {"qwen2_vl", "qwen2_5_vl"}


def rows_of(name, which):
    """The embeddings of a batch's prompts, `[L, C]` each."""
    asked = oracle(name, shared(name, "eager"))
    with torch.no_grad():
        return [asked.row(prompt, prompt.ids[:0], asked.encode(prompt)) for prompt in batch(name, which).prompts]


def seen_by(name, which, unit, layer=None):
    """What a method sees of a batch: its view rows."""
    model, look = shared(name, FAMILIES[name].attentions[0]), Look(unit, layer)
    with vlmtok.compress(model, look):
        generate(model, batch(name, which).inputs(), 1)
    return look.seen


def units_of(name, which):
    """Tokens, columns, parts, grid, and grid of a part of every picture; crops where only they can be told."""
    found = []
    for prompt, row in zip(batch(name, which).prompts, rows_of(name, which)):
        for picture in prompt.pictures:
            parts, grids = parts_of(name, picture), picture.shot.grids
            if name in BY_CROP and len(grids) > 1:
                for run, grid in zip(picture.runs(), grids, strict=True):
                    found.append((row.hidden[run], run, torch.zeros_like(run), grid[1:], grid[1:]))
            else:
                whole = len(grids) == 1 and not picture.shot.video
                one = grids[0][1:] if grids else None
                found.append((row.hidden[picture.columns], picture.columns, parts, one if whole else None, one))
    return found


def parts_of(name, picture):
    """Part of each placeholder: pushed through the host's packing where it has one."""
    if name in ("llava_next", "llava_onevision", "llava_next_video") and isinstance(FAMILIES[name].shots["I"], AnyRes):
        pushed = pushed_through(shared(name), picture.shot)
        if pushed is not None:
            return pushed
    shot = picture.shot
    return torch.tensor(shot.parts) if shot.parts else torch.zeros(len(shot), dtype=torch.int64)


def pushed_through(model, shot):
    """Crop numbers through LLaVA's packing: 0 the thumbnail, 1.. the crops, -1 newlines."""
    if shot.video or shot.parts:
        return None
    core = model.model
    crops = int((shot.arrays["pixel_values"][0].flatten(1).abs().sum(1) > 0).sum())
    side = core.config.vision_config.image_size // core.config.vision_config.patch_size
    numbers = torch.arange(crops).float()[:, None, None].expand(crops, side * side, 1)
    given = [[numbers], shot.arrays["image_sizes"]]
    if core.config.model_type.startswith("llava_next"):
        given.append("default")
    packed, _ = core.pack_image_features(*given, image_newline=torch.tensor([-1.0]))
    return packed[0][:, 0].round().long()


def only(seen, tokens):
    """The one view row with these embeddings."""
    found = [one for one in seen if one.tokens.shape == tokens.shape and torch.allclose(one.tokens, tokens, atol=1e-4)]
    assert len(found) == 1, f"{len(found)} view rows show a unit of {len(tokens)} tokens, of {len(seen)}"
    return found[0]


CASES = [
    (name, which)
    for name, family in FAMILIES.items()
    for which in ("rows", "several", "clips")
    if getattr(family, which)
]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_pictures(name, which):
    """One view row for each picture or clip, with its columns, parts and grid.

    No two units of a batch have as many tokens and different grids: a view has one grid for all its rows.
    """
    seen, wanted = seen_by(name, which, "picture"), units_of(name, which)
    assert len(seen) == len(wanted)
    for tokens, columns, parts, grid, _ in wanted:
        one = only(seen, tokens)
        assert torch.equal(one.columns, columns)
        assert torch.equal(one.part, parts)
        assert one.grid == grid


@pytest.mark.parametrize(("name", "which"), CASES)
def test_parts(name, which):
    """One view row for each thumbnail, crop and frame; separators belong to none."""
    seen, count = seen_by(name, which, "part"), 0
    for tokens, columns, parts, _, grid in units_of(name, which):
        for part in parts.unique().tolist():
            if part >= 0:
                one = only(seen, tokens[parts == part])
                assert torch.equal(one.columns, columns[parts == part])
                assert (one.part == part).all()
                assert grid is None or one.grid == grid
                count += 1
    assert len(seen) == count


@pytest.mark.parametrize(("name", "which"), CASES)
def test_traces(name, which):
    """Pictures in the order of the prompts, each with the grids that overlays are drawn on."""
    model, wanted = shared(name, FAMILIES[name].attentions[0]), units_of(name, which)
    with vlmtok.compress(model, Top(Cut(0.5)), trace=True) as run:
        generate(model, batch(name, which).inputs(), 1)
        found = run.trace()
    shots = [picture.shot for prompt in batch(name, which).prompts for picture in prompt.pictures]
    assert [one.patches for one in found.pictures] == [len(tokens) for tokens, *_ in wanted]
    assert [one.kept for one in found.pictures] == [int(len(tokens) / 2 + 0.5) for tokens, *_ in wanted]
    for one, (_, _, parts, whole, grid) in zip(found.pictures, wanted):
        shown = {part: shape for part, (shape, _) in one.grids().items()}
        assert set(shown) == set(parts.unique().tolist()) - {-1}
        assert whole is None or shown == {0: whole}
        assert grid is None or set(shown.values()) == {grid}
    if len(shots) == len(found):
        for one, shot in zip(found.pictures, shots):
            assert one.video == shot.video
            crops = "image_sizes" in shot.arrays and not shot.parts
            assert (one.canvas is not None) == crops
            if one.canvas is not None:
                (rows, columns), patches = one.canvas
                assert len(shot) == 16 + rows * (columns + 1) and len(patches) == rows * columns


@pytest.mark.parametrize(("name", "which"), CASES)
def test_samples(name, which):
    """One view row for each prompt with pictures, whatever stands between them."""
    seen = seen_by(name, which, "sample")
    wanted = [row for row in rows_of(name, which) if (row.owner >= 0).any()]
    assert len(seen) == len(wanted)
    for row in wanted:
        assert torch.equal(only(seen, row.hidden[row.owner >= 0]).columns, (row.owner >= 0).nonzero()[:, 0])


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_reach_the_decoder(name):
    at_input, inside = (seen_by(name, "several", "picture", layer) for layer in (None, 2))
    assert len(at_input) == len(inside)
    for one, other in zip(at_input, inside):
        assert torch.equal(one.part, other.part) and torch.equal(one.columns, other.columns) and one.grid == other.grid


@pytest.mark.parametrize("canvas", [(32, 64), (64, 32), (64, 64)])
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_canvas_in_every_shape(name, canvas):
    """Crops of one canvas row interleave; what un-padding takes off differs by shape."""
    assert list(canvas) in PINPOINTS
    height, width = {(32, 64): (30, 62), (64, 32): (62, 30), (64, 64): (64, 40)}[canvas]
    family, model = FAMILIES[name], shared(name)
    prompt = write("2I3", {"I": AnyRes(height, width, canvas)}, 5)
    look = Look("picture")
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    (one,) = look.seen
    wanted = pushed_through(model, prompt.pictures[0].shot)
    assert torch.equal(one.part, wanted)
    crops = canvas[0] * canvas[1] // 32**2
    assert set(wanted.tolist()) == {-1, *range(crops + 1)}


def test_a_shrunk_canvas_is_one_part():
    """OneVision shrinks a canvas that is too large: its tokens mix crops."""
    family = FAMILIES["llava_onevision"]
    model = replace(family, make=lambda: llava_onevision("anyres_max_1")).build()
    # 8 x 8 patches become 4 x 4, and each row gets a newline.
    large = AnyRes(64, 64, (64, 64))
    prompt = write("2I3", {"I": lambda generator: replace(large(generator), ids=(IMAGE,) * (16 + 4 * 5))}, 3)
    look = Look("picture")
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    (one,) = look.seen
    assert one.part.tolist() == [0] * 16 + ([1] * 4 + [-1]) * 4


@pytest.mark.parametrize("name", sorted(RUN_CLIPS))
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_frames_of_one_run(name, frames):
    family, model = FAMILIES[name], shared(name)
    prompt = write("3V2", {"V": packed_clip(frames, 2, 3, "run")}, 4)
    look = Look("picture")
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    (one,) = look.seen
    assert one.part.tolist() == [frame for frame in range(FIRST_FRAME, FIRST_FRAME + frames) for _ in range(6)]


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 3), (3, 2)])
def test_rows_of_one_picture_with_separators_between_them(rows, columns):
    """Rows down, columns across: no square tells them apart."""
    places = [2 + row * (columns + 1) + column for row in range(rows) for column in range(columns)]
    picture = Picture(0, 0, places)
    x = torch.zeros(1, places[-1] + 2, 4)
    assert PARTS["rows"](Shown([picture], x, torch.arange(x.shape[1])[None], None, None, None)) is None
    assert picture.grid == (rows, columns)


@dataclass(eq=False)
class Reads(Method):
    """Cuts nothing and notes the text behind the first token of a row's pictures."""

    seen: list[torch.Tensor] = field(default_factory=list, repr=False)

    def sites(self, layout):
        return [Site("projected", needs=("text",), scope="sample")]

    def reduce(self, view):
        self.seen += [view.signal("text")[row] for row in range(len(view.tokens))]


@pytest.mark.parametrize("name", ["mistral3", "llava", "smolvlm"])
def test_text_inside_a_picture_stands_behind_its_first_token(name):
    """Separators of rows are text: they count with what follows, in the order of the prompt."""
    model, reads, given = shared(name), Reads(), batch(name).inputs()
    with torch.no_grad(), vlmtok.compress(model, reads):
        model(**given)
    table = model.get_input_embeddings().weight
    wanted = []
    for ids, real in zip(given["input_ids"], given["attention_mask"].bool()):
        shown = ids == model.config.image_token_id
        if shown.any():
            behind = torch.arange(len(ids)) > int(shown.nonzero()[0, 0])
            wanted.append(table[ids[behind & real & ~shown]])
    assert len(reads.seen) == len(wanted) > 1
    for one in wanted:
        assert any(one.shape == other.shape and torch.allclose(one, other) for other in reads.seen)
    if name == "mistral3":
        inside = (given["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].diff()
        assert (inside > 1).any(), "no text stands inside the picture"
