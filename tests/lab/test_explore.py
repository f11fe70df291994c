"""`vlmtok.explore`: sliders are turned as a user would, and what the panel shows is read."""

import io
import sys

import pytest
import torch
from PIL import Image
from support.checkpoints import picture, vit
from support.comparing import QUESTION

import vlmtok
from vlmtok import loading
from vlmtok.core.hooks import hooks_of
from vlmtok.errors import ParameterError, SiteError
from vlmtok.lab import compare as comparing
from vlmtok.lab.explore import Explorer


@pytest.fixture
def panel(speaker):
    return vlmtok.explore(speaker, picture(), QUESTION, "todre:keep=0.1:tau=none", max_new_tokens=4)


def shown(panel):
    return bytes(panel.picture.value), panel.answer.value, panel.report.value, panel.status.value


def turn(panel, key, value):
    panel.controls[key].input.value = value


def test_everything_follows_a_slider(panel, speaker):
    before = shown(panel)
    with Image.open(io.BytesIO(before[0])) as drawn:
        assert drawn.format == "PNG"
    first = panel.comparison
    turn(panel, "keep", 0.5)
    assert panel.spec == "todre:keep=0.5:tau=none" and panel.comparison is not first
    assert all(one != other for one, other in zip(before, shown(panel)))
    assert panel.comparison.tokens.first == 72 and "72" in panel.answer.value and panel.spec in panel.status.value
    expected = comparing.compare(speaker, picture(), QUESTION, panel.spec, max_new_tokens=4, rounds=0)
    assert panel.comparison.compressed.ids == expected.compressed.ids
    assert panel.report.value == expected.report.to_html()
    assert shown(panel)[0] == vlmtok.lab.explore.png(expected.overlay)
    assert not list(hooks_of(speaker.model))


def test_the_bare_model_answers_once(speaker, monkeypatch):
    asked = []
    whole = vlmtok.lab.runners.Speaker.answer

    def answer(self):
        asked.append(bool(list(hooks_of(speaker.model))))
        return whole(self)

    monkeypatch.setattr(vlmtok.lab.runners.Speaker, "answer", answer)
    panel = vlmtok.explore(speaker, picture(), QUESTION, "random:keep=0.5", max_new_tokens=2)
    for keep in (0.25, 0.75):
        turn(panel, "keep", keep)
    assert sorted(asked) == [False, True, True, True]


def test_the_drop_down_has_the_methods_of_the_model_and_each_runs(panel, speaker):
    assert {"todre", "fastv", "tome"} < set(panel.method.options) <= set(vlmtok.list_methods())
    for name in panel.method.options:
        panel.method.value = name
        assert panel.problem == "" and panel.comparison.method.partition(":")[0] == name, panel.problem
        assert shown(panel)[0].startswith(b"\x89PNG") and name in panel.status.value
    panel.method.value = "todre"
    assert panel.spec == "todre:tau=none"  # where one began
    assert not list(hooks_of(speaker.model))


def test_layers_strength_and_the_rest(panel):
    panel.method.value = "fastv"
    first = panel.comparison.report.to_dict()["total_macs"]
    assert [control.knob.key for control in panel.controls.values()] == [
        "keep",
        "K",
        "positions",
        "forget",
        "min_tokens",
    ]
    turn(panel, "K", 8)
    assert panel.spec == "fastv:K=8" and panel.comparison.report.to_dict()["total_macs"]["after"] > first["after"]
    turn(panel, "positions", "renumber")
    assert panel.spec == "fastv:K=8:positions=renumber"
    assert len(panel.settings.children) == 3 and len(panel.more.children[0].children) == 2
    assert panel.more.titles == ("more settings",)
    panel.method.value = "pyramiddrop"
    turn(panel, "ratios[2]", 0.05)
    assert panel.spec == "pyramiddrop:ratios=(0.5;0.25;0.05)"
    turn(panel, "layers", "(2;4;6)")
    assert panel.spec == "pyramiddrop:layers=(2;4;6):ratios=(0.5;0.25;0.05)"


def test_none_is_a_tick(panel):
    tau = panel.controls["tau"]
    assert tau.none.value and tau.input.disabled
    tau.none.value = False
    assert not tau.input.disabled and panel.spec == "todre:tau=0.5"
    panel.controls["keep"].none.value = True
    assert panel.spec == "todre:keep=none:tau=0.5" and panel.problem == ""


def test_an_impossible_setting_says_so_and_leaves_the_model_as_it_was(panel, speaker):
    inputs = vlmtok.lab.prompts.encode_prompt(speaker, picture(), QUESTION)
    with torch.no_grad():
        before = speaker.model(**inputs).logits
    panel.controls["keep"].none.value = True  # and tau is none already
    assert panel.problem == "ToDRE: keep=None and tau=None leave nothing to do"
    assert panel.problem in panel.status.value and "Traceback" not in panel.status.value
    assert panel.comparison is None and shown(panel)[:3] == (b"", "", "")
    assert repr(panel) == f"<Explorer of {speaker.name}: error: {panel.problem}>"
    panel.method.value = "pyramiddrop"
    turn(panel, "layers", "(2;99;100)")
    assert "layer 99 does not exist" in panel.problem and "\n" not in panel.problem
    turn(panel, "layers", "(2;")
    assert panel.problem.startswith("'(2;' is no value; an int, a float")
    assert not list(hooks_of(speaker.model))
    with torch.no_grad():
        assert torch.equal(speaker.model(**inputs).logits, before)
    turn(panel, "layers", "none")
    assert panel.problem == "" and panel.comparison is not None and panel.picture.value


def test_whatever_goes_wrong_while_running_is_one_line(panel, speaker, monkeypatch):
    def burst(*_, **__):
        raise RuntimeError("the <host> said no\nat length")

    monkeypatch.setattr(type(panel._comparing), "with_method", burst)
    turn(panel, "keep", 0.7)
    assert panel.problem == "the <host> said no" and "the &lt;host&gt; said no" in panel.status.value
    assert not panel.button.disabled


def test_without_live_only_the_button_runs(speaker):
    panel = vlmtok.explore(speaker, picture(), QUESTION, "random:keep=0.5", max_new_tokens=2, live=False)
    first = panel.comparison
    turn(panel, "keep", 0.2)
    assert panel.comparison is first
    panel.button.click()
    assert panel.spec == "random:keep=0.2" and panel.comparison is not first


def test_a_tower(tmp_path):
    model = loading.load(str(vit(tmp_path)))
    panel = vlmtok.explore(model, picture())
    assert panel.method.value == "pitome" and "fastv" not in panel.method.options
    panel.method.value = "tome"
    before = shown(panel)
    turn(panel, "r", 2)
    assert panel.spec == "tome:r=2" and all(one != other for one, other in zip(before, shown(panel)))


def test_a_notebook_gets_the_widget(panel):
    shown = panel._repr_mimebundle_()
    shown = shown[0] if isinstance(shown, tuple) else shown
    assert "application/vnd.jupyter.widget-view+json" in shown and isinstance(panel, Explorer)


def test_bad_input_is_refused(speaker, monkeypatch):
    with pytest.raises(ParameterError, match="turns one method, got 2"):
        vlmtok.explore(speaker, picture(), QUESTION, "tome+fastv")
    with pytest.raises(SiteError, match="layer 99"):
        vlmtok.explore(speaker, picture(), QUESTION, "fastv:K=99")
    assert not list(hooks_of(speaker.model))
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r"explore\(\) needs ipywidgets: pip install 'vlmtok\[notebooks\]'"):
        vlmtok.explore(speaker, picture(), QUESTION)
