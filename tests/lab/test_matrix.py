"""Which method runs on which model: what is tried, what is said of it, and its forms."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass

import pytest
from support.checks import Print
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.further_families import FURTHER

import vlmtok
from vlmtok.core import registry
from vlmtok.errors import ParameterError, UnknownMethod, UnsupportedModel
from vlmtok.lab import pairs
from vlmtok.lab.matrix import LETTERS, Matrix
from vlmtok.lab.tiny import released


@pytest.fixture(scope="module")
def llava():
    return released.released("llava").build()


@pytest.fixture(scope="module")
def found():
    """Some methods on every family."""
    return vlmtok.matrix(None, ["visionzip", "crossget", "fastv:keep=0.25", "todre"])


# ---------------------------------------------------------------------- one model
def test_a_loaded_model_gets_a_row_for_each_method_and_is_left_alone(llava):
    before = Print.of(llava)
    made = vlmtok.matrix(llava)
    before.assert_still(llava)
    assert made.methods == vlmtok.list_methods() and made.models == ["LlavaForConditionalGeneration"]
    assert len(made) == len(vlmtok.list_methods())
    assert [one.method for one in made if not one.attaches] == ["recoverable"]  # it wants a signal of yours
    todre, prumerge = made.pair("todre"), made.pair("prumerge")
    assert todre.stages == ("projected", "decoder") and todre.sites == "projected; decoder layer 27 end"
    assert prumerge.stages == ("features",) and not prumerge.notes
    assert ["todre", "projected, decoder"] in [row[:2] for row in made.table().rows]


def test_observers_are_told_from_what_acts(llava):
    made = vlmtok.matrix(llava, "transprune").pair("transprune")
    assert made.stages == ("decoder",) and "looks on" in made.sites and "decoder layer 7 start;" in made.sites


def test_a_refusal_says_why_and_one_choice_is_a_note():
    late = "todre:check_layer=99"
    made = vlmtok.matrix(released.shared("qwen2_vl"), [late, "random"])
    todre, random = made
    with pytest.raises(vlmtok.errors.SiteError) as refusal:
        vlmtok.compress(released.shared("qwen2_vl"), late)
    assert (todre.attaches, todre.error, todre.reason) == (False, "SiteError", str(refusal.value))
    assert random.attaches and "keeps position ids" in random.notes[0] and random.notes[0].startswith("random ")
    cells = [list(row) for row in made.table().rows]
    assert cells[0] == [late, "refused", todre.reason] and cells[1] == ["random", "projected", random.notes[0]]
    assert made.notes() == ["1 of 2 pairs attach"]


def test_settings_are_tried_as_given(llava):
    given = [vlmtok.ToDRE(keep=0.5), "todre:check_layer=99", "fastv"]
    made = vlmtok.matrix(llava, given)
    assert made.methods == ["todre:keep=0.5", "todre:check_layer=99", "fastv"]
    assert [one.attaches for one in made] == [True, False, True] and "layer 99 does not exist" in made.pairs[1].reason


def test_warnings_of_settings_become_notes(llava):
    (one,) = vlmtok.matrix(llava, ["tome:r=[2;2]"])
    assert one.attaches and any("names 2 of the tower's" in note for note in one.notes)


def test_what_cannot_be_asked_is_refused(llava):
    with pytest.raises(UnknownMethod, match="no method matches"):
        vlmtok.matrix(llava, "nothing*")
    with pytest.raises(ParameterError, match="is of a model"):
        vlmtok.matrix(adapter="generic-vlm")
    with pytest.raises(UnsupportedModel, match="no adapter carries"):
        vlmtok.matrix(__import__("torch").nn.Linear(2, 2))
    run = vlmtok.compress(llava, "fastv")
    with pytest.raises(ParameterError, match="carries a compression"):
        vlmtok.matrix(llava)
    with pytest.warns(vlmtok.errors.VlmtokWarning, match="never ran"):
        run.remove()
    with pytest.raises(ParameterError, match="0 pairs"):
        vlmtok.matrix(llava, "fastv").pair("tome")


def test_a_model_that_is_not_listed_by_its_adapter(llava):
    made = vlmtok.matrix(llava, ["fastv", "tome"], adapter="generic-vlm")
    assert [one.attaches for one in made] == [True, False] and made.pair("tome").reason


# ---------------------------------------------------------------------- families
def test_every_family_is_there_once(found):
    assert found.models == [*released.NAMES] and len(found) == 4 * len(found.models)
    kinds = {released.shared(name).config.model_type for name in found.models}
    assert kinds == set(ROWS) - set(FURTHER), "a row without a tiny family would not be in the matrix"


def test_cells_say_stages_and_choices(found):
    rows = {row[0]: row[1:] for row in found.table().rows}
    assert rows["llava"] == ["F", "V", "D", "PD"] and rows["internvl"] == ["P*", "V", "D", "PD"]
    assert rows["smolvlm"][1] == "V*" and rows["blip-2"] == ["-", "V", "-", "-"]
    for one in found:
        cell = rows[one.model][found.methods.index(one.method)]
        assert cell.rstrip("*") == ("".join(LETTERS[stage] for stage in one.stages) or "-")
        assert cell.endswith("*") == bool(one.notes)


def test_one_sentence_is_one_line_with_its_pairs(found):
    chosen, refused = found.sentences()
    assert sum(map(len, refused.values())) == len(found) - len(found.attaching)
    (without,) = (pairs for said, pairs in chosen.items() if "merges without guidance" in said)
    assert {one.method for one in without} == {"crossget"} and "smolvlm" in {one.model for one in without}
    for said, group in refused.items():
        assert not any(name in said for name in ("transformers-vlm", "CrossGET", "VisionZip", "FastV"))
        (line,) = [note for note in found.notes() if note.startswith(f"refused: {said}: ")]
        assert all(one.model in line and one.method in line for one in group)


def test_models_with_the_same_methods_stand_together():
    made = [pairs.Pair(model, method) for model in ("a", "b") for method in ("x", "y")] + [pairs.Pair("c", "x")]
    assert pairs.named_pairs(made) == "x, y on a, b; x on c"


def test_forms_agree(found):
    text, records = str(found), found.to_records()
    for name in found.models:
        assert sum(line.startswith(f" {name} ") for line in text.splitlines()) == 1
    assert f"{len(found.attaching)} of {len(found)} pairs attach" in text
    read = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["model"] for row in read] == [one.model for one in found] and len(read) == len(records)
    assert {row["attaches"] for row in read} == {"True", "False"}
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["of"] == len(found) and plain["pairs"][0]["stages"] == ["features"]
    assert "| llava | F | V | D | PD |" in found.to_markdown()
    assert found.pair("todre", "llava").stages == ("projected", "decoder")
    with pytest.raises(ParameterError, match="26 pairs"):
        found.pair("todre")


def test_a_narrow_terminal_loses_nothing(found):
    from rich.console import Console

    console = Console(width=60, file=io.StringIO(), color_system=None)
    console.print(found)
    shown = "".join(console.file.getvalue().split())
    assert all("".join(note.split()) in shown for note in found.notes())


@pytest.mark.parametrize("name", ["gemma4", "qwen3_5", "lfm2_vl", "llama4", "qwen2_5_vl", "gemma3"])
def test_depths_are_those_of_releases(name):
    """The pattern reaches the layers themselves, not the configuration alone."""
    depths, model = released.DEPTHS[name], released.shared(name)
    text = model.config.get_text_config()
    layout = vlmtok.adapters.adapter_for(model).layout()
    assert layout.stages["decoder"].depth == depths.decoder == text.num_hidden_layers
    assert list(text.layer_types) == depths.layer_types if name != "qwen2_5_vl" else True
    if name == "gemma4":
        assert layout.stages["decoder"].last_cut == 13
    if name == "qwen3_5":
        assert set(layout.stages["decoder"].blind) == {i for i in range(32) if i % 4 != 3}
    if name == "lfm2_vl":
        assert sorted(set(range(16)) - set(layout.stages["decoder"].blind)) == [2, 5, 8, 10, 12, 14]
    if name == "llama4":
        layers = model.language_model.model.layers
        assert [bool(layer.self_attn.use_rope) for layer in layers] == [i % 4 != 3 for i in range(32)]
    if name == "qwen2_5_vl":
        assert list(model.config.vision_config.fullatt_block_indexes) == [7, 15, 23, 31]
        assert len(model.model.visual.blocks) == 32


# ---------------------------------------------------------------------- methods of one's own
@pytest.fixture
def own():
    """Methods of which the package knows nothing: one whose setting must be given, and one with a preset for it."""
    vlmtok.list_methods()
    known = dict(registry._METHODS)

    @vlmtok.register_method
    @dataclass(eq=False)
    class Sieve(vlmtok.Method):
        """Keeps some."""

        step: int

        def sites(self, layout):
            return [vlmtok.Site("projected")]

        def reduce(self, view):
            return None

    yield Sieve
    registry._METHODS.clear()
    registry._METHODS.update(known)


def test_a_method_from_outside_has_its_column(own, llava):
    made = vlmtok.matrix(llava, "*e")
    assert "sieve" in made.methods
    one = made.pair("sieve")
    assert not one.attaches and "no default for step" in one.reason
    (one,) = vlmtok.matrix(llava, ["sieve:step=2"])
    assert one.attaches and one.stages == ("projected",)


def test_an_empty_matrix_has_forms():
    assert Matrix(()).to_csv() == "" and Matrix(()).to_records() == []
