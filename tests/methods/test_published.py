"""Figures of papers by `estimate`, in one table: each counted as its paper counts, from a preset alone.

The long tables (every ratio of PiToMe, layer by layer) stand in test_published_figures.py.
"""

import pytest

from vlmtok import AIM, TCA, CrossGET, FastV, PyramidDrop, TransPrune, VisionZip, budget, estimate

T, G = 1e12, 1e9
LLAVA, NEXT, ONEVISION, CLIP = "llava-1.5-7b", "llava-next-7b", "llava-onevision-7b", "clip-vit-b-16"
FRAMES = {"visual_tokens": 32 * 196, "crops": 32, "text_tokens": 100}

# Model, method, convention, prompt, unit, bare, compressed, and how far the print may be off.
PUBLISHED = {
    "TransPrune, table 1": (LLAVA, TransPrune(), "transprune", {}, T, 3.82, 1.56, 0.005),
    "TransPrune, NeXT": (NEXT, TransPrune(), "transprune", {}, T, 20.83, 8.33, 0.005),
    "TransPrune after 5, 7, 10": (LLAVA, TransPrune(layers=(5, 7, 10)), "transprune", {}, T, 3.817, 1.348, 0.0005),
    "TransPrune after 6, 8, 11": (LLAVA, TransPrune(layers=(6, 8, 11)), "transprune", {}, T, 3.817, 1.453, 0.0005),
    "TransPrune after 7, 9, 12": (LLAVA, TransPrune(), "transprune", {}, T, 3.817, 1.557, 0.0005),
    "TransPrune after 8, 10, 13": (LLAVA, TransPrune(layers=(8, 10, 13)), "transprune", {}, T, 3.817, 1.662, 0.0005),
    "TransPrune after 9, 11, 14": (LLAVA, TransPrune(layers=(9, 11, 14)), "transprune", {}, T, 3.817, 1.767, 0.0005),
    "TransPrune, NeXT, exactly": (NEXT, TransPrune(), "transprune", {}, T, 20.825, 8.330, 0.0005),
    "FastV R = .5": (LLAVA, FastV(keep=0.5), "transprune", {}, T, 3.817, 2.007, 0.0005),
    "FastV R = .75": (LLAVA, FastV(keep=0.25), "transprune", {}, T, 3.817, 1.118, 0.0005),
    "FastV R = .5, NeXT": (NEXT, FastV(keep=0.5), "transprune", {}, T, 20.825, 10.554, 0.0005),
    "FastV R = .75, NeXT": (NEXT, FastV(keep=0.25), "transprune", {}, T, 20.825, 5.800, 0.0005),
    "PyramidDrop": (LLAVA, PyramidDrop(), "transprune", {}, T, 3.817, 1.777, 0.0005),
    "PyramidDrop, NeXT": (NEXT, PyramidDrop(), "transprune", {}, T, 20.825, 9.465, 0.0005),
    "VisionZip, 288 tokens": (LLAVA, VisionZip(keep=288), "transprune", {}, T, 3.82, 1.89, 0.005),
    "VisionZip and TransPrune": (LLAVA, [VisionZip(keep=288), TransPrune()], "transprune", {}, T, 3.82, 0.77, 0.005),
    "AIM": (ONEVISION, AIM(), "llm-viewer", FRAMES, T, 99.63, 14.76, 0.005),
    "AIM, merging alone": (ONEVISION, AIM(prune=False), "language", FRAMES, T, 99.456, 22.885, 0.0005),
    "CrossGET, image tower": (CLIP, CrossGET.preset("clip", rv=16), "crossget", {}, G, 20.567, 12.036, 0.002),
    "CrossGET, text tower": (CLIP, CrossGET(rv=0, rl=6, guidance="cross"), "crossget", {}, G, 20.567, 19.275, 0.002),
    "CrossGET, both": (CLIP, CrossGET.preset("clip", rv=16, rl=6), "crossget", {}, G, 20.567, 10.612, 0.002),
    "TCA R = .9": (CLIP, TCA(ratio=0.9, reservoir_size=0), "tca", {}, G, 17.59, 15.45, 0.002),
    "TCA R = .7": (CLIP, TCA(ratio=0.7, reservoir_size=0), "tca", {}, G, 17.59, 11.69, 0.002),
    "TCA .035, as measured": (CLIP, TCA(drop_rate=0.035, reservoir_size=0), "tca", {}, G, 17.59, 15.710, 0.002),
    "TCA .105, as measured": (CLIP, TCA(drop_rate=0.105, reservoir_size=0), "tca", {}, G, 17.59, 11.683, 0.002),
    "TCA .175, as measured": (CLIP, TCA(drop_rate=0.175, reservoir_size=0), "tca", {}, G, 17.59, 8.826, 0.002),
}
RELATIVE = ("crossget", "tca")
"""Conventions whose figures were logged by a tool that counts a little more: tolerances are shares there."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_of_papers(name):
    model, method, convention, prompt, unit, bare, left, within = PUBLISHED[name]
    figure = estimate(model, method, convention=convention, deciding=False, **prompt).figure
    assert figure.after.fixed
    share = {"rel": within} if convention in RELATIVE else {"abs": within}
    assert figure.before / unit == pytest.approx(bare, **share)
    assert figure.after.low / unit == pytest.approx(left, **share)


# Shares that the tables print beside the figures.
SHARES = [
    (LLAVA, TransPrune(), 40.8),
    (NEXT, TransPrune(), 40.0),
    (LLAVA, FastV(keep=0.5), 52.6),
    (LLAVA, FastV(keep=0.25), 29.3),
    (LLAVA, PyramidDrop(), 46.6),
]


@pytest.mark.parametrize(("model", "method", "percent"), SHARES)
def test_shares_of_papers_and_the_way_back(model, method, percent):
    figure = estimate(model, method, convention="transprune", deciding=False).figure
    assert round(100 * figure.after.low / figure.before, 1) == percent
    # A budget at the printed figure gives the printed setting back.
    found = budget(method, model, macs=figure.after.low, convention="transprune")
    parameter = type(method).budget_parameter
    assert getattr(found, parameter) == pytest.approx(getattr(method, parameter), rel=0.01)


def test_tokens_that_papers_call_by_one_number():
    """FastV "at 128 tokens" keeps 144 of 576 in some tables, which is 171 on average over layers."""
    average = {
        "FastV keep 144": (FastV(keep=144), 171.0),
        "FastV keep 128": (FastV(keep=128), 156.0),
        "PyramidDrop": (PyramidDrop(), 270.0),
        "TransPrune": (TransPrune(), (7 * 576 + 2 * 504 + 3 * 360 + 20 * 72) / 32),
    }
    for method, wanted in average.values():
        layers = [line.visual.low for line in estimate(LLAVA, method, deciding=False).layers if line.stage == "decoder"]
        assert sum(layers) / 32 == wanted
        assert budget(method, LLAVA, layer_average_tokens=wanted).budget.reached == pytest.approx(wanted, rel=0.01)


def test_a_bare_prompt_as_a_roofline_tool_counts_it():
    """LLaVA-1.5 with 576 visual and 64 text tokens: 8.5 T (arXiv 2409.01179)."""
    report = estimate(LLAVA, FastV(), text_tokens=64, deciding=False)
    assert round(report.by("language").before / T, 2) == 8.50
