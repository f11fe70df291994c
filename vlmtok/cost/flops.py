"""MACs of a pass by what the ledger booked: the tokens of each block, and what they cost by line of a report.

One MAC is one multiplication with its addition; FLOPs are 2 x MACs, and the two are named apart always. What is counted
are matrix products and convolutions, exactly as `torch.utils.flop_counter.FlopCounterMode` counts them on what runs
under the math backend of attention: over all keys, masked ones and padding included. The conventions of papers are in
`vlmtok.cost.conventions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..core.ledger import StageRun
from ..core.model_shape import LATE, BlockShape, LanguageShape, Part, Tokens, TowerShape
from ..core.skipping import MLP, OUTPUT, QUERY


# ---------------------------------------------------------------------- tokens of a pass
@dataclass(frozen=True)
class Profile:
    """The tokens of one stage, block by block.

    Attributes:
        rows: of the batch.
        layers: one for each block.
        entered: tokens of a row before the first block.
        left: tokens of a row behind the last block.
        losses: of language models, what leaves a layer's cache while decode steps run, see `StageRun.losses`.
    """

    rows: int
    layers: tuple[Tokens, ...] = ()
    entered: int = 0
    left: int = 0
    losses: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def macs(self, blocks: Sequence[BlockShape]) -> int:
        """MACs of the blocks; a whole number for each block, whatever the means over rows."""
        return sum(round(self.rows * block.macs(tokens)) for block, tokens in zip(blocks, self.layers))

    def step_macs(self, blocks: Sequence[BlockShape], rows: int, first: int, steps: int, recorded: bool = False) -> int:
        """MACs of decode steps on the cache that this pass leaves.

        Args:
            blocks: the layers.
            rows: rows of each step.
            first: tokens that joined the caches before.
            steps: how many.
            recorded: see `vlmtok.core.ledger.Decoding`.
        """
        return rows * sum(
            block.step(*stretch, recorded)
            for layer, block in enumerate(blocks)
            for stretch in self.stretches(layer, first, steps)
        )

    def stretches(self, layer: int, first: int, steps: int) -> Iterator[tuple[int, int, int]]:
        """Decode steps between which nothing leaves a layer's cache.

        Args:
            layer: 0-based.
            first: tokens that joined the cache before.
            steps: how many.

        Yields:
            Entries that the cache would hold behind the pass without what left since; tokens that joined it before;
            steps.
        """
        held, end = self.layers[layer].held, first + steps
        for written, lost in self.losses.get(layer, ()):
            if first < written < end:
                yield held, first, written - first
                first = written
            if written <= first:
                held -= lost
        yield held, first, end - first

    def cached(self, blocks: Sequence[BlockShape]) -> int:
        """Bytes of what the caches of all layers keep behind the pass, all rows; padding takes as much as entries."""
        return self.rows * sum(block.cached(tokens.held) for block, tokens in zip(blocks, self.layers))

    def peak(self, blocks: Sequence[BlockShape]) -> int:
        """Bytes that the caches of all layers held at the end of the pass, before entries left, all rows."""
        return self.rows * sum(block.cached(tokens.keys) for block, tokens in zip(blocks, self.layers))


def tower_profiles(run: StageRun, depth: int, protected: int) -> tuple[Profile, Profile]:
    """A tower's tokens in a pass: bare, and as they ran.

    Args:
        run: the pass.
        depth: blocks.
        protected: protected tokens of a row.
    """
    n = run.entered
    bare = Tokens(n, n, n, n - protected)
    layers = []
    for layer in range(depth):
        inserted = 0
        queries = mlp = n
        whole = None
        for event in run.events:
            if event.stage != run.stage or event.layer != layer:
                continue
            if event.kind == "spread":
                whole = event.after
                continue
            n = event.after
            if event.point == "start":
                queries = mlp = n
                inserted += event.after - event.before if event.kind == "insert" else 0
            elif event.point == "mid":
                mlp = n
        layers.append(Tokens(queries, queries, mlp, queries - protected - inserted))
        n = n - inserted if whole is None else whole
    return _pair(run, [bare] * depth, layers, n)


def feature_tokens(run: StageRun, after: Profile, protected: int) -> tuple[int, int]:
    """Features of one row of a tower that are handed on: bare, and as they ran."""
    left = after.left - protected
    for event in run.events:
        if event.stage == "features":
            left = event.after
    return run.entered - protected, left


def decoder_profiles(run: StageRun, blocks: Sequence[BlockShape]) -> tuple[Profile, Profile]:
    """A language model's tokens in a call: bare, and as they ran.

    Args:
        run: the call.
        blocks: its layers.
    """
    visual = run.visual / run.rows
    columns = run.entered
    late = run.parts.get(LATE, 0) // run.rows
    bare, layers = [], []
    for layer, block in enumerate(blocks):
        for event in run.events:
            if event.reaches == layer and event.kind == "cut":
                gone = sum(group.rows * (group.n - group.slots) for group in event.groups)
                if event.ragged:
                    gone = run.rows * (event.before - event.after) if event.gone is None else event.gone
                visual -= gone / run.rows
                columns = event.after
        # As many tokens as arrive are all that there are, whatever the row was before a cut.
        few = late if block.late and 0 < late < columns else None
        entered, left = (run.entered, columns) if few is None else (few, few)
        keys = block.held(run.seen) + run.entered
        bare.append(Tokens(entered, keys, entered, run.visual / run.rows, held=block.held(keys)))
        spared = {skip.module: _each(skip.tokens, run.rows) for skip in run.skips if skip.layer == layer}
        without = left - spared.get(MLP, 0), visual, spared.get(QUERY, 0), spared.get(OUTPUT, 0)
        holder = layer if block.source is None else block.source
        keys = block.held(run.before(holder)) + columns
        layers.append(Tokens(left, keys, *without, held=block.held(run.keeps(holder))))
    whole, ran = _pair(run, bare, layers, layers[-1].queries if layers else columns)
    holders = [layer if block.source is None else block.source for layer, block in enumerate(blocks)]
    return whole, replace(ran, losses={layer: run.losses(holder) for layer, holder in enumerate(holders)})


def _each(tokens: int, rows: int) -> float:
    """Tokens of a row, a whole number where all may have as many."""
    return tokens / rows if tokens % rows else tokens // rows


def _pair(run: StageRun, bare: list[Tokens], layers: list[Tokens], left: int) -> tuple[Profile, Profile]:
    whole = Profile(run.rows, tuple(bare), run.entered, run.entered)
    return whole, Profile(run.rows, tuple(layers), run.entered, left)


# ---------------------------------------------------------------------- MACs of a pass
@dataclass
class Account:
    """MACs before and after, by line.

    Attributes:
        lines: (bare, as it ran) by name, in order.
        step: the same for one decode step, or None without a language model.
        steps: the same for the decode steps that ran, and
        stepped: how many they were.
        cache: bytes of the key-value cache that stay behind the prefill, all rows, or None.
        peak: bytes that it held at the end of the prefill, before entries left, or None.
        profiles: by stage, (bare, as it ran).
        missing: what ran and could not be counted.
    """

    lines: dict[str, tuple[int, int]] = field(default_factory=dict)
    step: tuple[int, int] | None = None
    steps: tuple[int, int] = (0, 0)
    stepped: int = 0
    cache: tuple[int, int] | None = None
    peak: tuple[int, int] | None = None
    profiles: dict[str, tuple[Profile, Profile]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, name: str, before: int, after: int, times: int = 1) -> None:
        """Adds to a line."""
        old = self.lines.get(name, (0, 0))
        self.lines[name] = (old[0] + times * before, old[1] + times * after)

    @property
    def total(self) -> tuple[int, int]:
        """The sum of the lines, without decode steps."""
        return sum(line[0] for line in self.lines.values()), sum(line[1] for line in self.lines.values())


def count_tower(account: Account, run: StageRun, shape: TowerShape, projector: Iterable[Part], times: int = 1) -> None:
    """Adds a pass through a tower: stem, blocks, what stands behind them, projector.

    Args:
        account: takes the lines.
        run: the pass.
        shape: the tower.
        projector: behind it.
        times: how often such a pass ran.
    """
    before, after = tower_profiles(run, shape.depth, shape.protected)
    account.profiles[run.stage] = (before, after)
    stem = run.rows * (run.entered - shape.protected) * shape.stem
    macs = [stem + before.macs(shape.blocks), stem + after.macs(shape.blocks)]
    for part in shape.parts:
        rows = run.parts.get(part.name, 0) if part.path else run.rows
        for i, profile in enumerate((before, after)):
            macs[i] += part.macs(rows, profile.left)
    account.add(run.stage, macs[0], macs[1], times)
    bare, left = feature_tokens(run, after, shape.protected)
    for part in projector:
        rows = run.parts.get(part.name, 0)
        if rows:
            account.add("projector", part.macs(rows * bare // left if left else 0), part.macs(rows), times)


def count_decoder(account: Account, run: StageRun, shape: LanguageShape, times: int = 1) -> None:
    """Adds a call of the language model, and the decode steps behind it.

    Args:
        account: takes the lines.
        run: the call.
        shape: the language model.
        times: how often such a call ran.
    """
    before, after = decoder_profiles(run, shape.blocks)
    head = 0
    if shape.head is not None:
        head = shape.head.macs(run.parts.get(shape.head.name, 0))
    name = "continued" if run.continues else "prefill"
    account.add(name, head + before.macs(shape.blocks), head + after.macs(shape.blocks), times)
    row = 0 if shape.head is None else shape.head.row
    one = [profile.step_macs(shape.blocks, run.rows, 0, 1) + run.rows * row for profile in (before, after)]
    if not run.continues:
        account.profiles["decoder"] = (before, after)
        account.step = (one[0], one[1])
        account.cache = (before.cached(shape.blocks), after.cached(shape.blocks))
        account.peak = (before.peak(shape.blocks), after.peak(shape.blocks))
    for part in run.decodings:
        spent = [
            p.step_macs(shape.blocks, part.rows, part.first, part.steps, part.recorded) + part.head * row
            for p in (before, after)
        ]
        account.steps = (account.steps[0] + times * spent[0], account.steps[1] + times * spent[1])
    account.stepped += times * run.steps
