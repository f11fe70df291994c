"""What the benchmarks of whole models on a CPU share: their options, their clock, and the file that they write."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import vlmtok


def options(doc: str | None, *, rounds: int, model: str, result: str, **more: str) -> argparse.Namespace:
    """The command line's options, with PyTorch's threads set as they say.

    Args:
        doc: of the script.
        rounds: by default.
        model: timm's name, by default.
        result: name of the file under ``results/``.
        more: further options with their defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=model)
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / result)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    return given


def clock(call: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call(pictures)
    return time.perf_counter() - start


def speed_up(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times as fast as ``bare`` each arm is: ratios of medians; printed too."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = {name: median["bare"] / value for name, value in median.items()}
    for name, value in ratio.items():
        print(f"{name:30} {value:5.2f} x")
    return ratio


def write(given: argparse.Namespace, seconds: Mapping[str, Sequence[float]], **more: Any) -> None:
    """Writes what was measured, where, and how quiet the machine was.

    Args:
        given: the options.
        seconds: of each arm, round by round.
        more: further entries.
    """
    bare = statistics.median(seconds["bare"])
    result = {
        **{name: value for name, value in vars(given).items() if name != "out"},
        "dtype": "float32",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vlmtok": vlmtok.__version__,
        **more,
        # Of every arm's rounds as a share of the bare median.
        "spread": {name: [round(v / bare, 3) for v in sorted(values)] for name, values in seconds.items()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
