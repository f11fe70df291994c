"""Writes the measured tables and figures of README.md and docs/results.md from `benchmarks/results/eval/*.csv`.

    python tools/results.py          # writes them
    python tools/results.py --check  # says what is no longer as the results have it, and ends with 1

Each table stands between ``<!-- results: NAME -->`` and ``<!-- results: end -->``; figures carry the hash of what they
were drawn from.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmtok.evaluation.ways import CONVENTION, IN_CACHES

ROOT = Path(__file__).resolve().parents[1]
EVAL = ROOT / "benchmarks" / "results" / "eval"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
README_WAYS = ("divprune", "todre", "visionzip", "pitome", "fastv", "downsample", "random")
BESIDE_CACHES = ("divprune", "todre", "fastv", "pyramiddrop", "downsample", "random")
OCR = ("number", "fine print", "table", "chart")
Row = dict[str, Any]


def rows_of(task: str) -> list[Row]:
    """Rows of a task's results, figures as numbers."""
    with open(EVAL / f"{task}.csv", encoding="utf-8", newline="") as file:
        found: list[Row] = list(csv.DictReader(file))
    for row in found:
        for name in ("keep", "quality", "difference", "low", "high", "visual_tokens", "macs", "macs_ratio", "kv_bytes"):
            row[name] = float(row[name]) if row.get(name) else None
    return found


class Results:
    """The rows of a task by what was asked for, budget and kind.

    Ways whose budget counts other things than tokens are a table of their own.
    """

    def __init__(self, task: str, convention: str = CONVENTION) -> None:
        every = rows_of(task)
        self.rows = [row for row in every if row["convention"] == convention or row["asked"] == "none"]
        self.by = {(row["asked"], row["keep"], row["kind"]): row for row in self.rows}
        self.keeps = sorted({row["keep"] for row in every if row["asked"] == "random"}, reverse=True)
        self.kinds = list(dict.fromkeys(row["kind"] for row in self.rows))

    def quality(self, way: str, keep: float, kind: str = "all") -> float | None:
        """Right answers in percent, or None where there is no such row."""
        row = self.by.get((way, keep, kind))
        return None if row is None or row["quality"] is None else 100 * row["quality"]

    def fewer(self, way: str) -> int | None:
        """Questions that a way answered, where they are not as many as the uncompressed model did."""
        asked = {
            int(row["questions"]) for row in self.rows if (row["asked"], row["kind"]) == (way, "all") and row["quality"]
        }
        return min(asked) if asked and min(asked) < int(self.by["none", 1.0, "all"]["questions"]) else None

    def ways(self) -> list[str]:
        """What was set to the budgets and ran at one of them at least, best first at the middle one."""
        middle = self.keeps[len(self.keeps) // 2]
        named = dict.fromkeys(row["asked"] for row in self.rows if row["keep"] in self.keeps)
        ran = [way for way in named if any(self.quality(way, keep) is not None for keep in self.keeps)]
        return sorted(ran, key=lambda way: -(self.quality(way, middle) or self.quality(way, self.keeps[0]) or 0.0))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def cell(value: float | None, missing: str = "-") -> str:
    """A share in percent, one digit."""
    return missing if value is None else f"{value:.1f}"


def label(way: str, asked: int | None = None) -> str:
    """A way's name in a table; baselines stand out, and so does one that answered fewer questions than the others."""
    name = f"**{way}**" if way in ("random", "downsample") else f"`{way}`"
    return name if asked is None else f"{name} ({asked})"


def readme() -> str:
    """All questions by budget, and fine print at the middle one."""
    found = Results("scenes-vqa")
    bare = found.quality("none", 1.0)
    head = [f"visual tokens kept (all: {cell(bare)})", *(f"{keep:.0%}" for keep in found.keeps), "fine print at 25 %"]
    lines = []
    for way in README_WAYS:
        shares = [cell(found.quality(way, keep), "cannot") for keep in found.keeps]
        lines.append([label(way), *shares, cell(found.quality(way, 0.25, "fine print"))])
    return table(head, lines)


def overall(task: str, convention: str = CONVENTION) -> str:
    """Every way at every budget, with the interval of its difference to the uncompressed model at each."""
    found = Results(task, convention)
    head = ["method", *(f"{keep:.0%}" for keep in found.keeps), *(f"against none, {keep:.0%}" for keep in found.keeps)]
    lines = []
    for way in found.ways():
        gaps = []
        for keep in found.keeps:
            row = found.by.get((way, keep, "all"))
            known = row is not None and row["difference"] is not None
            gaps.append(f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}" if known else "-")  # type: ignore[index]
        shares = [cell(found.quality(way, keep)) for keep in found.keeps]
        lines.append([label(way, found.fewer(way)), *shares, *(["", *gaps[1:]] if way == "none" else gaps)])
    return table(head, lines)


def kinds(task: str, keep: float) -> str:
    """Every way at one budget by kind of question."""
    found = Results(task)
    columns = [kind for kind in found.kinds if kind != "all"]
    ran = [(label(way, found.fewer(way)), way, keep) for way in found.ways() if found.quality(way, keep) is not None]
    lines = [
        [name, *(cell(found.quality(way, share, kind)) for kind in columns)]
        for name, way, share in [("none", "none", 1.0), *ran]
    ]
    return table(["method", *columns], lines)


def horizon() -> str:
    """A tenth of the tokens from a layer on: by attention and at random."""
    found = Results("scenes-vqa")
    layers = (2, 4, 8, 12)
    lines = []
    for layer in layers:
        pair = (f"fastv:keep=0.1:K={layer}", f"random:keep=0.1:stage=decoder:layer={layer}")
        shares, ocr = [], []
        for way in pair:
            (keep,) = {row["keep"] for row in found.rows if row["asked"] == way}
            shares.append(found.quality(way, keep) or 0.0)
            ocr.append(sum(found.quality(way, keep, kind) or 0.0 for kind in OCR) / len(OCR))
        lines.append([f"{layer}", *map(cell, (*shares, shares[0] - shares[1], *ocr))])
    return table(["cut behind layer", "FastV, all", "random, all", "gain", "FastV, printed", "random, printed"], lines)


def refused(task: str) -> str:
    """What has no figures, and why."""
    seen = {}
    for row in rows_of(task):
        if row["problem"] and row["kind"] == "all":
            reason = re.sub(r" on \w+ cannot be set", " cannot be set", row["problem"])
            seen[row["asked"], row["keep"]] = f"- `{row['asked']}` at {row['keep']:.0%}: {reason}"
    return "\n".join(seen.values())


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    "vqa": lambda: overall("scenes-vqa"),
    "vqa kinds 50": lambda: kinds("scenes-vqa", 0.5),
    "vqa kinds 25": lambda: kinds("scenes-vqa", 0.25),
    "vqa kinds 10": lambda: kinds("scenes-vqa", 0.1),
    "vqa caches": lambda: overall("scenes-vqa", IN_CACHES),
    "vqa refused": lambda: refused("scenes-vqa"),
    "horizon": horizon,
    "clip": lambda: overall("scenes-clip"),
    "clip kinds": lambda: kinds("scenes-clip", 0.45),
    "shift": lambda: overall("scenes-shift"),
    "shift kinds": lambda: kinds("scenes-shift", 0.45),
}
FIGURES = {
    "docs/images/results.png": ("scenes-vqa", "all", "macs"),
    "docs/images/results-fine-print.png": ("scenes-vqa", "fine print", "macs"),
    "docs/images/results-caches.png": ("scenes-vqa", "all", "kv_bytes"),
}
_BLOCK = re.compile(r"(<!-- results: ([\w ]+) -->\n)(.*?)(<!-- results: end -->)", re.S)


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    return _BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def source(task: str) -> str:
    """The hash of a task's results."""
    return hashlib.sha256((EVAL / f"{task}.csv").read_bytes()).hexdigest()


def draw(path: Path, task: str, kind: str, cost: str) -> None:
    """Draws quality against a cost."""
    import matplotlib

    matplotlib.use("Agg")
    from vlmtok.evaluation.plot import quality_plot

    ways = ("none", *Results(task).ways())
    if cost == "kv_bytes":
        ways = ("none", *Results(task, IN_CACHES).ways(), *BESIDE_CACHES)
    axes = quality_plot([row for row in rows_of(task) if row["asked"] in ways], cost, kind)
    said = "all questions" if kind == "all" else kind
    axes.set_title(f"{task}, {said}; bars: 95 % against the uncompressed model", fontsize=10)
    figure: Any = axes.figure
    figure.savefig(path, dpi=110, metadata={"results": source(task)})


def drawn_from(path: Path) -> str:
    """The hash that a figure carries."""
    from PIL import Image

    with Image.open(path) as picture:
        return str(picture.info.get("results", ""))


def main() -> int:
    """Writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text("utf-8")
        if filled(text) != text:
            stale.append(page)
            if not check:
                page.write_text(filled(text), "utf-8")
    for name, (task, kind, cost) in FIGURES.items():
        path = ROOT / name
        if not path.exists() or drawn_from(path) != source(task):
            stale.append(path)
            if not check:
                draw(path, task, kind, cost)
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
