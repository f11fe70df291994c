"""Signals of a tower's crops at the language model's input: they go the way that the features of their patches go."""

from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers as tf
from torch import Tensor
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.packing import Encoded, Packing
from vlmtok.adapters.language.spans import IMAGE as IMAGES

import vlmtok
from vlmtok import Layout, Method, Site, TokenView
from vlmtok.core.pictures import Picture
from vlmtok.core.settings import keep_count
from vlmtok.errors import CacheError, MissingSignal, SiteError
from vlmtok.mergers.aim import merged_count

from .build import FAMILIES, llava_onevision, shared
from .canvas import EDGE, attention_of, canvas_by_hand, crops_of, halved, outputs_of, real_crops
from .harness import NOISE, STEPS, generate
from .methods import InTower, Look
from .oracle import oracle
from .prompts import IMAGE, write
from .shots import AnyRes

NAMES = {"llava_next": "cls_attention", "llava_onevision": "received_attention"}
PICTURES = {
    "wide": AnyRes(30, 62, (32, 64)),
    "high": AnyRes(62, 30, (64, 32)),
    "square canvas": AnyRes(40, 60, (64, 64)),
    "whole crops of padding": AnyRes(64, 33, (64, 64)),
    "small": AnyRes(10, 10, (32, 64)),
    "one pixel": AnyRes(1, 1, (32, 64)),
    "strip": AnyRes(1, 400, (32, 64)),
    "standing strip": AnyRes(60, 1, (64, 32)),
}
"""Of the strips, un-padding leaves no row of patches, or rows of a separator alone."""


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes signals of every picture."""

    name: str = "cls_attention"
    layer: str = "feature"
    seen: list[Tensor] = field(default_factory=list, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("projected", needs=(f"{self.name}@vision:{self.layer}",))]

    def reduce(self, view: TokenView) -> None:
        self.seen.extend(view.signal(f"{self.name}@vision:{self.layer}"))


def heard(model, inputs, name, layer="feature", forward=False, methods=()):
    """The signal of every picture of a call, `[..., n]` each."""
    listen = Listen(NAMES[name], layer)
    with vlmtok.compress(model, [*methods, listen]), torch.no_grad():
        if forward:
            model(**inputs)
        else:
            generate(model, inputs, 1)
    return listen.seen


@pytest.mark.parametrize("forward", [False, True], ids=["generate", "forward"])
@pytest.mark.parametrize("layer", ["feature", "-1"])
@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("name", NAMES)
def test_attention_follows_the_canvas(name, shape, layer, forward):
    shot, family = PICTURES[shape], FAMILIES[name]
    prompt = write("2I3", {"I": shot}, 5)
    (found,) = heard(shared(name), family.collect(prompt).inputs(), name, layer, forward)
    wanted = canvas_by_hand(crops_of(name, prompt.pictures[0], layer), shot)
    assert found.shape[-1] == wanted.shape[-1] == len(prompt.pictures[0].shot)
    assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-6)


@pytest.mark.parametrize("layer", ["feature", "-1"])
@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("name", NAMES)
def test_features_follow_the_canvas(name, shape, layer):
    """All channels of what a block gave, 0 in separators."""
    shot, family = PICTURES[shape], FAMILIES[name]
    prompt = write("2I3", {"I": shot}, 5)
    listen = Listen("outputs", layer)
    with vlmtok.compress(shared(name), listen):
        generate(shared(name), family.collect(prompt).inputs(), 1)
    (found,) = listen.seen
    crops = outputs_of(name, real_crops(prompt.pictures[0].shot.arrays["pixel_values"][0]), layer)
    wanted = canvas_by_hand(crops.transpose(1, 2), shot).T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "output_logits": False}, {"use_cache": False}], ids=str)
def test_every_picture_of_a_batch_has_its_own(options):
    """Left padding, different pictures in the rows, beams."""
    family, model = FAMILIES["llava_next"], shared("llava_next")
    batch = family.batch("2I3J5", "4J3", "7")
    listen = Listen()
    with vlmtok.compress(model, listen):
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, **options)
    shots = {"I": family.shots["I"], "J": family.shots["J"]}
    pictures = [picture for prompt in batch.prompts for picture in prompt.pictures]
    order = [shots["I"], shots["J"], shots["J"]]
    wanted = [canvas_by_hand(crops_of("llava_next", p), shot) for p, shot in zip(pictures, order, strict=True)]
    beams = options.get("num_beams", 1)
    assert len(listen.seen) >= beams * len(wanted)
    for one in wanted:
        same = [s for s in listen.seen if s.shape == one.shape and torch.allclose(s, one, atol=1e-6)]
        assert len(same) >= beams


def test_a_shrunk_canvas():
    """OneVision shrinks a canvas that is too large, bilinearly."""
    model = replace(FAMILIES["llava_onevision"], make=lambda: llava_onevision("anyres_max_1")).build()
    large = AnyRes(64, 64, (64, 64))
    prompt = write("2I3", {"I": lambda generator: replace(large(generator), ids=(IMAGE,) * (16 + 4 * 5))}, 3)
    crops = crops_of("llava_onevision", prompt.pictures[0])
    whole = canvas_by_hand(crops, large)[:, EDGE * EDGE :].unflatten(-1, (8, 9))[..., :8]
    lines = torch.cat([halved(whole), torch.zeros(1, 4, 1)], -1).flatten(1)
    for forward in (False, True):
        (found,) = heard(
            model, FAMILIES["llava_onevision"].collect(prompt).inputs(), "llava_onevision", "feature", forward
        )
        assert torch.allclose(found, torch.cat([crops[0], lines], 1)[0], atol=1e-6)


@pytest.mark.parametrize("forward", [False, True], ids=["generate", "forward"])
def test_frames_are_pooled(forward):
    """Clips of one batch, next to a picture: pooled by the host, 0 in the separator."""
    family, model = FAMILIES["llava_onevision"], shared("llava_onevision")
    batch = family.batch(*family.clips)
    found = heard(model, batch.inputs(), "llava_onevision", forward=forward)
    for picture in (picture for prompt in batch.prompts for picture in prompt.pictures):
        if picture.shot.video:
            frames = attention_of("llava_onevision", picture.shot.arrays["pixel_values_videos"][0], "feature")
            wanted = torch.cat([halved(frames.unflatten(-1, (EDGE, EDGE))).flatten(), torch.zeros(1)])
        else:
            wanted = canvas_by_hand(crops_of("llava_onevision", picture), family.shots["I"])[0]
        assert sum(one.shape == wanted.shape and torch.allclose(one, wanted, atol=1e-6) for one in found) == 1


@pytest.mark.parametrize("merge", [False, True])
def test_a_cut_tower_gives_every_patch_what_its_slot_has(merge):
    """Patches that a tower dropped have none; those that it joined share one."""
    name = "llava_onevision"
    prompt = write("2I3", {"I": PICTURES["wide"]}, 5)
    inputs = FAMILIES[name].collect(prompt).inputs()
    (found,) = heard(shared(name), inputs, name, methods=[InTower(merge)])
    thumbnail = found[: EDGE * EDGE]
    if merge:
        assert torch.equal(thumbnail[::2], thumbnail[1::2])
        assert thumbnail[::2].sum() == pytest.approx(1, abs=1e-5)  # every row of attention sums to one
    else:
        assert (thumbnail > 0).sum() == EDGE * EDGE // 2
        assert thumbnail.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", PICTURES)
def test_the_pivot_is_the_largest_class_attention_of_the_thumbnail(shape):
    name, kept = "llava_next", []

    class Spy(vlmtok.ToDRE):
        def reduce(self, view):
            reduction = super().reduce(view)
            kept.append(reduction.keep)
            return reduction

    prompt = write("2I3", {"I": PICTURES[shape]}, 5)
    with vlmtok.compress(shared(name), Spy(keep=1, tau=None)):
        generate(shared(name), FAMILIES[name].collect(prompt).inputs(), 1)
    wanted = crops_of(name, prompt.pictures[0], "-1")[0].mean(0).argmax()
    assert kept[0].tolist() == [[wanted.item()]]


def scope_by_loops(tokens, saliency, k):
    """SCOPE's greedy choice in float64: int64 `[k]` ascending."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    similar, cover, chosen = unit @ unit.T, torch.zeros(len(tokens), dtype=torch.float64), []
    for _ in range(k):
        gain = (similar - cover[:, None]).clamp(min=0).sum(0) * saliency.double()
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        cover = torch.maximum(cover, similar[:, chosen[-1]])
    return torch.tensor(sorted(chosen))


@pytest.mark.parametrize(
    ("name", "pattern"), [("llava_next", "2I3J5"), ("llava_onevision", "2I3"), ("llava_onevision", "3W5")]
)
def test_scope_chooses_in_every_crop_and_frame(name, pattern):
    """Equal to the oracle on the tokens that plain loops keep: crop by crop; separators stay where that is asked."""
    family, model = FAMILIES[name], shared(name)
    prompt = family.prompt(pattern, 3)
    look, signals = Look("picture"), heard(model, family.collect(prompt).inputs(), name)
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    asked = oracle(name, shared(name, "eager"))
    with torch.no_grad():
        encoded = asked.encode(prompt)
        hidden = asked.row(prompt, prompt.ids[:0], encoded).hidden
        stays = torch.ones(len(prompt.ids), dtype=torch.bool)
        for seen, signal in zip(look.seen, signals, strict=True):
            weight = signal.sum(0) if signal.dim() > 1 else signal
            for part in set(seen.part.tolist()) - {-1}:
                here = (seen.part == part).nonzero()[:, 0]
                columns = seen.columns[here]
                left = scope_by_loops(hidden[columns], weight[here], keep_count(0.5, len(here)))
                stays[columns] = False
                stays[columns[left]] = True
        written, rows = prompt.ids[:0], []
        for _ in range(STEPS):
            kept = torch.cat([stays, torch.ones(len(written), dtype=torch.bool)]).nonzero()[:, 0]
            row = asked.row(prompt, written, encoded).take(kept)
            rows.append(asked.logits(replace(row, positions=torch.arange(len(row))[None]), ()))
            written = torch.cat([written, rows[-1].argmax()[None]])
    assert not stays.all()
    with vlmtok.compress(model, vlmtok.SCOPE(keep=0.5, separators="keep")):
        for options in ({}, {"use_cache": False}):
            tokens, logits = generate(model, family.collect(prompt).inputs(), **options)
            assert torch.equal(tokens[0], written)
            assert (logits[0] - torch.stack(rows)).abs().max() <= NOISE


PER_PART = {
    "scope": (vlmtok.SCOPE(keep=0.25), lambda n: keep_count(0.25, n)),
    "scope, separators kept": (vlmtok.SCOPE(keep=0.25, separators="keep"), lambda n: keep_count(0.25, n)),
    "cdpruner": (vlmtok.CDPruner(keep=0.25), lambda n: keep_count(0.25, n)),
    "aim": (vlmtok.AIM(prune=False), merged_count),
}


@pytest.mark.parametrize("method", PER_PART)
@pytest.mark.parametrize(("name", "which"), [("llava_next", "several"), ("llava_onevision", "clips")])
def test_methods_of_parts(name, which, method):
    """Thumbnails, crops and frames are cut one by one; separators go where a method says so, or stay."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*getattr(family, which))
    look, (one, count) = Look("picture"), PER_PART[method]
    with vlmtok.compress(model, look):
        generate(model, batch.inputs(), 1)
    wanted = []
    for seen in look.seen:
        parts = seen.part.tolist()
        left = sum(count(parts.count(part)) for part in set(parts) - {-1})
        wanted.append((len(parts), left + (0 if method == "scope" else parts.count(-1))))
    with vlmtok.compress(model, one, trace=True) as run:
        generate(model, batch.inputs(), 1)
        assert sorted((found.patches, found.kept) for found in run.trace().pictures) == sorted(wanted)


@pytest.mark.parametrize(
    ("name", "pattern"), [("llava_next", "2IJ3"), ("llava_onevision", "2SS3"), ("llava_onevision", "2VW3")]
)
def test_pictures_without_text_between_them(name, pattern):
    """Their lengths come from the host's packing, in a plain forward as in generation."""
    family, model = FAMILIES[name], shared(name)
    prompt = family.prompt(pattern, 4)
    wanted = sorted(len(picture.shot) for picture in prompt.pictures)
    for forward in (False, True):
        look = Look("picture")
        with vlmtok.compress(model, look), torch.no_grad():
            if forward:
                model(**family.collect(prompt).inputs())
            else:
                generate(model, family.collect(prompt).inputs(), 1)
        assert sorted(len(one.tokens) for one in look.seen) == wanted


def test_features_of_an_earlier_call_are_refused():
    family, model = FAMILIES["llava_next"], shared("llava_next")
    first, second = (family.collect(family.prompt("2J3", seed)).inputs() for seed in (1, 2))
    with vlmtok.compress(model, vlmtok.SCOPE(keep=0.5)), torch.no_grad():
        old = model.model.get_image_features(first["pixel_values"], first["image_sizes"], return_dict=True)
        model.model.get_image_features(second["pixel_values"], second["image_sizes"], return_dict=True)
        with pytest.raises(CacheError, match="encode and ask in one call"):
            model(first["input_ids"], attention_mask=first["attention_mask"], mm_encoder_outputs={"image": old})


def test_layouts():
    """What reaches the language model is said; what has no place in a canvas is refused, and SCOPE without either."""
    with vlmtok.compress(shared("llava_next"), vlmtok.SCOPE()) as run:
        layout = run.layout
    assert layout.gives("vision", "cls_attention", later=True)
    assert not layout.gives("vision", "protected_queries", later=True)
    assert [site.stage for site in vlmtok.SCOPE().sites(layout)] == ["projected"]
    with pytest.raises(SiteError, match="features"):
        vlmtok.compress(shared("kimi_k25"), vlmtok.SCOPE())
    with pytest.raises(MissingSignal, match="cls_attention"):
        vlmtok.compress(shared("llava_next"), Listen("protected_queries"))


def full_size(name):
    """An inner model with the pictures of a released one."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": 16}
    if name == "llava_next":
        vision = tf.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
        return tf.LlavaNextModel(tf.LlavaNextConfig(vision_config=vision, text_config=tf.LlamaConfig(**text)))
    vision = tf.SiglipVisionConfig(**sizes, image_size=384, patch_size=14, vision_use_head=False)
    return tf.LlavaOnevisionModel(tf.LlavaOnevisionConfig(vision_config=vision, text_config=tf.Qwen2Config(**text)))


SIZES = [(336, 336), (100, 100), (1174, 592), (1344, 673), (1416, 2802), (750, 2531), (3671, 3486), (316, 3859)]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_released_models(name):
    """Canvases are known again from features alone, shrunk ones too, and sizes that the host nearly fits elsewhere."""
    core, generator = full_size(name), torch.Generator().manual_seed(0)
    packing = Packing(ROWS[name], core)
    patches = packing._side()[1]
    with torch.no_grad():
        for size in SIZES:
            crops = packing._crops(size)
            features = torch.randn(crops, patches, 8, generator=generator)
            signal = torch.rand(crops, patches, generator=generator)
            options = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
            (packed,), _ = core.pack_image_features([features], [size], image_newline=core.image_newline, **options)
            (wanted,), _ = core.pack_image_features(
                [signal[..., None]], [size], image_newline=torch.zeros(1), **options
            )
            told = {"image_sizes": torch.tensor([size]), "pixel_values": features}
            assert packing.lengths(lambda role, told=told: told.get(role.names[0]), told) == {IMAGES: [len(packed)]}
            picture = Picture(0, 0, list(range(len(packed))))
            (found,) = packing._pictures(Encoded(features, {"signal": (signal, 1)}), [picture], packed[None], 1)
            assert torch.allclose(found, wanted, atol=1e-6)


STRIPS = [(1, 100), (2, 1000), (1000, 2), (336, 336), (10, 3000), (20, 336), (3395, 7), (1, 1), (750, 2531), (17, 2394)]


@pytest.mark.parametrize("name", NAMES)
def test_strips_among_other_pictures_of_released_models(name):
    """A strip shows nothing but its thumbnail, so that what follows it tells how many crops it had."""
    core, generator = full_size(name), torch.Generator().manual_seed(0)
    packing = Packing(ROWS[name], core)
    patches = packing._side()[1]
    counts = [packing._crops(size) for size in STRIPS]
    features = [torch.randn(count, patches, 8, generator=generator) for count in counts]
    signals = [torch.rand(count, patches, generator=generator) for count in counts]
    options = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
    with torch.no_grad():
        packed, _ = core.pack_image_features(features, STRIPS, image_newline=core.image_newline, **options)
        seen = [signal[..., None] for signal in signals]
        wanted, _ = core.pack_image_features(seen, STRIPS, image_newline=torch.zeros(1), **options)
        x = torch.nn.utils.rnn.pad_sequence(list(packed), batch_first=True)
        call = Encoded(torch.cat(features), {"signal": (torch.cat(signals), 1)})
        pictures = [Picture(row, 0, list(range(len(one)))) for row, one in enumerate(packed)]
        found = packing._pictures(call, pictures, x, len(pictures))
        assert min(map(len, packed)) == patches or name != "llava_next"
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("keep", "said"), [(16, True), (15, False), (1.0, False)])
def test_a_count_that_cuts_nothing_is_said_once(keep, said):
    """Crops have 16 patches each."""
    prompt = write("2I3", {"I": PICTURES["square canvas"]}, 5)
    with vlmtok.compress(shared("llava_next"), vlmtok.SCOPE(keep=keep)) as run:
        for _ in range(2):
            generate(shared("llava_next"), FAMILIES["llava_next"].collect(prompt).inputs(), 1)
        notes = [note for note in run.report().notes if "cut nothing" in note]
    wanted = (
        "scope cut nothing: keep=16 is a count for each part, and the largest one had 16 tokens; a float is a share"
    )
    assert notes == [wanted] * said
