"""Signals of towers whose patches the projector joins in squares: at the tokens that each square becomes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from support.checks import assert_equal
from torch import Tensor
from vlmtok.adapters.language.patches import fits, token_means

import vlmtok
from vlmtok import Layout, Method, Site, TokenView
from vlmtok.errors import CacheError, HostChanged

from .build import FAMILIES, shared
from .harness import generate
from .methods import InTower
from .towers_by_hand import PREFIX, SQUARES, blocks_of, crops_of_prompt, members, members_in, signals

NAMES = ("received_attention", "flat_attention", "turned_keys", "turned_keys_full", "outputs")


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes signals of every layer at the language model's input, token by token."""

    names: tuple[str, ...] = NAMES
    layers: tuple[int, ...] = (-1,)
    heard: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list, repr=False)

    scope = "sample"

    def sites(self, layout: Layout) -> list[Site]:
        return [
            Site("projected", needs=tuple(f"{name}@vision:{layer}" for name in self.names for layer in self.layers))
        ]

    def reduce(self, view: TokenView) -> None:
        for row in range(len(view.tokens)):
            found = {need: view.signal(need)[row] for need in view.signals}
            self.heard.append((view.columns[row], found))


def token_first(need: str, value: Tensor) -> Tensor:
    """A signal of a view row as `[N, c]`."""
    if need.startswith("cls_attention"):
        return value.T
    return value.unsqueeze(-1) if value.dim() == 1 else value


@pytest.mark.parametrize("name", SQUARES)
def test_a_token_is_made_of_the_patches_of_its_square(name: str) -> None:
    """Of which patches the gradients of every token speak."""
    assert_squares(members(name))


def assert_squares(mine: Tensor) -> None:
    n, patches = mine.shape
    side = int(patches**0.5)
    assert fits((side, side), n) and (mine.sum(1) == patches // n).all() and (mine.sum(0) == 1).all()
    single = torch.eye(patches).unsqueeze(0)  # patch p's signal is the p-th unit vector
    assert torch.equal(token_means("raster", single, 1, (side, side), n)[0] > 0, mine)


LARGER = {
    "smolvlm": (4, 12, lambda config: setattr(config, "scale_factor", 4)),
    "idefics3": (3, 9, lambda config: setattr(config, "scale_factor", 3)),
    "gemma3": (4, 12, lambda config: setattr(config, "mm_tokens_per_image", 9)),
    "internvl": (4, 12, lambda config: setattr(config, "downsample_ratio", 0.25)),
}
"""Squares of more patches a side, as released SmolVLM and Gemma 3 have: patches of square and picture, and a change."""


@pytest.mark.parametrize("name", LARGER)
def test_larger_squares(name: str) -> None:
    """Nine tokens in three rows: an order of columns shows."""
    square, side, change = LARGER[name]
    config = copy.deepcopy(shared(name).config)
    vision = config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    size = side * patch
    vision.image_size = size if isinstance(vision.image_size, int) else [size, size]
    change(config)
    model = type(shared(name))(config).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():  # hosts begin some with zeros
        weight.data.normal_(0, 0.1, generator=generator)
    mine = members_in(name, model)
    assert mine.shape == (9, side * side) and int(mine[0].sum()) == square * square
    assert_squares(mine)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SQUARES)
def test_signals_equal_the_hosts_own_attention(name: str, kind: str) -> None:
    """Every layer, several pictures and crops in rows of a padded batch, rows without pictures among them."""
    family, model = FAMILIES[name], shared(name, kind)
    batch = family.batch(*family.several)
    depth = len(blocks_of(name))
    listen = Listen((*NAMES, *(["cls_attention"] if name in PREFIX else [])), tuple(range(depth)))
    with torch.no_grad(), vlmtok.compress(model, listen):
        model(**batch.inputs())
    rows = [prompt for prompt in batch.prompts if prompt.pictures]
    assert len(listen.heard) == len(rows) > 1
    by_length = sorted(listen.heard, key=lambda one: len(one[0]))
    for prompt, (_, found) in zip(sorted(rows, key=lambda one: int((one.kinds > 0).sum())), by_length, strict=True):
        for layer in range(depth):
            for key, wanted in signals(name, crops_of_prompt(prompt), layer).items():
                need = f"{key}@vision:{layer}"
                if need in found:
                    assert_equal(
                        token_first(need, found[need]), wanted.flatten(0, 1), 1e-6 if "attention" in key else 1e-5
                    )


@pytest.mark.parametrize("options", [{"num_beams": 3, "output_logits": False}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", SQUARES)
def test_every_row_has_its_own(name: str, options: dict) -> None:
    """Beams and steps without a cache show pictures again; each row gets the signals of its own."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*family.several)
    listen = Listen(("received_attention",))
    with vlmtok.compress(model, listen):
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, **options)
    beams = options.get("num_beams", 1)
    for prompt in batch.prompts:
        if prompt.pictures:
            wanted = signals(name, crops_of_prompt(prompt))["received_attention"].flatten()
            same = [f for _, found in listen.heard for f in found.values() if f.shape == wanted.shape]
            assert sum(torch.allclose(one, wanted, atol=1e-6) for one in same) >= beams * (1 if beams > 1 else 2)


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_pictures_of_another_call_are_refused(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    first, second = (family.collect(family.prompt("2J3", seed)).inputs() for seed in (1, 2))
    given = {key: value for key, value in first.items() if key != "pixel_values"}
    with vlmtok.compress(model, "visionzip:keep=0.5"), torch.no_grad():
        old = model.model.get_image_features(first["pixel_values"], return_dict=True)
        model(**given, mm_encoder_outputs={"image": old})
        model.model.get_image_features(second["pixel_values"], return_dict=True)
        with pytest.raises(CacheError, match="encode and ask in one call"):
            model(**given, mm_encoder_outputs={"image": old})


@pytest.mark.parametrize("merge", [False, True])
def test_a_cut_tower_gives_every_patch_what_its_slot_has(merge: bool) -> None:
    """Patches that a tower dropped have none; those that it joined in pairs share one; all rows of attention are 1."""
    family, model = FAMILIES["smolvlm"], shared("smolvlm")
    listen = Listen(("received_attention",))
    with vlmtok.compress(model, [InTower(merge), listen]), torch.no_grad():
        generate(model, family.batch("2I3").inputs(), 1)
    ((_, found),) = listen.heard
    received = found["received_attention@vision:-1"]
    assert float(received.sum()) * (64 // len(received)) == pytest.approx(2 if merge else 1, abs=1e-5)


def test_padding_of_a_picture_gets_nothing() -> None:
    """Tokens of nothing but padding have no attention, and so are never chosen for it."""
    family, model = FAMILIES["smolvlm"], shared("smolvlm")
    inputs = family.batch("2I3").inputs()
    mask = torch.ones(*inputs["pixel_values"].shape[:2], *inputs["pixel_values"].shape[-2:], dtype=torch.long)
    mask[..., :, mask.shape[-1] // 2 :] = 0
    listen = Listen(("received_attention",))
    with vlmtok.compress(model, listen), torch.no_grad():
        model(**inputs, pixel_attention_mask=mask)
    ((_, found),) = listen.heard
    (received,) = found.values()
    grid = received.unflatten(0, (4, 4))
    assert (grid[:, 2:] == 0).all() and (grid[:, :2] > 0).all()
    with vlmtok.compress(model, "visionzip:keep=8:contextual=0", trace=True) as run, torch.no_grad():
        model(**inputs, pixel_attention_mask=mask)
        owner = run.trace().pictures[0].owner
    assert torch.equal((owner >= 0).unflatten(0, (4, 4)), grid > 0)


def test_a_projector_of_another_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of the host that joins other patches is no silent change."""
    family, model = FAMILIES["internvl"], shared("internvl")
    module = model.model.multi_modal_projector
    made = module.forward
    monkeypatch.setattr(module, "forward", lambda x: made(x)[:, :-1])
    with vlmtok.compress(model, "visionzip:keep=0.5"), torch.no_grad(), pytest.raises(HostChanged, match="squares"):
        model.model.get_image_features(family.batch("2I3").inputs()["pixel_values"])
