"""Counting without running: a model's shape as counts and widths, and the MACs of a pass from the ledger.

One MAC is one multiplication with its addition; FLOPs are 2 x MACs, and the two are named apart always. What is counted
are matrix products and convolutions, exactly as `torch.utils.flop_counter.FlopCounterMode` counts them on what runs
under the math backend of attention: over all keys, masked ones and padding included. The conventions of papers are in
`vlmtok.conventions`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .ledger import StageRun
from .method import Layout, layer_of


# ---------------------------------------------------------------------- shapes
@dataclass(frozen=True)
class BlockShape:
    """A transformer block.

    Attributes:
        width: C, channels of a token.
        heads: H, query heads.
        head_width: d, channels of a head.
        kv_heads: heads of keys and values.
        attn: MACs of one token in the weights of attention (q, k, v, output).
        mlp: MACs of one token in the weights of the MLP.
        hidden: m, hidden channels of the MLP.
        window: tokens that a sliding-window layer sees in a decode step; 0 means all.
    """

    width: int
    heads: int
    head_width: int
    kv_heads: int
    attn: int
    mlp: int
    hidden: int
    window: int = 0

    @classmethod
    def of(
        cls,
        width: int,
        hidden: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        gated: bool = False,
    ) -> BlockShape:
        """A block from its widths.

        Args:
            width: C.
            hidden: m.
            heads: H.
            kv_heads: heads of keys and values; None means H.
            head_width: d; None means C / H.
            gated: whether the MLP has three matrices (SwiGLU) instead of two.

        Returns:
            The shape, its weights counted.
        """
        d = head_width or width // heads
        kv = kv_heads or heads
        attn = 2 * width * heads * d + 2 * width * kv * d
        return cls(width, heads, d, kv, attn, (3 if gated else 2) * width * hidden, hidden)

    @property
    def q(self) -> int:
        """MACs of one token in the query projection."""
        return self.width * self.heads * self.head_width

    @property
    def k(self) -> int:
        """MACs of one token in the key projection."""
        return self.width * self.kv_heads * self.head_width

    def products(self, queries: int, keys: int) -> int:
        """MACs of QK^T and AV of one row."""
        return 2 * self.heads * self.head_width * queries * keys

    def held(self, tokens: int) -> int:
        """Tokens that the layer's cache holds of so many that it has seen."""
        return min(tokens, self.window - 1) if self.window else tokens

    def step(self, held: int, first: int, steps: int) -> int:
        """MACs of decode steps of one row.

        Args:
            held: tokens that the layer's cache held behind the prefill.
            first: tokens that joined it since.
            steps: how many.
        """
        # A step sees what it adds itself; the sum over steps of how many tokens that is.
        low, high = held + first + 1, held + first + steps
        cap = self.window or high
        rising = max(min(high, cap) - low + 1, 0)
        keys = rising * low + rising * (rising - 1) // 2 + (steps - rising) * cap
        return steps * (self.attn + self.mlp) + self.products(1, keys)

    def macs(self, tokens: Tokens) -> int:
        """MACs of one row."""
        return tokens.queries * self.attn + self.products(tokens.queries, tokens.keys) + tokens.mlp * self.mlp


@dataclass(frozen=True)
class Part:
    """A module outside the blocks: stem, pooling, head, projector.

    Attributes:
        name: what reports call it.
        row: MACs of one row of its input; for a pool, of one picture, whatever its tokens.
        token: a pool's MACs for each token of the picture.
        pair: a pool's MACs for each pair of tokens.
        path: the module's dotted path in the model; empty for a parameter, which is used in every pass.
    """

    name: str
    row: int
    token: int = 0
    pair: int = 0
    path: str = ""

    def macs(self, rows: int, tokens: int = 0) -> int:
        """MACs of so many input rows, or of so many pictures of `tokens` tokens."""
        return rows * (self.row + tokens * self.token + tokens * tokens * self.pair)


@dataclass(frozen=True)
class TowerShape:
    """A vision tower, or the text tower of a dual encoder.

    Attributes:
        blocks: the blocks, in order.
        tokens: of a row at the configured size, protected ones included.
        protected: of them.
        stem: MACs of one patch in the patch embedding.
        parts: what stands behind the blocks.
        recomputed: whether q and k have no module to be read from, so that signals compute them again.
        fused: whether one map gives q, k and v, which signals of a block that has not run call whole, once.
        grid: rows and columns of patches at the configured size, or None.
        first: dotted path of the first block in the model; empty where there is no model.
        spread: whether rows get their full length back behind the last block that is used.
    """

    blocks: tuple[BlockShape, ...]
    tokens: int
    protected: int
    stem: int = 0
    parts: tuple[Part, ...] = ()
    recomputed: bool = False
    fused: bool = False
    grid: tuple[int, int] | None = None
    first: str = ""
    spread: bool = False

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class LanguageShape:
    """A language model.

    Attributes:
        blocks: the layers, in order.
        head: the projection on the vocabulary, or None.
        kv_bytes: bytes that the cache takes for one token in one layer.
    """

    blocks: tuple[BlockShape, ...]
    head: Part | None = None
    kv_bytes: int = 0

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.blocks)


@dataclass(frozen=True)
class ModelShape:
    """A model as counts and widths.

    Attributes:
        name: preset or class.
        layout: what it offers to methods.
        vision: the vision tower, or None.
        text: the text tower of a dual encoder, or None.
        projector: the linear maps from tower features to the language model.
        language: the language model, or None.
        visual: visual tokens of one picture in the language model; 0 where the configuration does not say.
        crops: rows of the tower that make one picture.
        parts: visual tokens of a picture's parts (thumbnail, crops), or empty where it is one.
        notes: what could not be counted.
    """

    name: str
    layout: Layout
    vision: TowerShape | None = None
    text: TowerShape | None = None
    projector: tuple[Part, ...] = ()
    language: LanguageShape | None = None
    visual: int = 0
    crops: int = 1
    parts: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------- tokens of a pass
@dataclass(frozen=True)
class Tokens:
    """One row in one block, as counts.

    Attributes:
        queries: tokens that enter, protected, inserted and padding included.
        keys: what attention sees, cached tokens included.
        mlp: tokens of the MLP.
        visual: reducible tokens that enter (a mean over rows, where they differ).
    """

    queries: int
    keys: int
    mlp: int
    visual: float


@dataclass(frozen=True)
class Profile:
    """The tokens of one stage, block by block.

    Attributes:
        rows: of the batch.
        layers: one for each block.
        entered: tokens of a row before the first block.
        left: tokens of a row behind the last block.
    """

    rows: int
    layers: tuple[Tokens, ...] = ()
    entered: int = 0
    left: int = 0

    def macs(self, blocks: Sequence[BlockShape]) -> int:
        """MACs of the blocks."""
        return self.rows * sum(block.macs(tokens) for block, tokens in zip(blocks, self.layers))

    def step_macs(self, blocks: Sequence[BlockShape], rows: int, first: int, steps: int) -> int:
        """MACs of decode steps on the cache that this pass leaves.

        Args:
            blocks: the layers.
            rows: rows of each step.
            first: tokens that joined the caches before.
            steps: how many.
        """
        return rows * sum(block.step(tokens.keys, first, steps) for block, tokens in zip(blocks, self.layers))

    def cached(self, blocks: Sequence[BlockShape]) -> int:
        """Tokens that the caches of all layers hold, all rows."""
        return self.rows * sum(block.held(tokens.keys) for block, tokens in zip(blocks, self.layers))


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
    bare, layers = [], []
    for layer, block in enumerate(blocks):
        bare.append(Tokens(run.entered, block.held(run.seen) + run.entered, run.entered, run.visual / run.rows))
        for event in run.events:
            if (layer_of(event.layer, event.point) if event.stage == "decoder" else 0) != layer:
                continue
            if event.kind == "cut":
                gone = sum(group.rows * (group.n - group.slots) for group in event.groups)
                if event.ragged:
                    gone = run.rows * (event.before - event.after) if event.gone is None else event.gone
                visual -= gone / run.rows
                columns = event.after
        past = max(run.held, default=(0, run.past), key=lambda part: part[0] if part[0] <= layer else -1)[1]
        layers.append(Tokens(columns, block.held(past) + columns, columns, visual))
    return _pair(run, bare, layers, columns)


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
        cache: bytes of the key-value cache behind the prefill, all rows, or None.
        profiles: by stage, (bare, as it ran).
    """

    lines: dict[str, tuple[int, int]] = field(default_factory=dict)
    step: tuple[int, int] | None = None
    steps: tuple[int, int] = (0, 0)
    stepped: int = 0
    cache: tuple[int, int] | None = None
    profiles: dict[str, tuple[Profile, Profile]] = field(default_factory=dict)

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
        held = [profile.cached(shape.blocks) * shape.kv_bytes for profile in (before, after)]
        account.cache = (held[0], held[1])
    for part in run.decodings:
        spent = [
            p.step_macs(shape.blocks, part.rows, part.first, part.steps) + part.head * row for p in (before, after)
        ]
        account.steps = (account.steps[0] + times * spent[0], account.steps[1] + times * spent[1])
    account.stepped += times * run.steps
