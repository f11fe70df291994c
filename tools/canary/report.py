"""What was found, for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .facts import Broken, Findings
from .needs import ROLES

HEAD = """# Facts of hosts, release by release

Hooks lean on names and signatures of timm, open_clip and transformers. The sources of every minor release (last patch)
are asked for each of them, read out of the wheel without installing or importing it; which ones follows from the rows
and the code in `adapters/`. A fact is a name, an argument or an order of calls that the source shows. That all hold
does not say that the numbers are right: that is what the tests are for.

`ok`: all facts hold. A number: so many do not. `host`: the host's own code does not fit itself, so that the family does
not run there without us either. Made by `python tools/host_facts.py --write docs`, read on {date}.
"""
OWN = "the host's own code: "
FEW = 3
"""Classes that are named in a sentence; what more of them share needs no names."""
MANY = 8
"""Families up to which all are named."""


def sentences(findings: Findings) -> Iterable[str]:
    """A sentence for every fact that does not hold: package, version, families, fact."""
    for broken, (families, classes) in _by_fact(findings).items():
        yield f"{findings.package} {findings.version}, {_listed(families)}: {_said(broken, classes)}"


def _by_fact(findings: Findings) -> dict[Broken, tuple[list[str], list[str]]]:
    """Families and classes of every fact that does not hold."""
    found: dict[Broken, tuple[list[str], list[str]]] = {}
    for name, family in findings.families.items():
        for broken, classes in family.broken.items():
            families, known = found.setdefault(broken, ([], []))
            families.append(name)
            known += [each for each in classes if each not in known]
    return found


def _listed(families: Sequence[str]) -> str:
    left = len(families) - FEW
    return ", ".join(families) if len(families) <= MANY else f"{', '.join(families[:FEW])} and {left} more"


def _said(broken: Broken, classes: Sequence[str]) -> str:
    named = f" ({', '.join(classes)})" if 0 < len(classes) <= FEW else ""
    return f"{OWN if broken.own else ''}{broken.sentence}{named}"


def ours(findings: Findings) -> bool:
    """Whether a fact does not hold that is not the host's own business."""
    return any(not broken.own for family in findings.families.values() for broken in family.broken)


def document(results: Sequence[Findings], date: str) -> str:
    """All releases as markdown.

    Args:
        results: of every release, the releases of one library one behind the other, oldest first.
        date: of the reading.
    """
    parts = [HEAD.format(date=date)]
    for package in dict.fromkeys(found.package for found in results):
        parts += _section(package, [found for found in results if found.package == package])
    return "\n".join(parts)


def _section(package: str, releases: Sequence[Findings]) -> list[str]:
    versions = [found.version for found in releases]
    names = list(dict.fromkeys(name for found in releases for name in found.families))
    newest = releases[-1]
    parts = [f"## {package}\n", f"{newest.asked:,} facts of {len(newest.families)} families in {versions[-1]}.\n"]
    parts.append(_table(["family", *versions], [[name, *(_cell(found, name) for found in releases)] for name in names]))
    broken = [f"- {line}" for line in _spans(releases, versions)]
    if broken:
        parts.append("What does not hold:\n\n" + "\n".join(broken) + "\n")
    roles = [[role, *cells] for role in ROLES if len(set(cells := [_called(found, role) for found in releases])) > 1]
    if roles:
        parts += ["What changed its name, as `adapters/` knows it:\n", _table(["role", *versions], roles)]
    noted: dict[str, list[str]] = {}
    for found in releases:
        for note in found.notes:
            noted.setdefault(note, []).append(found.version)
    if noted:
        parts.append("To come:\n\n" + "\n".join(f"- {_span(seen, versions)}: {n}." for n, seen in noted.items()) + "\n")
    return parts


def _cell(findings: Findings, family: str) -> str:
    if family not in findings.families:
        return "-"
    broken = findings.families[family].broken
    number = sum(not each.own for each in broken)
    return str(number) if number else "host" if broken else "ok"


def _called(findings: Findings, role: str) -> str:
    return ", ".join(f"`{name}`" for name in ROLES[role].names if name in findings.called[role]) or "-"


def _spans(releases: Sequence[Findings], versions: Sequence[str]) -> Iterable[str]:
    """Every fact that does not hold, with the first and the last release where it does not."""
    seen: dict[tuple[str, str], list[str]] = {}
    for found in releases:
        for broken, (families, classes) in _by_fact(found).items():
            seen.setdefault((_listed(families), _said(broken, classes)), []).append(found.version)
    for (who, said), where in seen.items():
        yield f"{_span(where, versions)}, {who}: {said}."


def _span(seen: Sequence[str], versions: Sequence[str]) -> str:
    """Releases as text, runs of them as first and last."""
    runs: list[list[str]] = []
    for version in seen:
        if runs and versions.index(version) == versions.index(runs[-1][-1]) + 1:
            runs[-1].append(version)
        else:
            runs.append([version])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def record(results: Sequence[Findings], date: str) -> dict[str, Any]:
    """All releases as plain data; arguments as in `document`."""
    found: dict[str, Any] = {"date": date, "releases": {}}
    for each in results:
        families = {
            name: {
                "facts": family.asked,
                "broken": [broken.sentence for broken in family.broken if not broken.own],
                "host": [broken.sentence for broken in family.broken if broken.own],
            }
            for name, family in each.families.items()
        }
        names = {role: sorted(called) for role, called in sorted(each.called.items())}
        release = {"facts": each.asked, "families": families, "names": names, "notes": list(each.notes)}
        found["releases"].setdefault(each.package, {})[each.version] = release
    return found
