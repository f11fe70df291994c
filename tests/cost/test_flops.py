"""Shapes, presets and conventions: every convention against a formula of its own, at random counts and widths."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.core.ledger import Decoding, Event, Group, Ledger, StageRun
from vlmtok.core.model_shape import BlockShape, LanguageShape, ModelShape, Part, Tokens, TowerShape
from vlmtok.core.site import Layout
from vlmtok.cost.conventions import CONVENTIONS, convention
from vlmtok.cost.flops import Profile, decoder_profiles, tower_profiles
from vlmtok.errors import ParameterError
from vlmtok.forecast.presets import PRESETS, preset

NOWHERE = Layout("nowhere", {})


# ---------------------------------------------------------------------- conventions
def _transprune(b, t):
    d, m, n = b.width, b.hidden, t.visual
    return n * d * (4 * d + 2 * n + 3 * m)


def _fastv(b, t):
    d, m, n = b.width, b.hidden, t.visual
    return n * d * (4 * d + 2 * n + 2 * m)


def _todre(b, t):
    d, m, n = b.width, b.hidden, t.queries
    return n * d * (4 * d + 2 * n + 2 * m)


def _language(b, t):
    inner, outer = b.heads * b.head_width, b.kv_heads * b.head_width
    n, d = t.queries, b.width
    return 2 * (n * d * (2 * inner + 2 * outer) + 2 * n * t.keys * inner + 3 * t.mlp * d * b.hidden)


def _llm_viewer(b, t):
    n, d = t.queries, b.width
    return _language(b, t) + 5 * n * t.keys * b.heads + 14 * n * d + 2 * n * d + 2 * n * d


def _pitome(b, t):
    c, m, n = b.width, b.hidden, t.queries
    return n * c * (4 * c + 2 * n + 2 * m)


def _tome(b, t):
    c, m, n = b.width, b.hidden, t.queries
    return n * c * (4 * c + 2 * n) + 2 * t.mlp * c * m


def _crossget(b, t):
    n, c = t.queries, b.width
    return _tome(b, t) + (n * (n + 1) * c if t.mlp < n else 0)


BLOCK_FORMULAS = {
    "transprune": _transprune,
    "pyramiddrop": _transprune,
    "fastv": _fastv,
    "todre": _todre,
    "divprune": _todre,
    "language": _language,
    "llm-viewer": _llm_viewer,
    "aim": _llm_viewer,
    "pitome": _pitome,
    "tome": _tome,
    "pitome-post": _tome,
    "tca": _tome,
    "crossget": _crossget,
}
WITH_STEM = ("tca", "crossget")


class _Drawn:
    """A model and a pass with drawn widths and counts."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        number = self.draw.randint
        self.rows = number(1, 4)
        heads, kv = number(1, 4), number(1, 3)
        self.blocks = {
            "vision": BlockShape.of(number(3, 40), number(3, 90), number(1, 5), head_width=number(2, 9)),
            "text": BlockShape.of(number(3, 40), number(3, 90), number(1, 5), head_width=number(2, 9)),
            "decoder": BlockShape.of(number(3, 40), number(3, 90), heads * kv, kv, number(2, 9), gated=True),
        }
        self.depths = {stage: number(1, 5) for stage in self.blocks}
        self.stem, self.protected = number(1, 500), number(0, 3)
        self.profiles = {stage: self._profile(depth) for stage, depth in self.depths.items()}

    def _profile(self, depth):
        entered = n = self.draw.randint(20, 60)
        layers = []
        for _ in range(depth):
            left = n - self.draw.randint(0, 2)
            layers.append(Tokens(n, n + self.draw.randint(0, 9), left, n - self.draw.randint(1, 5)))
            n = left
        return Profile(self.rows, tuple(layers), entered, n)

    @property
    def shape(self):
        towers = {
            stage: TowerShape((self.blocks[stage],) * self.depths[stage], 50, self.protected, self.stem)
            for stage in ("vision", "text")
        }
        language = LanguageShape((self.blocks["decoder"],) * self.depths["decoder"])
        return ModelShape("drawn", NOWHERE, towers["vision"], towers["text"], language=language)

    def expected(self, name):
        stages = CONVENTIONS[name].stages
        total = sum(
            self.rows * BLOCK_FORMULAS[name](self.blocks[stage], tokens)
            for stage in stages
            for tokens in self.profiles[stage].layers
        )
        if name in WITH_STEM:
            total += self.rows * (self.profiles["vision"].entered - self.protected) * self.stem
        return total


def test_every_convention_has_a_formula_of_its_own_here():
    assert set(BLOCK_FORMULAS) == set(CONVENTIONS)


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_conventions_are_functions_of_counts_and_widths(name):
    found = set()
    for seed in range(12):
        drawn = _Drawn(seed)
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12)
        found.add(value)
        before = value
        stage = CONVENTIONS[name].stages[0]
        # One count more, then one width more: the result follows, as the formula says.
        first = drawn.profiles[stage].layers[0]
        more = Tokens(first.queries + 3, first.keys + 3, first.mlp + 3, first.visual + 3)
        layers = (more, *drawn.profiles[stage].layers[1:])
        drawn.profiles[stage] = Profile(drawn.rows, layers, drawn.profiles[stage].entered, drawn.profiles[stage].left)
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12) and value > before
        before, block = value, drawn.blocks[stage]
        gated = stage == "decoder"
        wide = BlockShape.of(block.width + 5, block.hidden + 7, block.heads, block.kv_heads, block.head_width, gated)
        drawn.blocks[stage] = wide
        value = convention(name).count(drawn.shape, drawn.profiles)
        assert value == pytest.approx(drawn.expected(name), rel=1e-12) and value > before
    assert len(found) == 12


def test_conventions_say_what_they_count():
    for name, row in CONVENTIONS.items():
        assert row.name == name and row.unit in ("MACs", "FLOPs") and row.summary and row.count.__doc__
    with pytest.raises(ParameterError, match=r"no convention 'transprun'; did you mean 'transprune'\? Known: aim"):
        convention("transprun")


# ---------------------------------------------------------------------- shapes
def test_a_block_counts_its_weights_and_products():
    block = BlockShape.of(8, 32, 4, kv_heads=2, head_width=3, gated=True)
    assert (block.attn, block.mlp) == (8 * 12 + 8 * 12 + 2 * 8 * 6, 3 * 8 * 32)
    assert (block.q, block.k) == (8 * 12, 8 * 6)
    assert block.macs(Tokens(5, 7, 4, 0)) == 5 * block.attn + 2 * 12 * 5 * 7 + 4 * block.mlp
    assert BlockShape.of(8, 32, 4).attn == 4 * 64


def test_a_part_counts_rows_tokens_and_pairs():
    assert Part("head", 10).macs(3) == 30
    assert Part("pool", 10, token=2, pair=3).macs(4, tokens=5) == 4 * (10 + 2 * 5 + 3 * 25)


def _events():
    return [
        Event("vision", 0, "start", 0, "insert", 10, 12),
        Event("vision", 0, "start", 0, "observe", 12, 12),
        Event("vision", 0, "mid", 0, "cut", 12, 9),
        Event("vision", 0, "end", 0, "cut", 9, 8),
        Event("vision", 1, "mid", 0, "cut", 6, 5),
    ]


def test_tokens_of_a_tower_follow_starts_merges_ends_and_insertions():
    run = StageRun("vision", 2, 10, events=_events())
    bare, after = tower_profiles(run, 3, protected=1)
    assert bare.layers == (Tokens(10, 10, 10, 9),) * 3 and bare.left == 10
    assert after.layers == (Tokens(12, 12, 9, 9), Tokens(6, 6, 5, 5), Tokens(5, 5, 5, 4)) and after.left == 5
    block = BlockShape.of(4, 8, 2)
    expected = 12 * 64 + 2 * 4 * 144 + 9 * 64 + 6 * 64 + 2 * 4 * 36 + 5 * 64 + 5 * 64 + 2 * 4 * 25 + 5 * 64
    assert after.macs((block,) * 3) == 2 * expected


def test_rows_that_are_spread_again_are_whole_behind_the_tower():
    run = StageRun("vision", 1, 10, events=[*_events(), Event("vision", 1, "end", -1, "spread", 5, 10)])
    assert [tokens.queries for tokens in tower_profiles(run, 3, 1)[1].layers] == [12, 6, 10]


def test_tokens_of_a_language_model_follow_cuts_and_the_past():
    group = Group(2, 20, 5, 20)
    run = StageRun("decoder", 2, 30, past=11, visual=40, seen=17, held=((0, 11), (2, 7)))
    run.events = [
        Event("projected", None, "end", 0, "cut", 30, 26, (Group(2, 20, 16, 20),)),
        Event("decoder", 0, "end", 1, "cut", 26, 20, (Group(2, 16, 10, 16),)),
        Event("decoder", 2, "start", 1, "observe", 20, 20, (group,)),
        Event("decoder", 2, "start", 2, "cut", 20, 14, (Group(2, 10, 4, 16),), ragged=True),
    ]
    block = BlockShape.of(4, 8, 2)
    bare, after = decoder_profiles(run, (block,) * 3)
    assert bare.layers == (Tokens(30, 47, 30, 20.0),) * 3
    assert after.layers == (Tokens(26, 37, 26, 16.0), Tokens(20, 31, 20, 10.0), Tokens(14, 21, 14, 4.0))
    assert after.cached((block,) * 3) == 2 * (37 + 31 + 21)
    # Rows that keep different numbers are padded to the longest: what left is told apart from the padded length.
    run.events[-1] = dataclasses.replace(run.events[-1], gone=15)
    assert decoder_profiles(run, (block,) * 3)[1].layers[2] == Tokens(14, 21, 14, 2.5)
    # Steps add what a layer's own cache holds, one token each.
    steps = after.step_macs((block,) * 3, rows=2, first=1, steps=3)
    per_token = 3 * 3 * (block.attn + block.mlp)
    products = sum(2 * 4 * (held + i) for held in (37, 31, 21) for i in (2, 3, 4))
    assert steps == 2 * (per_token + products)


@pytest.mark.parametrize("held", [2, 5, 6, 7, 20])
def test_a_sliding_layer_sees_its_window_in_a_step(held):
    block = BlockShape(4, 2, 2, 2, 64, 64, 8, window=8)
    seen = [min(8, held + i) for i in range(3, 8)]
    assert block.step(held, 2, 5) == 5 * 128 + 2 * 4 * sum(seen)
    assert block.held(held) == min(held, 7)


# ---------------------------------------------------------------------- the ledger
def test_the_ledger_keeps_the_prefill_behind_later_calls_and_totals_all():
    ledger = Ledger()
    ledger.begin(StageRun("decoder", 1, 20, pictures=1))
    ledger.note("decoder", "lm_head", 1)
    for i in range(3):
        ledger.step(1, 20 + i)
        ledger.note("decoder", "lm_head", 1)
    ledger.begin(StageRun("decoder", 1, 4, past=23, seen=23))
    ledger.step(1, 27)
    assert ledger.last["decoder"].entered == 20 and ledger.last["continued"].entered == 4
    assert ledger.last["decoder"].parts == {"lm_head": 1}
    assert ledger.last["decoder"].decodings == [Decoding(1, 0, 3, 3)] and ledger.last["continued"].steps == 1
    again = ledger.begin(StageRun("decoder", 1, 20, pictures=1))
    assert "continued" not in ledger.last and ledger.last["decoder"] is again
    assert sorted((run.entered, run.steps, times) for run, times in ledger.totals()) == [
        (4, 1, 1),
        (20, 0, 1),
        (20, 3, 1),
    ]
    assert ledger.passes == {"decoder": 2, "continued": 1} and ledger.steps == 4


def test_a_step_on_a_cache_that_was_filled_bare_has_books_of_its_own():
    ledger = Ledger()
    ledger.step(2, 9)
    run = ledger.last["continued"]
    assert (run.rows, run.entered, run.past, run.steps) == (2, 0, 9, 1)
    ledger.step(3, 10)  # rows joined
    ledger.step(3, 11)
    ledger.step(3, 8)  # the host took four tokens off
    assert [(part.rows, part.first, part.steps) for part in run.decodings] == [(2, 0, 1), (3, 1, 2), (3, -1, 1)]


# ---------------------------------------------------------------------- presets
def _clip_336():
    import transformers as tf

    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    return tf.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)


def _llava(width, hidden, depth, heads):
    import transformers as tf

    sizes = dict(hidden_size=width, intermediate_size=hidden, num_hidden_layers=depth, num_attention_heads=heads)
    text = tf.LlamaConfig(**sizes, num_key_value_heads=heads, vocab_size=32064)
    feature = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=_clip_336(), text_config=text, **feature))


def _several_crops(kind):
    import transformers as tf

    llama = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    qwen = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    if kind == "next":
        text = tf.LlamaConfig(**llama, num_key_value_heads=32, vocab_size=32064)
        return tf.LlavaNextForConditionalGeneration(tf.LlavaNextConfig(vision_config=_clip_336(), text_config=text))
    text = tf.Qwen2Config(**qwen, num_key_value_heads=4, vocab_size=152064)
    vision = {**_siglip().config.to_dict(), "vision_use_head": False}
    config = tf.LlavaOnevisionConfig(vision_config=vision, text_config=text)
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _siglip():
    import transformers as tf

    sizes = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**sizes, image_size=384, patch_size=14))


def _timm(name, **changes):
    import timm

    return timm.create_model(name, pretrained=False, **changes)


def _open_clip(name):
    import open_clip

    return open_clip.create_model(name, device="meta")


BUILT = {
    "llava-1.5-7b": lambda: _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _llava(5120, 13824, 40, 40),
    "llava-next-7b": lambda: _several_crops("next"),
    "llava-onevision-7b": lambda: _several_crops("onevision"),
    "clip-vit-b-16": lambda: _open_clip("ViT-B-16"),
    "clip-vit-l-14": lambda: _open_clip("ViT-L-14"),
    "clip-vit-l-14-336": lambda: __import__("transformers").CLIPVisionModel(_clip_336()),
    "siglip-so400m-14-384": _siglip,
    "vit-t-16": lambda: _timm("vit_tiny_patch16_224"),
    "vit-s-16": lambda: _timm("vit_small_patch16_224"),
    "vit-b-16": lambda: _timm("vit_base_patch16_224"),
    "vit-b-16-384": lambda: _timm("vit_base_patch16_384"),
    "vit-l-16": lambda: _timm("vit_large_patch16_224"),
    "deit-s": lambda: _timm("deit_small_patch16_224"),
    "mae-h": lambda: _timm("vit_huge_patch14_224.mae", num_classes=1000),
}


def _plain(tower):
    """A tower without what only a model has: paths, names, and how q and k are read."""
    if tower is None:
        return None
    parts = sorted((part.row, part.token, part.pair) for part in tower.parts)
    return tower.blocks, tower.tokens, tower.protected, tower.stem, parts, tower.grid, tower.spread


@pytest.mark.parametrize("name", BUILT)
def test_presets_are_what_the_adapters_read_off_the_models(name):
    with torch.device("meta"):
        model = BUILT[name]().to(torch.float16)
    found, wanted = preset(name), adapter_for(model).account()
    assert _plain(found.vision) == _plain(wanted.vision)
    assert _plain(found.text) == _plain(wanted.text)
    assert sum(part.row for part in found.projector) == sum(part.row for part in wanted.projector)
    if wanted.visual:  # else the prompt says how many there are
        assert (found.visual, found.crops) == (wanted.visual, wanted.crops)
    if found.language is not None:
        assert found.language.blocks == wanted.language.blocks
        assert found.language.head.row == wanted.language.head.row
        assert found.language.kv_bytes == wanted.language.kv_bytes
    assert dict(found.layout.stages) == dict(wanted.layout.stages)


def test_every_preset_can_be_made_and_an_unknown_one_names_them():
    for name in PRESETS:
        shape = preset(name)
        assert shape.name == name and shape.layout.stages
        assert shape.visual == sum(shape.parts or (shape.visual,))
    with pytest.raises(ParameterError, match=r"no preset 'llava-1.5'; did you mean 'llava-1.5-7b'\?"):
        preset("llava-1.5")


# ---------------------------------------------------------------------- reading weights
class _Quantised(nn.Module):
    """A linear map that stores its weights packed."""

    in_features, out_features = 6, 10

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(30, 1), requires_grad=False)


def test_linear_maps_count_by_features_not_by_storage():
    from vlmtok.adapters.account import weights

    low_rank = nn.ModuleDict({"base_layer": nn.Linear(6, 10), "lora_A": nn.Linear(6, 2), "lora_B": nn.Linear(2, 10)})
    assert weights(_Quantised()) == 60
    assert weights(low_rank) == 60 + 12 + 20
    assert weights(nn.MultiheadAttention(8, 2)) == 4 * 64
    assert weights(nn.MultiheadAttention(8, 2, kdim=5, vdim=3)) == 64 + 40 + 24 + 64
    assert weights(nn.LayerNorm(8)) == 0


def test_accounting_imports_no_library():
    import subprocess
    import sys

    code = (
        "import sys, vlmtok; vlmtok.budget('fastv', 'llava-1.5-7b', tokens=64);"
        "print(','.join(sorted({'timm', 'open_clip', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert vlmtok.estimate is not None
