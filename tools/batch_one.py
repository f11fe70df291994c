"""Writes what methods cost for a single picture, which `vlmtok show` says, from the results of the benchmarks.

    python tools/batch_one.py          # writes vlmtok/data/costs/batch_one.csv
    python tools/batch_one.py --check  # ends with 1 where it is no longer as the results have it

From ``benchmarks/results``: rows of batch 1 of every ``suite_*.json`` and ``towers_*.json`` that were measured on a
GPU, with the kernels that a user gets, and ``selection_cpu.csv``, in which the choice is measured and the rest of the
prefill modelled.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from vlmtok.core.spec import parse_methods
from vlmtok.lab.batch_one import FILE, Cost

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
STAGES = ("tower", "prefill", "tower + generate")


def models(rows: list[dict[str, Any]]) -> Iterator[Cost]:
    """Whole models, from rows of `vlmtok bench`."""
    for row in rows:
        of_users = row["measured"] and row["device_type"] == "cuda" and row["kernels"] == "auto"
        if of_users and row["batch"] == 1 and row["stage"] in STAGES and row["speedup"]:
            what, times = f"{row['model']}, {row['stage']}", 1 / row["speedup"]
            yield _cost(row["method"], what, row["visual_tokens"], times, row)


def graphs(rows: list[dict[str, Any]], tokens: dict[str, int]) -> Iterator[Cost]:
    """Towers as CUDA graphs, where launches cost least."""
    bare = {(row["model"], row["batch"]): row["graph_ms"] for row in rows if row["method"] is None}
    for row in rows:
        if row["batch"] == 1 and row["kernels"] == "triton":
            times = row["graph_ms"] / bare[row["model"], 1]
            yield _cost(row["method"], f"{row['model']}, tower as a CUDA graph", tokens[row["model"]], times, row)


def _cost(spec: str, what: str, tokens: int, times: float, row: dict[str, Any]) -> Cost:
    versions = f"torch {row['torch']}, vlmtok {row['vlmtok']}"
    name = parse_methods(spec)[0].spec_name()
    return Cost(name, spec, what, tokens, round(times, 3), None, "measured", row["device"], row["dtype"], versions)


def selections(path: Path) -> Iterator[Cost]:
    """Choices on a CPU, beside the prefill of which they save most."""
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["batch"] == "1" and row["spec"]:
                of_prefill, of_saving = float(row["of_prefill"]), float(row["of_saving"])
                times = 1 - of_prefill / of_saving + of_prefill
                what = f"prefill of a LLaMA-7B (modelled), {row['k']} of {row['n']} tokens"
                basis = "choice measured, prefill modelled"
                yield Cost(
                    row["method"], row["spec"], what, int(row["n"]), round(times, 3), of_saving, basis,
                    row["processor"], "float32", row["versions"],
                )  # fmt: skip


def made() -> str:
    """The table as CSV."""
    found: list[Cost] = []
    tokens: dict[str, int] = {}
    for path in sorted(RESULTS.glob("suite_*.json")):
        rows = json.loads(path.read_text("utf-8"))["rows"]
        tokens |= {row["model"]: row["visual_tokens"] for row in rows if row["stage"] == "tower"}
        found += models(rows)
    for path in sorted(RESULTS.glob("towers_*.json")):
        found += graphs(json.loads(path.read_text("utf-8")), tokens)
    found += selections(RESULTS / "selection_cpu.csv")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Cost)]
    writer.writerow(names)
    writer.writerows([getattr(cost, name) for name in names] for cost in found)
    return text.getvalue()


def main() -> None:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    text = made()
    if not parser.parse_args().check:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.is_file() or FILE.read_text("utf-8") != text:
        sys.exit(f"{FILE.name} is not what the results give; run python tools/batch_one.py")


if __name__ == "__main__":
    main()
