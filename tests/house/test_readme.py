"""What the README says holds; its Python blocks run in test_docs.py."""

import json
import re

from support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_name_it_uses_exists():
    import vlmtok

    for name in re.findall(r"vlmtok\.((?:kernels\.|viz\.)?\w+)\(", README):
        found = vlmtok
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found)


def test_every_file_it_links_is_there():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_speed_is_what_was_measured():
    """Every ratio of the section on speed is in the results of the benchmarks, or one of MACs, to two digits."""
    import vlmtok

    folder = ROOT / "benchmarks" / "results"
    vit, compiled = (json.loads((folder / name).read_text()) for name in ("vit_b16_cpu.json", "compile_cpu.json"))
    measured = {f"{ratio:.2f}" for result in (vit, compiled) for ratio in result["speed_up"].values()}
    reports = (vlmtok.estimate("vit-b-16", method) for method in ("tome:r=16", "pitome:ratio=0.9"))
    macs = {f"{report.macs.before / report.macs.after.low:.2f}" for report in reports}
    section = README.split("## Speed")[1].split("## Kernels")[0]
    named = set(re.findall(r"(\d\.\d\d) x", section))
    assert named <= measured | macs and len(named) >= 6


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
