"""One row of a language model: its layers, what is carried along with it, and the signals that are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import flat, heads_of, rotary
from .cuts import Cut, Signals
from .held import Eviction, attend
from .towers import rotated


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (x.double() * scale).to(x.dtype)


class LlamaLayer:
    """A Llama layer on one row [L, C].

    Attributes:
        keys: [Hkv, L, d] after rope, of the last call.
        values: [Hkv, L, d], of the last call.
        gone: bool [Hkv, L], entries that rows to come do not see.
        neurons: [L, F], input of the MLP's last projection in the last run.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.width = module, config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]

    def attend(
        self,
        h: Tensor,
        positions: Tensor,
        unseen: Tensor | None = None,
        places: Tensor | None = None,
        evictions: Sequence[Eviction] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input, what attention adds, and logits [H, L, L]; nobody looks at the columns `unseen` but they.

        Rows behind each of the `evictions` see what it left; `places` are the prompt columns of all.
        """
        attn = self.module.self_attn
        x = rms_norm(h, self.module.input_layernorm)
        q, k, v = (
            heads_of(part(x), part.out_features // self.width) for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        sin, cos = rotary(positions, self.width, self.theta)
        q, k = rotated(q.double(), sin, cos, True), rotated(k.double(), sin, cos, True)
        self.keys, self.values = k, v
        length = len(h)
        blocked = torch.ones(length, length).triu(1).bool()
        if unseen is not None:
            blocked = blocked | (unseen[None, :] & ~unseen[:, None])
        places = torch.arange(length) if places is None else places
        mixed, logits, self.gone = attend(q, k, v.double(), blocked, self.width**-0.5, places, evictions)
        return x, attn.o_proj(flat(mixed).to(h.dtype)), logits

    def run(
        self,
        h: Tensor,
        positions: Tensor,
        unseen: Tensor | None = None,
        skips: frozenset[str] = frozenset(),
        idle: Tensor | None = None,
        places: Tensor | None = None,
        evictions: Sequence[Eviction] = (),
    ) -> tuple[Tensor, Tensor, Any]:
        """Output, logits, and (in, out) of attention and MLP; branches in `skips` add nothing to the columns `idle`."""
        x, mixed, logits = self.attend(h, positions, unseen, places, evictions)
        if "attn" in skips and idle is not None:
            mixed = torch.where(idle[:, None], 0.0, mixed)
        h = h + mixed
        z = rms_norm(h, self.module.post_attention_layernorm)
        mlp = self.module.mlp
        self.neurons = F.silu(mlp.gate_proj(z)) * mlp.up_proj(z)
        y = mlp.down_proj(self.neurons)
        if "ffn" in skips and idle is not None:
            y = torch.where(idle[:, None], 0.0, y)
        return h + y, logits, ((x, mixed), (z, y))


@dataclass
class RowRun:
    """One row on its way through a language model.

    Attributes:
        h: [L, C].
        picture: int64 [L], picture of each column, -1 for text.
        positions: int64 [L].
        size: [L].
        place: int64 [L], prompt column whose place each column takes.
        who: int64 [L], prompt column that its token goes on from.
        row: number of the row, for the decider.
        began: first prompt column of each picture.
        carried: the tower's signals of each picture; rows of them belong to `rank`.
        rank: int64 [L], which of the features of its picture each column is.
        entered: tokens of each picture when the stage began.
        held: prompt column of a visual token that ends the row and therefore stays, or -1.
        lengths: columns that each layer ran with.
    """

    h: Tensor
    picture: Tensor
    positions: Tensor
    size: Tensor
    place: Tensor
    who: Tensor
    row: int
    began: dict[int, int]
    carried: dict[int, Signals]
    rank: Tensor
    entered: dict[int, int] = field(default_factory=dict)
    held: int = -1
    lengths: list[int] = field(default_factory=list)

    def columns(self, picture: int) -> Tensor:
        """Columns of a picture (-1: of all) that may be cut."""
        mine = self.picture >= 0 if picture < 0 else self.picture == picture
        return (mine & (self.place != self.held)).nonzero()[:, 0]

    def enter(self) -> None:
        self.entered = {p: len(self.columns(p)) for p in self.began}

    def units(self, scope: str) -> list[tuple[int, Tensor]]:
        """(picture or -1, columns) of each view row."""
        pictures = ([-1] if self.began else []) if scope == "sample" else sorted(self.began)
        found = [(p, self.columns(p)) for p in pictures]
        return [(p, columns) for p, columns in found if len(columns)]

    def text_behind(self, picture: int) -> Tensor:
        """Text columns behind the first token of a picture (-1: of the first picture)."""
        first = self.began[min(self.began) if picture < 0 else picture]
        return ((self.picture < 0) & (self.place > first)).nonzero()[:, 0]

    def take(self, cuts: list[tuple[Tensor, Cut]]) -> Tensor:
        """Cuts view rows (columns, cut); slots fill the places of what stays of their own view row, in slot order.

        Returns where columns came from.
        """
        stay, source = torch.ones(len(self.h), dtype=torch.bool), torch.arange(len(self.h))
        h, size = self.h, self.size
        for columns, cut in cuts:
            kept = columns[cut.keep]
            h = h.index_copy(0, kept, cut.tokens(self.h[columns]))
            size = size.index_copy(0, kept, cut.own.to(self.size) @ self.size[columns])
            stay[columns] = False
            stay[kept] = True
            source[kept.sort().values] = kept
        self.h, self.size, source = h, size, source[stay]
        self.h, self.size, self.picture = self.h[source], self.size[source], self.picture[source]
        self.positions, self.rank, self.who = self.positions[source], self.rank[source], self.who[source]
        self.place = self.place[stay]
        return source

    def renumber(self) -> None:
        self.positions = self.positions.min() + torch.arange(len(self.h))


def row_signals(
    run: RowRun,
    picture: int,
    columns: Tensor,
    logits: Tensor,
    now: Tensor,
    modules: Any,
    layer: LlamaLayer,
    states: Tensor,
) -> Signals:
    """What a layer tells of one view row.

    Args:
        run: the row as it is.
        picture: of the view row.
        columns: of its tokens.
        logits: [H, L0, L0] of the layer.
        now: int64 [L], the layer's column of each column.
        modules: (in, out) [L0, C] of attention and MLP, or None where the layer has not run.
        layer: what made the logits.
        states: [L, C], the row through the model's last norm.
    """
    norms = layer.keys.abs().sum((0, 2))[now]
    rows = logits.softmax(-1)[:, now][:, :, now]
    text = run.text_behind(picture)
    found: Signals = {
        "last_attention": (rows[:, -1][:, columns], 1),
        "attention_logits": (logits[:, now][:, :, now], None),
        "attention_to_text": (rows[:, columns][:, :, text].sum(-1).mean(0), 0),
        "key_norm": (norms[columns], 0),
        "normed": (states[columns], 0),
    }
    if len(text):
        found["text_attention"] = (rows[:, text][:, :, columns], 2)
        found["text_key_norm"], found["text_normed"] = (norms[text], None), (states[text], None)
    if modules is not None:
        on = layer.neurons[now] > 0
        asked = torch.cat([text, torch.tensor([len(on) - 1])])
        found["activation_match"] = ((on[columns][:, None] & on[asked][None]).sum(-1), 0)
        stats = [(y.norm(dim=-1) / x.norm(dim=-1), F.cosine_similarity(x, y, dim=-1)) for x, y in modules]
        found["transition"] = (torch.stack([torch.stack(pair) for pair in stats])[:, :, now], None)
    return {name: (value.float(), axis) for name, (value, axis) in found.items()}


@dataclass
class Plan:
    """Cuts of a prompt, to be taken again with more behind it.

    Attributes:
        cuts: by site, method and picture; pictures that are not in it are decided on when they come.
        held: the visual token that ended the prompt, or -1.
        done: whether the prompt has been seen.
        evictions: by layer, what left caches behind each prompt.
        until: columns of the prompts whose caches have been seen to.
        written: columns behind them.
    """

    cuts: dict[tuple[Any, ...], Cut | None] = field(default_factory=dict)
    held: int = -1
    done: bool = False
    evictions: dict[int, list[Eviction]] = field(default_factory=dict)
    until: int = 0
    written: int = 0
