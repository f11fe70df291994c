"""Which path `auto` takes and how the Triton kernels are tiled: fixed tables, no tuning while running.

`@triton.autotune` is not used: it needs a driver to import, its choice differs from run to run, and it stalls at every
new token count. ``python -m vlmtok.kernels.bench --sweep`` prints rows to paste here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .policy import Policy, all_policies
from .tracing import constant_in_graphs

# ---------------------------------------------------------------------- auto
POLICIES: tuple[Policy, ...] = all_policies()
"""Rows that decide, the first that fits before others."""


def policy(op: str, device: str = "") -> Policy:
    """The row for an op: measured on this device if there is one, else modelled.

    Args:
        op: name of the op.
        device: name of the device.

    Returns:
        The row.
    """
    rows = [row for row in POLICIES if row.op in (op, "*")]
    return min(rows, key=lambda row: (row.device != device, row.basis != "modelled", row.op == "*"))


def prefers_triton(op: str, batch: int, pair_bytes: int, device: torch.device) -> bool:
    """Whether `auto` takes the Triton kernel.

    Args:
        op: name of the op.
        batch: rows of the batch.
        pair_bytes: bytes of N x N intermediates of the torch path; 0 where it has none.
        device: where the tensors are.

    Returns:
        What the table says.
    """
    least, bytes_ = _thresholds(op, device.index)
    return batch >= least or pair_bytes >= bytes_


@constant_in_graphs
def _thresholds(op: str, index: int | None) -> tuple[int, int]:
    """`min_batch` and `pair_bytes` of the row for an op; Dynamo need not read how it is chosen."""
    measured = any(row.device for row in POLICIES)
    row = policy(op, device_facts(index)[0] if measured else "")
    return row.min_batch, row.pair_bytes


_facts: dict[int | None, tuple[str, bool]] = {}


@constant_in_graphs
def device_facts(index: int | None) -> tuple[str, bool]:
    """Name of a CUDA or HIP device, and whether the kernels are built for it (compute capability 8.0 on; any HIP).

    Args:
        index: of the device.

    Returns:
        Both, looked up once.
    """
    if index not in _facts:
        modern = torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)
        _facts[index] = torch.cuda.get_device_name(index), modern
    return _facts[index]


# ---------------------------------------------------------------------- tiles
@dataclass(frozen=True)
class Tile:
    """One row of the tile table.

    Attributes:
        op: the kernel.
        width: bytes of an element of the input at most.
        size: greatest extent (features, or tokens for `greedy_select` and `order`) the row serves.
        programs: smallest number of programs (of 64 rows each) from which on the row is used.
        m: rows of a tile.
        n: columns of a tile, or the whole extent of a one-dimensional kernel.
        k: features of a step; 0 where the kernel has no such loop.
        warps: warps of a program.
        stages: depth of the load pipeline.
    """

    op: str
    width: int
    size: int
    programs: int
    m: int
    n: int
    k: int
    warps: int
    stages: int = 2


LIMIT_GREEDY = 16384
"""Tokens that one program can hold: beyond, the state of `greedy_select` spills."""
LIMIT_DETERMINANT = 2048
"""Tokens up to which one program makes the whole choice of `greedy_determinant`: beyond, reading factors takes longer
than launching a round over many programs."""
LIMIT_ORDER = 4096
"""Scores that one program sorts."""
LIMIT_HEAD = 256
"""Head width of `received_attention` and `causal_column_sums`."""
LIMIT_SETS = 4
"""Sets of rows that `causal_column_sums` sums in one pass."""
_ANY = 1 << 30

# Of the rows that fit, the first is used. All compile for sm_80 and sm_90 without spills (tests/kernels).
TILES: tuple[Tile, ...] = (
    # match, energy: 128 x 64 from about four waves on, small tiles where there are few programs; fp32 is "ieee".
    Tile("match", 2, 64, 528, 128, 64, 64, 4),
    Tile("match", 2, 64, 132, 64, 64, 64, 4),
    Tile("match", 2, 64, 0, 16, 64, 64, 4),
    Tile("match", 2, 128, 132, 64, 64, 128, 4),
    Tile("match", 2, 128, 0, 16, 64, 128, 4),
    Tile("match", 2, _ANY, 132, 64, 64, 64, 4),
    Tile("match", 2, _ANY, 0, 32, 64, 64, 4),
    Tile("match", 4, 64, 0, 32, 32, 64, 4),
    Tile("match", 4, 128, 0, 32, 32, 128, 4),
    Tile("match", 4, _ANY, 0, 32, 64, 32, 4),
    # With a rank or the diagonal masked, 128 x 64 spills.
    Tile("match_masked", 2, 64, 132, 64, 64, 64, 4),
    Tile("match_masked", 2, 64, 0, 16, 64, 64, 4),
    Tile("match_masked", 2, 128, 132, 64, 64, 128, 4),
    Tile("match_masked", 2, 128, 0, 16, 64, 128, 4),
    Tile("match_masked", 2, _ANY, 0, 32, 64, 64, 4),
    Tile("match_masked", 4, 64, 0, 32, 32, 64, 4),
    Tile("match_masked", 4, 128, 0, 32, 32, 128, 4),
    Tile("match_masked", 4, _ANY, 0, 32, 32, 32, 4),
    Tile("energy", 2, 64, 528, 128, 64, 64, 4),
    Tile("energy", 2, 64, 132, 64, 64, 64, 4),
    Tile("energy", 2, 64, 0, 16, 64, 64, 4),
    Tile("energy", 2, 128, 132, 64, 64, 128, 4),
    Tile("energy", 2, 128, 0, 16, 64, 128, 4),
    Tile("energy", 2, _ANY, 132, 64, 64, 64, 4),
    Tile("energy", 2, _ANY, 0, 16, 64, 64, 4),
    Tile("energy", 4, 64, 0, 32, 32, 64, 4),
    Tile("energy", 4, 128, 0, 32, 32, 128, 4),
    Tile("energy", 4, _ANY, 0, 32, 64, 32, 4),
    # order: one program sorts a picture.
    Tile("order", 8, 64, 0, 1, 64, 0, 4),
    Tile("order", 8, 256, 0, 1, 256, 0, 4),
    Tile("order", 8, 512, 0, 1, 512, 0, 4),
    Tile("order", 8, 1024, 0, 1, 1024, 0, 8),
    Tile("order", 8, 2048, 0, 1, 2048, 0, 8),
    Tile("order", 8, LIMIT_ORDER, 0, 1, 4096, 0, 16),
    # greedy_select: one program holds the state of a picture.
    Tile("greedy_select", 4, 256, 0, 1, 256, 0, 4),
    Tile("greedy_select", 4, 1024, 0, 1, 1024, 0, 4),
    Tile("greedy_select", 4, 4096, 0, 1, 4096, 0, 16),
    Tile("greedy_select", 4, LIMIT_GREEDY, 0, 1, LIMIT_GREEDY, 0, 32),
    # greedy_cover: m rows a program, n targets a step; few rows are spread over more programs.
    Tile("greedy_cover", 4, LIMIT_GREEDY, 132, 16, 256, 0, 4),
    Tile("greedy_cover", 4, LIMIT_GREEDY, 0, 4, 256, 0, 4),
    # greedy_determinant: one program a picture, or n rows a program in a launch a round.
    Tile("determinant", 4, 256, 0, 1, 256, 0, 4),
    Tile("determinant", 4, 1024, 0, 1, 1024, 0, 8),
    Tile("determinant", 4, LIMIT_DETERMINANT, 0, 1, LIMIT_DETERMINANT, 0, 16),
    Tile("determinant_round", 4, LIMIT_GREEDY, 0, 1, 128, 0, 4),
    # merge_rows: m entries are looked at in a step, n channels are a program's.
    Tile("merge_rows", 4, 512, 0, 512, 512, 0, 4),
    Tile("merge_rows", 4, 1024, 0, 512, 1024, 0, 4),
    Tile("merge_rows", 4, _ANY, 0, 512, 2048, 0, 8),
    Tile("transition_stats", 4, 1024, 0, 1, 1024, 0, 4),
    Tile("transition_stats", 4, _ANY, 0, 1, 2048, 0, 8),
    Tile("received_attention", 2, 64, 0, 64, 64, 64, 4),
    Tile("received_attention", 2, 128, 0, 64, 32, 128, 4),
    Tile("received_attention", 2, LIMIT_HEAD, 0, 32, 32, 256, 4),
    Tile("received_attention", 4, 64, 0, 32, 32, 64, 4),
    Tile("received_attention", 4, 128, 0, 32, 32, 128, 4),
    Tile("received_attention", 4, LIMIT_HEAD, 0, 16, 32, 256, 4),
    Tile("causal_column_sums", 2, 64, 0, 64, 64, 64, 4),
    Tile("causal_column_sums", 2, 128, 0, 64, 32, 128, 4),
    Tile("causal_column_sums", 2, LIMIT_HEAD, 0, 32, 32, 256, 4),
    Tile("causal_column_sums", 4, 64, 0, 32, 32, 64, 4),
    Tile("causal_column_sums", 4, 128, 0, 16, 32, 128, 8),
    Tile("causal_column_sums", 4, LIMIT_HEAD, 0, 16, 16, 256, 4),
)


def tile(op: str, width: int, size: int, rows: int = 0) -> Tile:
    """The row of the tile table for a call.

    Args:
        op: the kernel.
        width: bytes of an element.
        size: its extent, see `Tile.size`.
        rows: rows that programs share, over the whole batch.

    Returns:
        The first row that fits.
    """
    programs = -(-rows // 64)
    for row in TILES:
        if row.op == op and width <= row.width and size <= row.size and programs >= row.programs:
            return row
    raise LookupError(f"no tile for {op} with {width}-byte elements and extent {size}")
