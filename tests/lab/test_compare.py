"""`vlmtok.lab.compare`: what is asked and compared, families and their pictures; and that the model stays bare."""

import base64
import dataclasses
import html
import io
import json
import re

import pytest
import torch
from PIL import Image
from support.checkpoints import FAMILIES, picture, vit
from support.comparing import QUESTION, compare
from support.tables import cells

import vlmtok
from vlmtok import loading
from vlmtok.core.hooks import hooks_of
from vlmtok.core.site import Site
from vlmtok.core.trace import PictureTrace, Trace
from vlmtok.errors import ParameterError, SiteError, SpecError, UnknownMethod, UnsupportedModel
from vlmtok.lab import compare as comparing
from vlmtok.lab import comparison, prompts, runners
from vlmtok.lab.comparing import joined
from vlmtok.loading import LoadError
from vlmtok.timing import Ratio


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return loading.load(str(vit(tmp_path_factory.mktemp("vit"))))


def generate(model, inputs):
    with torch.no_grad():
        return model.model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]


# ---------------------------------------------------------------------- comparing
def test_both_answers_are_those_of_generate(speaker):
    found = compare(speaker, picture(), QUESTION, "todre:keep=0.1")
    inputs = prompts.encode_prompt(speaker, picture(), QUESTION)
    assert list(found.bare.ids) == generate(speaker, inputs).tolist()
    with vlmtok.compress(speaker.model, "todre:keep=0.1") as run:
        short = generate(speaker, inputs)
    assert list(found.compressed.ids) == short.tolist()
    assert found.report.to_dict()["total_macs"] == run.report().to_dict()["total_macs"]
    assert found.bare.text == speaker.processor.decode(found.bare.ids, skip_special_tokens=True).strip()
    assert found.tokens == comparison.VisualTokens(144, 14, 14, 14)
    assert found.method == "todre:keep=0.1" and found.prompt == QUESTION
    assert not list(hooks_of(speaker.model))


def test_keeping_everything_changes_nothing(speaker):
    found = compare(speaker, picture(), QUESTION, "todre:keep=1.0:tau=none")
    assert found.loyalty == runners.Loyalty(True, 1.0, 0.0) and found.tokens.first == 144
    other = compare(speaker, picture(), QUESTION, "random:keep=1")
    assert other.loyalty.divergence > 0 and other.tokens.first == 1


def test_the_dict_is_json_and_gives_no_absolute_times_of_a_cpu(speaker):
    found = compare(speaker, picture(), QUESTION, "tome:r=4+fastv").to_dict()
    text = json.dumps(found)
    assert "seconds" not in text and json.loads(text)["method"] == "tome:r=4+fastv"
    assert found["bare"]["visual_tokens"] == 144 and found["compressed"]["visual_tokens"] < 144
    assert set(found["speedup"]) == {"prefill", "answer"} and found["speedup"]["prefill"]["rounds"] == 1
    assert found["bare"]["kv_bytes"] > found["compressed"]["kv_bytes"] > 0
    assert found["bare"]["total_macs"] > found["compressed"]["total_macs"] > 0


def test_a_tower_names_its_classes(classifier):
    found = compare(classifier, picture(), None, "tome:r=3")
    with torch.no_grad():
        shares = classifier.model(classifier.pixels(picture())).logits[0].softmax(-1)
    best = shares.argmax()
    assert found.bare.text == classifier.model.config.id2label[int(best)]
    assert found.bare.classes[0][1] == pytest.approx(float(shares[best]))
    assert found.tokens.bare == 36 and found.tokens.last == 36 - 4 * 3
    assert set(found.latency) == {"forward"} and found.to_dict()["bare"]["total_macs"] > 0
    assert 0.5 < found.loyalty.cosine <= 1.0 + 1e-6


def test_timm_and_open_clip_towers_with_random_weights():
    for name in ("timm:vit_tiny_patch16_224", "open_clip:ViT-S-32-alt"):
        model = loading.load(name, random=True)
        found = compare(model, picture(), None, "pitome:ratio=0.9")
        assert not model.trained and found.overlay.width > 2 * picture().width
        named = found.bare.text.startswith("class ") and len(found.bare.classes) == runners.TOP
        assert named if name.startswith("timm") else not found.bare.classes
        assert found.loyalty.cosine > 0 and found.report.macs.after.high < found.report.macs.before
        assert not list(hooks_of(model.model))


def test_the_tables_can_be_printed(speaker, classifier):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare(speaker, picture(), QUESTION, "todre:keep=0.1"))
    console.print(compare(classifier, picture(), None, "tome:r=3"))
    text = console.export_text()
    assert "visual tokens" in text and "key-value cache" in text and "time, prefill" in text and "cosine" in text
    assert " ms" not in text and "relative to bare" in text


@pytest.mark.parametrize(
    ("ratio", "said", "unsaid"),
    [
        (Ratio(0.8, 0.7, 0.9, 9), "took more than fewer tokens saved", "differ too much"),
        (Ratio(0.9, 0.7, 1.2, 9), "differ too much", "took more"),
        (Ratio(1.1, 0.9, 1.2, 9), "differ too much", "took more"),
        (Ratio(0.99, 0.99, 0.99, 1), "1 of 3 rounds", "took more"),
        (Ratio(19.6, 19.6, 19.6, 1), "too few rounds to say", "19.6"),
        (Ratio(1.5, 1.4, 1.6, 9), "1.50 x faster", "took more"),
    ],
)
def test_slower_is_said_only_where_the_rounds_agree(classifier, ratio, said, unsaid):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    found = compare(classifier, picture(), None, "tome:r=3")
    console.print(dataclasses.replace(found, latency={"forward": ratio}))
    text = console.export_text()
    assert said in text and unsaid not in text


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("todre:keep=0", ParameterError),
        ("todre:keep=1.5", ParameterError),
        ("todre:keep=true", ParameterError),
        ("tome:r=-1", ParameterError),
        ("tome:r=[" + "1;" * 40 + "1]", ParameterError),
        ("pitome:ratio=[" + "0.9;" * 40 + "0.9]", ParameterError),
        ("todre:check_layer=99", SiteError),
        ("todre:frobnicate=1", ParameterError),
        ("nope", UnknownMethod),
        ("todre:keep", SpecError),
        ("tca:reservoir_size=1+nope", UnknownMethod),
    ],
)
def test_a_method_that_does_not_fit_leaves_the_model_as_it_was(speaker, method, error):
    inputs = prompts.encode_prompt(speaker, picture(), QUESTION)
    with torch.no_grad():
        before = speaker.model(**inputs).logits
    with pytest.raises(error) as problem:
        compare(speaker, picture(), QUESTION, method)
    assert "\n" not in str(problem.value)
    assert not list(hooks_of(speaker.model))
    with torch.no_grad():
        assert torch.equal(speaker.model(**inputs).logits, before)


def test_other_bad_input_is_refused(speaker, classifier):
    with pytest.raises(ParameterError, match="takes a picture and no prompt"):
        compare(classifier, picture(), "what is this?")
    with pytest.raises(ParameterError, match="max_new_tokens=0"):
        compare(speaker, picture(), QUESTION, max_new_tokens=0)
    with pytest.raises(ParameterError, match="rounds=-1"):
        compare(speaker, picture(), QUESTION, rounds=-1)
    assert not compare(speaker, picture(), QUESTION, rounds=0).latency
    with pytest.raises(SiteError, match="acts at stage 'decoder'"):
        compare(classifier, picture(), None, "fastv")
    with pytest.raises(LoadError, match="no such file"):
        compare(speaker, "nowhere.png", QUESTION)
    with pytest.raises(UnsupportedModel, match="shifted windows"):
        compare(loading.load("timm:swin_tiny_patch4_window7_224", random=True), picture())
    assert not list(hooks_of(speaker.model)) and not list(hooks_of(classifier.model))


def test_methods_by_default(speaker, classifier):
    assert comparing.default_method(speaker.model) == comparing.DEFAULT_METHOD
    assert comparing.default_method(classifier.model) == comparing.DEFAULT_TOWER_METHOD


# ---------------------------------------------------------------------- families and their pictures
@pytest.mark.parametrize("family", FAMILIES)
def test_families_run_from_a_folder_and_overlays_land_on_the_patches(family, tmp_path):
    model = loading.load(str(FAMILIES[family](tmp_path)))
    white = Image.new("RGB", (128, 96), (255, 255, 255))
    inputs = prompts.encode_prompt(model, white, QUESTION)
    with vlmtok.compress(model.model, "random:keep=0.3", trace=True) as run:
        generate(model, inputs)
    found = joined(run.trace(), white.size, model.processor)
    drawn = [p for part, (_, patches) in found.grids().items() if part or len(found.grids()) == 1 for p in patches]
    kept = sum(int(found.owner[patch]) >= 0 for patch in drawn) / len(drawn)
    result = compare(model, white, QUESTION, "random:keep=0.3")
    assert result.overlay is not None, result.overlay_problem
    alone = vlmtok.overlay(white, result.trace, preprocess=model.processor, plain=True)
    shown = torch.frombuffer(bytearray(alone.convert("L").tobytes()), dtype=torch.uint8)
    # All of these show the whole picture, and patches of a part are equally large: bright is what was kept.
    assert float((shown > 200).float().mean()) == pytest.approx(kept, abs=0.03)
    assert 0.05 < kept < 0.9 and result.tokens.bare == sum(p.patches for p in run.trace().pictures)


def test_crops_that_count_as_pictures_are_joined():
    def piece(owner):
        return PictureTrace(torch.tensor(owner), ((Site("projected"), torch.tensor(owner)),), (1, 2))

    def halves(image):
        import torchvision.transforms.functional as tf

        left, right = image.crop((0, 0, 50, 100)), image.crop((50, 0, 100, 100))
        return torch.stack([tf.to_tensor(part.resize((64, 64))) for part in (left, right, image)])

    trace = Trace([piece([0, 1]), piece([-1, 1]), piece([0, -1])])
    found = joined(trace, (100, 100), halves)
    assert found.owner.tolist() == [0, 1, -1, 3, 4, -1]
    assert found.parts.tolist() == [1, 1, 2, 2, 0, 0]
    assert [site is None for site in found.dropped_at()] == [True, True, False, True, True, False]
    assert joined(Trace([piece([0, 1])]), (100, 100), halves).owner.tolist() == [0, 1]


def test_a_list_of_methods_is_compared_one_after_the_other(speaker):
    short = {"rounds": 0, "max_new_tokens": 2}
    rows = vlmtok.compare(speaker, picture(), ["todre:keep=0.1,0.5", "fastv"], **short)
    assert [row.method for row in rows] == ["todre:keep=0.1", "todre:keep=0.5", "fastv"]
    assert [row.prompt for row in rows] == [prompts.DEFAULT_PROMPT] * 3
    (both,) = vlmtok.compare(speaker, picture(), QUESTION, [["tome:r=4", vlmtok.FastV(keep=0.5)]], **short)
    assert [type(method).__name__ for method in vlmtok.parse_methods(both.method)] == ["ToMe", "FastV"]
    with pytest.raises(ParameterError, match="the prompt is one text"):
        vlmtok.compare(speaker, picture(), ["todre"], "fastv", **short)


def test_a_picture_that_the_bare_model_cannot_answer_is_one_line_and_other_faults_go_up(speaker, monkeypatch):
    def falls(*args, **kwargs):
        raise RuntimeError("split sizes\ndo not sum")

    monkeypatch.setattr(speaker.model, "generate", falls)
    with pytest.raises(LoadError, match=r"cannot answer .* \(120 x 90 pixels\), bare as it is: RuntimeError: split"):
        compare(speaker, picture(), QUESTION, "todre")
    monkeypatch.undo()
    once = iter([True])
    inner = speaker.model.generate

    def falls_once(*args, **kwargs):
        return falls() if next(once, False) else inner(*args, **kwargs)

    monkeypatch.setattr(speaker.model, "generate", falls_once)
    with pytest.raises(RuntimeError, match="do not sum"):
        compare(speaker, picture(), QUESTION, "todre")
    monkeypatch.undo()
    assert not list(hooks_of(speaker.model))


# ---------------------------------------------------------------------- how it is shown
def test_a_notebook_gets_answers_figures_and_the_picture(speaker):
    found = compare(speaker, picture(), "what <b> ?", "todre:keep=0.1")
    page = found._repr_html_()
    shown = cells(page)
    assert shown[:4] == ["", "bare", "compressed", ""] and "visual tokens" in shown
    assert found.bare.text in shown and found.compressed.text in shown
    data = re.search(r'<img src="data:image/png;base64,([^"]+)"', page)[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.convert("RGB").tobytes() == found.overlay.tobytes()
    assert html.escape(found.overlay_legend) in page and "what &lt;b&gt; ?" in page and "color" not in page
    same = "same answer" if found.loyalty.same else "another answer"
    assert repr(found) == f"<Comparison of todre:keep=0.1 on {speaker.name}: {same}, 14 of 144 visual tokens>"
    assert "what <b> ?" in str(found) and "visual tokens" in str(found) and "\x1b" not in str(found)


def test_where_there_is_no_overlay_a_notebook_says_why(classifier):
    found = compare(classifier, picture(), None, "tome:r=3")
    without = dataclasses.replace(found, overlay=None, overlay_legend="", overlay_problem="no <grid>")
    assert "no overlay: no &lt;grid&gt;" in without._repr_html_() and "<img" not in without._repr_html_()
