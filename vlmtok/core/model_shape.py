"""A model as counts and widths: what a token costs in a block, a tower, a language model."""

from __future__ import annotations

from dataclasses import dataclass

from .mixers import Mixer
from .site import Layout

LATE = "late layers"
"""The part by which passes book how many tokens ran through layers that take none but those whose logits are wanted."""


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
        window: tokens that a layer with a sliding window, or with chunks, sees in a decode step; 0 means all.
        beside: MACs of one token in what stands beside attention and MLP.
        kv_bytes: bytes that the cache takes for one token; 0 where the layer keeps no keys.
        gated: whether the query projection gives a gate of the same width.
        shared: whether keys and values are those of an earlier layer, and
        source: which layer's, where that is known.
        late: whether it runs for the tokens alone whose logits are wanted.
        mixer: what it has in the place of attention, or None; `attn` counts the weights of that then.
    """

    width: int
    heads: int
    head_width: int
    kv_heads: int
    attn: int
    mlp: int
    hidden: int
    window: int = 0
    beside: int = 0
    kv_bytes: int = 0
    gated: bool = False
    shared: bool = False
    source: int | None = None
    late: bool = False
    mixer: Mixer | None = None

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
        return (2 if self.gated else 1) * self.width * self.heads * self.head_width

    @property
    def k(self) -> int:
        """MACs of one token in the key projection."""
        return self.width * self.kv_heads * self.head_width

    @property
    def output(self) -> int:
        """MACs of one token in the output projection of attention."""
        return self.width * self.heads * self.head_width

    def products(self, queries: int, keys: int) -> int:
        """MACs of QK^T and AV of one row, or of what stands in their place."""
        if self.mixer is not None:
            return self.mixer.macs(queries, keys)
        return 2 * self.heads * self.head_width * queries * keys

    def held(self, tokens: int) -> int:
        """Tokens that a later one can look at, of so many that the layer has seen."""
        return min(tokens, self.window - 1) if self.window else tokens

    def cached(self, tokens: int) -> int:
        """Bytes of the layer's cache with the entries of so many tokens of one row."""
        if self.mixer is not None:
            return self.mixer.state if tokens else 0
        return self.held(tokens) * self.kv_bytes

    def step(self, held: int, first: int, steps: int, recorded: bool = False) -> int:
        """MACs of decode steps of one row.

        Args:
            held: entries that the layer's cache kept behind the prefill.
            first: tokens that joined it since.
            steps: how many.
            recorded: see `vlmtok.core.mixers.ShortConv.step`.
        """
        weights = steps * (self.attn + self.mlp + self.beside)
        if self.mixer is not None:
            return weights + steps * self.mixer.step(recorded)
        return weights + self.products(1, self.seen(held, first, steps))

    def seen(self, held: int, first: int, steps: int) -> int:
        """Keys that decode steps of one row see, their own included, all steps together; arguments as of `step`."""
        low, high = held + first + 1, held + first + steps
        cap = self.window or high
        rising = max(min(high, cap) - low + 1, 0)
        return rising * low + rising * (rising - 1) // 2 + (steps - rising) * cap

    def macs(self, tokens: Tokens) -> float:
        """MACs of one row, a mean over rows where `tokens` are."""
        weights = tokens.queries * (self.attn + self.beside) + tokens.mlp * self.mlp
        spared = tokens.no_query * self.q + tokens.no_output * self.output
        return weights + self.products(tokens.queries, tokens.keys) - spared


@dataclass(frozen=True)
class Part:
    """A module outside the blocks: stem, pooling, head, projector.

    Attributes:
        name: what reports call it.
        row: MACs of one row of its input; for a pool, of one picture, whatever its tokens.
        token: a pool's MACs for each token of the picture.
        pair: a pool's MACs for each pair of tokens.
        path: the module's dotted path in the model; empty for a parameter, which is used in every pass.
        joins: tokens that make one row of its input, or pairs that make one of a pool's.
    """

    name: str
    row: int
    token: int = 0
    pair: int = 0
    path: str = ""
    joins: int = 1

    @property
    def pools(self) -> bool:
        """Whether it takes a picture's tokens together."""
        return bool(self.token or self.pair)

    def macs(self, rows: int, tokens: int = 0) -> int:
        """MACs of so many input rows, or of so many pictures of `tokens` tokens."""
        return rows * (self.row + tokens * self.token + tokens * tokens * self.pair // self.joins)


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
class PackedTowerShape:
    """A vision tower in which tokens stay, and that may take pictures of any size: their grids say what it costs.

    Attributes:
        blocks: the blocks, in order.
        spans: what a patch is multiplied with, by block: ``row`` (its whole row, what a mask hides included), ``frame``
            (the patches of its frame) or ``window``.
        stem: the patch embedding, a row for each patch.
        parts: modules behind the patch embedding and outside the blocks: mergers, poolings.
        merge: patches along a side that make one visual token.
        window: visual tokens along the side of a window; 0 where there are no windows.
        shared: whether all pictures of a pass lie in one row; else each frame has a row of its own.
        extra: tokens of a row beside the patches.
        pads: whether processors fill rows up to a length of theirs, which no configuration tells.
        canvas: whether the patch embedding sees each picture on a canvas as large as the largest one.
        slots: whether the projector multiplies padding, too.
        first: dotted path of the first block in the model.
        path: dotted path of the tower.
    """

    blocks: tuple[BlockShape, ...]
    spans: tuple[str, ...]
    stem: Part
    parts: tuple[Part, ...] = ()
    merge: int = 1
    window: int = 0
    shared: bool = True
    extra: int = 0
    pads: bool = False
    canvas: bool = False
    slots: bool = False
    first: str = ""
    path: str = ""


@dataclass(frozen=True)
class LanguageShape:
    """A language model.

    Attributes:
        blocks: the layers, in order.
        head: the projection on the vocabulary, or None.
        late: where the first of the layers that run late gets its tokens, or None.
    """

    blocks: tuple[BlockShape, ...]
    head: Part | None = None
    late: Part | None = None

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.blocks)


@dataclass(frozen=True)
class Uncounted:
    """Something that a model runs and that is not counted: where it ran, there is no total.

    Attributes:
        what: a clause for a reader, with the reason.
        path: dotted path of the module, whose calls are noted; empty means that it runs in every pass.
        apart: whether a call of its own runs it, which estimates do not plan.
    """

    what: str
    path: str = ""
    apart: bool = False


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
        notes: what to know of the figures.
        packed: the vision tower where it is no `TowerShape`, or None.
        uncounted: what is not counted.
        tile: visual tokens of each row of the tower where pictures are several rows, 0 where that varies; None where a
            picture is one row.
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
    packed: PackedTowerShape | None = None
    uncounted: tuple[Uncounted, ...] = ()
    tile: int | None = None


@dataclass(frozen=True)
class Tokens:
    """One row in one block, as counts.

    Attributes:
        queries: tokens that enter, protected, inserted and padding included.
        keys: what attention sees, cached tokens included.
        mlp: tokens of the MLP,
        visual: reducible tokens that enter,
        no_query: tokens of which no query is made, and
        no_output: tokens that the output projection does not see; means over rows, where these differ.
        held: entries that the layer's cache keeps behind the call, padding included; 0 where there is no cache.
    """

    queries: int
    keys: int
    mlp: float
    visual: float
    no_query: float = 0
    no_output: float = 0
    held: int = 0
