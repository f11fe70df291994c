"""`evaluate()`: methods x budgets over a task, one answer at a time on disk, then statistics over the questions."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import timing
from ..adapters import adapter_for
from ..dispatcher import dispatcher_of
from ..errors import InternalError, ParameterError, VlmtokError
from ..guard import guarded
from ..loading import load
from ..loading.models import Loaded
from ..loading.problems import quiet
from ..timing import Progress, tell
from .costs import cost_of, latency_of
from .downsample import Downsampler
from .journal import Journal
from .table import Evaluation
from .task import Item, Outcome, Task, task_named
from .ways import BASELINES, DOWNSAMPLE, NONE, Way, check_names, ways_of

ALL_METHODS = "all"
_VERSIONS = ("vlmtok", "torch", "transformers", "timm", "open_clip_torch")


@dataclass(frozen=True)
class _Settings:
    """What a sweep was asked for."""

    repeats: int
    seed: int
    batch: int
    latency_rounds: int
    text_tokens: int


@guarded
def evaluate(
    task: str | Task,
    model: str | Loaded | None = None,
    methods: str | Sequence[str] = ALL_METHODS,
    keep: float | Sequence[float] = (0.5, 0.25, 0.1),
    *,
    limit: int | None = None,
    repeats: int = 3,
    seed: int = 0,
    batch: int = 8,
    baselines: bool = True,
    as_written: str | Sequence[str] = (),
    latency_rounds: int = 0,
    folder: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    text_tokens: int = 16,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures what methods keep of a task's answers at equal numbers of visual tokens.

    Every way answers the same questions; differences to the uncompressed model come with paired bootstrap intervals
    over the questions. Methods are set to each budget by `vlmtok.budget`; what a method cannot reach within 7 percent,
    or what the model refuses, has a row that says why and no figures.

    Args:
        task: name of a task, or one.
        model: name as for `vlmtok.load`, a loaded model, or None for the task's own.
        methods: spec strings (a name alone is set to each budget; stacks with ``+`` run as they are written), or
            ``"all"`` for all that are registered.
        keep: budgets: shares of the visual tokens, mean over layers, in (0, 1).
        limit: questions; None for all of the task.
        repeats: answers to each question by methods that draw.
        seed: of what they draw and of the intervals.
        batch: questions at a time.
        baselines: whether random choice and downsampled pictures are in the table though `methods` does not name them.
        as_written: further spec strings, which run once with the settings that they have, whatever the budget.
        latency_rounds: rounds of the measurement of time, for each way; 0 measures none, and the table is the same
            every time.
        folder: gets the journal; a sweep that was stopped goes on from it. None keeps nothing.
        device: as for `vlmtok.load`.
        dtype: as for `vlmtok.load`.
        text_tokens: of a typical prompt, for the budgets.
        progress: told what is being done.

    Returns:
        The table.

    Raises:
        ParameterError: no such task, method or budget, a folder with another sweep, a model that carries a compression.
        LoadError: the model cannot be had.
        VlmtokError: the model cannot be asked this task, or refuses a method while it answers.
    """
    chosen = task_named(task) if isinstance(task, str) else task
    keeps = [keep] if isinstance(keep, (int, float)) else list(dict.fromkeys(keep))
    names, written = check_names(_names(methods)), check_names(_names(as_written), ())
    plain = BASELINES if baselines else [name for name in BASELINES if name in names]
    _check(keeps, limit=limit, repeats=repeats, batch=batch)
    _check_whole(0, seed=seed, latency_rounds=latency_rounds)
    if folder is not None:
        _check_folder(Path(folder))
    items = list(chosen.items(limit))
    if not items:
        raise ParameterError(f"task {chosen.name} has no questions")
    tell(progress, f"loading {model.name if isinstance(model, Loaded) else model or chosen.model}", 0, 0)
    loaded = model if isinstance(model, Loaded) else load(model or chosen.model, device=device, dtype=dtype)
    if dispatcher_of(loaded.model) is not None:
        raise ParameterError(f"evaluate: {loaded.name} carries a compression; vlmtok.remove(model) first")
    chosen.check(loaded)
    settings = _Settings(repeats, seed, batch, latency_rounds, text_tokens)
    prompt = _prompt(chosen, loaded, items[0], text_tokens) if chosen.language else {}
    ways = ways_of(loaded, [name for name in names if name not in BASELINES], keeps, plain, written, **prompt)
    found = timing.environment(loaded.device)
    where = {"device": found["device"], "dtype": str(loaded.dtype).removeprefix("torch.")}
    where |= {name: found[name] for name in _VERSIONS}
    head = {
        "task": chosen.name,
        "model": loaded.name,
        "weights": fingerprint(loaded),
        "questions": hashlib.sha256("\n".join(item.id for item in items).encode()).hexdigest()[:16],
        "seed": seed,
        "batch": batch,
        **getattr(chosen, "settings", {}),
        **where,
    }
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        journal = Journal(Path(place) / f"{chosen.name}.jsonl", head)
        return _Sweep(chosen, loaded, items, settings, journal, where, progress).run(ways)


def _prompt(task: Task, loaded: Loaded, item: Item, text_tokens: int) -> dict[str, Any]:
    """What budgets are set for: a prompt with a picture; where the model does not say how many tokens, an item's."""
    given: dict[str, Any] = {"text_tokens": text_tokens}
    if not adapter_for(loaded.model).account().visual:
        given |= {"image_size": task.pictures(item)[0].size, "processor": loaded.processor}
    return given


def _names(methods: str | Sequence[str]) -> list[str]:
    from ..core.registry import list_methods

    given = [methods] if isinstance(methods, str) else list(methods)
    every = [name for name in sorted(list_methods()) if name not in BASELINES]
    return [name for one in given for name in (every if one == ALL_METHODS else [one])]


def _check(keeps: Sequence[Any], **counts: Any) -> None:
    for one in keeps:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 < one < 1:
            raise ParameterError(f"a budget of {one!r} is not possible; a share of the visual tokens in (0, 1)")
    if not keeps:
        raise ParameterError("there is no budget: keep is empty")
    _check_whole(1, **{name: value for name, value in counts.items() if value is not None})


def _check_folder(folder: Path) -> None:
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise ParameterError(f"{str(folder)!r} cannot hold the journal: {str(there)!r} is no folder")


def _check_whole(least: int, **counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ParameterError(f"{name}={value!r} is not possible; a whole number of at least {least}")


def fingerprint(loaded: Loaded) -> str:
    """What tells a model's weights from others': a hash over the shapes and sums of all of them."""
    digest = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        held = value if value.device.type == "cuda" else value.cpu()  # other devices know no float64
        total = held.detach().sum(dtype=torch.float64).item()
        digest.update(f"{name} {tuple(value.shape)} {total!r}\n".encode())
    return digest.hexdigest()[:16]


class _Sweep:
    """Answers what the journal lacks, way by way."""

    def __init__(
        self,
        task: Task,
        loaded: Loaded,
        items: Sequence[Item],
        settings: _Settings,
        journal: Journal,
        where: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.task, self.loaded, self.items, self.settings = task, loaded, items, settings
        self.journal, self.where, self.progress = journal, where, progress
        self.batches = task.batches(loaded, items, settings.batch)
        self.first = {item.kind: item for item in reversed(items)}
        self.downsampler: Downsampler | None = None

    def run(self, ways: Sequence[Way]) -> Evaluation:
        """The table of all ways."""
        kept = []
        for number, way in enumerate(ways):
            label = f"{self.task.name}: {way.key} ({number + 1} of {len(ways)})"
            problem = way.problem or self._answer_all(way, label)
            kept.append(replace(way, problem=problem))
        fixed = {
            "seed": self.settings.seed,
            **self.where,
            "settings": f"batch={self.settings.batch}; text_tokens={self.settings.text_tokens}",
        }
        asked = self.settings.repeats
        return Evaluation.of(self.task.name, self.loaded.name, self.items, kept, self.journal, fixed, asked)

    def _answer_all(self, way: Way, label: str) -> str:
        """Answers and costs of a way; the reason where the model refuses it."""
        try:
            with torch.inference_mode(), quiet():
                for repeat in range(self.settings.repeats if way.draws else 1):
                    self._answer(way, repeat, label)
                self._costs(way)
        except InternalError:
            raise
        except VlmtokError as problem:
            if way.name == NONE:
                raise
            return str(problem)
        return ""

    def _answer(self, way: Way, repeat: int, label: str) -> None:
        known = self.journal.outcomes[way.key, repeat]
        for number, batch in enumerate(self.batches):
            asked = [self.items[i] for i in batch]
            if all(item.id in known for item in asked):
                continue
            tell(self.progress, label, number, len(self.batches))
            outcomes = self._ask(way, asked, (self.settings.seed, repeat, number))
            self.journal.add_answers(way.key, repeat, asked, outcomes)

    def _ask(self, way: Way, asked: Sequence[Item], seed: tuple[int, ...]) -> list[Outcome]:
        if way.name != DOWNSAMPLE:
            with way.attached(self.loaded, *seed):
                return self.task.answer(self.loaded, asked)
        found: list[Outcome | None] = [None] * len(asked)
        for loaded, places in self._downsampled(asked, way.keep):
            for i, outcome in zip(places, self.task.answer(loaded, [asked[i] for i in places])):
                found[i] = outcome
        assert all(outcome is not None for outcome in found)
        return found  # type: ignore[return-value]

    def _downsampled(self, asked: Sequence[Item], keep: float) -> Iterator[tuple[Loaded, list[int]]]:
        """Items by the model that takes their pictures at the budget."""
        if self.downsampler is None:
            self.downsampler = Downsampler(self.loaded)
        groups: dict[int, tuple[Loaded, list[int]]] = {}
        for i, item in enumerate(asked):
            made = self.downsampler(self.task.pictures(item), float(keep)).loaded
            groups.setdefault(id(made), (made, []))[1].append(i)
        yield from groups.values()

    def _costs(self, way: Way) -> None:
        for kind, item in self.first.items():
            known = self.journal.costs.get((way.key, kind))
            timed = self.settings.latency_rounds and way.name != NONE
            if known is not None and (not timed or "latency_ratio" in known):
                continue
            loaded = self.loaded
            if way.name == DOWNSAMPLE:
                ((loaded, _),) = self._downsampled([item], way.keep)
            cost: dict[str, Any] = cost_of(self.task, loaded, item, way)
            if timed:
                rounds = self.settings.latency_rounds
                cost["latency_ratio"] = latency_of(self.task, self.loaded, loaded, item, way, rounds)
            self.journal.add_cost(way.key, kind, cost)
