"""The whole sweep behind `docs/results.md`: every method at every budget on every task that the package ships.

    python benchmarks/evaluate_all.py --device cuda --jobs 4

runs `vlmtok eval` for groups of methods side by side, each resumable in a folder of its own below `--work`, and joins
their tables to `benchmarks/results/eval/TASK.csv`, of which `vlmtok recommend` reads a copy.

    python benchmarks/evaluate_all.py --add FOLDER ...

adds the tables that `vlmtok eval TASK --methods NEW --no-baselines --out FOLDER` wrote, of methods that came since;
rows of the same method and budget are replaced.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "eval"
SHIPPED = ROOT / "vlmtok" / "data" / "results"
KEEPS = {"scenes-vqa": "0.5,0.25,0.1", "scenes-clip": "0.75,0.6,0.45", "scenes-shift": "0.75,0.6,0.45"}
# Settings worth a row besides the defaults: CDPruner without its sign for CLIP, whose patches and texts correlate
# inversely; SparseVLM with its first cut where these models begin to look at the picture.
# CrossGET guided by nothing, by the class token, by the cross tokens that were trained on the checkpoint.
GUIDED = ("crossget:guidance=cls", "crossget:guidance=cross")
VARIANTS = {
    "scenes-vqa": ("cdpruner:negate=false", "sparsevlm:layers=(2;3;7)"),
    "scenes-clip": GUIDED,
    "scenes-shift": GUIDED,
}
# What a cut at layer K is worth: by attention, and at random. A tenth of the tokens stays from there on.
HORIZON = tuple(
    spec.format(layer)
    for layer in (2, 4, 8, 12)
    for spec in ("fastv:keep=0.1:K={}", "random:keep=0.1:stage=decoder:layer={}")
)
AS_WRITTEN = {"scenes-vqa": HORIZON}
QUESTIONS = {"scenes-vqa": 1200, "scenes-clip": 1200, "scenes-shift": 3000}


def groups(task: str, jobs: int) -> list[tuple[list[str], list[str], bool]]:
    """Methods, specs that run as written, and whether the baselines are among them, for each job."""
    import vlmtok

    methods = [*sorted(vlmtok.list_methods()), *VARIANTS.get(task, ())]
    methods.remove("random")
    found: list[tuple[list[str], list[str], bool]] = [([], [], False) for _ in range(jobs)]
    for i, method in enumerate(methods):
        found[i % max(1, jobs - 1)][0].append(method)
    found[-1] = (found[-1][0], list(AS_WRITTEN.get(task, ())), True)
    return found


def run(task: str, group: tuple[list[str], list[str], bool], folder: Path, args: argparse.Namespace) -> None:
    """One `vlmtok eval`."""
    methods, written, baselines = group
    words = [sys.executable, "-m", "vlmtok", "eval", task, "--methods", ",".join(methods), "--keep", KEEPS[task]]
    words += ["--as-written", ",".join(written)] if written else []
    words += ["--baselines" if baselines else "--no-baselines", "--out", str(folder), "--device", args.device]
    words += ["--batch", str(args.batch), "--dtype", args.dtype]
    limit = args.limit or QUESTIONS.get(task)
    words += ["--limit", str(limit)] if limit else []
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads})


def join(task: str, tables: Iterable[list[dict[str, str]]]) -> None:
    """Joins tables; the uncompressed model is in all of them, once in the result."""
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    for table in tables:
        for row in table:
            columns += [name for name in row if name not in columns]
            rows += [] if row in rows else [row]
    order = {name: i for i, name in enumerate(("none", "random", "downsample"))}
    places = {row["asked"]: i for i, row in enumerate(sorted(rows, key=lambda row: row["asked"]))}
    rows.sort(key=lambda row: (order.get(row["asked"], 3), places[row["asked"]], -float(row["keep"])))
    for folder in (RESULTS, SHIPPED):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{task}.csv", columns, rows)


def added(task: str, folders: Iterable[Path]) -> None:
    """Joins tables of further methods to the committed one, whose row of the uncompressed model stays."""
    committed = _read(RESULTS / f"{task}.csv")
    further = [[row for row in _read(folder / f"{task}.csv") if row["asked"] != "none"] for folder in folders]
    newer = {(row["asked"], row["keep"]) for table in further for row in table}
    join(task, [[row for row in committed if (row["asked"], row["keep"]) not in newer], *further])


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(KEEPS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--limit", type=int, help="questions; for a trial")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "eval")
    parser.add_argument("--add", type=Path, nargs="+", help="folders of sweeps of methods that came since")
    args = parser.parse_args()
    if args.add:
        for task in KEEPS:
            folders = [folder for folder in args.add if (folder / f"{task}.csv").is_file()]
            if folders:
                added(task, folders)
        return
    for task in args.tasks:
        parts = groups(task, args.jobs)
        folders = [args.work / f"{task}-{i}" for i in range(len(parts))]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, [task] * len(parts), parts, folders, [args] * len(parts)))
        join(task, [_read(folder / f"{task}.csv") for folder in folders])


if __name__ == "__main__":
    main()
