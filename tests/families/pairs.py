"""What a method decided while a model ran, and the same decisions taken by the oracle on a row of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from support.player import written_out
from torch import Tensor, nn

from vlmtok import Compression, Layout, Method, Reduction, Site

from .oracle import Oracle
from .oracle.rows import Row
from .prompts import Picture, Prompt
from .tower_replay import Event, Replay, row_of


@dataclass(frozen=True)
class Call:
    """One answer of a method in the language model: view rows of a row that is alone.

    Attributes:
        site: where.
        columns: int64 `[V, N]`, of each view row's tokens.
        size: `[V, N]`, what each stands for.
        reduction: of the V view rows.
    """

    site: Site
    columns: Tensor
    size: Tensor
    reduction: Reduction


@dataclass
class Recorded:
    """What methods answered, forward by forward.

    Attributes:
        passes: calls in the language model, a list for each forward.
        tower: what happened in towers and before projectors, in order.
        reduced: how many answers in all left a token out, those in towers among them.
        skips: branches that methods leave out for visual tokens, by decoder layer.
    """

    passes: list[list[Call]] = field(default_factory=list)
    tower: list[Event] = field(default_factory=list)
    reduced: int = 0
    skips: dict[int, set[str]] = field(default_factory=dict)


@contextlib.contextmanager
def recorded(model: nn.Module, run: Compression) -> Iterator[Recorded]:
    """Notes what methods answer inside the block, and where: at a site that moved, the view shows the one asked for."""
    found, methods = Recorded(), run.methods
    for method in methods:
        for layer, part in method.skip(run.layout).items():
            found.skips.setdefault(layer, set()).update(("ffn", "attn") if part == "block" else (part,))
    acts = {(id(entry.method), entry.asked): entry.site for entry in run._attachment.entries}

    def listen(method: Method) -> None:
        inner, given = method.reduce, method.insert

        def insert(view: Any) -> Tensor | None:
            made = given(view)
            if made is not None:
                found.tower.append(Event(view.site.layer, view.site.point, None, made.detach().clone(), None))
            return made

        def reduce(view: Any) -> Reduction | None:
            made = inner(view)
            if made is not None:
                found.reduced += made.slots < view.tokens.shape[1] or made.valid is not None
                size = torch.ones(view.tokens.shape[:2]) if view.size is None else view.size.clone()
                if view.site.stage in ("projected", "decoder"):
                    site = acts[id(method), view.site]
                    found.passes[-1].append(Call(site, view.columns.clone(), size, made))
                else:
                    found.tower.append(Event(view.site.layer, view.site.point, made, None, size))
            return made

        method.__dict__.update(reduce=reduce, insert=insert)

    for method in methods:
        listen(method)
    handle = model.register_forward_pre_hook(lambda *given: found.passes.append([]), prepend=True)
    try:
        yield found
    finally:
        handle.remove()
        for method in methods:
            del method.__dict__["reduce"], method.__dict__["insert"]


def taken(row: Row, calls: Sequence[Call], renumber: bool) -> Row:
    """A row after the answers at one site; slots fill the places of what stays, in their order."""
    hidden, size = row.hidden.clone(), row.size.clone()
    stays, source = torch.ones(len(row), dtype=torch.bool), torch.arange(len(row))
    for call in calls:
        for index, columns in enumerate(call.columns):
            assert torch.equal(row.size[columns], call.size[index].to(row.size))
            cut = written_out(row_of(call.reduction, index), call.size[index])
            kept = columns[cut.keep]
            hidden[kept] = cut.tokens(row.hidden[columns])
            size[kept] = (cut.own @ row.size[columns].double()).to(size)
            stays[columns] = False
            stays[kept] = True
            source[kept.sort().values] = kept
            if call.site.separators == "drop":
                mine = row.owner == row.owner[columns[0]]
                stays[mine & (row.part < 0)] = False
    left = replace(row, hidden=hidden, size=size).take(source[stays])
    if renumber and len(left) < len(row):
        left = replace(left, positions=row.positions.min() + torch.arange(len(left))[None])
    return left


@contextlib.contextmanager
def idle(layer: nn.Module, branches: Collection[str], row: Row) -> Iterator[None]:
    """Branches of a layer give zeros for the tokens of pictures, but for one that ends the row."""
    visual = row.owner >= 0
    visual[-1] = False

    def silent(module: nn.Module, args: Any, output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        made = torch.where(visual[:, None], 0.0, made.reshape(len(row), -1)).view(made.shape)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    names = {"ffn": ("mlp", "feed_forward"), "attn": ("self_attn", "linear_attn", "conv")}
    parts = [next(getattr(layer, name) for name in names[b] if hasattr(layer, name)) for b in branches]
    handles = [part.register_forward_hook(silent) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(
    asked: Oracle, row: Row, calls: Sequence[Call], layout: Layout, skips: Mapping[int, Collection[str]]
) -> Tensor:
    """Logits `[V]` behind a row, the calls taken where they were made."""

    def at(stage: str, layer: int | None = None, point: str = "end") -> None:
        nonlocal row
        here = [c for c in calls if (c.site.stage, c.site.layer, c.site.point) == (stage, layer, point)]
        if here:
            row = taken(row, here, layout.positions_at(here[0].site) == "renumber")

    at("projected")
    row = asked.start(row)
    for index in range(len(asked.layers)):
        at("decoder", index, "start")
        with idle(asked.layers[index], skips.get(index, ()), row):
            row = replace(row, hidden=asked.layer(index, row))
        at("decoder", index, "end")
    return asked.head(row.hidden)


@torch.no_grad()
def said(
    asked: Oracle,
    prompt: Prompt,
    encoded: dict[int, Any],
    passes: Sequence[Sequence[Call]],
    layout: Layout,
    steps: int,
    skips: Mapping[int, Collection[str]],
) -> tuple[Tensor, Tensor]:
    """Greedy decoding by the oracle: tokens `[steps]` and logits `[steps, V]`.

    Args:
        asked: the oracle.
        prompt: one row.
        encoded: what the tower made of its pictures, by kind.
        passes: calls of every step; one entry is that of a prompt of which a cache remembers the rest.
        layout: of the model.
        steps: tokens to write.
        skips: branches that layers leave out for visual tokens.
    """
    written, rows = prompt.ids[:0], []
    for step in range(steps):
        row = asked.row(prompt, written, encoded)
        rows.append(logits(asked, row, passes[min(step, len(passes) - 1)], layout, skips))
        written = torch.cat([written, rows[-1].argmax()[None]])
    return written, torch.stack(rows)


def encoded_by_loops(asked: Oracle, prompt: Prompt, replay: Replay) -> tuple[Prompt, dict[int, Any]]:
    """What a tower makes of a prompt's pictures when its cuts are taken by loops.

    Returns:
        The prompt, in which each picture has the places that its features take, its first ones; and the features.
    """
    with torch.no_grad(), replay.on():
        encoded = asked.encode(prompt)
    if not replay.slots:
        return prompt, encoded
    ((kind, made),) = encoded.items()
    rows = made.pooler_output if isinstance(made.pooler_output, list) else list(made.pooler_output)
    whole = torch.cat(list(rows)).unflatten(0, (len(replay.counts), -1))
    encoded = {kind: SimpleNamespace(pooler_output=[one[:count] for one, count in zip(whole, replay.counts)])}
    stays = torch.ones_like(prompt.ids, dtype=torch.bool)
    for picture, count in zip(prompt.pictures, replay.counts, strict=True):
        stays[picture.columns[count:]] = False
    column = stays.long().cumsum(0) - 1
    left = [Picture(column[p.columns[:count]], p.shot) for p, count in zip(prompt.pictures, replay.counts)]
    return Prompt(prompt.ids[stays], tuple(left)), encoded
