"""`Counter`: what stays of a picture is known without weights, and whatever it answers can be encoded."""

import contextlib
import random
import re

import pytest
import torch
from support import drawn_settings, serving
from support.methods import METHODS
from support.serving import counter, encoder, letters, model, show

from vlmtok.core.spec import counted_form
from vlmtok.errors import ParameterError, SiteError, UnsupportedModel, VlmtokError
from vlmtok.loading.models import configured
from vlmtok.serving import Counter, Item

DRAWN = 10
"""Specs that are drawn for each family, beside those that are known to go wrong."""
RISKY = (
    *("averagepool", "averagepool:output_size=2", "averagepool:output_size=3", "averagepool:overlap=true"),
    *("todre:pivot=7:tau=none", "visionzip:keep=3:separators=keep", "random:keep=3+averagepool", "cdpruner:keep=2"),
    *("divprune:keep=20+visionzip:keep=2", "visionzip:keep=2:scope=part+divprune:keep=2", "tca", "tome:r=700"),
)
FEW = (None, "divprune:keep=5", "visionzip:keep=4:contextual=2", "averagepool:overlap=true", "pitome:ratio=0.8")


def drawn(name):
    """Specs for a family: of any method, any setting that it takes."""
    chosen = random.Random(name)
    specs = []
    for method in chosen.sample(METHODS, DRAWN):
        made = drawn_settings.variant(*_method(method, chosen))
        with contextlib.suppress(ParameterError):  # what is left out twice leaves nothing
            specs.append(str(counted_form(made)))
    return specs


def _method(name, chosen):
    import vlmtok

    return (vlmtok.parse_methods(chosen.choice(drawn_settings.specs(name)))[0],)


@pytest.mark.filterwarnings("ignore::vlmtok.errors.VlmtokWarning")
@pytest.mark.parametrize("name", serving.NAMES)
def test_what_is_counted_can_be_encoded(name):
    """An error in an engine's step takes all requests along: every refusal comes before."""
    answered = 0
    for letter in letters(name):
        shown = show(name, letter, 4)
        for spec in (*RISKY, *drawn(name)):
            try:
                plan = counter(name).plan(spec)
                left = counter(name).left(plan, shown.item)
            except VlmtokError:
                continue
            text = shown.text if plan.reads_text else None
            (made,) = encoder(name).encode(plan, [shown.item], [left], text)
            assert len(made.rows) == left.counts[1] and made.rows.isfinite().all(), spec
            answered += 1
    assert answered >= 2


@pytest.mark.parametrize("name", serving.NAMES)
def test_a_model_without_data_counts_the_same(name):
    bare = Counter(configured(model(name).config))
    assert all(one.is_meta for one in bare.adapter.model.parameters())
    for letter in letters(name):
        item = show(name, letter).item
        for spec in FEW:
            told = [answer(one, spec, item) for one in (bare, counter(name))]
            assert told[0] == told[1]


def answer(asked, spec, item):
    """Places that stay, or the refusal."""
    try:
        left = asked.left(None if spec is None else asked.plan(spec), item)
    except VlmtokError as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return left.stays.tolist(), left.placeholders.tolist()


def test_all_stays_without_a_plan():
    item = show("mistral3", "I").item
    left = counter("mistral3").left(None, item)
    assert left.stays.all() and left.counts == (16, 16) and int((~left.placeholders).sum()) == 4


@pytest.mark.parametrize("name", ["mistral3", "lighton_ocr"])
def test_marks_among_tokens_of_which_some_leave_are_refused(name):
    asked, item = counter(name), show(name, "I").item
    with pytest.raises(ParameterError, match="divprune:keep=5: .* puts 3 marks among the 16 tokens of a picture"):
        asked.left(asked.plan("divprune:keep=5"), item)
    assert asked.left(asked.plan("divprune:keep=16"), item).stays.all()  # nothing leaves


def test_marks_between_crops_stay():
    """Crops with marks of their own are cut each by itself."""
    asked, item = counter("gemma3"), show("gemma3", "M").item
    left = asked.left(asked.plan("divprune:keep=5"), item)
    assert left.counts == (48, 15) and left.stays[~left.placeholders].all()
    runs = torch.tensor_split(left.stays[left.placeholders], 3)
    assert [run.tolist() for run in runs] == [[True] * 5 + [False] * 11] * 3


@pytest.mark.parametrize("name", ["internvl", "llava_next"])
def test_a_choice_in_each_crop_behind_one_of_the_whole_picture_is_refused(name):
    asked = counter(name)
    item = show(name, "M" if name == "internvl" else "I").item
    with pytest.raises(ParameterError, match="cdpruner:keep=3 chooses in each crop.*divprune:keep=20 leaves.*turn"):
        asked.left(asked.plan("divprune:keep=20+cdpruner:keep=3"), item)
    turned = asked.plan("cdpruner:keep=10+divprune:keep=7")
    assert asked.left(turned, item).counts[1] == 7
    one = show(name, "I").item if name == "internvl" else None
    if one is not None:  # a picture in one part has no such parts
        assert asked.left(asked.plan("divprune:keep=10+cdpruner:keep=3"), one).counts[1] == 3


def test_grids_that_cannot_be_pooled_are_refused():
    asked, item = counter("llava"), show("llava", "I").item
    for spec, words in {
        "averagepool:output_size=3": "4 x 4 tokens cannot be divided into 3 x 3",
        "averagepool:output_size=5": "is larger than the grid 4 x 4",
        "divprune:keep=7+averagepool": "no longer its 4 x 4 grid",
    }.items():
        with pytest.raises(ParameterError, match=words):
            asked.left(asked.plan(spec), item)
    assert asked.left(asked.plan("averagepool"), item).counts == (16, 4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_clips_whose_frames_are_told_apart_by_times_go_as_they_are(name):
    asked, clip = counter(name), show(name, "V").item
    before, after = asked.left(None, clip).counts
    assert before == after > 0
    with pytest.raises(SiteError, match="time of a clip"):
        asked.left(asked.plan("divprune:keep=5"), clip)


def test_clips_that_are_pooled_before_the_projector_have_no_attention_to_patches():
    asked, clip = counter("llava_next_video"), show("llava_next_video", "V").item
    with pytest.raises(SiteError, match="pools those of a clip in front of its projector"):
        asked.left(asked.plan("visionzip:keep=2"), clip)
    assert asked.left(asked.plan("divprune:keep=5"), clip).counts == (12, 5)
    assert asked.left(asked.plan("averagepool:output_size=1"), clip).counts == (12, 3)
    picture = show("llava_next_video", "I").item
    assert asked.left(asked.plan("visionzip:keep=4"), picture).counts == (70, 20)


def test_a_model_whose_language_model_is_not_counted_is_served():
    asked, item = counter("kimi_k25"), show("kimi_k25", "I").item
    assert asked.shape.language is None
    assert asked.left(asked.plan("divprune:keep=5"), item).counts == (16, 5)


def test_plans_are_kept_and_messages_name_the_engine():
    asked = Counter(model("llava"), engine="some engine")
    assert asked.plan("divprune:keep=5") is asked.plan("divprune:keep=5")
    with pytest.raises(SiteError, match="in some engine does not offer"):
        asked.plan("fastv")
    with pytest.raises(ParameterError, match="but .* in some engine lays out a prompt before it sees one"):
        asked.plan("prumerge:keep=none")


def test_what_nobody_carries_is_refused():
    with pytest.raises(UnsupportedModel):
        Counter(torch.nn.Linear(2, 2))


def test_other_sizes_have_other_counts():
    asked = counter("qwen2_vl")
    plan = asked.plan("divprune:keep=0.5")
    counts = [asked.left(plan, show("qwen2_vl", letter).item).counts for letter in "IJ"]
    assert counts == [(16, 8), (8, 4)]
    item = show("qwen2_vl", "I").item
    assert re.fullmatch(r"\(16, 8\)", str(asked.left(plan, Item(item.ids, dict(item.inputs), item.types)).counts))
