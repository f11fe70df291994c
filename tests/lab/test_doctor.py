"""`vlmtok doctor`: right on the libraries at hand, on models of the user's, and by its command."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from support.doctor_hosts import broken, row_of
from typer.testing import CliRunner
from vlmtok.adapters import adapter_for, host_faults
from vlmtok.adapters.language import families

from vlmtok import cli
from vlmtok.errors import ParameterError
from vlmtok.lab import catalogue, doctor
from vlmtok.lab.doctor import language
from vlmtok.lab.doctor.facts import BROKEN, NAMES, OK, REFUSED
from vlmtok.lab.doctor.language import SHARED_ROWS
from vlmtok.lab.doctor.rows import QUICK, cases
from vlmtok.lab.tiny.families import FAMILIES, TOWER_ONLY
from vlmtok.lab.tiny.towers import TOWERS

CARRIED = [name for name, case in cases().items() if case.build is not None]
REASONS = {*families.REFUSED.values(), "its adapter offers no cut there", SHARED_ROWS}
for row in families.ROWS.values():
    REASONS |= {row.whole, row.boundary}


def command(*words):
    return CliRunner().invoke(cli.app, ["doctor", *words])


# ---------------------------------------------------------------------- on the libraries at hand
def test_the_quick_set_is_right_here():
    """And its JSON is one object, nothing else, with all that an issue needs."""
    result = command("--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["ok"], [row["why"] for row in found["rows"] if row["status"] == BROKEN]
    assert set(found) == {"ok", "counts", "versions", "machine", "kernels", "seconds", "rows"}
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    for package in ("python", "vlmtok", "torch", "transformers", "timm", "open_clip_torch", "numpy", "triton"):
        assert package in found["versions"]
    assert found["machine"]["device_type"] == "cpu" and found["kernels"]["path"] == "torch"
    assert [row["name"] for row in found["rows"]] == list(QUICK)
    for row in found["rows"]:
        assert set(row) == {"name", "library", "model", "adapter", "status", "why", "seconds", "facts"}
        check(row["name"], row["status"], {fact["fact"]: fact for fact in row["facts"]})
    assert found["counts"] == {
        status: sum(row["status"] == status for row in found["rows"]) for status in (OK, REFUSED, BROKEN)
    }


@pytest.mark.parametrize("name", [name for name in CARRIED if name not in QUICK])
def test_every_other_row_is_right_here(name):
    row = row_of(name)
    assert not broken(row), row.why
    check(name, row.status, {fact.name: fact.to_dict() for fact in row.facts})


def check(name, status, facts):
    """A row has every fact that its kind can have, and what is refused is refused for a reason that is written down."""
    assert list(facts) == [fact for fact in NAMES if fact in facts]
    known = host_faults.fault_of(name)
    if known is not None:
        assert status == REFUSED and facts["bare"]["why"] == known and len(facts) == 1
        return
    assert status == OK
    wanted = {"bare", "neutral", "tower"}
    if name in FAMILIES or name == "generic-vlm" or name in TOWER_ONLY:
        wanted |= {"input", "layer", "generate"}
    elif name in ("open_clip CLIP", "open_clip CustomTextCLIP", "open_clip TimmModel", "HF CLIPModel"):
        wanted |= {"text"}
    assert set(facts) == wanted
    for fact in facts.values():
        assert fact["status"] == OK or (fact["status"] == REFUSED and fact["why"] in REASONS), fact
    must = wanted - {"tower"} if name in FAMILIES or name == "generic-vlm" else wanted - {"input", "layer"}
    assert all(facts[fact]["status"] == OK for fact in must)


def test_every_family_adapter_and_class_has_a_row():
    table = cases()
    types = {family.make().config.model_type for family in TOWER_ONLY.values()} | set(FAMILIES)
    assert set(families.ROWS) <= types and set(families.ROWS) | set(families.REFUSED) <= set(table)
    assert set(QUICK) <= set(table) and set(TOWERS) <= set(table)
    models = [tower.build() for tower in TOWERS.values()]
    models += [model.visual for model in models if hasattr(model, "visual")]  # an adapter of its own carries it there
    assert {adapter_for(model).name for model in models} | {"transformers-vlm"} == set(catalogue.ADAPTERS)


# ---------------------------------------------------------------------- the command
def test_one_family_as_a_page():
    result = command("--family", "TIMM vit", "--family", "mllama")
    assert result.exit_code == 0 and not result.stderr.strip()
    for word in (f"torch {torch.__version__}"[:9], "kernels torch", "timm ViT", "cross-attention", "1 ok, 1 refused"):
        assert word in result.stdout
    assert "timm EVA" not in result.stdout


def test_a_library_is_all_its_towers():
    report = doctor.examine(["open_clip"])
    assert [row.name for row in report.rows] == [name for name in TOWERS if name.startswith("open_clip")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--family", "lava"), "no family or tower 'lava'; did you mean 'llava'"),
        (("--family", "llava", "--all"), "one of them"),
        (("--device", "abacus"), "device 'abacus' cannot be used here"),
        (("--adapter", "generic-vlm"), "none is given"),
        (("--model", "no/such folder"), "no model"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_2(words, said):
    result = command(*words)
    assert result.exit_code == 2 and said in result.stderr and not result.stdout
    assert len(result.stderr.split("vlmtok: ")) == 2 and "\n" not in result.stderr.strip()


def test_something_broken_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(language, "compress", lambda *given, **named: contextlib.nullcontext())
    result = command("--family", "llava", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and not found["ok"] and found["counts"][BROKEN] == 1
    page = command("--family", "llava")
    assert page.exit_code == 1 and "broken: llava, layer: nothing was cut" in page.stdout


def test_the_embedded_checkpoint():
    report = doctor.examine(model="tiny-llava")
    assert [row.name for row in report.rows] == ["tiny-llava"]
    assert {fact.name: fact.status for fact in report.rows[0].facts} == dict.fromkeys(
        ("bare", "neutral", "tower", "input", "layer", "generate"), OK
    )


# ---------------------------------------------------------------------- models of the user's
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "paligemma", "blip-2"])
def test_a_loaded_model_with_one_prompt(name):
    """The second row is made of the first: its last words are the same, and some before them are missing."""
    family = {**FAMILIES, **TOWER_ONLY}[name]
    model, pattern = family.build(family.attentions[0]), family.rows[0][:-1] + "6"
    inputs = family.batch(pattern).inputs()
    batch, rows = doctor.own.two_rows(model, inputs)
    assert batch["attention_mask"].sum(1).tolist() == [row["input_ids"].shape[1] for row in rows]
    assert batch["input_ids"][:, -1].tolist() == [inputs["input_ids"][0, -1]] * 2
    row = doctor.examine_model(model, inputs, name="mine")
    assert row.status == OK and row.name == "mine" and row.library == "transformers", row.why
    assert row.fact("generate").status == OK


def test_a_loaded_tower():
    tower = TOWERS["HF DINOv2"]
    row = doctor.examine_model(tower.build(), tower.pictures(2))
    assert row.status == OK and row.name == "Dinov2Model" and row.fact("tower").status == OK


def test_inputs_that_do_not_fit_are_refused():
    family = FAMILIES["llava"]
    model = family.build()
    for inputs, said in (
        (family.batch("2I6", "I6").inputs(), "one prompt"),
        (family.batch("I2").inputs(), "more than"),
        (family.batch("9").inputs(), "with a picture"),
    ):
        with pytest.raises(ParameterError, match=said):
            doctor.examine_model(model, inputs)
    with pytest.raises(ParameterError, match="B >= 2"):
        doctor.examine_model(TOWERS["timm ViT"].build(), torch.zeros(1, 3, 48, 48))


def test_a_model_that_nobody_carries_is_no_success():
    class Stranger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_one = torch.nn.Linear(3, 1)

        def forward(self, pixels):
            return self.to_one(pixels.mean((2, 3)))

    row = doctor.examine_model(Stranger(), torch.rand(2, 3, 8, 8))
    assert row.status == BROKEN and row.fact("bare").status == OK and "no adapter carries" in row.fact("neutral").why
