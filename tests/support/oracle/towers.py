"""A tower on one picture, block by block, with the cuts that a `Decider` makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Vision, flat
from .cuts import Cut, Decider, Moment, Signals


def rotated(x: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    """Rotates [H, L, d]."""
    if half:
        a, b = x.chunk(2, -1)
        other = torch.cat([-b, a], -1)
    else:
        other = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos + other * sin


@dataclass
class TowerRun:
    """One picture on its way through a tower.

    Attributes:
        x: [L, C], the row now.
        size: [L].
        prefix: protected tokens in front.
        entered: patches.
        who: int64 [N], patch that each view token goes on from.
        source: int64 [entered], slot of every patch, -1 where it was dropped.
        own: signals of the block that runs now.
        carried: signals of the blocks before, by ``name@vision:layer``.
        inserted: (method, count) of the tokens at the end of the row.
        outputs: what became of the tokens that a method inserted last.
        hidden: output of every block.
    """

    x: Tensor
    size: Tensor
    prefix: int
    entered: int
    who: Tensor
    source: Tensor
    own: Signals = field(default_factory=dict)
    carried: Signals = field(default_factory=dict)
    inserted: list[tuple[int, int]] = field(default_factory=list)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def n(self) -> int:
        return self.x.shape[0] - self.prefix - sum(count for _, count in self.inserted)

    def view(self, x: Tensor) -> Tensor:
        return x[self.prefix : self.prefix + self.n]

    def guard(self, x: Tensor) -> Tensor:
        """Protected tokens, inserted ones last."""
        return torch.cat([x[: self.prefix], x[self.prefix + self.n :]])

    def take(self, cut: Cut) -> None:
        n, end = self.n, self.prefix + self.n
        sizes = cut.own.to(self.size) @ self.view(self.size)
        values = cut.tokens(self.view(self.x))
        self.x = torch.cat([self.x[: self.prefix], values, self.x[end:]])
        self.size = torch.cat([self.size[: self.prefix], sizes, self.size[end:]])
        self.book(cut, n)

    def book(self, cut: Cut, n: int) -> None:
        """Everything but the tokens and their sizes."""
        self.who = cut.follow(self.who)
        owner = torch.full((n,), -1)
        for slot, token in cut.own[:, :n].nonzero().tolist():
            owner[token] = slot
        self.source = torch.where(self.source < 0, -1, owner[self.source.clamp(min=0)])
        for table in (self.own, self.carried):
            for name, (value, axis) in table.items():
                if axis is not None:
                    table[name] = (cut.follow(value, axis), axis)


def _tower_signals(
    run: TowerRun, q: Tensor, k: Tensor, turned: tuple[Tensor, Tensor], logits: Tensor, bias: Tensor | float
) -> Signals:
    """Everything that a block's attention tells of the row as it is; logits [H, L, L]."""
    n, lo = run.n, run.prefix
    rows = logits.softmax(-1)
    wide_q, wide_k = (flat(part).double() for part in turned)
    one = ((wide_q @ wide_k.T) * wide_q.shape[-1] ** -0.5 + bias).softmax(-1)
    guarded = torch.cat([rows[:, :lo], rows[:, lo + n :]], 1)[:, :, lo : lo + n]
    found: Signals = {
        "keys": (k[:, lo : lo + n].mean(0), 0),
        "keys_full": (flat(k)[lo : lo + n], 0),
        "turned_keys": (turned[1][:, lo : lo + n].mean(0), 0),
        "turned_keys_full": (flat(turned[1])[lo : lo + n], 0),
        "flat_attention": ((one[0] if lo else one.mean(0))[lo : lo + n], 0),
        "protected_queries": (run.guard(flat(q)), None),
        "protected_keys": (run.guard(flat(k)), None),
        "received_attention": (rows.mean((0, 1))[lo : lo + n], 0),
    }
    if guarded.shape[1]:
        found["protected_attention"] = (guarded.transpose(0, 1), 2)
        found["cls_attention"] = (guarded[:, 0], 1)
    return {name: (value.float(), axis) for name, (value, axis) in found.items()}


def run_tower(vision: Vision, pixels: Tensor, decider: Decider, unit: tuple[int, int] = (0, -1)) -> TowerRun:
    """One picture [1, 3, H, W] through a tower."""
    x = vision.embed(pixels)[0]
    depth, n = len(vision.blocks), x.shape[0] - vision.prefix
    run = TowerRun(x, torch.ones(x.shape[0]), vision.prefix, n, torch.arange(n), torch.arange(n))
    table = None if vision.rope is None else vision.rope(pixels)
    grid = vision.grid if vision.grid and vision.grid[0] * vision.grid[1] == n else None

    def moment(layer: int, point: str, visit: Any) -> Moment:
        signals = {**run.carried, **run.own, "protected": (run.guard(run.x), None)}
        if visit.index in run.outputs:
            signals["inserted"] = (run.outputs[visit.index], None)
        columns = torch.arange(vision.prefix, vision.prefix + run.n)
        tokens, size = run.view(run.x), run.view(run.size)
        return Moment(
            "vision", layer, point, tokens, size, run.who, signals, vision.prefix, depth, n, grid, columns, unit
        )

    def turn(x: Tensor) -> Tensor:
        if table is None:
            return x
        lo, hi = run.prefix, run.prefix + run.n
        middle = rotated(x[:, lo:hi], table[0][run.who], table[1][run.who], vision.half)
        return torch.cat([x[:, :lo], middle, x[:, hi:]], 1)

    def attention(layer: int, block: Block) -> tuple[Tensor, Tensor]:
        q, k, v = block.qkv(block.norm1(run.x))
        turned = turn(q), turn(k)
        bias = run.size.double().log() if layer >= decider.bias_from() else 0.0
        logits = (turned[0].double() @ turned[1].double().transpose(1, 2)) * block.scale + bias
        run.own = _tower_signals(run, q, k, turned, logits, bias)
        return logits, v

    def visit_all(layer: int, point: str) -> None:
        for visit in decider.visits("vision", layer, point):
            if point == "start":
                attention(layer, vision.blocks[layer])  # looks ahead
                tokens = decider.insert(visit, moment(layer, point, visit))
                if tokens is not None and len(tokens):
                    run.x = torch.cat([run.x, tokens.to(run.x)])
                    run.size = torch.cat([run.size, torch.ones(len(tokens))])
                    run.inserted.append((visit.index, len(tokens)))
                    attention(layer, vision.blocks[layer])
            cut = decider.decide(visit, moment(layer, point, visit))
            if cut is not None:
                run.take(cut)

    for layer, block in enumerate(vision.blocks):
        visit_all(layer, "start")
        logits, v = attention(layer, block)
        run.carried.update({f"{name}@vision:{layer}": value for name, value in run.own.items()})
        run.x = run.x + block.out(flat((logits.softmax(-1) @ v.double()).to(v.dtype)))
        visit_all(layer, "mid")
        run.x = run.x + block.mlp(block.norm2(run.x))
        run.carried[f"protected@vision:{layer}"] = (run.guard(run.x), None)
        run.carried[f"outputs@vision:{layer}"] = (run.view(run.x), 0)
        visit_all(layer, "end")
        at = end = run.prefix + run.n
        for index, count in run.inserted:
            run.outputs[index] = run.x[at : at + count]
            at += count
        run.x, run.size, run.inserted = run.x[:end], run.size[:end], []
        run.hidden.append(run.x)
    return run
