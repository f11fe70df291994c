"""What one forward of a language model holds while it runs: what came in, its rows, what it adds to each segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...core.ledger import StageRun
from ...core.method import Method
from ...core.row_data import ColumnMap
from ...core.rows import Picture, PromptRows, Snapshot
from ...core.site import Site
from ...core.stream import Stream
from ...errors import UnsupportedModel

HOST = -1
"""Key, among the states of `PromptRows`, of what hosts keep for each token."""
BLOCKS = (HOST, "blocks")
"""State of bidirectional blocks, int64 `[B, L]`."""


def deepstack(layer: int) -> tuple[int, str]:
    """State of the tower's features that the host adds behind a layer, `[B, L, C]`."""
    return HOST, f"deepstack {layer}"


@dataclass
class Incoming:
    """What the inner model was called with; the text model sees only part of it.

    Attributes:
        codes: int8 `[B, S]`, what each column is (see `spans`), or None where the call brings no features.
        mask: `[B, past + S]`, or what else came as a mask.
        types: int `[B, S]`, type ids, or None.
        lengths: by code, what the encoder's outputs told, or None.
        encoded: by code, how many pictures the encoder saw; beams show them again.
        crops: crops that the encoder is about to see, where all have the same number of tokens; else 0.
        placed: whether the caller gave position ids; hosts that make their own take the cache's length for the past.
        drafts: last columns that hold drafts of speculative decoding.
        ids: int64 `[B, S]`, token ids of a call without features, or None.
        made: bool `[]`, whether features that came along are those of this thread's last encoding, or None.
    """

    codes: Tensor | None
    mask: Any
    types: Tensor | None
    lengths: dict[int, list[int]] | None
    placed: bool = False
    encoded: dict[int, int] = field(default_factory=dict)
    drafts: int = 0
    ids: Tensor | None = None
    made: Tensor | None = None
    crops: int = 0


@dataclass
class SegmentCall:
    """One segment during one call.

    Attributes:
        rotary: position embeddings by the host's own, for rows whose positions were renumbered; else None.
        masks: attention masks, by layer type.
        valid: bool `[B, past + L]`, or None.
        blocks: int64 `[B, past + L]`, or None.
    """

    rotary: dict[str, Any] | None
    valid: Tensor | None
    blocks: Tensor | None
    masks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Brought:
    """What a call brought to the cache of one layer.

    Attributes:
        rows: the rows as that layer had them.
        masses: by signal, fp32 `[B, L, Hkv, ...]`, attention that each column received.
    """

    rows: PromptRows
    masses: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class LayerCut:
    """A cut between layers.

    Attributes:
        layer: the first one behind it.
        method: whose it was.
        forget: whether entries of what it dropped leave the caches of earlier layers.
        moved: how columns moved.
        gone: tokens that left all rows together.
    """

    layer: int
    method: int
    forget: bool
    moved: ColumnMap
    gone: int


@dataclass
class Call:
    """One forward of the text model.

    Attributes:
        cache: the cache of this call, or None.
        stream: the past, or None where nothing was cut yet.
        rows: the rows of a prefill with pictures, or None.
        columns: S.
        run: the books.
        positions: int64 `[..., B, S]` as the host counts, of a call without pictures.
        blocks: int64 `[B, S]`, bidirectional blocks of a call without pictures, or None.
        added: what this call adds to the caches of each segment: (columns, validity, blocks) by first layer.
        segments: by first layer.
        taps: per layer, what hooks caught.
        moved: whether the boundary changed the rows.
        width: columns that the text model got.
        input_columns: int64 `[B, L]`, which of these columns each column of the rows is, once a layer was cut.
        gathered: host position embeddings that follow `input_columns`, with what each was made from.
        next: int64 `[B]`, one more than the largest position of this call, as the host counts, and
        follows: one more than the last one; behind a clip that is less.
        top: int64 `[B]`, one more than the last position of each row as it entered, in the count of the first segment.
        position_drop: int64 `[B]`, how far renumbering cuts of this call lowered positions so far, or None.
        drop_by_segment: the same by segment, as it held there.
        steps: sites that cut, the owners of the original columns behind each, and whose cut it was; for traces only.
        places: (first layer, where its columns stood) of each run of layers that see the same rows.
        others: the tokens that are not visual, by columns, with the labels that they were found by.
        narrowed: the same while a module runs on them alone, by layer and task.
        whole: what entered such a module, by layer, where it is read.
        refusal: why the rows of this call cannot be cut, or None; a call in which nothing is cut may go on.
        brought: by layer, what methods are to see of its cache behind the call.
        tracked: whether caches are watched that lose entries while the answer is written.
        attended: by layer, the attention of the rows of such a call, see `cache_watch`.
        cuts: cuts between layers, where caches of earlier layers are to follow some.
        held: by layer from whose cache entries left, bool `[B, 1 or Hkv, n]`, which of those before it holds on, alone
            or in others; for traces only.
    """

    cache: Any
    stream: Stream | None
    rows: PromptRows | None
    columns: int
    run: StageRun | None
    positions: Tensor | None = None
    blocks: Tensor | None = None
    added: dict[int, tuple[int, Tensor | None, Tensor | None]] = field(default_factory=dict)
    segments: dict[int, SegmentCall] = field(default_factory=dict)
    taps: dict[int, dict[str, Any]] = field(default_factory=dict)
    moved: bool = False
    width: int = 0
    input_columns: Tensor | None = None
    gathered: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    next: Tensor | None = None
    follows: Tensor | None = None
    top: Tensor | None = None
    position_drop: Tensor | None = None
    drop_by_segment: dict[int, Tensor | None] = field(default_factory=dict)
    steps: list[tuple[Site, Tensor, Method]] = field(default_factory=list)
    places: list[tuple[int, Snapshot]] = field(default_factory=list)
    others: dict[int, tuple[Tensor, Any]] = field(default_factory=dict)
    narrowed: dict[tuple[int, str], Any] = field(default_factory=dict)
    whole: dict[int, Tensor] = field(default_factory=dict)
    refusal: str | None = None
    brought: dict[int, Brought] = field(default_factory=dict)
    tracked: bool = False
    attended: dict[int, Tensor] = field(default_factory=dict)
    cuts: list[LayerCut] = field(default_factory=list)
    held: dict[int, Tensor] = field(default_factory=dict)

    def check_cut(self) -> None:
        """Before rows are cut.

        Raises:
            UnsupportedModel: the call has something that a cut cannot follow.
        """
        if self.refusal is not None:
            raise UnsupportedModel(self.refusal)


@dataclass
class Opened:
    """A call that something is to be done in.

    Attributes:
        call: it.
        incoming: what the inner model was called with.
        x: `[B, S, C]`, embeddings.
        pictures: that the mask does not hide.
        valid: bool `[B, S]`, which columns are no padding, or None where all are real.
    """

    call: Call
    incoming: Incoming
    x: Tensor
    pictures: list[Picture]
    valid: Tensor | None


@dataclass
class DecoderRun:
    """What a thread runs in a language model.

    Attributes:
        call: the forward that runs, or None.
        held: columns that its cache held before it.
        muted: while a layer's modules are called for signals, out of turn.
        last_rows: of the last prefill with pictures; kept only for traces, and
        steps: the sites that cut them, the owners of the original columns behind each, and whose cut it was, and
        cached: fp32 `[layers, B, S]`, share of heads in which each original column is held behind the prefill (see
            `holding`), or None where nothing acts on caches.
    """

    call: Call | None = None
    held: int = 0
    muted: bool = False
    last_rows: PromptRows | None = None
    steps: list[tuple[Site, Tensor, Method]] = field(default_factory=list)
    cached: Tensor | None = None


def flat(positions: Tensor) -> Tensor:
    """Positions `[B, L]`; of several axes, the largest."""
    return positions if positions.dim() == 2 else positions[-3:].amax(0)


def top(rows: PromptRows) -> Tensor:
    """One more than the last position of each row, int64 `[B]`."""
    positions = flat(rows.positions)
    return (positions if rows.valid is None else positions.masked_fill(~rows.valid, -1)).amax(-1) + 1
