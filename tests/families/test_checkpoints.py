"""`vlmtok run` on a checkpoint of every family: it answers, and overlays show the pixels that the kept tokens saw.

Towers are made short-sighted (no attention, no positions), so that a token tells of its own patch alone; then the
tokens that differ most from the others of their picture are those of the one thing in it.
"""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image, ImageDraw
from support import checkpoints
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok import Layout, Method, Reduction, Site, TokenView, loading
from vlmtok.lab import compare as comparing
from vlmtok.lab import prompts
from vlmtok.lab.comparing import joined
from vlmtok.lab.paint import LINES

from .build import TOWER_ONLY
from .checkpoints import READERS, WITHOUT, save

SIZE = (128, 96)
BLOCK = (72, 4, 91, 19)
"""Where the thing lies, both ends included: right of the middle, at the top, within one crop and few patches."""
BRIGHT, GROUND = (255, 255, 60), (90, 80, 100)
QUESTION = "what color is the circle ?"

SAVED = {**{name: lambda folder, name=name: save(name, folder) for name in READERS}, **checkpoints.FAMILIES}
SAVED["llava"] = checkpoints.llava


def photograph():
    image = Image.new("RGB", SIZE, GROUND)
    ImageDraw.Draw(image).rectangle(BLOCK, fill=BRIGHT)
    return image


@dataclass(eq=False)
class Odd(Method):
    """Keeps the tokens that differ most from the others, of thumbnail and crops apart."""

    keep: float = 0.3

    def sites(self, layout: Layout) -> list[Site]:
        if layout.has("projected"):
            return [Site("projected")]
        return [Site("vision", layout.stage("vision").last, "end")]

    def reduce(self, view: TokenView) -> Reduction:
        apart = torch.cdist(view.tokens.double(), view.tokens.double())
        same = (view.part[:, :, None] > 0) == (view.part[:, None, :] > 0)
        odd = (apart * same).sum(-1) / same.sum(-1)
        odd = torch.where(view.part < 0, -1.0, odd)
        count = max(1, round(self.keep * view.tokens.shape[1]))
        return Reduction(odd.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values)


def short_sighted(model):
    """Takes attention and positions out of the tower."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            far = any(part in name for part in ("out_proj", "o_proj", "attn.proj", "projection", "posit", "pos_embed"))
            if far and ("vision" in name or "visual" in name) and "patch" not in name:
                parameter.zero_()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}

    def load(name):
        if name not in found:
            found[name] = loading.load(str(SAVED[name](tmp_path_factory.mktemp(name.replace("-", "_")))))
        return found[name]

    return load


@pytest.mark.parametrize("name", SAVED)
def test_it_runs_and_the_overlay_shows_what_was_kept(name, loaded):
    model = loaded(name)
    method = "random:keep=0.3" if name not in TOWER_ONLY else "random:keep=0.3:stage=vision:layer=1"
    found = comparing.compare(model, photograph(), QUESTION, method, rounds=1, limit=0, max_new_tokens=2)
    assert found.overlay is not None, found.overlay_problem
    assert len(found.bare.ids) == 2 and found.image.size == SIZE
    assert (
        found.tokens.first == found.tokens.last == pytest.approx(0.3 * found.tokens.bare, abs=4) or name in TOWER_ONLY
    )
    assert found.tokens.last < found.tokens.bare


@pytest.mark.parametrize("name", SAVED)
def test_overlays_land_on_the_right_pixels(name, loaded):
    model, image = loaded(name), photograph()
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    short_sighted(model.model)
    try:
        inputs = prompts.encode_prompt(model, image, QUESTION)
        with vlmtok.compress(model.model, Odd(), trace=True) as run, torch.no_grad():
            model.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            trace = run.trace()
    finally:
        model.model.load_state_dict(state)
    found = joined(trace, SIZE, model.processor)
    drawn = vlmtok.overlay(image, found, preprocess=model.processor, plain=True)
    left, top, right, bottom = BLOCK
    inside = [drawn.getpixel((x, y)) for x in range(left + 4, right - 3) for y in range(top + 4, bottom - 3)]
    assert {colour for colour in inside if colour not in LINES} == {BRIGHT}, "tokens of the thing were dropped"
    ground = [drawn.getpixel((x, y)) for x in range(SIZE[0]) for y in range(SIZE[1])]
    assert sum(colour == GROUND for colour in ground) < 0.5 * len(ground), "most of the ground is left"


def test_every_family_has_a_checkpoint_or_a_reason():
    assert not set(SAVED) & set(WITHOUT)
    assert set(SAVED) | set(WITHOUT) == set(ROWS)
