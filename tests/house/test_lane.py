"""Lanes of other releases (``.ci/lane``), their subset, and the pins of ``constraints.txt``."""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import lane as subset
from support import since
from support.places import ROOT
from support.scripts import script


@pytest.fixture(scope="module")
def lane():
    return script(".ci/lane")


@pytest.fixture(scope="module")
def constraints():
    return script("tools/constraints.py")


@pytest.fixture(scope="module")
def bounds(lane):
    return lane.bounds((ROOT / "pyproject.toml").read_text("utf-8"))


# ---------------------------------------------------------------------- lanes
def test_bounds_are_read_off_the_project_table(lane, bounds):
    text = '# why\ndependencies = [\n    "a>=1.2,<3",\n    "b",  # why\n]\n[tool.x]\ndependencies = [\n    "c",\n]\n'
    assert {name: str(each) for name, each in lane.bounds(text).items()} == {"a": "a<3,>=1.2", "b": "b"}
    assert {"torch", "transformers", "timm", "open_clip_torch", "typer", "rich"} <= set(bounds)


def test_the_oldest_lane_takes_lower_bounds_and_the_newest_takes_bounds(lane, bounds):
    oldest = {each.name: each.specifier for each in map(Requirement, lane.wanted("oldest", bounds))}
    assert set(oldest) == {*lane.HOSTS, "typer", "rich"}
    for name, specifier in oldest.items():
        (exact,) = specifier
        assert exact.operator == "==" and exact.version in bounds[name].specifier
        assert not bounds[name].specifier.contains(f"{Version(exact.version).major}.0.0.dev0", prereleases=True)
    assert lane.wanted("newest", bounds) == [str(bounds[name]) for name in lane.HOSTS]


def test_a_layer_comes_first_and_all_else_from_behind(lane, tmp_path):
    """The environment behind still gives torch and vlmtok; a host in front hides its own."""
    python = lane.layer(tmp_path / "front", with_pip=False)
    shown = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", shown], capture_output=True, text=True, check=True).stdout.strip())
    (site / "timm").mkdir()
    (site / "timm" / "__init__.py").write_text("__version__ = '99.1'\n")
    (site / "timm-99.1.dist-info").mkdir()
    (site / "timm-99.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 99.1\n")
    found = lane.versions(python)
    assert found["timm"] == "99.1" != importlib.metadata.version("timm")
    assert found["torch"] == importlib.metadata.version("torch")
    code = "import timm, torch; print(timm.__version__, torch.__version__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=lane.environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["99.1", torch.__version__], done.stderr
    assert lane.blamed(found, {**found, "timm": "1.0.31"}) == ["timm 99.1"]


def test_what_broke_is_the_last_sentence(lane):
    code = (
        "print('. .'); print('FAILED test_a - wrong'); print('FAILED test_b'); print('2 failed'); raise SystemExit(1)"
    )
    with pytest.raises(lane.Broken, match="^FAILED test_a - wrong$"):
        lane.run([sys.executable, "-c", code], ("FAILED ", "ERROR "))
    with pytest.raises(lane.Broken, match="2 failed"):
        lane.run([sys.executable, "-c", code], ("broken: ",))
    lane.run([sys.executable, "-c", "print('FAILED')"], ("FAILED ",))
    back = {"transformers": "5.24.0", "timm": "1.0.31", "open-clip-torch": "3.3.0", "regex": "1"}
    said = lane.sentence("newest", lane.blamed({**back, "transformers": "5.25.0", "regex": "2"}, back), "FAILED test_a")
    assert said == "newest lane: transformers 5.25.0 breaks vlmtok: FAILED test_a"
    said = lane.sentence("newest", lane.blamed({**back, "transformers": "5.25.0", "timm": "2"}, back), "x")
    assert said == "newest lane: transformers 5.25.0 and timm 2 break vlmtok: x"
    assert lane.blamed({**back, "regex": "2"}, back) == ["regex 2"]
    assert lane.blamed(back, back) == ["transformers 5.24.0", "timm 1.0.31", "open-clip-torch 3.3.0"]


# ---------------------------------------------------------------------- the subset
def test_every_file_and_family_of_the_subset_is_there():
    from families.build import FAMILIES

    for name in (*subset.WHOLE, *subset.SAMPLED):
        assert (subset.HERE / name).is_file(), name
    assert set(FAMILIES) >= subset.FAMILIES


@pytest.mark.parametrize(("size", "limit"), [(0, 3), (2, 3), (3, 3), (96, 8), (50, 12), (7, 4)])
def test_cases_are_spread_over_all(size, limit):
    found = subset.spread(size, limit)
    assert len(set(found)) == len(found) == min(size, limit) and found == sorted(found)
    assert all(
        index * size // limit <= at < (index + 1) * size / limit for index, at in enumerate(found) if size > limit
    )


def test_what_a_host_does_only_since_a_release_is_named_by_a_test():
    sources = "\n".join(path.read_text("utf-8") for path in sorted(subset.HERE.rglob("test_*.py")))
    for part, (package, release) in since.SINCE.items():
        assert part.partition("[")[0] in sources, part
        below = f"{Version(release).major}.{Version(release).minor - 1}.9"
        assert since.too_old(f"tests/x.py::{part}", {package: below})
        assert not since.too_old(f"tests/x.py::{part}", {package: release})
        assert not since.too_old("tests/x.py::test_other", {package: below})


def test_packages_that_tests_want_are_in_their_extra():
    """Where the extra is installed, as in CI, nothing is left out."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extra = text.partition("\ntest = [")[2].partition("]")[0]
    sources = {str(path.relative_to(subset.HERE)): path.read_text("utf-8") for path in subset.HERE.rglob("test_*.py")}
    for part, package in since.WANTS.items():
        assert f'"{package}>=' in extra, package
        assert (
            part in sources
            or (ROOT / part).is_file()
            or any(f"def test_{part}" in source for source in sources.values())
        ), part
        assert since.lacking(f"tests/{part}::test_{part}") == (importlib.util.find_spec(package) is None)
    assert not since.lacking("tests/lab/test_other.py::test_other")


# ---------------------------------------------------------------------- pins
def test_pins_are_exact_within_the_bounds_and_of_no_platform(bounds):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonicalize_name(each.name): each for each in map(Requirement, (x for x in lines if x[:1] != "#"))}
    assert len(pins) == sum(line[:1] != "#" for line in lines), "a package is pinned twice"
    for name, each in pins.items():
        (exact,) = each.specifier
        assert exact.operator == "==" and "+" not in exact.version and each.url is None
        assert not name.startswith(("nvidia-", "cuda-", "vlmtok")), name
        assert each.marker is None or str(each.marker).startswith("python_version >= "), each
    for name, each in bounds.items():
        (exact,) = pins[canonicalize_name(name)].specifier
        assert exact.version in each.specifier


def test_a_pin_says_which_python_it_needs(constraints):
    assert constraints.pin("numpy", "2.4.6", ">=3.11") == 'numpy==2.4.6 ; python_version >= "3.11"'
    assert constraints.pin("networkx", "3.6.1", "!=3.14.1,>=3.11") == 'networkx==3.6.1 ; python_version >= "3.11"'
    for python in ("", ">=3.9", ">= 3.10", ">=3.10,<3.15"):
        assert constraints.pin("timm", "1.0.31", python) == "timm==1.0.31"


def test_what_is_written_is_read_again_and_differences_are_sentences(constraints):
    found = {
        "torch": ("2.14.1", ""),
        "timm": ("1.0.31", ">=3.10"),
        "nvidia-cublas": ("13.1", ">=3"),
        "x": ("1", ">=3.99"),
    }
    written = constraints.text(found)
    held = constraints.pins(written)
    assert held == {"torch": "2.14.1", "timm": "1.0.31"} and "nvidia-cublas==" not in written
    assert constraints.outdated(held, {name: found[name] for name in ("torch", "timm", "nvidia-cublas")}) == []
    newer = {"torch": ("2.14.1", ""), "timm": ("1.0.32", ""), "new": ("1", "")}
    assert constraints.outdated({**held, "old": "2"}, newer) == [
        "new 1 is not in the file",
        "timm 1.0.31 -> 1.0.32",
        "old 2 is no longer asked for",
    ]


def test_pins_of_another_python_or_system_are_not_compared(constraints):
    head = "# resolved on 2026-11-26 with Python {} on {}.\n"
    constraints.check_place(head.format(platform.python_version(), f"{platform.system()} x86_64"))
    for python, system in (("2.7.18", platform.system()), (platform.python_version(), "Plan9")):
        with pytest.raises(SystemExit, match="check it there"):
            constraints.check_place(head.format(python, f"{system} x86_64"))
    with pytest.raises(SystemExit, match="nobody knows"):
        constraints.check_place("timm==1.0.31\n")
