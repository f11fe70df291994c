"""Writes ``constraints.txt``, the versions on which all tests pass: what pip makes of the package's own bounds today.

    python tools/constraints.py           # write it, then run the tests on it before it is committed
    python tools/constraints.py --check   # name the pins that are older than what the bounds give today; exit code 1

pip only resolves and installs nothing (under two minutes). Run it on the Python that tests run on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints.txt"
LOWEST = "3.10"
"""The lowest Python of the package."""
FOLLOW_TORCH = ("nvidia-", "cuda-")
"""Packages that torch itself pins, and pulls in on some platforms only."""
HEADER = """\
# The versions on which all tests of vlmtok passed: resolved on {date} with Python {python} on {system}.
# Made by tools/constraints.py from the bounds of pyproject.toml, with the extra dev.
#     pip install -c constraints.txt .      installs these versions
#     pip install vlmtok                    takes what the bounds allow
# What torch pins itself (nvidia-*, cuda-*) is left to it, and so is a build for CPU alone: torch=={torch} is also
# {torch}+cpu. A version that needs a newer Python than {lowest} is left to the bounds below it.
"""


def resolved() -> dict[str, tuple[str, str]]:
    """What pip would install here for the package with the extra dev and nothing else: version and Python by name.

    Raises:
        SystemExit: pip finds no such set, or there is no pip.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        asked = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report), f"{ROOT}[dev]"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *asked], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"pip finds no set of versions within the bounds:\n{done.stderr}")
        found = [row["metadata"] for row in json.loads(report.read_text("utf-8"))["install"]]
    return {
        canonicalize_name(each["name"]): (each["version"].partition("+")[0], each.get("requires_python") or "")
        for each in found
        if canonicalize_name(each["name"]) != "vlmtok"
    }


def pin(name: str, version: str, python: str) -> str:
    """A line of the file."""
    lower = [each for each in SpecifierSet(python) if each.operator in (">=", ">", "~=")]
    newest = max((Version(each.version) for each in lower), default=Version(LOWEST))
    marker = f' ; python_version >= "{newest.major}.{newest.minor}"' if newest > Version(LOWEST) else ""
    return f"{name}=={version}{marker}"


def text(found: dict[str, tuple[str, str]]) -> str:
    """The file."""
    system = f"{platform.system()} {platform.machine()}"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    head = HEADER.format(
        date=date, python=platform.python_version(), system=system, torch=found["torch"][0], lowest=LOWEST
    )
    rows = [pin(name, *row) for name, row in sorted(found.items()) if not name.startswith(FOLLOW_TORCH)]
    return head + "\n".join(rows) + "\n"


def pins(written: str) -> dict[str, str]:
    """Versions by name, of the lines that hold on this Python."""
    asked = [Requirement(line) for line in written.splitlines() if line and not line.startswith("#")]
    there = [each for each in asked if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): re.sub("^==", "", str(each.specifier)) for each in there}


def outdated(held: dict[str, str], found: dict[str, tuple[str, str]]) -> list[str]:
    """A sentence for every package where the bounds give another version today than the file."""
    lines = []
    for name, (version, _) in sorted(found.items()):
        if name.startswith(FOLLOW_TORCH) or held.get(name) == version:
            continue
        lines.append(f"{name} {held[name]} -> {version}" if name in held else f"{name} {version} is not in the file")
    return lines + [f"{name} {held[name]} is no longer asked for" for name in sorted(held.keys() - found.keys())]


def check_place(written: str) -> None:
    """Refuses to compare what another Python or system resolved: it would differ by right.

    Raises:
        SystemExit: the file was made elsewhere.
    """
    made = re.search(r"resolved on \S+ with Python (\d+\.\d+)\S* on (\S+)", written)
    here = platform.python_version().rpartition(".")[0], platform.system()
    if made is None or made.groups() != here:
        there = "nobody knows where" if made is None else "Python {} on {}".format(*made.groups())
        sys.exit(f"{FILE.name} was made by {there}; this is Python {here[0]} on {here[1]}: check it there")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the file with what the bounds give today")
    check = parser.parse_args().check
    if check:
        check_place(FILE.read_text("utf-8"))
    found = resolved()
    if not check:
        FILE.write_text(text(found), "utf-8")
        print(f"{FILE.name} is written; run the tests on it: pip install -c {FILE.name} -e '.[dev]'")
        return
    written = FILE.read_text("utf-8")
    lines = outdated(pins(written), found)
    print("\n".join(lines) or "every pin is what the bounds give today")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
