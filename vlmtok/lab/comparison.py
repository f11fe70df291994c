"""What a comparison found, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..core.site import layer_of
from ..core.trace import PictureTrace, Trace
from ..cost.units import binary, si
from ..loading.models import Loaded
from ..sheet import Sheet, Shown
from ..tabular import Table
from ..timing import Ratio
from .page import Entry, Page, Side, page
from .runners import Answer, Loyalty

if TYPE_CHECKING:
    from ..cost.report import Report


ENOUGH = 3
"""Rounds below which a ratio of times says nothing of which is faster."""


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of one picture: in the language model, or in a lone tower.

    Attributes:
        bare: how many there are.
        first: how many enter the first layer of the compressed model,
        last: the last one,
        mean: and a layer on average.
    """

    bare: int
    first: float
    last: float
    mean: float

    @classmethod
    def of(cls, report: Report, trace: Trace, depth: int | None = None) -> VisualTokens:
        """Reads a pass of one picture and its report.

        Args:
            report: of the pass.
            trace: of the pass.
            depth: layers of the language model, or None for a lone tower; reports do not count those of every family.
        """
        lines = report.last_layers()
        stage, layers = lines[0].stage if lines else "vision", [line.visual.high for line in lines]
        bare = sum(picture.patches for picture in trace.pictures)
        if depth is not None and stage != "decoder":
            layers = [sum(_left(picture, layer) for picture in trace.pictures) for layer in range(depth)]
            return cls(bare, layers[0], layers[-1], sum(layers) / depth)
        if not layers:
            return cls(bare, bare, bare, bare)
        # What a tower's last block leaves is handed on; a language model's answer is read off its last layer.
        last = sum(picture.kept for picture in trace.pictures) if stage == "vision" else layers[-1]
        return cls(bare, layers[0], last, sum(layers) / len(layers))


def _left(picture: PictureTrace, layer: int) -> int:
    """Tokens of a picture that enter a layer of the language model."""
    left = picture.patches
    for site, owner in picture.steps:
        if site.stage == "cache":
            continue
        if site.stage != "decoder" or layer_of(site.layer, site.point) <= layer:
            left = int(owner[owner >= 0].unique().numel())
    return left


@dataclass(frozen=True, eq=False)
class Comparison(Shown, Page):
    """The outcome of `compare`; print it, let a notebook show it, or take `to_dict`.

    Attributes:
        model: what was loaded.
        method: spec string of the methods.
        prompt: as typed; None for towers.
        bare: the answer without,
        compressed: and with the methods.
        loyalty: how close they are.
        tokens: visual tokens.
        report: tokens, MACs and cache bytes of the compressed pass, before and after.
        latency: how many times faster, by stage: ``prefill`` and ``answer``, or ``forward`` for towers.
        seconds: bare and compressed medians by stage; on a GPU only.
        overlay: the picture and what became of its patches, a panel a cut, or None.
        overlay_legend: how to read it.
        overlay_problem: why there is none.
        environment: device and versions.
        image: the picture, RGB.
        trace: what became of its patches, for `vlmtok.overlay`; None where there is no overlay.
    """

    model: Loaded
    method: str
    prompt: str | None
    bare: Answer
    compressed: Answer
    loyalty: Loyalty
    tokens: VisualTokens
    report: Report
    latency: dict[str, Ratio]
    seconds: dict[str, tuple[float, float]]
    overlay: Image.Image | None
    overlay_legend: str
    overlay_problem: str | None
    environment: dict[str, Any]
    image: Image.Image
    trace: PictureTrace | None

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts; no absolute times of a CPU."""

        def side(answer: Answer) -> dict[str, Any]:
            made: dict[str, Any] = {"answer": answer.text}
            if answer.classes:
                made["classes"] = [{"label": label, "probability": share} for label, share in answer.classes]
            return made

        macs, cache, tokens = self.report.total, self.report.cache, self.tokens
        bare = {**side(self.bare), "visual_tokens": tokens.bare, "total_macs": None if macs is None else macs.before}
        short = {**side(self.compressed), "visual_tokens": tokens.first}
        short["total_macs"] = None if macs is None else macs.after.high
        short.update(visual_tokens_last_layer=tokens.last, visual_tokens_mean=tokens.mean)
        if cache is not None:
            bare["kv_bytes"], short["kv_bytes"] = cache.before, cache.after.high
        for stage, (before, after) in self.seconds.items():
            bare[f"{stage}_seconds"], short[f"{stage}_seconds"] = before, after
        return {
            "model": self.model.name,
            "class": type(self.model.model).__name__,
            "parameters": self.model.parameters,
            "trained": self.model.trained,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "prompt": self.prompt,
            "method": self.method,
            "bare": bare,
            "compressed": short,
            "loyalty": asdict(self.loyalty),
            "speedup": {stage: asdict(ratio) for stage, ratio in self.latency.items()},
            "overlay_legend": self.overlay_legend,
            "overlay_problem": self.overlay_problem,
            "environment": self.environment,
            "report": self.report.to_dict(),
        }

    def sheet(self) -> Sheet:
        """The two side by side."""
        loaded, gpu = self.model, self.environment["device_type"] != "cpu"
        dtype = str(loaded.dtype).removeprefix("torch.")
        size = f"{type(loaded.model).__name__}, {si(loaded.parameters)} parameters"
        where = self.environment["device"] if gpu else "CPU"
        lines = [] if loaded.trained else ["the weights are random: what it says means nothing"]
        lines += [] if self.prompt is None else [f"prompt   {self.prompt}"]
        notes = [*self.doubts(), *(f"note: {note}" for note in self.report.notes)]
        if self.latency:
            rounds = max(ratio.rounds for ratio in self.latency.values())
            how = f"median of {rounds} interleaved rounds, 20 and 80 % in brackets"
            notes.insert(0, f"time: {how}" + ("" if gpu else "; on a CPU relative to bare, never absolute"))
        return Sheet(
            f"{loaded.name} ({size}) on {where}, {dtype}",
            [*lines, f"method   {self.method}"],
            [self.table()],
            notes,
            self.overlay,
            self.overlay_legend if self.overlay_problem is None else f"no overlay: {self.overlay_problem}",
        )

    def __repr__(self) -> str:
        answer = "same answer" if self.loyalty.same else "another answer"
        tokens = f"{self.tokens.first:g} of {self.tokens.bare} visual tokens"
        return f"<Comparison of {self.method} on {self.model.name}: {answer}, {tokens}>"

    def table(self) -> Table:
        """The two side by side, row by row."""
        return Table(["", "bare", "compressed", ""], list(self._rows()))

    def to_html(self) -> str:
        """One self-contained HTML page: the picture with a slider over stages and layers, answers, figures, report.

        Nothing is fetched when it is opened.
        """
        return page(
            f"{self.method} on {self.model.name}",
            self.facts(),
            self.image,
            self.model.processor,
            [self.entry()],
            self.environment,
        )

    def facts(self) -> list[tuple[str, str]]:
        """What was asked of what, as names and values."""
        loaded = self.model
        dtype = str(loaded.dtype).removeprefix("torch.")
        what = f"{type(loaded.model).__name__}, {si(loaded.parameters)} parameters, {dtype}"
        found = [("model", f"{loaded.name} ({what})")]
        if not loaded.trained:
            found.append(("weights", "random: what it says means nothing"))
        return found if self.prompt is None else [*found, ("prompt", self.prompt)]

    def entry(self) -> Entry:
        """What a page says of this method."""

        def side(title: str, answer: Answer) -> Side:
            return Side(title, answer.text, [f"{share:.1%} {label}" for label, share in answer.classes])

        return Entry(
            self.method,
            self.trace,
            self.overlay_problem,
            [side("bare", self.bare), side("compressed", self.compressed)],
            str(self.loyalty),
            self.table(),
            [*self.doubts(), *self.report.notes],
            self.report.to_html(),
        )

    def doubts(self) -> Iterator[str]:
        """What the ratios of time do not say."""
        for stage, ratio in self.latency.items():
            if ratio.rounds < ENOUGH:
                yield f"time, {stage}: {ratio.rounds} of {ENOUGH} rounds that a ratio takes to mean anything"
            elif ratio.p20 < 1 < ratio.p80:
                yield f"time, {stage}: the rounds differ too much to say which is faster"
            elif ratio.p80 <= 1:
                yield f"time, {stage}: hooks and deciding took more than fewer tokens saved, on this machine and input"

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Cells of the table."""
        tokens, macs, cache = self.tokens, self.report.total, self.report.cache
        yield ("answer", self.bare.text, self.compressed.text, str(self.loyalty))
        for (label, share), (other, short) in zip(self.bare.classes, self.compressed.classes):
            yield ("", f"{share:.1%} {label}", f"{short:.1%} {other}", "")
        note = f"{tokens.first / tokens.bare:.0%}" if tokens.bare else ""
        if tokens.last != tokens.first:
            note = f"{tokens.last:g} left at the end, {tokens.mean:.0f} a layer on average"
        yield ("visual tokens", str(tokens.bare), f"{tokens.first:g}", note)
        if macs is None:
            yield ("MACs, total", "not given", "not given", "; ".join(self.report.missing))
        else:
            high = macs.after.high
            fewer = f"{macs.before / high:.2f} x fewer" if high else ""
            if high > macs.before:
                fewer = f"{high / macs.before:.2f} x as many"
            yield ("MACs, total", si(macs.before), macs.after.show(si), fewer)
        if cache is not None and cache.before:
            saved = f"{1 - cache.after.high / cache.before:.0%} saved"
            yield (cache.name, binary(cache.before), cache.after.show(binary), saved)
        for stage, ratio in self.latency.items():
            if stage in self.seconds:
                before, after = (f"{1000 * seconds:.2f} ms" for seconds in self.seconds[stage])
            elif ratio.rounds < ENOUGH:
                before = after = ""
            else:
                before, after = "1.00", f"{1 / ratio.median:.2f}"
            yield (f"time, {stage}", before, after, _faster(ratio))


def _faster(ratio: Ratio) -> str:
    if ratio.rounds < ENOUGH:
        return "too few rounds to say"
    spread = f"({ratio.p20:.2f} to {ratio.p80:.2f})"
    if ratio.median >= 1:
        return f"{ratio.median:.2f} x faster {spread}"
    return f"{1 / ratio.median:.2f} x slower {spread}"
