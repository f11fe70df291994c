"""Downsampling, on every family with a processor here and on every tower: the count is the model's own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from families.build import FAMILIES, TOWER_ONLY, shared
from families.checkpoints import READERS, TEMPLATE, Reader, tokenizer
from PIL import Image
from support import checkpoints
from vlmtok.adapters.host_faults import fault_of

import vlmtok
from vlmtok.errors import ParameterError, TargetError, UnsupportedModel
from vlmtok.evaluation import dialling, sizing, twins
from vlmtok.evaluation.downsample import Downsampler, downsample, largest_grid
from vlmtok.forecast.published import PUBLISHED
from vlmtok.lab.tiny.prompts import END, IMAGE, START
from vlmtok.lab.tiny.towers import TOWERS
from vlmtok.loading import Loaded, load, open_picture, samples
from vlmtok.loading.models import encoder_of

QUESTION = "what color is the circle ?"
SIZES = ((96, 64), (64, 128))
FIXED = {"gemma3", "blip-2", "instructblip"}
FEWEST = {"gemma4": 70, "llama4": 16}
"""Families whose processors make no fewer tokens of a picture, and how many."""


def noise(size):
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.byte().numpy())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models whose checkpoints have a module of their own."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = load(str(checkpoints.FAMILIES[name](folder) or folder), device="cpu")
        return made[name]

    return get


def _seen(name, side=32):
    """DeepSeek-VL and Janus: one size, and a number of tokens that the processor is told."""

    def make(words, **more):
        pictures = getattr(tf, f"{name}ImageProcessor")(size={"height": side, "width": side}, min_size=4)
        return getattr(tf, f"{name}Processor")(pictures, words, num_image_tokens=16, **more)

    return make


def _light(words, **more):
    pictures = tf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    return tf.LightOnOcrProcessor(pictures, words, patch_size=8, spatial_merge_size=2, **more)


def _llava(words, **more):
    pictures = tf.LlavaImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    how = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return tf.LlavaProcessor(pictures, words, **how, **more)


BOUNDS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
LINES = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
MARKED = {"<image>": IMAGE, "<boi>": START, "<eoi>": END}
FURTHER = {
    "deepseek_vl": Reader(_seen("DeepseekVL"), {"<image>": IMAGE}, {"image_token": "<image>"}),
    "janus": Reader(_seen("Janus"), MARKED, BOUNDS),
    "lighton_ocr": Reader(_light, {"<image>": IMAGE, "<break>": START, "<end>": END}, LINES),
    "llava": Reader(_llava, {"<image>": IMAGE}, {"image_token": "<image>"}),
}
"""Processors of further families, and another of LLaVA."""


def built(name):
    reader = {**READERS, **FURTHER}[name]
    model = shared(name, {**FAMILIES, **TOWER_ONLY}[name].attentions[0])
    made = reader.make(tokenizer(reader), chat_template=TEMPLATE.replace("IMAGE", reader.shown))
    return Loaded(name, model, made, True)


def check(loaded, name):
    """Counts are within the budget and the processor's; the model runs, and refuses features of any other number."""
    config = loaded.model.config
    mark = next(i for i in (getattr(config, w, None) for w in ("image_token_id", "image_token_index")) if i is not None)
    resizer = Downsampler(loaded)
    state = loaded.model.config.to_dict()
    for size in SIZES:
        picture = noise(size)
        bare = resizer(picture, 1.0)
        assert bare.loaded is loaded and not bare.settings and bare.tokens == bare.bare
        reached = []
        for share in (0.7, 0.4, 0.2):
            try:
                found = resizer(picture, share)
            except TargetError:
                assert int(share * bare.bare + 0.5) < FEWEST.get(name, 6)
                continue
            given = found.inputs(picture, QUESTION)
            assert found.tokens <= found.asked == max(1, int(share * bare.bare + 0.5))
            assert found.tokens == (given["input_ids"] == mark).sum() == sum(found.each)
            assert found.settings
            reached.append(found.tokens)
            if fault_of(config.model_type) is None:
                said = found.loaded.model.generate(**given, max_new_tokens=1, do_sample=False)
                assert said.shape[1] == given["input_ids"].shape[1] + 1
        assert reached == sorted(reached, reverse=True)
        assert reached or name in FEWEST
    assert loaded.model.config.to_dict() == state
    assert all(
        a is b
        for a, b in zip(loaded.model.parameters(), resizer(picture, 0.9 if reached else 1.0).loaded.model.parameters())
    )


@pytest.mark.parametrize("name", [name for name in (*READERS, *FURTHER) if name not in FIXED])
def test_families(name):
    check(built(name), name)


@pytest.mark.parametrize("name", sorted(checkpoints.FAMILIES))
def test_families_with_checkpoints(name, saved):
    check(saved(name), name)


@pytest.mark.parametrize("name", sorted(FIXED))
def test_families_whose_count_is_fixed(name):
    with pytest.raises(UnsupportedModel, match="whatever"):
        downsample(built(name), noise((64, 64)), tokens=4)


def test_the_shipped_checkpoint():
    """48 of 96 pixels: 36 of 144 tokens, of which the model still answers; itself it stays as it was."""
    model = load(device="cpu")
    sample = samples()[0]
    picture = open_picture(sample.path)
    found = downsample(model, picture, tokens=0.25)
    assert (found.tokens, found.bare, found.settings) == (36, 144, {"side of a tile": 48})
    given = found.inputs(picture, sample.question)
    assert given["pixel_values"].shape == (1, 3, 48, 48)
    said = found.loaded.model.generate(**given, max_new_tokens=8)
    assert said.shape[1] > given["input_ids"].shape[1]
    with pytest.raises(ValueError, match="doesn't match model"):
        model.model.generate(**given, max_new_tokens=1)
    near = downsample(model, picture, tokens=0.5)
    said = near.loaded.model.generate(**near.inputs(picture, sample.question), max_new_tokens=8)
    assert sample.answer in model.processor.batch_decode(said, skip_special_tokens=True)[0]


def test_features_of_a_smaller_picture_are_those_of_interpolated_positions():
    """By hand: the table of positions resized, and the tower called on it."""
    model = load(device="cpu")
    picture = noise((96, 96))
    found = downsample(model, picture, tokens=36)
    pixels = found.inputs(picture, QUESTION)["pixel_values"]
    seen = found.loaded.model.model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(found.loaded.model.model.vision_tower(pixels).last_hidden_state, seen)
    hand = twins.twin(model.model)
    embeddings = next(part for part in hand.modules() if hasattr(part, "position_embedding"))
    table = embeddings.position_embedding.weight
    grid = table[1:].T.reshape(1, -1, 12, 12)
    small = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    weight = torch.cat([table[:1], small.reshape(-1, 36).T])
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(weight)
    embeddings.position_ids = torch.arange(37)[None]
    embeddings.image_size = 48
    torch.testing.assert_close(hand.model.vision_tower(pixels).last_hidden_state, seen)


def test_several_pictures_share_the_budget():
    loaded = built("qwen2_5_vl")
    pictures = [noise((96, 64)), noise((32, 32))]
    found = downsample(loaded, pictures, tokens=0.4)
    assert len(found.each) == 2 and sum(found.each) == found.tokens <= found.asked < found.bare
    text = "<|vision_start|> <|image_pad|> <|vision_end|> " * 2 + QUESTION
    given = found.loaded.processor(images=pictures, text=[text], return_tensors="pt")
    assert (given["input_ids"] == loaded.model.config.image_token_id).sum() == found.tokens
    found.loaded.model.generate(**given, max_new_tokens=1)


def test_what_was_found_is_kept():
    resizer = Downsampler(load(device="cpu"))
    first, again = resizer(noise((96, 96)), 36), resizer(noise((96, 96)), 36)
    other = resizer(noise((200, 100)), 40)
    assert again is first and other.loaded is first.loaded and other.tokens == 36


GRIDS = {
    "CohereCompassImageProcessor": 3136,
    "Cosmos3EdgeImageProcessor": 65536,
    "GlmgaImageProcessor": 12544,
    "Kimi_K25ImageProcessor": None,
    "MuseGlimmerImageProcessor": None,
}
"""Image processors whose grids say how many tokens a picture has, and the fewest pixels that they make of one."""


@pytest.mark.parametrize("name", GRIDS)
def test_dials_of_processors_without_a_prompt(name):
    """Fewer with every turn down to a token or few; turned to the top, as it was."""
    pictures = getattr(tf, name)()
    native = Loaded(name, torch.nn.Identity(), SimpleNamespace(image_processor=pictures), True)
    ((dial,), image) = sizing.ROWS[name], noise((640, 420))

    def tokens(made):
        (grid,) = made(images=[image], return_tensors="pt")["image_grid_thw"]
        return int(grid.prod()) // made.merge_size**2

    values = list(dial.values(native))
    counted = []
    for value in (values[-1], *values[len(values) // 50 :: -max(1, len(values) // 300)][:12], values[0]):
        draft = sizing.fresh(native)
        dial.turn(draft, value)
        counted.append(tokens(draft.pictures))
    assert counted[0] == tokens(pictures) > 200 and counted[-1] <= 4
    assert counted == sorted(counted, reverse=True) and len(set(counted)) > 3
    assert GRIDS[name] is None or pictures.size["shortest_edge"] == GRIDS[name]


# ---------------------------------------------------------------------- published models, without their weights
def published(name):
    row = PUBLISHED[name]
    return Loaded(name, row.model(), row.reader().processor, True)


@pytest.mark.parametrize(
    "name, tokens, reached",
    [
        ("llava-1.5-7b", 192, 169),
        ("llava-1.5-7b", 128, 121),
        ("llava-1.5-7b", 64, 64),
        ("llava-next-7b", 640, 612),
        ("internvl3-1b", 256, 256),
        ("smolvlm2-256m", 320, 320),
        ("qwen2.5-vl-7b", 64, 64),
    ],
)
def test_published_budgets(name, tokens, reached):
    found = downsample(published(name), Image.new("RGB", (672, 672)), tokens=tokens)
    assert found.tokens == reached


def test_a_smaller_tile_is_not_taken_where_a_whole_one_is_near_the_budget():
    """InternVL at 340: three tiles of 10 x 10 tokens would give 300; one of 16 x 16 is as the tower was trained."""
    found = downsample(published("internvl3-1b"), Image.new("RGB", (896, 896)), tokens=340)
    assert found.settings == {"most tiles of a picture": found.settings["most tiles of a picture"]}
    assert found.tokens == 256


# ---------------------------------------------------------------------- towers
def tower(name):
    row = TOWERS[name]
    model, pixels = row.build(), row.pictures(1)
    return row, Loaded(name, model, None, False, True, lambda image: pixels, encoder_of(model))


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name):
    row, loaded = tower(name)
    state = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    whole = loaded.encode(loaded.pixels(None))
    resizer = Downsampler(loaded)
    picture = Image.new("RGB", (48, 48))
    for share in (0.7, 0.4, 0.1):
        found = resizer(picture, share)
        pixels = found.inputs(picture)["pixel_values"]
        left = row.tokens(found.loaded.model, pixels)
        assert left.shape[1] - row.prefix == found.tokens <= found.asked < found.bare
        assert pixels.shape[-2] * found.bare // found.tokens  # a picture, not nothing
        output = found.loaded.encode(pixels)
        assert output.shape == whole.shape and output.isfinite().all()
    assert torch.equal(loaded.encode(loaded.pixels(None)), whole)
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())


def test_a_tower_has_one_twin_for_each_size():
    _, loaded = tower("timm ViT")
    resizer = Downsampler(loaded)
    picture = Image.new("RGB", (48, 48))
    first, other = resizer(picture, 16), resizer(picture, 17)
    assert other.asked == 17 and other.loaded is first.loaded and resizer(picture, 9).loaded is not first.loaded


def test_open_clips_table_is_resized_as_its_own_loader_does():
    from open_clip.model import resize_pos_embed

    _, loaded = tower("open_clip CLIP")
    found = Downsampler(loaded)(Image.new("RGB", (48, 48)), 16)
    assert found.settings == {"rows of patches": 4, "columns of patches": 4}
    wanted = {"visual.positional_embedding": loaded.model.visual.positional_embedding.detach().clone()}
    resize_pos_embed(wanted, found.loaded.model)
    made = found.loaded.model.visual.positional_embedding
    torch.testing.assert_close(made.detach(), wanted["visual.positional_embedding"])


def test_grids_keep_their_shape():
    assert largest_grid((6, 8), 24) == (4, 6)
    assert largest_grid((24, 24), 192) == (13, 13)
    assert largest_grid((8, 4), 1) == (1, 1)


# ---------------------------------------------------------------------- wrong use
@pytest.mark.parametrize("tokens", [0, -1, 0.0, 1.5, True, "many", None])
def test_budgets_that_are_none(tokens):
    with pytest.raises(ParameterError, match="downsample: tokens="):
        downsample(load(device="cpu"), noise((96, 96)), tokens=tokens)


def test_a_budget_that_no_size_meets():
    with pytest.raises(TargetError, match=r"at least \d+ visual tokens of 96 x 64 pixels, 1 asked"):
        downsample(built("llava_onevision"), noise((96, 64)), tokens=1)


def test_no_picture_and_two_for_a_tower():
    with pytest.raises(ParameterError, match="no picture"):
        downsample(load(device="cpu"), [], tokens=4)
    with pytest.raises(ParameterError, match="one picture, not 2"):
        downsample(tower("HF ViT")[1], [noise((48, 48))] * 2, tokens=4)


@pytest.mark.filterwarnings("ignore:the hooks of")
def test_a_compressed_model_is_refused():
    model = load(device="cpu")
    with vlmtok.compress(model.model, "random:keep=0.5"), pytest.raises(ParameterError, match="carries a compression"):
        downsample(model, noise((96, 96)), tokens=36)
    loaded = tower("timm ViT")[1]
    with vlmtok.compress(loaded.model, "tome:r=2"), pytest.raises(ParameterError, match="carries a compression"):
        downsample(loaded, noise((48, 48)), tokens=4)


def test_prompts():
    model = load(device="cpu")
    with pytest.raises(ParameterError, match="answers prompts"):
        downsample(model, noise((96, 96)), tokens=36).inputs(noise((96, 96)))
    with pytest.raises(ParameterError, match="takes a picture and no prompt"):
        downsample(tower("HF ViT")[1], noise((48, 48)), tokens=4).inputs(noise((48, 48)), "what ?")


def test_processors_that_nobody_knows():
    loaded = built("internvl")

    class Strange:
        pass

    loaded.processor.image_processor.__class__ = type("StrangeProcessor", (), {})
    with pytest.raises(UnsupportedModel, match="not known how a StrangeProcessor"):
        downsample(loaded, noise((64, 64)), tokens=4)


def test_towers_whose_positions_are_fixed():
    class Fixed(torch.nn.Module):
        patch_size = 8

    fixed = Loaded("fixed", Fixed(), None, False, True, lambda image: torch.zeros(1, 3, 48, 48), lambda x: x)
    with pytest.raises(UnsupportedModel, match="interpolates positions of a Fixed"):
        downsample(fixed, noise((48, 48)), tokens=4)


def test_vision_language_models_whose_tower_is_fixed(monkeypatch):
    """Tiles can be fewer; where that does not do, the error says why they cannot be smaller."""
    monkeypatch.setattr(sizing, "embeddings_of", lambda model: [])
    loaded = built("aya_vision")
    assert downsample(loaded, noise((96, 64)), tokens=20).tokens == 16
    with pytest.raises(TargetError, match="at least 16 .* cannot be interpolated"):
        downsample(loaded, noise((96, 64)), tokens=8)
    with pytest.raises(UnsupportedModel, match="cannot be interpolated"):
        downsample(load(device="cpu"), noise((96, 96)), tokens=36)


def test_dials_of_rows_are_those_of_host_classes():
    import transformers

    assert all(hasattr(transformers, name) for name in sizing.ROWS)
    assert dialling.bisect([1, 2, 3], lambda value: value < 3) == 1
    assert dialling.bisect([1, 2, 3], lambda value: False) == -1
    assert replace(sizing.SIDE).twin


def test_gemma4_has_steps():
    """Its processor makes every picture as large as a number of soft tokens allows; there are five such numbers."""
    loaded = built("gemma4")
    loaded.processor.image_processor.max_soft_tokens = 280
    found = downsample(loaded, noise((96, 64)), tokens=0.6)
    assert found.settings == {"most tokens of a picture": 140} and 70 < found.tokens <= 140 < found.bare
    found.loaded.model.generate(**found.inputs(noise((96, 64)), QUESTION), max_new_tokens=1, do_sample=False)
