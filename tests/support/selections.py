"""What methods choose on inputs that every machine makes alike, as digests beside `Method.version`.

``python -m support.selections`` (in `tests/`) writes the table; it refuses a choice that changed while its version did
not. Inputs are made of integers alone, so that no library's random numbers have a part in them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmtok
from vlmtok import Layout, Method
from vlmtok.errors import ParameterError, VlmtokError
from vlmtok.kernels import dispatch

from . import drawn_settings
from .asking import Asking, dual, llava

TABLE = Path(__file__).parents[1] / "methods" / "selections.json"
GRID = (6, 6)
NUDGE = 1e-5
"""So much of it may a number of the inputs differ without another choice; sums of few numbers round to less."""
_WORD = 2**32

Row = dict[str, Any]
"""Of a method: its version, and by spec string the digest of what it chooses."""


def mixed(name: str, *shape: int, nudge: float = 0.0) -> Tensor:
    """A tensor in [-1, 1), by name and place, from integers.

    Args:
        name: tells tensors apart.
        shape: of the tensor.
        nudge: moves every number by up to so much of it.
    """
    salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    made = _numbers(salt, shape)
    return made.float() if not nudge else (made * (1.0 + nudge * _numbers(salt + 1, shape))).float()


def _numbers(salt: int, shape: tuple[int, ...]) -> Tensor:
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    value = (place * 2654435761 + salt) % _WORD
    for step in (15, 13, 16):  # a 16-bit factor keeps the product within 48 bits
        value = ((value ^ (value >> step)) * 40503 + salt) % _WORD
    return (value.double() / (_WORD / 2) - 1.0).reshape(shape)


def choice(method: Method, nudge: float = 0.0) -> str:
    """What a method keeps, joins and leaves out at each of its sites, as a digest.

    Args:
        method: the method.
        nudge: as in `mixed`.
    """
    found: list[Any] = []
    for layout in (llava(), dual()):
        try:
            asking = Asking(method, layout, lambda name, *shape: mixed(name, *shape, nudge=nudge))
        except VlmtokError:
            continue
        for view in asking.views(GRID[0] * GRID[1], GRID):
            try:
                reduction = method.reduce(view)
            except ParameterError as refusal:
                found.append(str(refusal))
                break
            asking.leave(reduction, view.counts.n)
            found.append([str(view.site), None if reduction is None else _indices(reduction)])
        found += _left_out(method, layout)
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def _left_out(method: Method, layout: Layout) -> list[Any]:
    """What it leaves out for visual tokens, where it does that at all."""
    try:
        skips = method.skip(layout)
    except VlmtokError as refusal:
        return [str(refusal)]
    return [sorted(skips.items())] if skips else []


def _indices(reduction: Any) -> list[Any]:
    pieces = (getattr(reduction, name) for name in ("keep", "src", "dst", "valid"))
    return [None if piece is None else piece.tolist() for piece in pieces]


def row_of(name: str) -> Row:
    """The row of a method as it is now."""
    with dispatch.use("torch"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choices = {spec: choice(vlmtok.parse_methods(spec)[0]) for spec in drawn_settings.specs(name)}
    return {"version": type(vlmtok.create_method(name)).version, "choices": choices}


def settled(row: Row) -> Row:
    """The row with None for choices that hang on rounding: another machine may make them differently."""
    with dispatch.use("torch"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moved = {spec: choice(vlmtok.parse_methods(spec)[0], NUDGE) for spec in row["choices"]}
    choices = {spec: digest if moved[spec] == digest else None for spec, digest in row["choices"].items()}
    return {**row, "choices": choices}


def committed() -> dict[str, Row]:
    """The table in the file, by method."""
    found: dict[str, Row] = json.loads(TABLE.read_text("utf-8"))
    return found


def problem(name: str, now: Row, before: Row) -> str | None:
    """What to do where a method chooses otherwise than the table says, under a version that is no higher."""
    old = before["choices"]
    moved = [spec for spec, digest in now["choices"].items() if old.get(spec) not in (None, digest)]
    if now["version"] < before["version"]:
        return f"Method.version of {name} went down, from {before['version']} to {now['version']}"
    if not moved or now["version"] > before["version"]:
        return None
    return (
        f"{name} chooses differently under {', '.join(moved[:3])}{' and others' * (len(moved) > 3)}: raise "
        f"Method.version of {name} (it is {now['version']}), and run python -m support.selections in tests/"
    )


def main() -> None:
    """Writes the table.

    Raises:
        SystemExit: a choice changed, and its version did not.
    """
    before = committed() if TABLE.exists() else {}
    now = {name: row_of(name) for name in vlmtok.list_methods()}
    wrong = [found for name in now if name in before and (found := problem(name, now[name], before[name]))]
    if wrong:
        raise SystemExit("\n".join(wrong))
    TABLE.write_text(json.dumps({name: settled(row) for name, row in now.items()}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
