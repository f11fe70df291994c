"""What ``vlmtok bench`` measures: one model with one method, or the standard suite of towers and language models.

A row is one stage of one case. Beside each measured speed-up stands the one that the MACs promise. Where there is no
GPU the suite gives the promise and the floor alone, marked as not measured: times of large models on a CPU say nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import bench, kernels
from .bench import Case, Progress, Ratio, Timing
from .compression import compress
from .errors import ParameterError
from .estimate import estimate, shape_of
from .loading import quiet
from .session import VisualTokens

if TYPE_CHECKING:
    from .flops import BlockShape
    from .loading import Loaded
    from .report import Report

Row = dict[str, Any]
"""A row of the table: plain values."""


@dataclass(frozen=True)
class Peak:
    """What floors are reckoned with.

    Attributes:
        name: of the GPU.
        flops: a second, of dense bf16 matrix products.
        moved: bytes a second, of copies.
    """

    name: str
    flops: float
    moved: float


PEAK = Peak("H200", 790e12, 4.3e12)
TEXT_TOKENS = 64
SWEEP = (36, 72, 144, 288, 576, 1152, 2880)
"""Visual tokens at which the break-even is looked for."""


# ---------------------------------------------------------------------- figures of a report
def macs_of(report: Report, stage: str, steps: int = 0) -> tuple[float, float]:
    """MACs of a stage, bare and compressed; deciding counts for the compressed one.

    Args:
        report: of one call.
        stage: ``decode`` (one step), or what is run, joined by +: ``tower`` (all that is not a language model),
            ``prefill`` (the language model's), ``generate`` (the same with `steps` decode steps).
        steps: decode steps behind the prefill.
    """
    lines = {line.name: (line.before, line.after.high) for line in report.lines}
    step = (0.0, 0.0) if report.step is None else (report.step.before, report.step.after.high)
    if stage == "decode":
        return step
    run = stage.split(" + ")
    names = ["signals", "method"]
    names += ["vision", "text", "projector"] if "tower" in run else []
    names += ["prefill"] if run[-1] != "tower" else []
    before, after = (sum(lines[name][side] for name in names if name in lines) for side in (0, 1))
    steps = steps if run[-1] == "generate" else 0
    return before + steps * step[0], after + steps * step[1]


# ---------------------------------------------------------------------- timing one model
@dataclass(frozen=True)
class Subject:
    """A model with its input, ready to be timed.

    Attributes:
        name: of the model.
        model: it.
        calls: stages that can be called, by name (see `macs_of`); the last one goes all the way through the model.
        tokens: visual tokens of one picture.
        batch: rows.
        steps: new tokens of calls that end in ``generate``.
        ends: calls with one and with all new tokens, whose difference is decoding; None for a tower.
    """

    name: str
    model: nn.Module
    calls: dict[str, Callable[[], object]]
    tokens: int
    batch: int
    steps: int = 1
    ends: tuple[str, str] | None = None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Contestant:
    """A method, and the path that its kernels take.

    Attributes:
        method: spec string.
        kernels: mode of `vlmtok.kernels.use`.
    """

    method: str
    kernels: str = "auto"

    def on(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context in which a model is compressed."""

        @contextmanager
        def both() -> Iterator[Any]:
            with kernels.use(self.kernels), compress(model, self.method) as run:
                yield run

        return both()


def measure(
    subject: Subject,
    contestants: Sequence[Contestant],
    *,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times a model bare and with each method, all in turns.

    Args:
        subject: the model and its calls.
        contestants: the methods.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        A row for each stage of each contestant.
    """
    cases = [Case(f"{stage}/bare", call) for stage, call in subject.calls.items()]
    reports = []
    whole = [*subject.calls.values()][-1]
    for number, one in enumerate(contestants):
        with one.on(subject.model) as run:
            whole()
            reports.append(run.report())
        cases += [
            Case(f"{stage}/{number}", call, lambda one=one: one.on(subject.model))  # type: ignore[misc]
            for stage, call in subject.calls.items()
        ]
    peaks = {case.name: bench.peak_bytes(case, subject.device) for case in cases}
    found = bench.interleave(cases, rounds=rounds, limit=limit, device=subject.device, progress=progress)
    rows = []
    for number, (one, report) in enumerate(zip(contestants, reports)):
        for stage in subject.calls:
            rows.append(_row(subject, one, report, stage, found[f"{stage}/bare"], found[f"{stage}/{number}"]))
            rows[-1].update(peak_bytes_bare=peaks[f"{stage}/bare"], peak_bytes=peaks[f"{stage}/{number}"])
        if subject.ends is not None:
            first, last = subject.ends
            bare, short = (
                _difference(found[f"{last}/{key}"], found[f"{first}/{key}"], subject.steps - 1)
                for key in ("bare", str(number))
            )
            if bare is not None and short is not None:
                rows.append(_row(subject, one, report, "decode", bare, short))
    return rows


def measure_graphs(
    subject: Subject,
    contestants: Sequence[Contestant],
    *,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times the last call of a subject on a GPU as CUDA graphs, bare and with each method: what the host costs is gone.

    Args:
        subject: the model and its calls.
        contestants: methods whose counts follow from shapes alone.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        A row for each contestant; the stage says that it is a graph.
    """
    stage, call = [*subject.calls.items()][-1]
    cases, reports = [Case("bare", bench.captured(call))], []
    for number, one in enumerate(contestants):
        with one.on(subject.model) as run:
            call()
            reports.append(run.report())
            cases.append(Case(str(number), bench.captured(call)))
    found = bench.interleave(cases, rounds=rounds, limit=limit, device=subject.device, progress=progress)
    return [
        {
            **_row(subject, one, report, stage, found["bare"], found[str(number)]),
            "stage": f"{stage}, CUDA graph",
            "peak_bytes_bare": None,
            "peak_bytes": None,
        }
        for number, (one, report) in enumerate(zip(contestants, reports))
    ]


def _difference(whole: Timing, first: Timing, steps: int) -> Timing | None:
    """One step, from the whole and its beginning; None where noise is greater than a step."""
    seconds = tuple((a - b) / steps for a, b in zip(whole.seconds, first.seconds))
    return Timing(seconds) if min(seconds) > 0 else None


def _row(subject: Subject, one: Contestant, report: Report, stage: str, bare: Timing, short: Timing) -> Row:
    ratio = Ratio.of(bare, short)
    before, after = macs_of(report, stage, subject.steps - 1)
    promised = before / after if after else 1.0
    gpu = subject.device.type == "cuda"
    row = _head(subject.name, stage, one, subject.batch, subject.tokens, report)
    row.update(
        mac_ratio=promised,
        speedup=ratio.median,
        p20=ratio.p20,
        p80=ratio.p80,
        rounds=ratio.rounds,
        of_promise=ratio.median / promised,
        # Fewer tokens do not change what weights cost: a decode step has no token count at which it pays.
        break_even_tokens=None if stage == "decode" else bench.break_even(subject.tokens, ratio.median, promised),
        break_even_from="overhead",
        seconds_bare=bare.median if gpu else None,
        seconds=short.median if gpu else None,
        measured=True,
    )
    return row


def _head(model: str, stage: str, one: Contestant, batch: int, tokens: int, report: Report) -> Row:
    cache = report.cache
    return {
        "model": model,
        "stage": stage,
        "method": one.method,
        "kernels": one.kernels,
        "batch": batch,
        "visual_tokens": tokens,
        "kv_bytes_bare": None if cache is None else cache.before,
        "kv_bytes": None if cache is None else cache.after.high,
    }


# ---------------------------------------------------------------------- one model, one method
def bench_pair(
    loaded: Loaded,
    image: Any,
    prompt: str | None,
    method: str | None = None,
    *,
    batch: int = 1,
    max_new_tokens: int = 16,
    rounds: int = 9,
    limit: float = math.inf,
    progress: Progress | None = None,
) -> list[Row]:
    """Times a loaded model with one method.

    Args:
        loaded: from `vlmtok.loading.load`.
        image: RGB.
        prompt: for models that answer in words.
        method: spec string; by default what `vlmtok.session.default_method` says.
        batch: how often the picture and its prompt stand in the batch.
        max_new_tokens: of the whole answer, always that many.
        rounds: how often each is timed.
        limit: seconds after which no further round begins.
        progress: told after each call.

    Returns:
        Rows: the first token and the whole answer, tower included, and one decode step; or the tower.

    Raises:
        ParameterError: no batch.
        VlmtokError: as `vlmtok.compress`.
    """
    from .session import Looker, Speaker, default_method

    chosen = method or default_method(loaded.model)
    if isinstance(batch, bool) or batch < 1:
        raise ParameterError(f"batch={batch!r}: at least 1")
    with torch.inference_mode(), quiet():
        calls: dict[str, Callable[[], object]]
        if loaded.language:
            speaker, steps = Speaker(loaded, image, prompt, max_new_tokens, batch), max_new_tokens
            calls = {"tower + prefill": lambda: speaker.generate(1)}
            if steps > 1:
                calls["tower + generate"] = lambda: speaker.generate(steps, steps)
        else:
            looker, steps = Looker(loaded, image, prompt, batch), 1
            calls = {"tower": lambda: looker.encode(looker.inputs)}
        with compress(loaded.model, chosen, trace=True) as run:
            next(iter(calls.values()))()
            tokens = VisualTokens.of(run.report(), run.trace()).bare // batch
        ends = ("tower + prefill", "tower + generate") if steps > 1 else None
        subject = Subject(loaded.name, loaded.model, calls, tokens, batch, steps, ends)
        rows = measure(subject, [Contestant(chosen)], rounds=rounds, limit=limit, progress=progress)
    return _stamped(rows, loaded.device, loaded.dtype)


def _stamped(rows: list[Row], device: torch.device | None, dtype: torch.dtype) -> list[Row]:
    where = {} if device is None else bench.environment(device)
    return [{**row, "dtype": str(dtype).removeprefix("torch."), **where} for row in rows]


# ---------------------------------------------------------------------- the suite
@dataclass(frozen=True)
class Sizes:
    """Shapes of the suite.

    Attributes:
        tower: width, depth, heads, MLP width, picture side and patch side of the vision tower.
        text: width, depth, heads, MLP width and vocabulary of the language model.
        visual: visual tokens of a picture, by name of the model.
        crops: rows of the tower that make such a picture, by the same names.
        tower_batches: pictures at once.
        batches: prompts at once.
        steps: new tokens.
        sweep: visual tokens at which the break-even is looked for.
        towers: spec strings for the tower.
        languages: spec strings for the language model.
    """

    tower: tuple[int, int, int, int, int, int]
    text: tuple[int, int, int, int, int]
    visual: dict[str, int]
    crops: dict[str, int]
    tower_batches: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    sweep: tuple[int, ...]
    towers: tuple[str, ...] = ("tome:r=23", "pitome:ratio=0.9", "crossget")
    languages: tuple[str, ...] = ("todre:keep=0.1:pivot=center", "transprune", "fastv", "divprune:keep=0.1")


FULL = Sizes(
    tower=(1024, 24, 16, 4096, 336, 14),
    text=(4096, 32, 32, 11008, 32064),
    visual={"LLaVA-1.5-7B shape": 576, "LLaVA-NeXT-7B shape": 2880},
    crops={"LLaVA-1.5-7B shape": 1, "LLaVA-NeXT-7B shape": 5},
    tower_batches=(1, 8, 32, 256),
    batches=(1, 8),
    steps=32,
    sweep=SWEEP,
)
"""ViT-L/14 at 336 px, and Vicuna-7B with the visual tokens of LLaVA 1.5 and of LLaVA-NeXT in one picture."""
TINY = Sizes(
    tower=(64, 4, 4, 128, 48, 8),
    text=(64, 16, 4, 128, 128),
    visual={"tiny shape": 36, "tiny shape, 5 crops": 180},
    crops={"tiny shape": 1, "tiny shape, 5 crops": 5},
    tower_batches=(1, 2),
    batches=(1,),
    steps=3,
    sweep=(16, 128),
    towers=("tome:r=3", "pitome:ratio=0.9", "crossget"),
)
"""The same code on shapes that any CPU runs in seconds; the figures mean nothing."""


def tower_config(sizes: Sizes) -> Any:
    """The suite's vision tower as a configuration of transformers."""
    import transformers

    width, depth, heads, hidden, side, patch = sizes.tower
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
    )


def llava_config(sizes: Sizes) -> Any:
    """The suite's vision-language model as a configuration of transformers."""
    import transformers

    width, depth, heads, hidden, vocabulary = sizes.text
    text = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return transformers.LlavaConfig(
        vision_config=tower_config(sizes), text_config=text, image_token_index=vocabulary - 1
    )


def draw(config: Any, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, made where it will be."""
    import transformers

    language = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    maker = transformers.AutoModelForImageTextToText if language else transformers.AutoModel
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = maker.from_config(config, dtype=dtype)
    return model.eval()


class Llava:
    """The suite's vision-language model with random prompts.

    Pictures enter the language model as features, so that the tower can be timed apart and a picture may have any
    number of tokens; ``tower + generate`` runs the tower on all crops first. Methods therefore see no attention of the
    tower's (ToDRE starts from the token nearest to the mean).
    """

    def __init__(self, model: nn.Module, name: str, visual: int, crops: int, batch: int, steps: int) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        given: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
        self.model, self.name, self.visual, self.steps, self.batch = model, name, visual, steps, batch
        torch.manual_seed(1)
        side = config.vision_config.image_size
        self.pixels = torch.randn(batch * crops, 3, side, side, **given)
        # Features as long as embeddings of words.
        width = config.text_config.hidden_size
        self.features = 0.02 * torch.randn(batch, visual, width, **given)
        start = torch.full((batch, 1), 1)
        words = torch.randint(3, config.text_config.vocab_size - 1, (batch, TEXT_TOKENS - 1))
        picture = torch.full((batch, visual), config.image_token_index)
        self.ids = torch.cat([start, picture, words], 1).to(parameter.device)

    def tower(self) -> Tensor:
        """All crops through tower and projector, `[B, visual, C]`."""
        found = self.model.get_image_features(self.pixels)  # type: ignore[operator]
        return torch.cat(list(found.pooler_output)).view(self.batch, self.visual, -1)

    def generate(self, features: Tensor, tokens: int) -> object:
        """So many new tokens from features `[B, visual, C]`."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return self.model.generate(  # type: ignore[operator]
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tuple(features))},
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )

    def subject(self, whole: bool = True) -> Subject:
        """What is timed: the prefill, and the whole answer with the tower in front."""
        calls: dict[str, Callable[[], object]] = {"prefill": lambda: self.generate(self.features, 1)}
        if whole:
            calls["generate"] = lambda: self.generate(self.features, self.steps)
            calls["tower + generate"] = lambda: self.generate(self.tower(), self.steps)
        ends = ("prefill", "generate") if whole else None
        return Subject(self.name, self.model, calls, self.visual, self.batch, self.steps, ends)


def run_suite(
    device: torch.device,
    *,
    sizes: Sizes | None = None,
    rounds: int = 9,
    limit: float = 60.0,
    progress: Progress | None = None,
) -> list[Row]:
    """Measures the standard suite.

    Args:
        device: where.
        sizes: shapes; `FULL` unless given.
        rounds: how often each case is timed.
        limit: seconds for each group of cases that take turns, after which no further round begins.
        progress: told after each call.

    Returns:
        The rows.
    """
    sizes = sizes or FULL
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[Row] = []
    with torch.inference_mode(), quiet():
        rows += _towers(sizes, device, dtype, rounds, limit, progress)
        model = draw(llava_config(sizes), device, dtype)
        for name, visual in sizes.visual.items():
            for batch in sizes.batches:
                llava = Llava(model, name, visual, sizes.crops[name], batch, sizes.steps)
                contestants = [Contestant(method) for method in sizes.languages]
                rows += measure(
                    llava.subject(), contestants, rounds=rounds, limit=limit, progress=_named(progress, name)
                )
        rows += _break_even(model, sizes, rounds, limit, progress)
    return _stamped(rows, device, dtype)


def _towers(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, rounds: int, limit: float, progress: Progress | None
) -> list[Row]:
    model = draw(tower_config(sizes), device, dtype)
    side, patch = sizes.tower[4], sizes.tower[5]
    name = "ViT-L/14-336" if sizes is FULL else "tiny tower"
    # The same algorithms in plain torch, where there are kernels to compare them with.
    modes = ("auto", "torch") if device.type == "cuda" else ("auto",)
    contestants = [Contestant(method, mode) for method in sizes.towers for mode in modes]
    rows: list[Row] = []
    for batch in sizes.tower_batches:
        pixels = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
        calls: dict[str, Callable[[], object]] = {"tower": lambda pixels=pixels: model(pixels)}  # type: ignore[misc]
        subject = Subject(name, model, calls, (side // patch) ** 2, batch)
        rows += measure(subject, contestants, rounds=rounds, limit=limit, progress=_named(progress, name))
        if device.type == "cuda":
            rows += measure_graphs(subject, contestants, rounds=rounds, limit=limit, progress=_named(progress, name))
    return rows


def _break_even(model: nn.Module, sizes: Sizes, rounds: int, limit: float, progress: Progress | None) -> list[Row]:
    """Prefill at several numbers of visual tokens: where each method begins to pay."""
    contestants = [Contestant(method) for method in sizes.languages]
    found: dict[str, list[Row]] = {}
    for visual in sizes.sweep:
        llava = Llava(model, "break-even", visual, 1, 1, 1)
        part = limit / len(sizes.sweep)
        named = _named(progress, f"break-even at {visual} tokens")
        for row in measure(llava.subject(whole=False), contestants, rounds=rounds, limit=part, progress=named):
            found.setdefault(row["method"], []).append(row)
    return [
        {
            **_without_speed(rows[-1]),
            "stage": "break-even",
            "visual_tokens": None,
            "break_even_tokens": crossing([(row["visual_tokens"], row["speedup"]) for row in rows]),
            "break_even_from": f"sweep over {', '.join(map(str, sizes.sweep))} tokens",
        }
        for rows in found.values()
    ]


def _without_speed(row: Row) -> Row:
    gone = ("mac_ratio", "speedup", "p20", "p80", "of_promise", "seconds", "seconds_bare", "kv_bytes", "kv_bytes_bare")
    return {name: None if name in gone else value for name, value in row.items()}


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Tokens from which on a method is faster than the bare model.

    Args:
        points: (tokens, speed-up), tokens ascending.

    Returns:
        The tokens, between two points by their logarithms; the first point's where it pays everywhere; None where it
        does not pay at the last.
    """
    if points[-1][1] < 1:
        return None
    for (few, below), (many, above) in reversed([*itertools.pairwise(points)]):
        if below < 1:
            share = (1 - below) / (above - below)
            return math.exp(math.log(few) + share * math.log(many / few))
    return float(points[0][0])


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, steps: progress(f"{name}: {what}", done, steps)


# ---------------------------------------------------------------------- without a GPU
def model_suite(progress: Progress | None = None) -> list[Row]:
    """The suite's rows without a measurement: what the MACs promise, and the least time that the peak rates allow.

    Returns:
        The rows, `measured` False; floors are of the GPU in `PEAK`, in bf16.
    """
    from .loading import quiet

    rows: list[Row] = []
    with quiet():
        tower = shape_of(tower_config(FULL))
        llava = shape_of(llava_config(FULL))
    llava = replace(llava, language=replace(llava.language, kv_bytes=llava.language.kv_bytes // 2))  # type: ignore
    jobs: list[Callable[[], list[Row]]] = []
    for method in FULL.towers:
        jobs += [lambda m=method, b=batch: [_modelled_tower(tower, m, b)] for batch in FULL.tower_batches]  # type: ignore
    for name, visual in FULL.visual.items():
        for method in FULL.languages:
            jobs += [
                lambda n=name, v=visual, m=method, b=batch: _modelled(llava, n, v, m, b)  # type: ignore[misc]
                for batch in FULL.batches
            ]
    for done, job in enumerate(jobs):
        if progress is not None:
            progress("counting", done, len(jobs))
        rows += job()
    return [{**row, "dtype": "bfloat16", "floor_of": PEAK.name} for row in rows]


def _modelled_tower(shape: Any, method: str, batch: int) -> Row:
    report = estimate(shape, method, batch=batch)
    row = _head("ViT-L/14-336", "tower", Contestant(method), batch, report.layers[0].before - 1, report)
    weights = _weights(shape.vision.blocks)
    return {**row, **_promise(*macs_of(report, "tower"), weights, weights)}


def _modelled(shape: Any, name: str, visual: int, method: str, batch: int) -> list[Row]:
    lm = replace(shape, vision=None, projector=(), visual=visual)
    lm = replace(lm, layout=replace(lm.layout, stages={k: lm.layout.stages[k] for k in ("projected", "decoder")}))
    report = estimate(lm, method, batch=batch, text_tokens=(1, TEXT_TOKENS - 1), visual_tokens=visual)
    head = _head(name, "prefill", Contestant(method), batch, visual, report)
    weights = _weights(shape.language.blocks) + 2 * shape.language.head.row
    assert report.cache is not None
    # The cache is written once in the prefill, and read once in each step.
    moved = [weights + cache for cache in (report.cache.before, report.cache.after.high)]
    stages = ("prefill", "decode")
    return [{**head, "stage": stage, **_promise(*macs_of(report, stage), *moved)} for stage in stages]


def _weights(blocks: Sequence[BlockShape]) -> int:
    """Bytes of the weights of blocks, in bf16: a MAC of a token each."""
    return 2 * sum(block.attn + block.mlp for block in blocks)


def _promise(before: float, after: float, moved_before: float, moved_after: float) -> Row:
    """The promise of MACs, and floors: the longer of computing and of moving weights and cache."""
    sides = ((before, moved_before), (after, moved_after))
    floors = [max(2 * macs / PEAK.flops, moved / PEAK.moved) for macs, moved in sides]
    return {
        "mac_ratio": before / after,
        "speedup": None,
        "floor_seconds_bare": floors[0],
        "floor_seconds": floors[1],
        "floor_speedup": floors[0] / floors[1],
        "measured": False,
    }
