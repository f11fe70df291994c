"""Lists the files of the package by wing, each with what its docstring says first, in ``docs/architecture.md``.

python tools/files.py            # writes the list anew between its markers
python tools/files.py --check    # fails where the page and the files differ
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: made by tools/files.py -->", "<!-- end: files -->"


def purpose(path: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def listed() -> str:
    """The list, a heading and a table for each folder."""
    folders = defaultdict(list)
    for top in ("vlmtok", "adapters"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if "data" not in path.parts:
                folders[path.parent.relative_to(ROOT).as_posix()].append(path)
    lines = []
    for folder, files in folders.items():
        lines += [f"### `{folder}/`", "", "| file | what it is for |", "|---|---|"]
        for path in sorted(files, key=lambda path: (path.name != "__init__.py", path.name)):
            lines.append(f"| `{path.name}` | {purpose(path).replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    """The whole page with the list as it is to be."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{listed()}\n{END}{after}"


def main() -> None:
    """Writes or compares."""
    if "--check" not in sys.argv:
        PAGE.write_text(page(), "utf-8")
    elif page() != PAGE.read_text("utf-8"):
        raise SystemExit("docs/architecture.md lists other files, or other purposes: run python tools/files.py")


if __name__ == "__main__":
    main()
