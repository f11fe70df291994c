"""Other tiles for a case, and rows for the table of `auto` from what was measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import table
from ..dispatch import use
from ..policy import NEVER, Policy
from .clock import Clock
from .floors import Case


def candidates(row: table.Tile) -> list[table.Tile]:
    """Rows that could take the place of a row of the tile table."""
    if row.k:
        shapes = [(m, n) for m in (16, 32, 64, 128) for n in (32, 64, 128)]
        return [replace(row, m=m, n=n, warps=w, stages=s) for m, n in shapes for w in (4, 8) for s in (2, 3, 4)]
    if row.op == "merge_rows":
        return [replace(row, m=m, n=n, warps=w) for m in (128, 512) for n in (512, 1024, 2048) for w in (2, 4, 8)]
    return [replace(row, warps=w) for w in (1, 2, 4, 8, 16, 32)]


def sweep(case: Case, clock: Clock, dtype: torch.dtype) -> list[tuple[float, table.Tile]]:
    """Times an op with other rows in the tile table.

    Args:
        case: the op and its size.
        clock: what times.
        dtype: of the inputs.

    Returns:
        (microseconds, row), the fastest first; rows that do not compile or launch are left out.
    """
    ours = case.calls(clock.device, dtype)["ours"]
    used: list[table.Tile] = []
    plain, original = table.tile, table.TILES

    def asked(op: str, width: int, size: int, rows: int = 0) -> table.Tile:
        used.append(plain(op, width, size, rows))
        return used[-1]

    results = []
    with use("triton"):
        ours()  # imports the modules
        modules = [m for n, m in sys.modules.items() if n.startswith("vlmtok.kernels.triton_") and hasattr(m, "tile")]
        try:
            for module in modules:
                module.tile = asked  # type: ignore[attr-defined]
            ours()
            for row in {row.op: row for row in used}.values():
                for other in candidates(row):
                    table.TILES = tuple(other if old == row else old for old in original)
                    try:
                        results.append((clock.time(ours).median, other))
                    except Exception as problem:
                        print(f"  {other}: {type(problem).__name__}", file=sys.stderr)
        finally:
            table.TILES = original
            for module in modules:
                module.tile = plain  # type: ignore[attr-defined]
    return sorted(results, key=lambda result: result[0])


def policies(rows: Sequence[dict[str, Any]], source: str) -> list[Policy]:
    """Rows for the table of `auto`: from which batch on the kernel is no slower than torch, alone and warm.

    An op whose kernel is slower at the greatest batch gets a row that leaves it to torch at every batch.

    Args:
        rows: as measured.
        source: the file they are kept in.

    Returns:
        One row an op that was measured on a GPU.
    """
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [r for r in rows if (r["op"], r["path"], r["way"]) == (op, "triton", "warm")]
        wins = {
            batch: all(r["times_eager"] >= 1 for r in mine if r["batch"] >= batch)
            for batch in {r["batch"] for r in mine}
        }
        if mine:
            first = mine[0]
            versions = f"torch {first['torch']}, triton {first['triton']}"
            least = min((batch for batch, won in wins.items() if won), default=NEVER)
            found.append(Policy(op, least, 1 << 30, "measured", first["device"], versions, source))
    return found
