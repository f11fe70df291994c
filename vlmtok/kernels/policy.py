"""When `auto` takes a kernel: rows of thresholds, modelled ones in code, measured ones in files of a card each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ParameterError

OWN = "VLMTOK_POLICIES"
"""Environment variable that names a file of rows of one's own, which come before those that ship."""
_SHIPPED = Path(__file__).parents[1] / "data" / "policies"
NEVER = 1 << 30
"""`Policy.min_batch` of an op whose kernel was slower at every size measured."""


@dataclass(frozen=True)
class Policy:
    """When `auto` prefers the Triton kernel of an op.

    Attributes:
        op: the op, or ``"*"`` for every op without a row of its own.
        min_batch: from this batch on.
        pair_bytes: or where the torch path would hold at least so many bytes of N x N intermediates.
        basis: ``"measured"`` or ``"modelled"``.
        device: name of the device measured (as `torch.cuda.get_device_name` says); empty for a modelled row.
        versions: of torch and triton, for a measured row.
        source: file with the figures, for a measured row.
    """

    op: str
    min_batch: int
    pair_bytes: int
    basis: str
    device: str = ""
    versions: str = ""
    source: str = ""

    @property
    def start(self) -> str:
        """From when on the kernel is taken, in words."""
        return "torch at every batch" if self.min_batch == NEVER else f"the kernel from batch {self.min_batch} on"

    def __post_init__(self) -> None:
        """Checks a row.

        Raises:
            ParameterError: a threshold is no whole number from 0 on, a measured row names no device, or a modelled one
                does.
        """
        for name in ("min_batch", "pair_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ParameterError(f"policy of {self.op!r}: {name}={value!r} must be a whole number from 0 on")
        if self.basis not in ("measured", "modelled") or (self.basis == "measured") != bool(self.device):
            raise ParameterError(
                f"policy of {self.op!r}: basis={self.basis!r} with device={self.device!r}; a row is 'measured' on a "
                "device that it names, or 'modelled' for any"
            )


def read_policies(path: str | os.PathLike[str]) -> tuple[Policy, ...]:
    """Rows of a file that ``vlmtok bench --all FOLDER`` wrote.

    Args:
        path: a JSON file, a list of objects with the fields of `Policy`.

    Raises:
        ParameterError: there is no such file, or it holds something else.
    """
    names = {field.name: field.default is MISSING for field in fields(Policy)}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ParameterError(f"cannot read dispatch rows {str(path)!r}: {problem}") from None
    rows: list[Any] = found if isinstance(found, list) else [None]
    for row in rows:
        if not isinstance(row, dict) or row.keys() - names or {name for name in names if names[name]} - row.keys():
            raise ParameterError(
                f"{str(path)!r} holds no dispatch rows: a list of objects with {', '.join(names)} is asked for"
            )
    return tuple(Policy(**row) for row in rows)


def write_policies(path: Path, rows: Iterable[Policy]) -> None:
    """Writes rows as `read_policies` reads them, one a line.

    Args:
        path: of the file.
        rows: what goes there.
    """
    lines = ",\n ".join(json.dumps(asdict(row)) for row in rows)
    path.write_text(f"[{lines}]\n", encoding="utf-8")


def all_policies() -> tuple[Policy, ...]:
    """Rows of one's own, rows that ship, and the modelled row that holds for whatever was not measured."""
    own = read_policies(os.environ[OWN]) if os.environ.get(OWN) else ()
    shipped = [row for path in sorted(_SHIPPED.glob("*.json")) for row in read_policies(path)]
    # On the card measured each kernel is faster than torch at every batch: small ones are bound by launches, of which
    # a kernel has fewer. Elsewhere, and of ops that were not measured, the same is assumed.
    return (*own, *shipped, Policy("*", min_batch=1, pair_bytes=1 << 30, basis="modelled"))
