"""Methods on each other in one block, one boundary or one tower: signals, traces, insertions and plans of several."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.checks import assert_equal, assert_same, watched
from support.llava_by_oracle import Top, llava
from support.models import Batch
from support.towers_by_oracle import assert_tower_equals_the_oracle

import vlmtok
from vlmtok import Layout, Reduction, Site, StageLayout, TokenView
from vlmtok.core.attachment import Attachment
from vlmtok.core.sequence import Sequence, TowerRow
from vlmtok.core.signals import DECODER_SIGNALS, DecoderTaps, TowerTaps, tower_signal
from vlmtok.core.trace import PictureTrace
from vlmtok.forecast.estimate import attach, estimate, shape_of


# ---------------------------------------------------------------------- traces behind several cuts
def owners(seen, at, patches):
    """Slot of every patch behind each of the reductions that a watched tower took, by loops; -1 dropped."""
    where, steps = list(range(patches)), []
    for one in seen:
        assigned = one.reduction.assignment(one.view.tokens.shape[1])[at].tolist()
        where = [-1 if slot < 0 else assigned[slot] for slot in where]
        steps.append(where)
    return steps


@pytest.mark.parametrize("name", ["timm ViT", "open_clip CLIP", "HF DINOv2"])
@pytest.mark.parametrize(
    "spec",
    [
        "random:keep=0.7:stage=vision:layer=0+random:keep=0.6:stage=vision:layer=1:seed=3",
        "random:keep=0.7:stage=vision:layer=0+tome:r=2",
        "tome:r=3+random:keep=0.5:stage=vision:layer=1",
    ],
)
def test_traces_behind_two_prunings_of_a_tower(name, spec):
    """Owners, sizes, the first site that dropped a patch, and what a patch is unmerged to: all cuts in a row."""
    tower, model, methods = models.TOWERS[name], models.shared(name), vlmtok.parse_methods(spec)
    pictures = tower.pictures(3)
    with torch.no_grad(), vlmtok.compress(model, methods, trace=True) as run:
        with watched(run.methods) as seen:
            tower.run(model, pictures)
        trace = run.trace()
    seen = [one for one in seen if one.reduction is not None]
    assert len(trace) == 3 and len(seen) >= 2
    dropped_late = 0
    for i, picture in enumerate(trace.pictures):
        steps = owners(seen, i, picture.patches)
        last = steps[-1]
        first = {slot: last.index(slot) for slot in set(last) - {-1}}
        assert picture.owner.tolist() == [first.get(slot, -1) for slot in last]
        assert [slots.tolist() for slots in picture.slots] == steps
        assert picture.group_sizes().tolist() == [last.count(slot) if slot >= 0 else 0 for slot in last]
        assert picture.kept == len(first)
        sites = [one.view.site for one in seen]
        gone = [next((site for site, step in zip(sites, steps) if step[p] < 0), None) for p in range(picture.patches)]
        found = picture.dropped_at()
        assert [(s and (s.layer, s.point)) for s in found] == [(s and (s.layer, s.point)) for s in gone]
        dropped_late += sum(site is not None and site != sites[0] for site in gone)
        rank = {slot: r for r, slot in enumerate(sorted(first, key=first.get))}
        values = torch.arange(1.0, len(first) + 1)[:, None]
        assert picture.unmerge(values)[:, 0].tolist() == [rank[slot] + 1.0 if slot >= 0 else 0.0 for slot in last]
    assert dropped_late


def test_sizes_of_a_trace_with_dropped_patches():
    picture = PictureTrace(torch.tensor([0, -1, 0, 3, -1, 3, 3]), (), None)
    assert picture.group_sizes().tolist() == [2, 0, 2, 3, 0, 3, 3]
    assert picture.kept == 2


@pytest.mark.parametrize("stack", ["prumerge:keep=none", "prumerge:keep=none+fastv:K=2:keep=6"])
def test_traces_of_towers_that_keep_as_many_as_a_picture_needs(stack):
    """Slots that are not real own nothing, at the step of the tower and at the end."""
    batch = Batch.of("^3I5", "2I1I2", "^4I1")
    with torch.no_grad(), vlmtok.compress(llava(), stack, trace=True) as run:
        with watched(run.methods) as seen:
            llava()(**batch.inputs())
        trace = run.trace()
    (prumerge,) = [one.reduction for one in seen if one.view.site.stage == "features"]
    real = prumerge.valid.sum(1).tolist()
    assert len(set(real)) > 1, "all pictures keep as many: nothing is ragged here"
    for picture, slots in zip(trace.pictures, real):
        first = next(owner for site, owner in picture.steps if site.stage == "features")
        assert int(first[first >= 0].unique().numel()) >= slots
        assert picture.kept == slots if "fastv" not in stack else picture.kept <= slots


# ---------------------------------------------------------------------- tokens that several methods insert
CROSS = "crossget:guidance=cross:rv"


@pytest.mark.parametrize("name", ["ViT 7 x 3", "EVA-02 5 x 3", "registers 3 x 7"])
@pytest.mark.parametrize(
    "spec",
    [
        "crossget:guidance=cross:rv=1+crossget:guidance=cross:rv=2",
        "tome:r=1+crossget:guidance=cross:rv=1+crossget:guidance=cross:rv=1",
    ],
)
def test_two_methods_insert_into_one_block(name, spec):
    """Each gets its own outputs back, and both are seen by attention and by signals."""
    assert_tower_equals_the_oracle(name, spec, 2)


class Puts(vlmtok.Random):
    """Puts in a patch of its own, then what became of it in the block before; cuts by what attention that one gives."""

    def __init__(self, keep, place):
        super().__init__(keep=keep)
        self.place = place

    def sites(self, layout):
        return [
            site
            for layer in (0, 1, 2)
            for site in (
                Site("vision", layer, "start", ("inserted",)),
                Site("vision", layer, "mid", ("protected_attention",)),
            )
        ]

    def insert(self, view):
        before = view.maybe("inserted")
        return view.tokens[:, self.place : self.place + 1] * 2 if before is None else before

    def reduce(self, view):
        if view.site.point == "start":
            return None
        score = view.signal("protected_attention")[:, -1 - self.place].mean(1)
        return Reduction(score.argsort(dim=1, descending=True, stable=True)[:, : self.count(view.counts)])


@pytest.mark.parametrize("name", ["ViT 7 x 3", "EVA-02 5 x 3", "registers 3 x 7"])
def test_two_methods_insert_tokens_that_differ(name):
    """Each gets back what became of its own, block after block."""
    assert_tower_equals_the_oracle(name, [Puts(0.9, 0), Puts(0.9, 1)], 4)


class Late(vlmtok.ToMe):
    """Merges from block 1 on."""

    def sites(self, layout):
        return [site for site in super().sites(layout) if site.layer >= 1]


@pytest.mark.parametrize("name", ["ViT 7 x 3", "EVA-02 5 x 3"])
def test_attention_is_proportional_from_the_first_method_that_wants_it(name):
    """Sizes of a merge without it are there already, and count from the other method's first block on."""
    assert_tower_equals_the_oracle(name, [vlmtok.ToMe(r=[4, 0, 0], prop_attn=False), Late(r=2)], 1)


@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=3), sized=st.booleans())
def test_inserted_tokens_add_up(counts, sized):
    sequence = Sequence(TowerRow(1, 4), 4, size=torch.full((2, 5), 3.0) if sized else None)
    for count in counts:
        sequence.insert(count)
    assert sequence.row == TowerRow(1, 4, sum(counts)) and sequence.row.length == 5 + sum(counts)
    if sized:
        assert sequence.size[:, 5:].eq(1).all() and sequence.size.shape[1] == sequence.row.length
    sequence.discard()
    assert sequence.row == TowerRow(1, 4) and (not sized or sequence.size.tolist() == [[3.0] * 5] * 2)


def test_only_what_stands_at_a_start_inserts():
    """Of a method that inserts at the start of a block and merges in it, one entry of the two inserts."""
    entries = attach(shape_of("vit-b-16"), "crossget:guidance=cross:rv=4").at("vision", 3)
    assert [(entry.site.point, entry.inserts) for entry in entries] == [("start", True), ("mid", False)]


# ---------------------------------------------------------------------- what is made of a row
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_log_sizes_in_each_dtype(dtypes):
    sequence = Sequence(TowerRow(1, 2), 2, size=torch.tensor([[1.0, 2.0, 3.0]]))
    for dtype in (*dtypes, dtypes[0]):
        found = sequence.key_bias(dtype)
        assert found.dtype == dtype
        assert_same(found[0, 0, 0], sequence.size[0].log().to(dtype))


@given(seed=st.integers(0, 1000), prefix=st.integers(0, 2), suffix=st.integers(0, 2), mean=st.booleans())
def test_a_widened_reduction_leaves_the_outer_tokens(seed, prefix, suffix, mean):
    """Of the whole row: protected tokens in front, inserted ones behind; empty entries stay empty."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in range(2)])
    keep, src = order[:, :4], order[:, 4:8]
    dst = torch.randint(-1, 4, src.shape, generator=generator)
    reduction = (Reduction.mean if mean else Reduction)(keep, src, dst)
    x = torch.randn(2, prefix + 9 + suffix, 3, generator=generator)
    size = torch.randint(1, 4, x.shape[:2], generator=generator).float()
    found, sizes = reduction.widen(prefix, 9, suffix).apply(x, size)
    inner, own = reduction.apply(x[:, prefix : prefix + 9], size[:, prefix : prefix + 9])
    assert_equal(found, torch.cat([x[:, :prefix], inner, x[:, prefix + 9 :]], 1))
    assert_equal(sizes, torch.cat([size[:, :prefix], own, size[:, prefix + 9 :]], 1), 0)


# ---------------------------------------------------------------------- signals by hand
@given(seed=st.integers(0, 1000), cap=st.none() | st.floats(0.3, 3.0), groups=st.integers(1, 3), past=st.integers(0, 2))
def test_logits_with_a_soft_cap_and_grouped_keys(seed, cap, groups, past):
    """Entry by entry: scaled, capped, then masked; head h reads group h // (H / Hkv). Rows are their softmax."""
    generator = torch.Generator().manual_seed(seed)
    heads, length, width = 2 * groups, 5, 3
    q = torch.randn(1, heads, length, width, generator=generator) * 2
    k = torch.randn(1, 2, past + length, width, generator=generator)
    look = torch.arange(past + length) <= torch.arange(length)[:, None] + past
    bias = torch.where(look, 0.0, -torch.inf)[None, None]
    here = torch.arange(past, past + length)[None]
    places = torch.arange(length)[None]
    taps = DecoderTaps(
        lambda rows: q.gather(2, rows[:, None, :, None].expand(-1, heads, -1, width)),
        lambda: k,
        0.7,
        lambda rows: bias.gather(2, rows[:, None, :, None].expand(-1, 1, -1, past + length)),
        here,
        places[:, 1:3],
        places[:, 3:],
        cap=cap,
    )
    found = DECODER_SIGNALS["attention_logits"](taps)
    for head in range(heads):
        whole = torch.empty(length, past + length)
        for i in range(length):
            for j in range(past + length):
                logit = 0.7 * float(q[0, head, i] @ k[0, head // groups, j])
                logit = cap * math.tanh(logit / cap) if cap else logit
                whole[i, j] = logit if j <= i + past else -math.inf
        seen = whole[:, past:]
        assert torch.equal(found[0, head].isinf(), seen.isinf())
        assert_equal(found[0, head].nan_to_num(neginf=0), seen.nan_to_num(neginf=0))
        rows = whole.softmax(-1)[:, past:]
        assert_equal(DECODER_SIGNALS["text_attention"](taps)[0, head], rows[3:, 1:3])
        assert_equal(DECODER_SIGNALS["last_attention"](taps)[0, head], rows[-1, 1:3])


def test_text_behind_all_tokens_gets_no_attention_and_costs_none():
    """Nobody looks ahead: zeros, without a query made."""

    def never(*_):
        raise AssertionError("a query was made")

    places = torch.arange(6)[None]
    taps = DecoderTaps(never, never, 1.0, never, places, places[:, 1:4], places[:, 4:], mixed=False)
    assert DECODER_SIGNALS["attention_to_text"](taps).tolist() == [[0.0, 0.0, 0.0]]
    taps.mixed = True
    with pytest.raises(AssertionError, match="query"):
        DECODER_SIGNALS["attention_to_text"](taps)


@pytest.mark.parametrize("inserted", [0, 2])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["one bias", "a bias for each row"])
def test_received_attention_counts_sizes_rotations_and_insertions(turned, inserted, own):
    """The mean over heads and all rows of the softmax with log sizes, behind the cuts of the block."""
    row = TowerRow(1, 5, inserted)
    q, k = (torch.randn(2, 3, row.length, 4) for _ in range(2))
    bias = torch.randint(1, 6, (2, 1, row.length if own else 1, row.length)).float().log()
    angle = torch.rand(row.length, 4) + 0.5
    cut = Reduction(torch.tensor([[0, 2, 3], [4, 1, 0]]))
    again = Reduction(torch.tensor([[2, 0], [1, 2]]))
    taps = TowerTaps(
        row,
        torch.randn(2, row.length, 12),
        lambda: q,
        lambda: k,
        0.5,
        bias,
        (lambda x: x * angle) if turned else None,
        cuts=(cut, again),
    )
    a, b = (q * angle, k * angle) if turned else (q, k)
    rows = (0.5 * a @ b.transpose(-1, -2) + bias).softmax(-1)
    wanted = rows.mean((1, 2))[:, 1:6].gather(1, cut.keep).gather(1, again.keep)
    assert_equal(tower_signal("received_attention", taps), wanted)
    guards = torch.cat([rows[:, :, :1], rows[:, :, 6:]], 2)[..., 1:6].transpose(1, 2)
    left = cut.keep.gather(1, again.keep)[:, None, None].expand(-1, guards.shape[1], 3, -1)
    assert_equal(tower_signal("protected_attention", taps), guards.gather(3, left))
    # Of the rows that are left, not of those that the block saw.
    shorter = replace(taps, tokens=torch.randn(2, 3 + inserted, 12), left=TowerRow(1, 2, inserted))
    assert torch.equal(tower_signal("protected", shorter), shorter.tokens[:, [0, *range(3, 3 + inserted)]])


# ---------------------------------------------------------------------- lists of methods
def test_points_of_one_layer_come_in_their_order_whatever_the_lists():
    """A plan walks them as a run does: a start comes before the end of its layer."""
    start, end = Top(0.5, "decoder", 3, "start"), Top(100, "decoder", 3, "end", scope="sample")
    entries = [attach(shape_of("llava-1.5-7b"), both).entries for both in ([start, end], [end, start])]
    assert all([entry.site.point for entry in found] == ["start", "end"] for found in entries)
    for both in ([start, end], [end, start]):
        layers = [layer for layer in estimate("llava-1.5-7b", both, pictures=2).layers if layer.stage == "decoder"]
        assert [layer.visual.high for layer in layers[2:5]] == [1152, 576, 100]


def test_a_signal_is_shared_by_those_who_ask_for_it():
    """Two methods of one layer's attention: it is made once, and costs once."""
    attachment = attach(shape_of("llava-1.5-7b"), "visionzip:keep=0.5+scope:keep=0.5")
    asked = [need for entry in attachment.entries for need in entry.needs if need.stage == "vision"]
    made = [need for needs in attachment.tapped("vision").values() for need in needs]
    assert len(made) < len(asked) and {(n.name, n.layer) for n in made} == {(n.name, n.layer) for n in asked}
    assert len({(need.name, need.layer) for need in made}) == len(made)


def test_each_name_of_a_users_signals_has_its_own():
    layout = Layout("host", {"vision": StageLayout(2, 4, 1, 1, frozenset({"end"}))})
    made = Attachment([], layout, {"one": lambda view: view.tokens + 1, "two": lambda view: view.tokens + 2})
    signals: dict = {}
    view = TokenView(torch.zeros(1, 2, 4), Site("vision", 0), signals=signals)
    made.bind_user(view, signals)
    assert view.signal("one").eq(1).all() and view.signal("two").eq(2).all()
