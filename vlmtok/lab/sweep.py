"""Several methods, or one at several strengths, on one picture: a row each, beside one bare answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..core.method import Method
from ..core.spec import expand
from ..cost.units import binary, si
from ..errors import NotCounted, ParameterError
from ..guard import guarded
from ..loading.models import Loaded
from ..tabular import Table, Tabular
from ..timing import Progress
from .compare import Comparing
from .comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = ("total_macs", "kv_bytes", "visual_tokens_mean")
"""What can be plotted against agreement."""


@guarded
def sweep(
    model: Loaded,
    image: Image.Image | str | os.PathLike[str],
    methods: str | Method | Sequence[str | Method],
    prompt: str | None = None,
    *,
    max_new_tokens: int = 32,
    rounds: int = 5,
    limit: float = 10.0,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Compares several methods with the bare model on one picture. The model is bare again afterwards.

    Args:
        model: from `vlmtok.load`.
        image: a PIL picture or the path of one.
        methods: one row each: methods or spec strings, whose values may be swept: ``"todre:keep=0.1,0.25,0.5"``.
        prompt: as for `vlmtok.compare`.
        max_new_tokens: of the answers, which are greedy.
        rounds: rounds of the measurement of latency, for each row; 0 measures none.
        limit: seconds for each row after which no further round begins.
        adapter: as for `vlmtok.compress`.
        progress: told what is being done.

    Returns:
        The rows.

    Raises:
        ParameterError: no method, or values of one sweep that mean different things (a count beside a share).
        VlmtokError: a method does not fit the model, before any answer is given.
    """
    given = [methods] if isinstance(methods, (str, Method)) else list(methods)
    listed = [one for item in given for one in (expand(item) if isinstance(item, str) else [item])]
    if not listed:
        raise ParameterError("sweep() needs at least one method")
    comparing = Comparing(model, image, prompt, max_new_tokens=max_new_tokens, adapter=adapter)
    for one in listed:
        comparing.check(one)
    found = []
    for index, one in enumerate(listed):
        if progress is not None:
            progress(f"{one}", index, len(listed))
        found.append(comparing.with_method(one, rounds=rounds, limit=limit))
    return Sweep(tuple(found))


@dataclass(frozen=True, eq=False)
class Sweep(Tabular):
    """Rows of a sweep; print it, or take one of its forms.

    Attributes:
        comparisons: one for each method, in order.
    """

    comparisons: tuple[Comparison, ...]

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.comparisons)

    def __len__(self) -> int:
        return len(self.comparisons)

    def to_records(self) -> list[dict[str, Any]]:
        """Numbers and words, the bare model first: method, answer, agreement, tokens, MACs, cache, speed."""
        first = self.comparisons[0]
        cache, total = first.report.cache, first.report.total
        bare = {
            "method": "bare",
            "answer": first.bare.text,
            "same": True,
            "divergence": 0.0 if first.loyalty.divergence is not None else None,
            "cosine": 1.0 if first.loyalty.cosine is not None else None,
            "visual_tokens": first.tokens.bare,
            "visual_tokens_mean": first.tokens.bare,
            "total_macs": None if total is None else total.before,
            "kv_bytes": None if cache is None else cache.before,
            **{f"speed_{stage}": 1.0 for stage in first.latency},
        }
        return [bare, *map(_record, self.comparisons)]

    def table(self) -> Table:
        """The rows as people read them."""
        records = self.to_records()
        stages = [name for name in records[0] if name.startswith("speed_")]
        head = ["method", "answer", "agreement", "visual tokens", "MACs, total", "key-value cache"]
        head += [f"speed, {name.removeprefix('speed_')}" for name in stages]
        rows = []
        for record in records:
            cache = record["kv_bytes"]
            cells = [record["method"], record["answer"], _agreement(record), f"{record['visual_tokens']:g}"]
            total = record["total_macs"]
            cells += ["not given" if total is None else si(total), "" if cache is None else binary(cache)]
            rows.append(cells + [f"{record[name]:.2f} x" for name in stages])
        return Table(head, rows)

    def doubts(self) -> list[str]:
        """What the ratios of time do not say, method by method; what all share is said once."""
        said = [line for found in self.comparisons for line in dict.fromkeys(found.doubts())]
        return list(dict.fromkeys(said))

    def plot(self, cost: str = "total_macs", ax: Axes | None = None) -> Axes:
        """Agreement with the bare model against a cost, a point for each row.

        Args:
            cost: one of `COSTS`.
            ax: axes of matplotlib to draw on; new ones unless given.

        Returns:
            The axes.

        Raises:
            ParameterError: no such cost.
            NotCounted: totals, and something is not counted.
            ImportError: matplotlib is not installed.
        """
        if cost not in COSTS:
            raise ParameterError(f"no cost {cost!r} to plot; one of {', '.join(COSTS)}")
        missing = self.comparisons[0].report.missing
        if cost == "total_macs" and missing:
            raise NotCounted(f"no total to plot: {'; '.join(missing)}; other costs: {', '.join(COSTS)}")
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise ImportError("plot() needs matplotlib: pip install 'vlmtok[notebooks]'") from None
        axes = plt.subplots()[1] if ax is None else ax
        records = self.to_records()
        what = "cosine" if records[0]["cosine"] is not None else "divergence"
        for record in records:
            axes.plot(record[cost], record[what], "k*" if record["method"] == "bare" else "o", label=record["method"])
        axes.set_xlabel(cost.replace("_", " "))
        axes.set_ylabel("cosine with the bare output" if what == "cosine" else "KL divergence from bare, nats")
        axes.legend(fontsize="small")
        return axes

    def __repr__(self) -> str:
        return f"<Sweep of {', '.join(found.method for found in self.comparisons)}>"


def _record(found: Comparison) -> dict[str, Any]:
    cache, total = found.report.cache, found.report.total
    return {
        "method": found.method,
        "answer": found.compressed.text,
        "same": found.loyalty.same,
        "divergence": found.loyalty.divergence,
        "cosine": found.loyalty.cosine,
        "visual_tokens": found.tokens.first,
        "visual_tokens_mean": found.tokens.mean,
        "total_macs": None if total is None else total.after.high,
        "kv_bytes": None if cache is None else cache.after.high,
        **{f"speed_{stage}": ratio.median for stage, ratio in found.latency.items()},
    }


def _agreement(record: dict[str, Any]) -> str:
    said = ["same" if record["same"] else "different"]
    if record["cosine"] is not None:
        said.append(f"cosine {record['cosine']:.4f}")
    if record["divergence"] is not None:
        said.append(f"KL {record['divergence']:.2g}")
    return ", ".join(said)
