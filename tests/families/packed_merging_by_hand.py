"""Merging inside towers that hold all pictures in one row, written out: a loop over the host's modules, with its own
attention, rotation, sizes and slots, whose rows take the place of the host's behind the last block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from support.merging_by_hand import pitome_by_hand, tome_by_hand
from torch import Tensor, nn

import vlmtok
from vlmtok import Site, TokenView

PACKED = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm46v",
    "paddleocr_vl",
    "mistral3",
)
_BLOCKS = ("VisionBlock", "OCRVisionEncoderLayer", "PixtralAttentionLayer")


@dataclass
class Slot:
    """A token of the shorter row.

    Attributes:
        own: the patch that it stands for in rotations.
        members: its patches.
    """

    own: int
    members: list[int]


@dataclass
class Moment:
    """What a decision about one segment can be made of.

    Attributes:
        layer: the block.
        x: `[n, C]`, the tokens.
        keys: `[H, n, d]`, before the rotation.
        received: `[n]`, attention from the rows that see a token, as a share of the rows of its frame.
        sizes: patches of each token.
    """

    layer: int
    x: Tensor
    keys: Tensor
    received: Tensor
    sizes: list[int]


Made = list[tuple[int, list[tuple[int, float | None]], float | None]]
"""Slots in order: whose place it has, what joins it and with which weight, and its own weight (None: means by size)."""
Decide = Callable[[Moment], Made | None]


# ---------------------------------------------------------------------- rules
def _pairs(stay: list[int], joins: list[tuple[int, int]]) -> Made:
    return [(own, [(a, None) for a, b in joins if b == own], None) for own in stay]


def tome(r: int) -> Decide:
    """Bipartite matching of every segment by itself."""

    def decide(now: Moment) -> Made | None:
        count = min(r, len(now.x) // 2)
        if not count:
            return None
        even, joins, odd = tome_by_hand(now.keys.mean(0).detach(), count, 0)
        return _pairs(even + odd, joins)

    return decide


def pitome(ratio: float, depth: int) -> Decide:
    """Energy, split and matching, with the margin of the paper's settings."""

    def decide(now: Moment) -> Made | None:
        n = len(now.x)
        r = min(int(n - n * ratio), n // 2)
        if not r:
            return None
        margin = 0.9 - 0.9 * now.layer / depth
        spared, joins, into = pitome_by_hand(now.keys.mean(0).detach(), r, margin, 1.0)
        return _pairs(spared + into, joins)

    return decide


def crossget(r: int) -> Decide:
    """Complete matching without guidance: the tokens with the best partner behind them in the ranking leave."""

    def decide(now: Moment) -> Made | None:
        n = len(now.x)
        count = min(r, n // 2)
        if not count:
            return None
        k = now.keys.detach().transpose(0, 1).flatten(1).double()
        k = k / k.norm(dim=-1, keepdim=True)
        similar = (k[:, None] * k).sum(-1)  # the same to both sides, so that best pairs tie
        similar.fill_diagonal_(-torch.inf)
        rank = sorted(range(n), key=lambda i: (-float(similar[i].max()), i))
        behind = {
            i: max((float(similar[i, j]) for j in rank[at + 1 :]), default=-torch.inf) for at, i in enumerate(rank)
        }
        gone = sorted(range(n), key=lambda i: (-behind[i], rank.index(i)))[:count]
        stay = [i for i in range(n) if i not in gone]
        return _pairs(stay, [(i, max(stay, key=lambda j: float(similar[i, j]))) for i in gone])

    return decide


def by_method(method: vlmtok.Method, depth: int) -> Decide:
    """What a method answers to a view of one segment that is made here."""

    def decide(now: Moment) -> Made | None:
        view = TokenView(
            now.x.detach()[None],
            Site("vision", now.layer, "mid"),
            size=torch.tensor([now.sizes], dtype=torch.float32),
            depth=depth,
            signals={
                "received_attention": now.received.detach()[None],
                "keys_full": now.keys.detach().transpose(0, 1).flatten(1)[None],
            },
        )
        found = method.reduce(view)
        if found is None:
            return None
        joins: list[list[tuple[int, float | None]]] = [[] for _ in range(found.keep.shape[1])]
        if found.src is not None:
            for entry, (token, slot) in enumerate(zip(found.src[0].tolist(), found.dst[0].tolist())):
                if slot >= 0:
                    weight = None if found.src_weight is None else float(found.src_weight[0, entry])
                    joins[slot].append((token, weight))
        own = [None] * len(joins) if found.keep_weight is None else found.keep_weight[0].tolist()
        return list(zip(found.keep[0].tolist(), joins, own))

    return decide


# ---------------------------------------------------------------------- the loop
def blocks_of(model: nn.Module) -> list[Any]:
    """Blocks of a model's tower."""
    return [m for m in model.modules() if type(m).__name__.endswith(_BLOCKS)]


def _child(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _bounds(args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> list[int]:
    """Where stretches begin that see each other, and the end, by what a block is called with."""
    if "cu_seqlens" in kwargs:
        return kwargs["cu_seqlens"].tolist()
    mask = args[1] if len(args) > 1 else kwargs["attention_mask"]
    starts = (mask[0, 0] == 0).int().argmax(-1)
    return [*starts.unique().tolist(), n]


class Loop:
    """The rows behind each block, from what the blocks of the bare tower are called with.

    Args:
        blocks: the tower's.
        decides: what merges between attention and MLP of a block, in order, segment by segment.
        sized: whether log(size) is added to the logits.

    Attributes:
        heard: signals of the last block at its patches, `[L, c]`: each has those of the token that stands for its slot.
        tokens: of the row in attention and in MLP, by block.
        pairs: of a query and a key that see each other, by block.
    """

    def __init__(self, blocks: list[Any], decides: Sequence[Decide], sized: bool) -> None:
        self.blocks, self.decides, self.sized = blocks, decides, sized
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.pairs: list[int] = []
        self.tokens: list[tuple[int, int]] = []

    def run(self) -> Tensor:
        """`[L, C]` behind the last block that was called: every patch has its slot's features, or zeros without one."""
        args, kwargs = self.calls[0]
        x = args[0] if args else kwargs["hidden_states"]
        x = x.reshape(-1, x.shape[-1])
        n = len(x)
        # Tokens merge in the finest stretches that any block knows; a frame is the coarsest.
        told = [set(_bounds(args, kwargs, n)) for args, kwargs in self.calls]
        windows = sorted(set.union(*told))
        self.frames = torch.tensor(sorted(set.intersection(*told)))
        self.pairs, self.tokens = [], []
        parts = [[Slot(i, [i]) for i in range(a, b)] for a, b in pairwise(windows)]
        values = [x[a:b] for a, b in pairwise(windows)]
        for layer, (args, kwargs) in enumerate(self.calls):
            bounds = _bounds(args, kwargs, n)
            table = kwargs["position_embeddings"]
            values, parts = self._block(layer, values, parts, bounds, table)
        owner = torch.full((n,), -1)
        for slot, one in enumerate(one for part in parts for one in part):
            owner[one.members] = slot
        before = {slot.own: i for i, slot in enumerate(self.seen)}
        at = torch.tensor([before[one.own] for part in parts for one in part])[owner]
        self.heard = {name: value[at] * (owner >= 0)[:, None] for name, value in self.heard.items()}
        return torch.cat(values)[owner] * (owner >= 0)[:, None]

    def _block(
        self, layer: int, values: list[Tensor], parts: list[list[Slot]], bounds: list[int], table: Any
    ) -> tuple[list[Tensor], list[list[Slot]]]:
        block = self.blocks[layer]
        attn, mlp = _child(block, "attn", "self_attn", "attention"), _child(block, "mlp", "feed_forward")
        x = torch.cat(values)
        slots = [slot for part in parts for slot in part]
        h = _child(block, "norm1", "layer_norm1", "attention_norm")(x)
        if hasattr(attn, "qkv"):
            q, k, v = attn.qkv(h).chunk(3, -1)
        else:
            q, k, v = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
        q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
        cos, sin = (t[[slot.own for slot in slots]] for t in table)

        def turned(t: Tensor) -> Tensor:
            first, second = t.float().chunk(2, -1)
            return (t.float() * cos.float() + torch.cat([-second, first], -1) * sin.float()).to(t.dtype)

        logits = turned(q) @ turned(k).transpose(1, 2) * attn.scaling
        if self.sized:
            logits = logits + torch.tensor([float(len(slot.members)) for slot in slots]).log().to(logits.dtype)
        seen = torch.bucketize(torch.tensor([slot.own for slot in slots]), torch.tensor(bounds), right=True)
        weights = logits.masked_fill(seen[:, None] != seen, -torch.inf).softmax(-1)
        x = x + _child(attn, "proj", "out_proj", "o_proj")((weights @ v).transpose(0, 1).flatten(1))
        self.pairs.append(int((seen[:, None] == seen).sum()))
        lengths = [len(part) for part in parts]
        frame = torch.bucketize(torch.tensor([slot.own for slot in slots]), self.frames, right=True)
        share = weights.float().mean(0).sum(0) / (frame[:, None] == frame).sum(0)
        received = share.split(lengths)
        self.seen = slots
        self.heard = {"received_attention": share[:, None], "turned_keys": turned(k).mean(0)}
        values, parts = list(x.split(lengths)), list(parts)
        for at, keys in enumerate(k.split(lengths, 1)):
            heard = received[at]
            for decide in self.decides:
                sizes = [len(slot.members) for slot in parts[at]]
                made = decide(Moment(layer, values[at], keys, heard, sizes))
                if made is not None:
                    own = [one for one, _, _ in made]
                    keys, heard = keys[:, own], heard[own]
                    values[at], parts[at] = _merged(values[at], parts[at], made)
        self.tokens.append((len(slots), sum(len(part) for part in parts)))
        norm = _child(block, "norm2", "layer_norm2", "ffn_norm")
        return [y + mlp(norm(y)) for y in values], parts


def _merged(x: Tensor, slots: list[Slot], made: Made) -> tuple[Tensor, list[Slot]]:
    rows, left = [], []
    owned = {own for own, _, _ in made}
    for own, joins, weight in made:
        taken = [(own, weight), *joins]
        if weight is None:
            total = sum(len(slots[i].members) for i, _ in taken)
            rows.append(sum(x[i].float() * len(slots[i].members) for i, _ in taken) / total)
        else:
            rows.append(sum(x[i].float() * share for i, share in taken))
        mine = [own, *(i for i, _ in joins if i not in owned)]
        owned.update(mine)
        left.append(Slot(slots[own].own, [m for i in mine for m in slots[i].members]))
    return torch.stack(rows).to(x.dtype), left


@contextlib.contextmanager
def by_hand(model: nn.Module, decide: Decide | Sequence[Decide], sized: bool) -> Iterator[Loop]:
    """The model with the loop's rows in place of those of its tower."""
    blocks = blocks_of(model)
    loop = Loop(blocks, [decide] if callable(decide) else decide, sized)

    def begin(layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer == 0:
                loop.calls.clear()
            loop.calls.append((args, kwargs))

        return hook

    def end(block: nn.Module, args: Any, output: Any) -> Any:
        whole = loop.run()
        given = output[0] if isinstance(output, tuple) else output
        whole = whole.reshape(given.shape)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (loop.run().reshape(args[0].shape), *args[1:])

    hooks = [block.register_forward_pre_hook(begin(i), with_kwargs=True) for i, block in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(end, prepend=True))
    for name, module in model.named_modules():
        if name.endswith("deepstack_merger_list"):
            hooks += [reader.register_forward_pre_hook(read) for reader in module.children()]
    try:
        yield loop
    finally:
        for hook in hooks:
            hook.remove()
