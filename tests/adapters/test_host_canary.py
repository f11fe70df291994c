"""The canary over releases: it holds on the libraries that are installed, and notices what a release might change."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.canary_played import LLAVA, OTHERS, PACKED_TOWERS, PLAYED
from vlmtok.adapters.language import families as vlm_rows
from vlmtok.adapters.language import masks
from vlmtok.adapters.towers import hf_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import host_facts
from canary import needs, report, wheels
from canary.auto import Chooser
from canary.facts import Findings
from canary.others import shared_facts
from canary.packed import PACKED, packed_facts
from canary.releases import FACTS, examine
from canary.sources import Library
from canary.towers import class_facts
from canary.vlm import family_facts

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRACKED = {tracked.package: tracked for tracked in wheels.TRACKED}
PARTS = {
    "transformers": [
        *("__init__.py", "cache_utils.py", "masking_utils.py", "modeling_layers.py", "modeling_outputs.py"),
        *("modeling_utils.py", "configuration_utils.py", "generation/utils.py", "models/auto", "models/llava"),
        *("models/clip", "models/llama", "models/gemma4", "models/qwen2_5_vl", "models/pixtral", "vision_utils.py"),
    ],
    "timm": ["models/vision_transformer.py", "models/eva.py", "layers"],
    "open_clip_torch": ["model.py", "coca_model.py", "timm_model.py", "transformer.py"],
}
"""What a small part of each library holds: enough for LLaVA, Gemma 4 and their towers, the towers of Qwen2.5-VL and
Pixtral, for timm and for open_clip."""


@functools.cache
def here(package: str) -> tuple[str, Path]:
    return wheels.installed(TRACKED[package])


@functools.cache
def found(package: str) -> Findings:
    return examine(Library.of_folder(package, *here(package)))


Change = tuple[str, str, str]
"""A file of a library, a pattern in it, and what takes its place."""


@functools.cache
def part_of(package: str) -> tuple[str, ...]:
    """Files of a small part of an installed library, with the folder of its name in front."""
    _, top = here(package)
    wholes = [top / part for part in PARTS[package]]
    files = [path for whole in wholes for path in (sorted(whole.rglob("*.py")) if whole.is_dir() else [whole])]
    return tuple(path.relative_to(top.parent).as_posix() for path in files)


def altered(package: str, folder: Path, *changes: Change) -> Library:
    """A small part of an installed library as a release of tomorrow; what changed is written below `folder`."""
    _, top = here(package)

    def read(path: str) -> str:
        changed = folder / path
        return (changed if changed.exists() else top.parent / path).read_text(encoding="utf-8")

    for name, pattern, by in changes:
        path = f"{top.name}/{name}"
        text, times = re.subn(pattern, by, read(path), flags=re.M)
        assert times, f"{name} has nothing like {pattern!r}, so that nothing was played"
        ast.parse(text)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return Library(package, "9.9", part_of(package), read)


def asked(library: Library, *families: str) -> list[str]:
    """Sentences about a part of a library."""
    findings, chooser = Findings(library.package, library.version), Chooser(library)
    if library.package != "transformers":
        FACTS[library.package](findings, chooser)
        return list(report.sentences(findings))
    shared_facts(findings, chooser)
    for family in families:
        family_facts(findings.about(family), chooser, family, vlm_rows.ROWS[family])
    for name, adapter in (("CLIPVisionModel", "HFVision"), ("CLIPModel", "HFDual")):
        class_facts(findings, chooser, "transformers.models.clip.modeling_clip", name, adapter)
    return list(report.sentences(findings))


# ---------------------------------------------------------------------- what is installed
@functools.cache
def committed() -> dict[str, Any]:
    return json.loads((DOCS / "host_facts.json").read_text(encoding="utf-8"))["releases"]


def is_known(package: str, line: str) -> bool:
    """Whether the committed table says that a fact does not hold in the installed release, as in some older ones."""
    release = committed()[package].get(here(package)[0], {"families": {}})
    return any(sentence in line for family in release["families"].values() for sentence in family["broken"])


@pytest.mark.parametrize("package", TRACKED)
def test_installed_libraries_have_what_the_rows_lean_on(package: str) -> None:
    said = [line for line in report.sentences(found(package)) if report.OWN not in line and not is_known(package, line)]
    assert not said, "\n".join(said)


def test_every_row_is_asked_about() -> None:
    families = found("transformers").families
    assert {*vlm_rows.ROWS, *hf_rows.ROWS, *PACKED} <= set(families)
    few = {name: family.asked for name, family in families.items() if name in vlm_rows.ROWS and family.asked < 60}
    assert set(few) == {name for name, row in vlm_rows.ROWS.items() if row.boundary}, f"few facts are asked of {few}"
    assert min(families[name].asked for name in (*hf_rows.ROWS, *PACKED)) > 20


def test_a_host_whose_own_code_does_not_fit_itself_is_named_and_is_no_fault_of_ours(tmp_path: Path) -> None:
    library = altered("transformers", tmp_path, (LLAVA, r"=outputs\.attentions", "=outputs.rows_of_all"))
    said = [line for line in asked(library, "llava") if "reads `rows_of_all` of a LlavaModelOutputWithPast" in line]
    assert said and all(report.OWN in line and ", llava: " in line for line in said)
    findings = Findings(library.package, library.version)
    family_facts(findings.about("llava"), Chooser(library), "llava", vlm_rows.ROWS["llava"])
    assert findings.families["llava"].broken and not report.ours(findings)


# ---------------------------------------------------------------------- what a release might change


@pytest.mark.parametrize(("path", "pattern", "by", "said"), PLAYED, ids=[said[:70] for *_, said in PLAYED])
def test_a_change_of_transformers_is_said(path: str, pattern: str, by: str, said: str, tmp_path: Path) -> None:
    sentences = asked(altered("transformers", tmp_path, (path, pattern, by)), "llava")
    assert any(said in line and line.startswith("transformers 9.9, ") for line in sentences), "\n".join(sentences)


@pytest.mark.parametrize(("package", "path", "pattern", "by", "said"), OTHERS, ids=[said[:70] for *_, said in OTHERS])
def test_a_change_of_timm_or_open_clip_is_said(
    package: str, path: str, pattern: str, by: str, said: str, tmp_path: Path
) -> None:
    sentences = asked(altered(package, tmp_path, (path, pattern, by)))
    assert any(said in line for line in sentences), "\n".join(sentences)


@pytest.mark.parametrize("package", TRACKED)
def test_a_part_that_nobody_changed_breaks_no_fact(package: str, tmp_path: Path) -> None:
    assert [line for line in asked(altered(package, tmp_path), "llava", "gemma4") if not is_known(package, line)] == []


def test_arguments_of_single_families_are_asked_for(tmp_path: Path) -> None:
    library = altered(
        "transformers",
        tmp_path,
        ("models/gemma4/modeling_gemma4.py", r"\bper_layer_input\b", "slice_of_layer"),
        ("models/gemma4/modeling_gemma4.py", r"\bpixel_position_ids\b", "places"),
        ("models/gemma4/configuration_gemma4.py", r"\bnum_kv_shared_layers\b", "shared_layers"),
    )
    said = "\n".join(asked(library, "gemma4"))
    assert "`forward` of layers has no argument `per_layer_input`" in said
    assert "`forward` of the tower has no argument `pixel_position_ids`" in said
    assert "the text model's configuration has no `num_kv_shared_layers`" in said


def packed(library: Library, kind: str) -> list[str]:
    """Sentences about a tower that packs or pads pictures."""
    findings, chooser = Findings(library.package, library.version), Chooser(library)
    tower = chooser.beside(kind, PACKED_TOWERS[kind][0])
    assert tower is not None
    packed_facts(findings.about(kind), chooser, kind, PACKED[kind], [tower])
    return list(report.sentences(findings))


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind, (_, changes) in PACKED_TOWERS.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else value[-1][:70],
)
def test_a_change_of_a_packed_tower_is_said(kind: str, change: tuple[str, str, str, str], tmp_path: Path) -> None:
    assert packed(altered("transformers", tmp_path), kind) == []
    *played, said = change
    sentences = packed(altered("transformers", tmp_path, tuple(played)), kind)
    assert any(said in line for line in sentences), "\n".join(sentences)


def test_types_that_share_a_model_are_found_by_its_name() -> None:
    chooser = Chooser(Library.of_folder("transformers", *here("transformers")))
    shared = chooser.model("glmga", "AutoModelForImageTextToText")
    assert shared is not None and shared is chooser.model("glm46v", "AutoModelForImageTextToText")


def test_a_fact_of_many_families_is_one_sentence_with_its_versions() -> None:
    findings = []
    for version, broken in (("1.0", False), ("1.1", True), ("1.2", True), ("1.3", False)):
        findings.append(Findings("timm", version))
        for number in range(12):
            findings[-1].about(f"family{number}").check(not broken, "there is no `x`", "Block")
    (said,) = report.sentences(findings[1])
    assert said == "timm 1.1, family0, family1, family2 and 9 more: there is no `x` (Block)"
    text = report.document(findings, "2026-11-26")
    assert "| family3 | ok | 1 | 1 | ok |" in text and "- 1.1 to 1.2, family0, family1" in text
    assert report.record(findings, "2026-11-26")["releases"]["timm"]["1.2"]["families"]["family7"]["broken"]


# ---------------------------------------------------------------------- where the questions come from
def test_our_own_mask_calls_are_what_is_asked() -> None:
    """A name that only our call has is missed by the host's signature."""
    signature = needs.Signature(("config", "inputs_embeds"), 2, False, ())
    before = sys.modules.get("transformers"), sys.modules.get("transformers.masking_utils")
    calls, missing = needs.mask_calls("full_attention", None, {"make": signature}, {"full_attention": "make"})
    assert missing is None and {"layer_idx", "attention_mask", "allow_is_causal_skip"} <= {
        n for c in calls for n in c.names
    }
    assert before == (sys.modules.get("transformers"), sys.modules.get("transformers.masking_utils"))
    assert needs.mask_calls("full_attention", None, {}, {})[1] is not None


def test_what_hooks_look_up_is_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of = needs.wanted(vlm_rows.ROWS["gemma4"])
    assert needs.ROLES["PER_LAYER"] in asked_of["text model"].required
    assert needs.ROLES["PIXEL_PLACES"] in asked_of["tower"].required
    assert (
        needs.ROLES["CACHE"] in asked_of["layers"].required and needs.ROLES["CACHE"] in asked_of["whole model"].required
    )
    assert "whole model" not in needs.wanted(vlm_rows.ROWS["llama4"])


def test_code_of_ours_that_reads_nothing_is_an_error() -> None:
    assert "sliding_window" in {read.path for read in needs.reads(masks.build_mask, "config")}
    with pytest.raises(needs.NothingRead, match="reads nothing of nobody"):
        needs.reads(masks.build_mask, "nobody")
    with pytest.raises(needs.NothingRead):
        needs.file_reads([masks], "nobody")


# ---------------------------------------------------------------------- releases and the command line
def test_a_minor_is_its_last_patch_and_previews_are_none() -> None:
    published = ["5.24.0", "5.9.0", "5.22.1", "5.22.10", "5.22.2", "5.25.0rc1", "5.25.0.dev0", "5.18.0", "4.57.6"]
    assert wheels.minors(published, "5.18", 2) == ["5.18.0", "5.22.10", "5.24.0"]
    assert wheels.minors(["1.0.9", "1.0.20", "1.0.31", "1.1.0"], "1.0.20", 3) == ["1.0.20", "1.0.31", "1.1.0"]


def test_versions_are_what_pip_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        wheels, "_pip", lambda *_: "timm (1.0.31)\nAvailable versions: 1.0.31, 1.0.30\n  INSTALLED: 1\n"
    )
    assert wheels.published("timm") == ["1.0.31", "1.0.30"]
    monkeypatch.setattr(wheels, "_pip", lambda *_: "")
    with pytest.raises(wheels.WheelError, match="lists no versions"):
        wheels.published("timm")


def wheel(folder: Path, version: str, library: Library) -> None:
    """A wheel of a part of a library."""
    with zipfile.ZipFile(folder / f"{library.package}-{version}-py3-none-any.whl", "w") as archive:
        for path in library.paths:
            archive.writestr(path, library.text(path))


def test_a_wheel_is_fetched_once_and_only_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def pip(*arguments: str) -> str:
        asked_for.append(arguments[-1])
        folder = Path(arguments[arguments.index("--dest") + 1])
        (folder / f"timm-{arguments[-1].partition('==')[2]}-py3-none-any.whl").write_bytes(b"")
        return ""

    monkeypatch.setattr(wheels, "_pip", pip)
    for _ in range(2):
        got = wheels.fetch("timm", ["1.0.30", "1.0.31"], tmp_path / "cache")
    assert sorted(asked_for) == ["timm==1.0.30", "timm==1.0.31"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(p.name for p in got.values())


def test_the_newest_release_fails_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(tmp_path, "1.0.98", altered("timm", tmp_path))
    wheel(tmp_path, "1.0.99", altered("timm", tmp_path, ("models/eva.py", r"\bself\.drop_path2\b", "self.drop2")))
    monkeypatch.setattr(wheels, "TRACKED", (TRACKED["timm"],))
    monkeypatch.setattr(wheels, "published", lambda _: ["1.0.99", "1.0.98", "1.1.0rc1"])
    folder = ["--cache", str(tmp_path)]
    assert host_facts.main([*folder, "--newest"]) == 1
    assert "timm 1.0.99, Eva: its blocks have no `drop_path2` (EvaBlock)\n" in capsys.readouterr().out
    assert host_facts.main([*folder, "--versions", "timm=1.0.98"]) == 0
    assert host_facts.main([*folder, "--versions", "timm=1.0.98,1.0.99"]) == 1
    assert host_facts.main([*folder, "--write", str(tmp_path / "docs")]) == 0
    assert "| Eva | ok | 2 |" in (tmp_path / "docs" / "host_facts.md").read_text()
    written = json.loads((tmp_path / "docs" / "host_facts.json").read_text())
    assert list(written["releases"]["timm"]) == ["1.0.98", "1.0.99"]
    wheel(tmp_path, "1.0.97", Library("timm", "9.9", ("timm/models/eva.py",), lambda _: "match = = 1"))
    assert host_facts.main([*folder, "--versions", "timm=1.0.97"]) == 2
    assert "timm 1.0.97 has source that Python" in capsys.readouterr().err
    assert host_facts.main([*folder, "--versions", "torch=2.9"]) == 2
    assert "--versions takes PACKAGE=VERSION,VERSION of timm, got 'torch=2.9'" in capsys.readouterr().err


@pytest.mark.parametrize("package", TRACKED)
def test_the_committed_table_is_of_the_rows_of_today(package: str) -> None:
    newest = list(committed()[package].values())[-1]["families"]
    assert set(newest) == set(found(package).families), "run python tools/host_facts.py --write docs: rows are others"
    assert not [name for name, family in newest.items() if family["broken"]]
