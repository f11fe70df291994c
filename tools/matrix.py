"""Which method runs on which family: the tables of ``docs/matrix.md``, and the families of ``tests/matrix.json``.

python tools/matrix.py            # writes both anew
python tools/matrix.py --check    # fails where they and what is found differ
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok.lab.matrix import LEGEND
from vlmtok.lab.pairs import Pair, named_pairs
from vlmtok.lab.tables import table

ROOT = Path(__file__).parents[1]
PAGE, FILE = ROOT / "docs" / "matrix.md", ROOT / "tests" / "matrix.json"
BEGIN, END = "<!-- matrix: made by tools/matrix.py -->", "<!-- end: matrix -->"
KEY = "families"
"""Where the families stand in the file, beside the models of the tests, by method."""


def outcome(pair: Pair) -> str:
    """A pair as the file has it: where it acts and what it chose, or the error and why."""
    if not pair.attaches:
        return f"refused: {pair.error}: {pair.clause}"
    return "; ".join((f"runs at {', '.join(pair.stages)}", *pair.plain_notes))


def outcomes(found: vlmtok.Matrix) -> dict[str, dict[str, str]]:
    """By method and family."""
    return {method: {one.model: outcome(one) for one in found if one.method == method} for method in found.methods}


def tables(found: vlmtok.Matrix) -> str:
    """What stands between the marks of the page."""
    grid = found.table()
    heads = [grid.head[0], *(f"[{name}](methods/{name}.md)" for name in grid.head[1:])]
    chosen, refused = found.sentences()
    faults = [f"- `{model}`: {fault}." for model, fault in found.faults.items()]
    rows = [
        [f"[{name}](families/{name}.md)" if name in ROWS else name, *(cell.replace("*", "\\*") for cell in cells)]
        for name, *cells in grid.rows
    ]
    legend = LEGEND.replace("*", "\\*")
    parts = [
        f"{len(found.attaching)} of {len(found)} pairs attach with transformers {version('transformers')}. "
        f"{legend[0].upper()}{legend[1:]}.",
        table(heads, rows),
        "## Chosen by itself",
        table(("what a report says", "pairs"), [(said, named_pairs(pairs)) for said, pairs in chosen.items()]),
        "## Refused",
        table(("why", "pairs"), [(why, named_pairs(pairs)) for why, pairs in refused.items()]),
    ]
    return "\n\n".join([*parts, *(["## Families that the library itself cannot run", *faults] if faults else [])])


def page(found: vlmtok.Matrix) -> str:
    """The whole page with its tables as they are to be."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables(found)}\n\n{END}{after}"


def file(found: vlmtok.Matrix) -> str:
    """The whole file with its families as they are to be."""
    whole = {**json.loads(FILE.read_text("utf-8")), KEY: outcomes(found)}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Writes or compares."""
    torch.set_num_threads(1)
    found = vlmtok.matrix()
    made = {PAGE: page(found), FILE: file(found)}
    if "--check" not in sys.argv:
        for path, text in made.items():
            path.write_text(text, "utf-8")
        print(f"{len(found.attaching)} of {len(found)} pairs attach")
        return
    stale = [path.relative_to(ROOT).as_posix() for path, text in made.items() if path.read_text("utf-8") != text]
    if stale:
        raise SystemExit(f"{' and '.join(stale)}: other pairs, or other reasons; run python tools/matrix.py")


if __name__ == "__main__":
    main()
