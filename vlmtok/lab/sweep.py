"""Several methods, or one at several strengths, on one picture: a row each, beside one bare answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..core.method import Method
from ..core.spec import expand
from ..cost.units import binary, si, whole
from ..errors import InternalError, NotCounted, ParameterError, VlmtokError
from ..guard import guarded
from ..loading.models import Loaded
from ..loading.problems import line_of
from ..tabular import Table, Tabular, bullets
from ..timing import Progress
from .comparing import Comparing
from .comparison import Comparison
from .page import Page, page, wide
from .plot_svg import pareto_svg
from .plots import COSTS, pareto
from .runners import Loyalty

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@guarded
def sweep(
    model: Loaded,
    image: Image.Image | str | os.PathLike[str],
    methods: str | Method | Sequence[str | Method | Sequence[str | Method]],
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
            A list inside the list is several methods at once, as ``"tome:r=8+fastv"`` is.
        prompt: as for `vlmtok.compare`.
        max_new_tokens: of the answers, which are greedy.
        rounds: rounds of the measurement of latency, for each row; 0 measures none.
        limit: seconds for each row after which no further round begins.
        adapter: as for `vlmtok.compress`.
        progress: told what is being done.

    Returns:
        The rows. A method that fits the model and fails on the picture has a row that says why; the others go on.

    Raises:
        ParameterError: no method, or values of one sweep that mean different things (a count beside a share).
        VlmtokError: a method does not fit the model, before any answer is given; or the last of them, all having
            failed.
    """
    given = [methods] if isinstance(methods, (str, Method)) else list(methods)
    listed: list[str | Method | Sequence[str | Method]] = []
    for item in given:
        listed += expand(item) if isinstance(item, str) else [item]
    if not listed:
        raise ParameterError("sweep() needs at least one method")
    comparing = Comparing(model, image, prompt, max_new_tokens=max_new_tokens, adapter=adapter)
    for one in listed:
        comparing.check(one)
    found: list[Comparison | Failed] = []
    for index, one in enumerate(listed):
        if progress is not None:
            progress(f"{one}", index, len(listed))
        try:
            found.append(comparing.with_method(one, rounds=rounds, limit=limit))
        except InternalError:
            raise
        except (VlmtokError, torch.OutOfMemoryError) as problem:
            found.append(Failed(str(one), problem))
    failed = [row for row in found if isinstance(row, Failed)]
    if len(failed) == len(found):
        raise failed[-1].problem
    return Sweep(tuple(found))


@dataclass(frozen=True)
class Failed:
    """A row of a sweep without figures.

    Attributes:
        method: spec string.
        problem: what was raised.
    """

    method: str
    problem: Exception


@dataclass(frozen=True, eq=False)
class Sweep(Tabular, Page):
    """Rows of a sweep; print it, or take one of its forms.

    Attributes:
        rows: one for each method, in order.
    """

    rows: tuple[Comparison | Failed, ...]

    @property
    def comparisons(self) -> list[Comparison]:
        """Rows with figures."""
        return [row for row in self.rows if isinstance(row, Comparison)]

    @property
    def failed(self) -> list[Failed]:
        """Rows without: methods that fit the model and failed on the picture."""
        return [row for row in self.rows if isinstance(row, Failed)]

    def __iter__(self) -> Iterator[Comparison]:
        return iter(self.comparisons)

    def __len__(self) -> int:
        return len(self.rows)

    def to_records(self) -> list[dict[str, Any]]:
        """Numbers and words, the bare model first: method, answer, agreement, tokens, MACs, cache, speed, problem."""
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
            "problem": None,
        }
        return [bare, *(_record(row) if isinstance(row, Comparison) else _failed(row, bare) for row in self.rows)]

    def table(self) -> Table:
        """The rows as people read them."""
        records = self.to_records()
        stages = [name for name in records[0] if name.startswith("speed_")]
        head = ["method", "answer", "agreement", "visual tokens a layer", "MACs, total", "key-value cache"]
        head += [f"speed, {name.removeprefix('speed_')}" for name in stages]
        rows = []
        for record in records:
            if record["problem"] is not None:
                rows.append([record["method"], "failed, see below", *[""] * (len(head) - 2)])
                continue
            cache = record["kv_bytes"]
            total = record["total_macs"]
            agreement = str(Loyalty(record["same"], None, record["divergence"], record["cosine"]))
            cells = [record["method"], record["answer"], agreement, whole(record["visual_tokens_mean"])]
            cells += ["not given" if total is None else si(total), "" if cache is None else binary(cache)]
            rows.append(cells + [f"{record[name]:.2f} x" for name in stages])
        return Table(head, rows)

    def notes(self) -> list[str]:
        """Why rows failed, and what the ratios of time do not say."""
        return [*(f"{row.method} failed: {line_of(row.problem)}" for row in self.failed), *self.doubts()]

    def doubts(self) -> list[str]:
        """What the ratios of time do not say, method by method; what all share is said once."""
        said = [line for found in self.comparisons for line in dict.fromkeys(found.doubts())]
        return list(dict.fromkeys(said))

    def plot(self, cost: str = "total_macs", ax: Axes | None = None) -> Axes:
        """Agreement with the bare model against a cost: a point a row, and a line through those that no other beats.

        Args:
            cost: ``total_macs``, ``kv_bytes`` or ``visual_tokens_mean``.
            ax: axes of matplotlib to draw on; new ones unless given.

        Returns:
            The axes.

        Raises:
            ParameterError: no such cost, or no row has it.
            NotCounted: totals, and something is not counted.
            MissingPackage: matplotlib is not installed.
        """
        missing = self.comparisons[0].report.missing
        if cost == "total_macs" and missing:
            raise NotCounted(f"no total to plot: {'; '.join(missing)}; other costs: {', '.join(COSTS)}")
        return pareto(self.to_records(), cost, ax)

    def to_html(self) -> str:
        """One self-contained HTML page: each method to choose from, a table of all and their Pareto plot.

        Nothing is fetched when it is opened.
        """
        first = next(iter(self))
        plot = pareto_svg(self.to_records())
        parts = [
            "<section><h2>All methods</h2>",
            wide(self.table().html()),
            bullets(self.notes(), ' class="notes"'),
            f"<h2>Cost against agreement</h2>{plot}" if plot else "",
            "</section>",
        ]
        return page(
            f"{len(self.rows)} methods on {first.model.name}",
            first.facts(),
            first.image,
            first.model.processor,
            [found.entry() for found in self],
            first.environment,
            "".join(parts),
        )

    def __repr__(self) -> str:
        return f"<Sweep of {', '.join(row.method for row in self.rows)}>"


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
        "problem": None,
    }


def _failed(row: Failed, like: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(like), "method": row.method, "problem": line_of(row.problem)}
