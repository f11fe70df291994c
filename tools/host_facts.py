"""Do host libraries still have what our rows lean on? Read off their wheels; nothing is installed or imported.

    python tools/host_facts.py                      # every tracked minor of transformers, timm and open_clip
    python tools/host_facts.py --write docs         # the same into docs/host_facts.md and .json
    python tools/host_facts.py --newest             # the newest release of each; exit code 1 where a fact is broken
    python tools/host_facts.py --versions transformers=5.19.0,5.24.0 timm=1.0.20
    python tools/host_facts.py --installed          # what this environment imports; no downloads

Wheels are kept in a cache folder. Exit codes: 0 all facts hold (or all minors were read), 1 a fact is broken in a
release that was asked for by --newest, --versions or --installed, 2 a release cannot be had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from canary import report, wheels
from canary.facts import Findings
from canary.releases import examine
from canary.sources import Library


def chosen(asked: Sequence[str]) -> dict[str, list[str]]:
    """Versions by package, from ``package=version,version``.

    Raises:
        WheelError: a package that is not tracked, or a text of another form.
    """
    known = [tracked.package for tracked in wheels.TRACKED]
    found: dict[str, list[str]] = {}
    for text in asked:
        package, _, versions = text.partition("=")
        if package not in known or not versions:
            raise wheels.WheelError(f"--versions takes PACKAGE=VERSION,VERSION of {', '.join(known)}, got {text!r}")
        found.setdefault(package, []).extend(versions.split(","))
    return found


def libraries(options: argparse.Namespace) -> Iterator[Library]:
    """Releases that were asked for, library by library."""
    wanted = chosen(options.versions) if options.versions else None
    for tracked in wheels.TRACKED:
        if options.installed:
            yield Library.of_folder(tracked.package, *wheels.installed(tracked))
            continue
        if wanted is not None:
            versions = wanted.get(tracked.package, [])
        else:
            versions = wheels.minors(wheels.published(tracked.package), tracked.since, tracked.digits)
            versions = versions[-1:] if options.newest else versions
        for version, wheel in wheels.fetch(tracked.package, versions, options.cache).items():
            yield Library.of_wheel(tracked.package, version, wheel)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--newest", action="store_true", help="the newest release of each library")
    which.add_argument("--versions", nargs="+", metavar="PACKAGE=VERSION,...", help="these releases")
    which.add_argument("--installed", action="store_true", help="what this environment imports")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write host_facts.md and host_facts.json there")
    parser.add_argument("--cache", type=Path, default=wheels.cache_folder(), help="folder of wheels (%(default)s)")
    options = parser.parse_args(arguments)
    results: list[Findings] = []
    try:
        for library in libraries(options):
            results.append(examine(library))
            said = list(report.sentences(results[-1]))
            verdict = f"{len(said)} of {results[-1].asked:,} facts do not hold" if said else "all facts hold"
            print(f"{library}: {verdict}", file=sys.stderr)
            for sentence in said:
                print(sentence)
    except wheels.WheelError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    date = datetime.date.today().isoformat()
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "host_facts.md").write_text(report.document(results, date), encoding="utf-8")
        text = json.dumps(report.record(results, date), indent=1)
        (options.write / "host_facts.json").write_text(text + "\n", encoding="utf-8")
    gate = options.newest or options.versions or options.installed
    return int(bool(gate) and any(map(report.ours, results)))


if __name__ == "__main__":
    sys.exit(main())
