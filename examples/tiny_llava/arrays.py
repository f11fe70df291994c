"""Arrays that many processes fill into memory-mapped files, once: what the larger trainings draw beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tiny_llava.training import logger

Columns = Mapping[str, tuple[tuple[int, ...], type]]
Fill = Callable[[dict[str, np.ndarray], dict[str, Any], range], None]
_CHUNK = 256


def fill_arrays(folder: Path, key: dict[str, Any], columns: Columns, fill: Fill, workers: int) -> dict[str, np.ndarray]:
    """Fills arrays and opens them for reading; arrays that a folder already holds for the same key are only opened.

    Args:
        folder: Gets a file for each array.
        key: What the content depends on, plain values; ``number`` is the length of all arrays.
        columns: Shape behind the first axis and type of each array, by name.
        fill: Writes some rows, a function of a module; called as ``fill(arrays, key, rows)`` in another process.
        workers: How many processes.

    Returns:
        The arrays, `[number, ...]` each.
    """
    done, number = folder / "done.json", int(key["number"])
    if not done.exists() or json.loads(done.read_text()) != key:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        for name, (shape, kind) in columns.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (number, *shape))
        rows = [range(first, min(first + _CHUNK, number)) for first in range(0, number, _CHUNK)]
        with ProcessPoolExecutor(workers) as pool:
            jobs = [(folder, tuple(columns), fill, key, part) for part in rows]
            for i, _ in enumerate(pool.map(_fill, jobs), 1):
                if i % 40 == 0:
                    logger.info("%s: %d of %d drawn", folder.name, rows[i - 1].stop, number)
        done.write_text(json.dumps(key))
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in columns}


def _fill(job: tuple[Path, tuple[str, ...], Fill, dict[str, Any], range]) -> None:
    folder, names, fill, key, rows = job
    fill({name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in names}, key, rows)
