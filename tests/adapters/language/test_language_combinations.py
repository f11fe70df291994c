"""Several cuts inside a language model: three at one boundary, later turns, crops, and what the tower hands on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from support import models, oracle
from support.checks import assert_equal
from support.hosts_of import cache_of, with_cache
from support.llava_by_oracle import (
    Top,
    assert_generates_as_the_oracle,
    assert_two_turns_equal_the_oracle,
    decider,
    llava,
)
from support.models import Batch

import vlmtok
from vlmtok import Method, Reduction, Site
from vlmtok.errors import CacheError, PassError


# ---------------------------------------------------------------------- several cuts at one boundary
class Scored(Top):
    """Keeps what the prompt's last token looks at, in an order of its own; one row a picture."""

    def sites(self, layout):
        return [
            Site(s.stage, s.layer, s.point, ("last_attention",), s.positions, s.scope) for s in super().sites(layout)
        ]

    def reduce(self, view):
        best = view.signal("last_attention").sum(1).argsort(dim=1, descending=True, stable=True)
        return Reduction(best[:, : self.count(view.counts)])


BOUNDARIES = {
    "behind": [Scored(11, "decoder", 2, "end"), Scored(8, "decoder", 2, "end"), Scored(5, "decoder", 2, "end")],
    "ahead": [Scored(11, "decoder", 3), Scored(8, "decoder", 3), Scored(5, "decoder", 3)],
    "on both sides": [
        Scored(12, "decoder", 2, "end"),
        Top(9, "decoder", 3, ordered=False),
        Scored(7, "decoder", 3),
        Scored(4, "decoder", 3, scope="sample"),
    ],
    "renumbered between": [
        Scored(11, "decoder", 2, "end", positions="renumber"),
        Scored(8, "decoder", 3),
        Scored(5, "decoder", 3, positions="renumber"),
    ],
    "renumbered, then ahead": [Top(9, "decoder", 3, positions="renumber", ordered=False), Scored(5, "decoder", 3)],
    "kept twice": [Top(0.6, "decoder", 1), Top(0.5, "decoder", 4)],
    "scored, kept, scored": [Scored(10, "decoder", 1), Top(8, "decoder", 2), Scored(5, "decoder", 4, "end")],
    "published": vlmtok.parse_methods(
        "sparsevlm:tokens=192:layers=(3;):budgets=(12;)+fastv:K=3:keep=9+pyramiddrop:layers=(3;):ratios=(0.4;)"
    ),
}


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BOUNDARIES)
def test_cuts_at_one_boundary_equal_the_oracle(name, attention, cached):
    """Rotary embeddings, keys, masks and padding follow each cut before the next one looks."""
    batch = Batch.of("^3I5", "2I1I2", "^4I1", "6", "^1II3")
    assert_generates_as_the_oracle(llava(attention), batch, BOUNDARIES[name], cached)


# ---------------------------------------------------------------------- later turns
@pytest.mark.parametrize("place", [("decoder", 2, "start"), ("decoder", 2, "end")])
@pytest.mark.parametrize("before", [[], [Top(9)]], ids=["alone", "behind the boundary"])
def test_scored_in_two_turns(place, before):
    """The second picture is scored by attention over the first turn too, whose keys are in the cache."""
    methods = [*before, Scored(5, *place)]
    assert_two_turns_equal_the_oracle(methods, Batch.of("^3I5"), Batch.of("2I4", seed=2))


def test_a_third_turn_behind_a_text_turn():
    """Text, a picture, text: the mask has the length of all that was seen."""
    model, methods = llava(), [Top(0.5), Top(0.5, "decoder", 2, positions="renumber")]
    one, two, last = Batch.of("^7"), Batch.of("2I4", seed=7), models.prompt("3", seed=3)
    with torch.no_grad(), vlmtok.compress(model, methods) as run:
        cache, seen = cache_of(model(**one.inputs(), use_cache=True)), len(one.rows[0])
        for ids, pixels in ((two.rows[0], two.pixels[0]), (last, None)):
            seen += len(ids)
            given = {} if pixels is None else {"pixel_values": pixels}
            mask = torch.ones(1, seen, dtype=torch.int64)
            found = model(input_ids=ids[None], attention_mask=mask, **given, **with_cache(model, cache), use_cache=True)
    whole = torch.cat([one.rows[0], two.rows[0], last])
    with torch.no_grad():
        hidden, _ = oracle.Llava(model).forward(whole, two.pixels[0], decider(methods, run)())
        assert_equal(found.logits[0, -3:], model.lm_head(hidden[-3:]))


@pytest.mark.parametrize("rows", [("^3I5", "2I1I2"), ("2I1I2", "^3I5")])
def test_the_shortest_tail_bounds_a_crop(rows):
    """A crop takes equally many columns off every row: no more than stand behind the last picture of each."""
    model, batch = llava(), Batch.of(*rows)
    more = models.prompt("3", seed=4).expand(2, -1)
    with torch.no_grad(), vlmtok.compress(model, [Top(0.5)]):
        for count, fits in ((2, True), (3, False)):
            cache = cache_of(model(**batch.inputs(), use_cache=True))
            cache.crop(-count)
            seen = batch.inputs()["attention_mask"][:, :-count]
            mask = torch.cat([seen, torch.ones(2, 3, dtype=torch.int64)], 1)
            if fits:
                model(input_ids=more, attention_mask=mask, **with_cache(model, cache))
                continue
            with pytest.raises((CacheError, PassError), match="only the last 2 stand behind a picture"):
                model(input_ids=more, attention_mask=mask, **with_cache(model, cache))


def test_an_answer_may_be_taken_off_again():
    """More columns than the prompt had behind its picture, by two crops; what comes next is as without them."""
    model, batch = llava(), Batch.of("^3I1")
    length, more, other = len(batch.rows[0]), models.prompt("6", seed=4)[None], models.prompt("6", seed=5)[None]

    def ask(cache, ids, seen):
        mask = torch.ones(1, seen + ids.shape[1], dtype=torch.int64)
        return model(input_ids=ids, attention_mask=mask, **with_cache(model, cache), use_cache=True).logits

    with torch.no_grad(), vlmtok.compress(model, [Top(0.5), Top(0.5, "decoder", 2, positions="renumber")]):
        wanted = ask(cache_of(model(**batch.inputs(), use_cache=True)), more, length)
        cache = cache_of(model(**batch.inputs(), use_cache=True))
        ask(cache, torch.cat([more[:, :3], other[:, :3]], 1), length)
        cache.crop(-2)
        ask(cache, other[:, :1], length + 4)
        cache.crop(-2)
        found = ask(cache, more[:, 3:], length + 3)
    assert_equal(found[0], wanted[0, 3:])


# ---------------------------------------------------------------------- what the tower hands on
@dataclass(eq=False)
class Scattered(Method):
    """Keeps tokens above 0 in one channel, wherever they stand: real slots are scattered among the others."""

    def sites(self, layout):
        return [Site("features")]

    def reduce(self, view):
        keep = torch.arange(view.tokens.shape[1]).expand(view.tokens.shape[:2])
        return Reduction(keep, valid=view.tokens[..., 0] > view.tokens[..., 0].median())

    def count(self, counts):
        return None


@dataclass(eq=False)
class BlockOrder(Method):
    """Cuts nothing; notes sizes, keys, and the class token's key, which a picture has once."""

    stage: str = "projected"
    seen: list = field(default_factory=list, repr=False)

    def sites(self, layout):
        return [Site(self.stage, needs=("keys@vision:-1", "protected_keys@vision:-1"), scope="picture")]

    def reduce(self, view):
        keys, guard = view.signal("keys@vision:-1"), view.signal("protected_keys@vision:-1")
        size = torch.ones(keys.shape[:2]) if view.size is None else view.size
        self.seen += [(view.tokens[i], size[i], keys[i], guard[i]) for i in range(len(keys))]


@pytest.mark.parametrize("merge", ["", "tome:r=2+"])
def test_views_know_the_slots_that_are_real(merge):
    """Sizes and signals of a tower reach the language model slot by slot, behind a cut of any shape."""
    before, behind, scattered = BlockOrder("features"), BlockOrder(), Scattered()
    methods = [*(vlmtok.parse_methods(merge[:-1]) if merge else []), before, scattered, behind]
    batch = Batch.of("^3I5", "2I1I2", "^4I1")
    with torch.no_grad(), vlmtok.compress(llava(), methods):
        llava()(**batch.inputs())
    features = torch.stack([tokens for tokens, _, _, _ in before.seen])
    real = features[..., 0] > features[..., 0].median()
    assert len(behind.seen) == len(before.seen) == 4 and len(set(real.sum(1).tolist())) > 1
    found = sorted((g.flatten().tolist(), size.tolist(), keys.flatten().tolist()) for _, size, keys, g in behind.seen)
    wanted = sorted(
        (g.flatten().tolist(), size[mine].tolist(), keys[mine].flatten().tolist())
        for mine, (_, size, keys, g) in zip(real, before.seen)
    )
    assert found == wanted
    assert not merge or any(max(size) > 1 for _, size, _ in wanted)


@dataclass(eq=False)
class Pairs(Method):
    """Token i + n / 2 joins token i; pairs whose first one is not above the median are no slots."""

    valid: list = field(default_factory=list, repr=False)

    def sites(self, layout):
        return [Site("features")]

    def reduce(self, view):
        batch, n, _ = view.tokens.shape
        keep, src = (torch.arange(n).expand(batch, n).split(n // 2, 1)[i] for i in (0, 1))
        valid = view.tokens[:, : n // 2, 0] > view.tokens[:, : n // 2, 0].median()
        self.valid.append(valid)
        return Reduction(keep, src, keep, valid=valid)

    def count(self, counts):
        return None


def test_traces_of_slots_that_are_not_real():
    """Who joined a slot that is none is gone with it."""
    pairs, batch = Pairs(), Batch.of("^3I5", "2I1I2", "^4I1")
    with torch.no_grad(), vlmtok.compress(llava(), pairs, trace=True) as run:
        llava()(**batch.inputs())
        trace = run.trace()
    (valid,) = pairs.valid
    assert len(trace) == len(valid) == 4 and len(set(valid.sum(1).tolist())) > 1
    for picture, real in zip(trace.pictures, valid.tolist()):
        wanted = [i if yes else -1 for i, yes in enumerate(real)]
        assert picture.owner.tolist() == wanted * 2
        assert picture.kept == sum(real)


# ---------------------------------------------------------------------- three steps in one block, with gradients
@pytest.mark.parametrize("name", ["timm ViT", "timm EVA-02", "open_clip CLIP", "HF CLIP vision"])
@pytest.mark.parametrize("spec", ["tome:r=2+pitome:ratio=0.8+tome:r=1", "tome:r=1+crossget:guidance=cross:rv=2"])
def test_several_cuts_in_one_block_are_the_same_with_gradients(name, spec):
    """Where gradients flow a merge goes through the block's own output, slot by slot."""
    tower, model = models.TOWERS[name], models.shared(name)
    pictures = tower.pictures(2)
    with vlmtok.compress(model, spec):
        with torch.no_grad():
            wanted = tower.run(model, pictures)
        found = tower.run(model, pictures.clone().requires_grad_())
    assert found.requires_grad
    assert_equal(found.detach(), wanted)
