"""`estimate` against the figures and tables that are published."""

from __future__ import annotations

import pytest

from vlmtok import (
    AIM,
    TCA,
    CrossGET,
    FastV,
    PiToMe,
    PyramidDrop,
    SparseVLM,
    ToDRE,
    ToMe,
    TransPrune,
    estimate,
)

T, G = 1e12, 1e9
LLAVA, NEXT, ONEVISION = "llava-1.5-7b", "llava-next-7b", "llava-onevision-7b"

FRAMES = {"visual_tokens": 32 * 196, "crops": 32, "text_tokens": 100}
"""32 frames of 14 x 14 tokens, as the roofline tool was given them."""

# Model, method, convention, what else, bare, compressed; as printed, in the unit of the convention.
LANGUAGE = [
    (LLAVA, TransPrune(), "transprune", {}, 3.817, 1.557),
    (NEXT, TransPrune(), "transprune", {}, 20.825, 8.330),
    (LLAVA, TransPrune(layers=(5, 7, 10)), "transprune", {}, 3.817, 1.348),
    (LLAVA, TransPrune(layers=(6, 8, 11)), "transprune", {}, 3.817, 1.453),
    (LLAVA, TransPrune(layers=(8, 10, 13)), "transprune", {}, 3.817, 1.662),
    (LLAVA, TransPrune(layers=(9, 11, 14)), "transprune", {}, 3.817, 1.767),
    (LLAVA, FastV(K=2, keep=0.5), "transprune", {}, 3.817, 2.007),
    (NEXT, FastV(K=2, keep=0.5), "transprune", {}, 20.825, 10.554),
    (LLAVA, FastV(K=2, keep=0.25), "transprune", {}, 3.817, 1.118),
    (NEXT, FastV(K=2, keep=0.25), "transprune", {}, 20.825, 5.800),
    (LLAVA, PyramidDrop(), "pyramiddrop", {}, 3.817, 1.777),
    (NEXT, PyramidDrop(), "pyramiddrop", {}, 20.825, 9.465),
    (ONEVISION, AIM(), "llm-viewer", FRAMES, 99.627, 14.756),
    (ONEVISION, AIM(), "language", FRAMES, 99.456, 14.748),
    (ONEVISION, AIM(prune=False), "language", FRAMES, 99.456, 22.885),
]


@pytest.mark.parametrize(("model", "method", "name", "prompt", "bare", "left"), LANGUAGE)
def test_published_figures_of_language_models(model, method, name, prompt, bare, left):
    figure = estimate(model, method, convention=name, deciding=False, **prompt).figure
    assert round(figure.before / T, 3) == bare
    assert figure.after.fixed and round(figure.after.low / T, 3) == left


def test_sparsevlm_without_and_with_the_tokens_that_it_recycles():
    kept = {"decoder layer 2 end": 300, "decoder layer 6 end": 200, "decoder layer 15 end": 110}
    printed = estimate(LLAVA, SparseVLM(tokens=192), counts=kept, convention="transprune", deciding=False)
    assert round(printed.figure.after.low / T, 3) == 1.329
    # 9, 7 and 5 clusters come back.
    whole = estimate(LLAVA, SparseVLM(tokens=192), deciding=False)
    visual = [line.visual.low for line in whole.layers if line.stage == "decoder"]
    assert (visual[3], visual[7], visual[16]) == (309, 204, 113)
    assert 1.32 < whole.by("transprune").after.low / T < 1.36


def test_todre_as_its_table_counts_and_as_its_formula_does():
    # The table's token count is not given; 2,000 visual and 100 text tokens, encoder included, meet both its figures.
    prompt = {"visual_tokens": 2000, "crops": 5, "parts": (576, 1424), "text_tokens": 100}
    report = estimate(NEXT, ToDRE(keep=0.1, tau=None), deciding=False, **prompt)
    assert report.flops.before / T == pytest.approx(31.4, rel=0.01)
    assert report.flops.after.low / T == pytest.approx(6.0, rel=0.01)
    # The printed formula has two of Vicuna's three MLP matrices and counts a multiply-add once.
    printed = estimate(NEXT, ToDRE(keep=0.1), text_tokens=120, convention="todre", deciding=False)
    assert round(printed.figure.before / T, 1) == 17.5
    assert printed.by("language").before / T == pytest.approx(43.6, rel=0.01)


FASTV = [
    ("llava-1.5-7b", 99.3, {0.1: (19.9, 20), 0.25: (32.8, 33), 0.5: (54.6, 55)}),
    ("llava-1.5-13b", 154.6, {0.1: (29.7, 19), 0.25: (50.2, 32), 0.5: (84.6, 55)}),
]
"""FastV's table 1: billions of FLOPs of a mean layer, bare and with K = 2, and per cent of bare."""


@pytest.mark.parametrize(("model", "bare", "rows"), FASTV)
def test_the_table_of_fastv(model, bare, rows):
    """36 text tokens give the bare figures; the pruned ones of the 7B stand 1 % lower in the paper."""
    for keep, (printed, share) in rows.items():
        figure = estimate(model, FastV(K=2, keep=keep), convention="fastv", text_tokens=36, deciding=False).figure
        assert round(figure.before / G, 1) == bare
        assert figure.after.low / G == pytest.approx(printed, rel=0.013)
        assert round(100 * figure.after.low / figure.before) == share


TOME = [
    ("deit-s", 0, 4.6),
    ("deit-s", 13, 2.7),
    ("deit-s", 16, 2.3),
    ("deit-t", 0, 1.3),
    ("deit-t", 12, 0.8),
    ("vit-l-16", 0, 61.6),
    ("vit-l-16", 8, 31.0),
]
"""ToMe's tables of DeiT and of ViT-L: GFLOPs as printed."""


@pytest.mark.parametrize(("model", "r", "printed"), TOME)
def test_the_tables_of_tome(model, r, printed):
    line = estimate(model, ToMe(r=r or 8), deciding=False).by("tome")
    assert round((line.after.low if r else line.before) / G, 1) == printed


# Preset, ratio, GMACs with the MLP charged before and after the merge; as printed, to two decimals (MAE: to one).
PITOME = [
    ("deit-s", None, 4.54, 4.54),
    ("deit-s", 0.975, 4.00, 3.95),
    ("deit-s", 0.95, 3.48, 3.38),
    ("deit-s", 0.925, 3.07, 2.93),
    ("deit-s", 0.9125, 2.86, 2.71),
    ("deit-s", 0.9, 2.70, 2.54),
    ("deit-t", None, 1.22, 1.22),
    ("deit-t", 0.95, 0.93, 0.90),
    ("deit-t", 0.925, 0.81, 0.78),
    ("deit-t", 0.9, 0.71, 0.67),
    ("deit-b", None, 17.45, 17.45),
    ("deit-b", 0.95, 13.48, 13.08),
    ("deit-b", 0.9, 10.50, 9.85),
    ("mae-l", None, 61.4, 61.4),
    ("mae-l", 0.95, 37.2, 36.0),
    ("mae-l", 0.925, 29.8, 28.5),
    ("mae-h", None, 167.1, 167.1),
    ("mae-h", 0.95, 86.2, 83.6),
    ("vit-b-16-384", None, 55.14, 55.14),
    ("vit-b-16-384", 0.95, 41.5, 40.3),
    ("clip-vit-l-14-336", None, 190.6, 190.6),
    ("clip-vit-l-14-336", 0.95, 110.5, 107.1),
    ("clip-vit-l-14-336", 0.925, 87.7, 83.6),
    ("clip-vit-l-14-336", 0.9, 71.4, 67.0),
]


@pytest.mark.parametrize(("model", "ratio", "early", "late"), PITOME)
def test_published_figures_of_pitome(model, ratio, early, late):
    report = estimate(model, PiToMe(ratio=ratio or 0.9), deciding=False)
    for name, printed in (("pitome", early), ("pitome-post", late)):
        line = report.by(name)
        value = (line.before if ratio is None else line.after.low) / G
        decimals = 1 if model.startswith("mae") or printed == round(printed, 1) else 2
        assert round(value, decimals) == printed


DIGITS = {
    "tome_r8": (ToMe(r=8), 0.9236),
    "tome_r16": (ToMe(r=16), 0.647),
    "tome_r16_dec": (ToMe(r=(16, -1)), 0.447),
    "pitome_deit_095": (PiToMe.preset("deit", ratio=0.95), 0.926),
    "pitome_deit_090": (PiToMe.preset("deit", ratio=0.9), 0.712),
    "pitome_paper_0925": (PiToMe.preset("paper", ratio=0.925), 0.813),
}


@pytest.mark.parametrize("name", DIGITS)
def test_figures_of_the_reference_runs_on_a_tiny_vit(name):
    method, printed = DIGITS[name]
    line = estimate("vit-t-16", method, convention="pitome", deciding=False).figure
    assert round(line.before / G, 4) == 1.2246
    assert round(line.after.low / G, 4 if printed == 0.9236 else 3) == printed


PATCHES = {
    ("vit-b-16", 0.95): [187, 178, 170, 162, 154, 147, 140, 133, 127, 121, 115, 110],
    ("vit-b-16", 0.9): [177, 160, 144, 130, 117, 106, 96, 87, 79, 72, 65, 59],
    ("clip-vit-l-14-336", 0.95): [548, 521, 495, 471, 448, 426, 405, 385, 366, 348, 331, 315]
    + [300, 285, 271, 258, 246, 234, 223, 212, 202, 192, 183, 174],
    ("clip-vit-l-14-336", 0.9): [519, 468, 422, 380, 342, 308, 278, 251, 226, 204, 184, 166]
    + [150, 135, 122, 110, 99, 90, 81, 73, 66, 60, 54, 49],
}  # fmt: skip


@pytest.mark.parametrize(("model", "ratio"), PATCHES)
def test_token_tables_of_pitome(model, ratio):
    report = estimate(model, PiToMe(ratio=ratio), deciding=False)
    assert [line.mlp.low - 1 for line in report.layers] == PATCHES[model, ratio]


@pytest.mark.parametrize(("ratio", "left"), [(0.975, 330), (0.95, 183), (0.925, 101), (0.9, 54), (0.85, 17)])
def test_visual_tokens_that_pitome_leaves_to_llava(ratio, left):
    report = estimate(LLAVA, PiToMe.preset("llava", ratio=ratio), deciding=False)
    assert report.visual("decoder") == (576, left)


# Logged by the release, image and text tower, batch 1.
CROSSGET = [
    (CrossGET.preset("clip", rv=16), 12.036),
    (CrossGET(rv=0, rl=6, guidance="cross"), 19.275),
    (CrossGET.preset("clip", rv=16, rl=6), 10.612),
]


@pytest.mark.parametrize(("method", "logged"), CROSSGET)
def test_published_figures_of_crossget(method, logged):
    figure = estimate("clip-vit-b-16", method, convention="crossget", deciding=False).figure
    assert figure.before / G == pytest.approx(20.567, rel=0.002)
    assert figure.after.low / G == pytest.approx(logged, rel=0.002)


# Tokens behind each layer's merge, the cross token included as the paper counts it.
@pytest.mark.parametrize(
    ("method", "stage", "tokens"),
    [
        (CrossGET.preset("clip", rv=16), "vision", [182, 166, 150, 134, 118, 102, 86, 70, 54, 38, 22, 12]),
        (CrossGET.preset("clip", rv=12), "vision", [186 - 12 * i for i in range(12)]),
        (CrossGET.preset("clip", rl=6), "text", [72, 66, 60, 54, 48, 42, 36, 30, 24, 18, 12, 8]),
    ],
)
def test_token_tables_of_crossget(method, stage, tokens):
    report = estimate("clip-vit-b-16", method, deciding=False)
    assert [line.mlp.low for line in report.layers if line.stage == stage] == tokens


TCA_TABLE = [
    ({"drop_rate": 0.035}, (182, 167, 155), 15.69),
    ({"drop_rate": 0.1}, (143, 104, 77), 11.86),
    ({"drop_rate": 0.105}, (140, 101, 74), 11.67),
    ({"drop_rate": 0.175}, (98, 53, 29), 8.82),
    ({"ratio": 0.9}, (179, 164, 149), 15.44),
    ({"ratio": 0.7}, (140, 101, 74), 11.67),
    ({"ratio": 0.5}, (101, 53, 29), 8.88),
]


@pytest.mark.parametrize(("settings", "tokens", "printed"), TCA_TABLE)
def test_published_figures_of_tca(settings, tokens, printed):
    report = estimate("clip-vit-b-16", TCA(**settings, reservoir_size=0), convention="tca", deciding=False)
    assert round(report.figure.before / G, 2) == 17.56
    assert round(report.figure.after.low / G, 2) == printed
    behind = [line.mlp.low for line in report.layers if line.stage == "vision"]
    assert (behind[3], behind[6], behind[9]) == tokens
