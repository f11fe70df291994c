"""Methods that papers place before the projector, at the language model's input: against loops in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import recoverable_by_hand
from torch import Tensor

import vlmtok
from vlmtok import Method, TokenView
from vlmtok.core.settings import keep_count
from vlmtok.errors import SiteError

from .build import FAMILIES, shared
from .canvas import placed, projections_of, real_crops
from .harness import NOISE, STEPS, generate
from .methods import Look
from .oracle import Oracle, oracle
from .packed_by_hand import PACKED, of_shot
from .prompts import Prompt
from .towers_by_hand import PREFIX, SQUARES, crops_of_prompt, signals

CANVASES = [("llava_next", "2I3J5"), ("llava_onevision", "2I3"), ("llava_onevision", "3W5")]
"""Two canvases in a row, one canvas, and a clip; a class token or none."""
CROPS = [(name, "2M3J5") for name in SQUARES]
"""A picture in crops and a single one."""
PACKS = [
    *((name, "2I3J5") for name in PACKED),
    *((name, "2V3" if name.startswith("glm") else "2I3V4") for name in PACKED if FAMILIES[name].clips),
]
"""Two pictures of different sizes in one row of the tower, and clips."""

Slots = dict[int, Tensor]
"""The slots of a part: place of the token that represents each, and what becomes of it."""


def channels(name: str, picture, layer: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score of each head, score of one head over the full width, keys, keys of all heads: `[crops, c, N]` each."""
    arrays = picture.shot.arrays
    pixels = arrays["pixel_values_videos"][0] if picture.shot.video else real_crops(arrays["pixel_values"][0])
    heads = shared(name).config.vision_config.num_attention_heads
    q, k = projections_of(name, pixels, layer)
    prefix = int(name == "llava_next")

    def scores(q: Tensor, k: Tensor) -> Tensor:
        """Of the class token, summed over heads, or received: `[crops, N]`."""
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights[:, :, 0, 1:].sum(1) if prefix else weights.mean((1, 2))

    by_head = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)]
    keys = by_head[1][:, :, prefix:]
    return (
        scores(*by_head).unsqueeze(1),
        scores(q.unsqueeze(1), k.unsqueeze(1)).unsqueeze(1),
        keys.mean(1).transpose(1, 2),
        k[:, prefix:].transpose(1, 2),
    )


def signals_of(name: str, prompt, pattern: str, look: Look, layer: str) -> Iterator[tuple[Tensor, ...]]:
    """Score, flat score, keys, and keys of all heads for the tokens of every picture that a view shows, `[n, c]`."""
    if name in PACKED:
        for seen in look.seen:
            picture = next(p for p in prompt.pictures if torch.equal(p.columns, seen.columns))
            made = of_shot(name, picture.shot)
            yield tuple(
                made[key] for key in ("received_attention", "flat_attention", "turned_keys", "turned_keys_full")
            )
        return
    if name in SQUARES:
        made = signals(name, crops_of_prompt(prompt))
        score = made["cls_attention"].sum(-1, keepdim=True) if name in PREFIX else made["received_attention"]
        columns = (score, made["flat_attention"], made["turned_keys"], made["turned_keys_full"])
        counts = [len(seen.tokens) for seen in look.seen]
        yield from zip(*(one.flatten(0, 1).split(counts) for one in columns), strict=True)
        return
    for picture, letter in zip(prompt.pictures, filter(str.isalpha, pattern), strict=True):
        shot = None if picture.shot.video else FAMILIES[name].shots[letter]
        yield tuple(placed(picture, shot, one).T for one in channels(name, picture, layer))


def visionzip(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """VisionZip on one part by loops: targets stay where they are and gather what is most like them."""
    n = len(x)
    k = keep_count(0.5, n)
    if k == n:
        return {i: x[i] for i in range(n)}
    contextual = min(keep_count(0.15625, k), k - 1)
    kept = score.argsort(descending=True, stable=True)[: k - contextual].tolist()
    rest = [i for i in range(n) if i not in kept]
    targets = rest[:: len(rest) // contextual][:contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            alike = F.cosine_similarity(keys[i][None].double(), keys[targets].double(), dim=-1)
            members[targets[int(alike.argmax())]].append(i)
    out = {i: x[i] for i in kept}
    for target, joined in members.items():
        out[target] = x[target] + x[joined].mean(0) if joined else x[target]
    return out


def prumerge(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """PruMerge on one part by loops: outliers gather their neighbours, the best that does not stay the rest."""
    n = len(x)
    first, third = torch.quantile(flat, torch.tensor([0.25, 0.75]))
    count = int((flat > third + 1.5 * (third - first)).sum())
    order = flat.argsort(descending=True, stable=True).tolist()
    unit, out = F.normalize(wide.double(), dim=-1), {}
    for i in order[:count]:
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(unit[i] @ unit[j]))[:32]
        out[i] = x[i] + (flat[others, None] * x[others]).sum(0)
    out[order[count]] = (flat[order[count:], None] * x[order[count:]]).sum(0)
    return out


def scope(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """SCOPE on one part by loops: what a token adds to the cover of all, times its score."""
    n = len(x)
    unit = F.normalize(x.double(), dim=-1)
    alike, cover, kept = unit @ unit.T, torch.zeros(n, dtype=torch.float64), []
    for _ in range(keep_count(0.5, n)):
        gains = [float((alike[j] - cover).clamp(min=0).sum() * score[j]) if j not in kept else -1.0 for j in range(n)]
        kept.append(max(range(n), key=lambda j: gains[j]))
        cover = torch.maximum(cover, alike[kept[-1]])
    return {i: x[i] for i in kept}


def vispruner(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """VisPruner on one part by loops: the best by score, and of the rest those without near duplicates."""
    k = keep_count(0.5, len(x))
    order = score.argsort(descending=True, stable=True).tolist()
    unit = F.normalize(x.double(), dim=-1)
    kept, others = order[: int(0.5 * k)], order[int(0.5 * k) :]
    while len(others) > k - len(kept):
        first, second = others[0::2], others[1::2]
        nearest = {i: max(float(unit[i] @ unit[j]) for j in second) for i in first}
        leave = min(8, len(others) - k + len(kept), len(first))
        others = sorted(first, key=lambda i: -nearest[i])[leave:] + second
    return {i: x[i] for i in [*kept, *others]}


def relevance(view: TokenView) -> Tensor:
    """Of a user: it tells tokens apart by themselves."""
    return relevance_of(view.tokens)


def relevance_of(x: Tensor) -> Tensor:
    """The same of tokens `[..., C]`."""
    return 0.01 * (x.float() @ torch.linspace(-1.0, 1.0, x.shape[-1])) ** 3


def recoverable(x: Tensor, score: Tensor, flat: Tensor, keys: Tensor, wide: Tensor) -> Slots:
    """Recoverable Compression on one part by loops: slots are where their tokens are."""
    made = recoverable_by_hand.recovered(x, flat, wide, relevance_of(x))
    assert made.margin > 1e-6
    return {place: token.float() for place, token in made.slots.items()}


METHODS = {
    "visionzip": (visionzip, {"keep": 0.5}, "feature"),
    "prumerge": (prumerge, {}, "-1"),
    "scope": (scope, {"keep": 0.5}, "feature"),
    "vispruner": (vispruner, {"keep": 0.5}, "feature"),
    "recoverable": (recoverable, {}, "-1"),
}
MERGING = {"visionzip", "prumerge", "recoverable"}
CLASSED = {"llava_next", *PREFIX}
"""Towers with a class token."""
GIVEN = {"recoverable": {"signals": {"relevance": relevance}}}
"""What a user gives beside a method."""


@torch.no_grad()
def assert_answers(
    name: str,
    prompt: Prompt,
    method: Method,
    asked: Oracle,
    encoded: object,
    hidden: Tensor,
    stays: Tensor,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Answers of a method are the oracle's on the columns that stay, with a cache and without.

    Args:
        name: of the family.
        prompt: with pictures.
        method: that acts at ``projected``.
        asked: the oracle of the family.
        encoded: what it made of the prompt's pictures.
        hidden: `[S, C]`, the prompt's columns when all is merged.
        stays: bool `[S]`, those that stay.
        given: what a user gives `vlmtok.compress` beside the method.
    """
    family, model = FAMILIES[name], shared(name)
    written, rows = prompt.ids[:0], []
    for _ in range(STEPS):
        row = asked.row(prompt, written, encoded)
        whole = torch.cat([hidden, row.hidden[len(hidden) :]])
        kept = torch.cat([stays, torch.ones(len(written), dtype=torch.bool)]).nonzero()[:, 0]
        row = replace(row, hidden=whole).take(kept)
        if family.positions == "1d":
            row = replace(row, positions=torch.arange(len(row))[None])
        rows.append(asked.logits(row, ()))
        written = torch.cat([written, rows[-1].argmax()[None]])
    with vlmtok.compress(model, method, trace=True, **(given or {})) as run:
        for options in ({}, {"use_cache": False}):
            tokens, logits = generate(model, family.collect(prompt).inputs(), **options)
            assert (logits[0] - torch.stack(rows)).abs().max() <= NOISE
            assert torch.equal(tokens[0], written)
        left = int(stays.sum()) - sum(prompt.kinds == 0)
        assert run.report().visual("decoder")[1] == left
        assert sum(found.kept for found in run.trace().pictures) == left
        assert any("acts at 'projected'" in note for note in run.report().notes)


def assert_batch(name: str, which: str, method: str) -> None:
    """A batch's answers are those of its rows, left padding and different pictures in the rows included."""
    family, model = FAMILIES[name], shared(name)
    batch = family.batch(*getattr(family, which))
    with vlmtok.compress(model, method, **GIVEN.get(method, {})):
        tokens, logits = generate(model, batch.inputs())
        for i, prompt in enumerate(batch.prompts):
            alone, one = generate(model, family.collect(prompt).inputs())
            assert torch.equal(alone[0], tokens[i])
            assert (one[0] - logits[i]).abs().max() <= NOISE
        if name.startswith("glm"):  # which gives beams of several pictures the features of others
            batch = family.batch(*family.rows)
        if family.beams:
            model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False, num_beams=2)


@pytest.mark.parametrize(
    ("name", "pattern", "separators"),
    [
        *((*case, how) for case in CANVASES for how in ("drop", "keep")),
        *((*case, "drop") for case in (*CROPS, *PACKS)),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_plain_loops(name: str, pattern: str, method: str, separators: str) -> None:
    """Answers equal the oracle's on the tokens that loops keep and merge, with a cache and without."""
    if method == "recoverable" and name not in CLASSED:
        with pytest.raises(SiteError, match="class token"):
            vlmtok.compress(shared(name), method, **GIVEN[method])
        return
    family, model = FAMILIES[name], shared(name)
    by_loops, settings, layer = METHODS[method]
    prompt = family.prompt(pattern, 3)
    look = Look("picture")
    with vlmtok.compress(model, look):
        generate(model, family.collect(prompt).inputs(), 1)
    asked = oracle(name, shared(name, "eager"))
    with torch.no_grad():
        encoded = asked.encode(prompt)
        hidden = asked.row(prompt, prompt.ids[:0], encoded).hidden.clone()
        stays = torch.ones(len(prompt.ids), dtype=torch.bool)
        merged = 0
        for seen, made in zip(look.seen, signals_of(name, prompt, pattern, look, layer), strict=True):
            score, flat, keys, wide = made
            for part in set(seen.part.tolist()):
                here = (seen.part == part).nonzero()[:, 0]
                columns = seen.columns[here]
                if part == -1:
                    stays[columns] = separators == "keep"
                    continue
                before = hidden[columns]
                slots = by_loops(before, score[here, 0], flat[here, 0], keys[here], wide[here])
                stays[columns] = False
                for place, token in slots.items():
                    merged += not torch.equal(token, before[place])
                    stays[columns[place]] = True
                    hidden[columns[place]] = token
    assert bool(merged) == (method in MERGING) and not stays.all()
    made = vlmtok.create_method(method, separators=separators, **settings)
    assert_answers(name, prompt, made, asked, encoded, hidden, stays, GIVEN.get(method))


@pytest.mark.parametrize(
    "method", ["visionzip:keep=0.5", "prumerge", "prumerge:plus=true", "scope:keep=0.5", "mmtok:keep=0.5"]
)
@pytest.mark.parametrize(
    ("name", "which"),
    [("llava_next", "several"), ("llava_onevision", "clips"), *((n, "several") for n in (*SQUARES, *PACKED))],
)
def test_a_batch_equals_its_rows(name: str, which: str, method: str) -> None:
    """Left padding, different pictures in the rows, beams."""
    assert_batch(name, which, method)


@pytest.mark.parametrize("name", sorted(CLASSED))
def test_a_batch_with_a_signal_of_the_users_equals_its_rows(name: str) -> None:
    """The same where the method needs what the user gives, row by row."""
    assert_batch(name, "several", "recoverable")
