"""What the README says holds; its Python blocks run in test_docs.py."""

import json
import re

from support.places import ROOT

import vlmtok

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_name_it_uses_exists():
    for name in re.findall(r"vlmtok\.((?:kernels\.|viz\.)?\w+)\(", README):
        found = vlmtok
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_file_it_links_is_there():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_report_of_a_7b_is_that_of_its_shapes():
    """What stands below a marker is printed by the estimate that the marker names; weights play no part in it."""
    ((model, method, text, shown),) = re.findall(
        r"<!-- report: ([\w.-]+), ([\w.:=-]+), text_tokens=\(([\d, ]+)\) -->\n```text\n(.*?)```", README, re.S
    )
    report = vlmtok.estimate(model, method, text_tokens=tuple(map(int, text.split(", "))))
    printed = str(report).splitlines()
    assert len(shown.splitlines()) > 5 and set(shown.splitlines()) <= set(printed)


def test_speed_is_what_was_measured():
    """Ratios on CPU are in the results of the benchmark, or those of MACs; rows of accuracy in those of tiny-llava."""
    folder = ROOT / "benchmarks" / "results"
    vit = json.loads((folder / "vit_b16_cpu.json").read_text())
    measured = {f"{ratio:.2f}" for ratio in vit["speed_up"].values()}
    reports = (vlmtok.estimate("vit-b-16", method) for method in ("tome:r=16", "pitome:ratio=0.9"))
    macs = {f"{report.macs.before / report.macs.after.low:.2f}" for report in reports}
    section = README.split("## Measured")[1].split("## Where")[0]
    named = set(re.findall(r"(\d\.\d\d) x", section))
    assert named <= measured | macs and len(named) == 4


def test_it_fits_on_two_screens():
    assert README.count("\n") <= 150


def test_both_commands_install_the_tested_set():
    commands = re.findall(r"<!-- ci: (\w+) -->\s*```bash\n(.*?)\n```", README, re.S)
    assert [name for name, _ in commands] == ["run", "test"]
    for _, command in commands:
        assert "\n" not in command and "pip install -q -c constraints.txt " in command


def test_the_table_of_versions_is_that_of_the_bounds_and_the_pins():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)(?:, below (\d+))? \| ([\d.]+) \|$", README, re.M)
    assert {"transformers", "torch", "timm", "open_clip_torch"} == {row[0] for row in rows}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name, lowest, below, tested in rows:
        assert f'"{name}>={lowest}{below and f",<{below}"}"' in project
        assert re.search(rf"^{name.replace('_', '-')}=={re.escape(tested)}( ;.*)?$", pins, re.M)
