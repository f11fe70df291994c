"""Traces of caches: cuts in front of it and inside the language model, merges, forgetting, and when there are none."""

from dataclasses import dataclass

import pytest
import torch
from support.hosts_of import cache_name, cache_of
from support.models import IMAGE, PLACEHOLDERS, llava
from vlmtok.adapters.language.holding import held_with

import vlmtok
from vlmtok import Method, Reduction, Site
from vlmtok.core.eviction import Entries, Piece, staying
from vlmtok.core.trace import PictureTrace, Trace
from vlmtok.errors import ParameterError

DEPTH = 5


@pytest.fixture(scope="module")
def model():
    return llava(depth=DEPTH)


def inputs(pictures=2):
    text = torch.arange(5, 9)
    ids = torch.cat([text, *([torch.full((PLACEHOLDERS,), IMAGE), text] * pictures)])[None]
    torch.manual_seed(3)
    return {"input_ids": ids, "pixel_values": torch.randn(pictures, 3, 32, 32)}


@dataclass(eq=False)
class Every(Method):
    """Keeps every n-th entry of caches; others join the one before them, or go.

    Args:
        n: of how many one stays.
        joins: the first others of each n that join.
        layers: where.
        stays: whether all stays.
        every: decode steps.
    """

    n: int = 2
    joins: int = 0
    layers: tuple = None
    stays: bool = False
    every: int = 0

    def sites(self, layout):
        layers = layout.cached_layers(self.layers)
        return [Site("cache", layer, scope="picture", every=self.every) for layer in layers]

    def reduce(self, view):
        if self.stays:
            return None
        place = torch.arange(view.counts.n)
        keep, src = place[place % self.n == 0], place[(place % self.n > 0) & (place % self.n <= self.joins)]
        rows = view.tokens.shape[0]
        return Reduction(keep.expand(rows, -1), src.expand(rows, -1), (src // self.n).expand(rows, -1))

    def count(self, counts):
        return counts.n if self.stays else -(-counts.n // self.n)


@torch.no_grad()
def traced(model, methods, pictures=2, **options):
    with vlmtok.compress(model, methods, trace=True) as run:
        model.generate(**inputs(pictures), max_new_tokens=4, do_sample=False, **options)
        return run.trace()


def test_what_joined_is_held(model):
    """Of each three patches the second joins the first and the third goes; all of that in two layers alone."""
    for picture in traced(model, Every(3, joins=1, layers=(1, 3))).pictures:
        wanted = torch.ones(DEPTH, PLACEHOLDERS)
        wanted[[1, 3], 2::3] = 0
        assert torch.equal(picture.cached, wanted)
        assert torch.equal(picture.held_in(), wanted.sum(0))


def test_layers_hold_what_reached_them(model):
    """Behind cuts before and inside the language model the entries of each layer are those of its own tokens."""
    cuts = [vlmtok.Random(keep=0.75), vlmtok.Random(keep=0.5, stage="decoder", layer=2)]
    for picture in traced(model, [*cuts, Every(2, layers=(0, 2, 4))]).pictures:
        (_, first), (_, second) = picture.steps
        for layer in range(DEPTH):
            owner = first if layer < 2 else second
            reached = (owner >= 0).nonzero()[:, 0].tolist()
            held = reached[::2] if layer in (0, 2, 4) else reached
            assert picture.cached[layer].nonzero()[:, 0].tolist() == held
            assert set(picture.cached[layer].tolist()) == {0.0, 1.0}


def test_groups_of_a_tower_are_held_together(model):
    """Patches that share a token share its entry."""
    for picture in traced(model, [vlmtok.ToMe(r=2), Every(2)]).pictures:
        assert len(picture.owner.unique()) < PLACEHOLDERS
        for slot in picture.owner.unique():
            assert len(picture.cached[:, picture.owner == slot].unique(dim=1).T) == 1
        slots = picture.owner.unique()
        firsts = torch.stack([picture.cached[0, picture.owner == slot][0] for slot in slots])
        assert float(firsts.sum()) == -(-len(slots) // 2)


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_forgotten_left_the_layers_before(model, forget):
    method = vlmtok.FastV(K=3, keep=0.25, forget=forget)
    for picture in traced(model, method).pictures:
        if not forget:
            assert picture.cached is None
            continue
        assert torch.equal(picture.cached, (picture.owner >= 0).float().expand(DEPTH, -1))
        assert picture.kept < PLACEHOLDERS


def test_forgetting_and_choosing_add_up(model):
    fastv = vlmtok.FastV(K=3, keep=0.5, forget=True)
    for picture in traced(model, [fastv, Every(2, layers=(1,))]).pictures:
        left = picture.owner >= 0
        assert torch.equal(picture.cached[[0, 2, 3, 4]], left.float().expand(4, -1))
        assert picture.cached[1].nonzero()[:, 0].tolist() == left.nonzero()[:, 0].tolist()[::2]


def test_what_leaves_later_does_not_change_what_the_prefill_left(model):
    """Entries go on leaving while the answer is written; the trace is of the moment behind the prefill."""
    once, always = (traced(model, Every(2, every=every)) for every in (0, 1))
    for one, other in zip(once.pictures, always.pictures):
        assert torch.equal(one.cached, other.cached) and float(one.cached.mean()) == 0.5


def test_all_that_stays_is_said_so(model):
    trace = traced(model, Every(stays=True))
    assert all(torch.equal(picture.cached, torch.ones(DEPTH, PLACEHOLDERS)) for picture in trace.pictures)


@torch.no_grad()
def test_nothing_is_said_where_nothing_acts_on_a_cache(model):
    for picture in traced(model, vlmtok.Random(keep=0.5)).pictures:
        assert picture.cached is None
        with pytest.raises(ParameterError, match="no method acted on one"):
            picture.held_in()
    with vlmtok.compress(model, Every(), trace=True) as run:
        model(**inputs())
        assert run.trace()[0].cached is not None
        with pytest.warns(vlmtok.errors.VlmtokWarning, match="without one"):
            model(**inputs(), use_cache=False)
        assert run.trace()[0].cached is None and "cache" not in str(run.trace())
        model(**inputs())
        held = run.trace()[0].cached
        model(input_ids=torch.arange(5, 9)[None])  # no pictures: the last ones still are the last ones
        assert torch.equal(run.trace()[0].cached, held)


@torch.no_grad()
def test_columns_are_counted_behind_what_the_cache_held(model):
    """A picture that comes on a filled cache; keys tell which of its entries are there."""
    given, held = inputs(1), {}
    for stays in (True, False):
        with vlmtok.compress(model, Every(3, layers=(1, 2), stays=stays), trace=True) as run:
            cache = model(input_ids=torch.arange(5, 12)[None], use_cache=True)
            cache = cache_of(model(**given, **{cache_name(model.forward): cache_of(cache)}))
            held[stays] = [layer.keys for layer in cache.layers]
            trace = run.trace()
    first = 7 + 4
    for layer, (whole, now) in enumerate(zip(*held.values())):
        there = [
            float((now == whole[:, :, first + patch, None]).all(-1).any(-1).float().mean())
            for patch in range(PLACEHOLDERS)
        ]
        assert trace[0].cached[layer].tolist() == there and (sum(there) < PLACEHOLDERS) == (layer in (1, 2))


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_of_the_one_before(model):
    def fail(*args):
        raise RuntimeError("out of patience")

    with vlmtok.compress(model, Every(), trace=True) as run:
        model(**inputs())
        assert run.trace()[0].cached is not None
        hook = model.model.language_model.layers[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of patience"):
            model(**inputs())
        hook.remove()
        assert run.trace()[0].cached is None


def test_it_is_told_in_one_line(model):
    one, two = traced(model, Every(2, layers=(0, 2)), pictures=1), traced(model, Every(2, layers=(0, 2)))
    said = "key-value caches behind the prefill: 8 to 16 of 16 patches in each of 5 layers, 64 of 80 together"
    assert said in str(one) and said in repr(one) and said in one.sheet().text() and said in repr(one[0])
    assert "prefill: 16 to 32 of 32 patches in each of 5 layers, 128 of 160 together" in two.sheet().text()
    many = Trace([one[0]] * 7)
    assert "prefill: 56 to 112 of 112 patches in each of 5 layers, 448 of 560 together" in many.sheet().text()
    table = torch.tensor([[0.5, 0.25, 0.0], [torch.nan] * 3, [1.0, 1.0, 1.0]])
    assert "prefill: 0.8 to 3 of 3 patches in each of 2 layers, 3.8 of 6 together" in repr(
        PictureTrace(torch.arange(3), (), None, cached=table)
    )
    assert "cache" not in repr(PictureTrace(torch.arange(3), (), None))


def test_entries_by_a_loop():
    """`held_with` on random views, with merges, empty entries and invalid slots."""
    g = torch.Generator().manual_seed(5)
    for _ in range(20):
        entries = Entries(torch.zeros(3, 2, 12, 4), torch.zeros(3, 2, 12, 4))
        index, columns = torch.tensor([2, 0]), torch.tensor([[3, 4, 6, 7, 9], [1, 2, 3, 8, 11]])
        order = torch.rand(2, 5, generator=g).argsort(1)
        keep, src = order[:, :2], order[:, 2:]
        valid = torch.tensor([[True, True], [True, False]])
        dst = torch.randint(-1, 2, src.shape, generator=g)
        dst = torch.where((dst == 1) & ~valid[:, 1:], -1, dst)
        piece = Piece(index, columns, Reduction(keep, src, dst, valid=valid))
        held = held_with(staying(entries, [piece], None)[0], [piece])
        wanted = [[True] * 12 for _ in range(3)]
        for view, row in enumerate(index.tolist()):
            for place, column in enumerate(columns[view].tolist()):
                stays = any(keep[view, slot] == place and valid[view, slot] for slot in range(2))
                joins = any(src[view, j] == place and dst[view, j] >= 0 for j in range(3))
                wanted[row][column] = stays or joins
        assert held.tolist() == wanted
