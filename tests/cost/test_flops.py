"""Shapes of models and the books of what ran: tokens of each block, of later calls, and of quantised weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import vlmtok
from vlmtok.core.ledger import Decoding, Event, Group, Ledger, StageRun
from vlmtok.core.model_shape import BlockShape, Part, Tokens
from vlmtok.cost.flops import decoder_profiles, tower_profiles


# ---------------------------------------------------------------------- shapes
def test_a_block_counts_its_weights_and_products():
    block = BlockShape.of(8, 32, 4, kv_heads=2, head_width=3, gated=True)
    assert (block.attn, block.mlp) == (8 * 12 + 8 * 12 + 2 * 8 * 6, 3 * 8 * 32)
    assert (block.q, block.k) == (8 * 12, 8 * 6)
    assert block.macs(Tokens(5, 7, 4, 0)) == 5 * block.attn + 2 * 12 * 5 * 7 + 4 * block.mlp
    assert BlockShape.of(8, 32, 4).attn == 4 * 64


def test_a_part_counts_rows_tokens_and_pairs():
    assert Part("head", 10).macs(3) == 30
    assert Part("pool", 10, token=2, pair=3).macs(4, tokens=5) == 4 * (10 + 2 * 5 + 3 * 25)


def _events():
    return [
        Event("vision", 0, "start", 0, "insert", 10, 12),
        Event("vision", 0, "start", 0, "observe", 12, 12),
        Event("vision", 0, "mid", 0, "cut", 12, 9),
        Event("vision", 0, "end", 0, "cut", 9, 8),
        Event("vision", 1, "mid", 0, "cut", 6, 5),
    ]


def test_tokens_of_a_tower_follow_starts_merges_ends_and_insertions():
    run = StageRun("vision", 2, 10, events=_events())
    bare, after = tower_profiles(run, 3, protected=1)
    assert bare.layers == (Tokens(10, 10, 10, 9),) * 3 and bare.left == 10
    assert after.layers == (Tokens(12, 12, 9, 9), Tokens(6, 6, 5, 5), Tokens(5, 5, 5, 4)) and after.left == 5
    block = BlockShape.of(4, 8, 2)
    expected = 12 * 64 + 2 * 4 * 144 + 9 * 64 + 6 * 64 + 2 * 4 * 36 + 5 * 64 + 5 * 64 + 2 * 4 * 25 + 5 * 64
    assert after.macs((block,) * 3) == 2 * expected


def test_rows_that_are_spread_again_are_whole_behind_the_tower():
    run = StageRun("vision", 1, 10, events=[*_events(), Event("vision", 1, "end", -1, "spread", 5, 10)])
    assert [tokens.queries for tokens in tower_profiles(run, 3, 1)[1].layers] == [12, 6, 10]


def test_tokens_of_a_language_model_follow_cuts_and_the_past():
    group = Group(2, 20, 5, 20)
    run = StageRun("decoder", 2, 30, past=11, visual=40, seen=17, held=((0, 11), (2, 7)))
    run.events = [
        Event("projected", None, "end", 0, "cut", 30, 26, (Group(2, 20, 16, 20),)),
        Event("decoder", 0, "end", 1, "cut", 26, 20, (Group(2, 16, 10, 16),)),
        Event("decoder", 2, "start", 1, "observe", 20, 20, (group,)),
        Event("decoder", 2, "start", 2, "cut", 20, 14, (Group(2, 10, 4, 16),), ragged=True),
    ]
    block = dataclasses.replace(BlockShape.of(4, 8, 2), kv_bytes=3)
    bare, after = decoder_profiles(run, (block,) * 3)
    assert bare.layers == (Tokens(30, 47, 30, 20.0, held=47),) * 3
    assert after.layers == (
        Tokens(26, 37, 26, 16.0, held=37),
        Tokens(20, 31, 20, 10.0, held=31),
        Tokens(14, 21, 14, 4.0, held=21),
    )
    assert after.cached((block,) * 3) == 3 * 2 * (37 + 31 + 21)
    # Rows that keep different numbers are padded to the longest: what left is told apart from the padded length.
    run.events[-1] = dataclasses.replace(run.events[-1], gone=15)
    assert decoder_profiles(run, (block,) * 3)[1].layers[2] == Tokens(14, 21, 14, 2.5, held=21)
    # Steps add what a layer's own cache holds, one token each.
    steps = after.step_macs((block,) * 3, rows=2, first=1, steps=3)
    per_token = 3 * 3 * (block.attn + block.mlp)
    products = sum(2 * 4 * (held + i) for held in (37, 31, 21) for i in (2, 3, 4))
    assert steps == 2 * (per_token + products)


def test_entries_that_leave_a_cache_shorten_no_row_and_are_held_no_more():
    """In the layer that lost them, behind the pass: it saw them, steps do not; windows have none that leave."""
    block = dataclasses.replace(BlockShape.of(4, 8, 2), kv_bytes=3)
    blocks = (block, block, dataclasses.replace(block, window=8), block)
    run = StageRun("decoder", 2, 30, past=11, visual=40, seen=17, held=((0, 9), (2, 7)))
    run.events = [Event("decoder", 2, "start", 0, "cut", 30, 24, (Group(2, 20, 14, 20),))]
    seen = decoder_profiles(run, blocks)[1]
    run.events += [
        Event("cache", 0, "end", 0, "forget", 39, 33, (), gone=12),
        Event("cache", 0, "end", 1, "cut", 33, 21, (Group(2, 14, 2, 20),)),
        Event("cache", 1, "end", 1, "observe", 39, 39, (Group(2, 20, 20, 20),)),
        Event("cache", 3, "end", 1, "cut", 31, 20, (Group(2, 14, 4, 20),), ragged=True, gone=21),
    ]
    bare, after = decoder_profiles(run, blocks)
    assert run.columns == 30 and [run.reaching(layer) for layer in range(4)] == [30, 30, 24, 24]
    assert all(dataclasses.replace(a, held=b.held) == b for a, b in zip(after.layers, seen.layers))
    found = [[one.held for one in profile.layers] for profile in (bare, seen, after)]
    assert found == [[47, 47, 7, 47], [39, 39, 7, 31], [21, 39, 7, 20]] and after.left == 24
    assert after.cached(blocks) == 2 * 3 * (21 + 39 + 7 + 20) and after.peak(blocks) == 2 * 3 * (39 + 39 + 7 + 31)
    assert after.macs(blocks) == seen.macs(blocks)
    steps = after.step_macs(blocks, rows=2, first=1, steps=2)
    products = sum(2 * 4 * keys for held in (21, 39, 20) for keys in (held + 2, held + 3)) + 2 * 2 * 4 * 8
    assert steps == 2 * (4 * 2 * (block.attn + block.mlp) + products)


@pytest.mark.parametrize("held", [2, 5, 6, 7, 20])
def test_a_sliding_layer_sees_its_window_in_a_step(held):
    block = BlockShape(4, 2, 2, 2, 64, 64, 8, window=8)
    seen = [min(8, held + i) for i in range(3, 8)]
    assert block.step(held, 2, 5) == 5 * 128 + 2 * 4 * sum(seen)
    assert block.held(held) == min(held, 7)


# ---------------------------------------------------------------------- the ledger
def test_the_ledger_keeps_the_prefill_behind_later_calls_and_totals_all():
    ledger = Ledger()
    ledger.begin(StageRun("decoder", 1, 20, pictures=1))
    ledger.note("decoder", "lm_head", 1)
    for i in range(3):
        ledger.step(1, 20 + i)
        ledger.note("decoder", "lm_head", 1)
    ledger.begin(StageRun("decoder", 1, 4, past=23, seen=23))
    ledger.step(1, 27)
    assert ledger.last["decoder"].entered == 20 and ledger.last["continued"].entered == 4
    assert ledger.last["decoder"].parts == {"lm_head": 1}
    assert ledger.last["decoder"].decodings == [Decoding(1, 0, 3, 3)] and ledger.last["continued"].steps == 1
    again = ledger.begin(StageRun("decoder", 1, 20, pictures=1))
    assert "continued" not in ledger.last and ledger.last["decoder"] is again
    assert sorted((run.entered, run.steps, times) for run, times in ledger.totals()) == [
        (4, 1, 1),
        (20, 0, 1),
        (20, 3, 1),
    ]
    assert ledger.passes == {"decoder": 2, "continued": 1} and ledger.steps == 4


def test_entries_that_leave_while_an_answer_is_written_are_seen_until_then():
    """Each step sees what is there in front of it; steps behind a later turn count from that turn."""
    ledger, blocks = Ledger(), (BlockShape.of(4, 8, 2),) * 2
    run = ledger.begin(StageRun("decoder", 1, 20, pictures=1))
    ledger.visit(run, Event("cache", 0, "end", 0, "cut", 20, 12, (Group(1, 10, 2, 10),)))
    held, seen = [12, 20], [[], []]
    for number in range(1, 10):
        for layer in (0, 1):
            seen[layer].append(held[layer] + 1)
        ledger.step(1, held[0])
        held = [n + 1 for n in held]
        for layer, every in ((0, 3), (1, 4)):
            if number % every == 0:
                event = Event("cache", layer, "end", 0, "cut", held[layer], held[layer] - 2, (Group(1, 4, 2, 10),))
                ledger.visit(None, event)
                held[layer] -= 2
    assert run.decodings == [Decoding(1, 0, 9)] and [run.keeps(layer) for layer in (0, 1)] == [12, 20]
    assert run.losses(0) == [(3, 2), (6, 2), (9, 2)] and run.losses(1) == [(4, 2), (8, 2)]
    profile = decoder_profiles(run, blocks)[1]
    weights = 2 * (blocks[0].attn + blocks[0].mlp)
    for first, steps in ((0, 9), (0, 1), (2, 1), (3, 1), (2, 5), (5, 4)):
        products = sum(2 * 4 * sum(keys[first : first + steps]) for keys in seen)
        assert profile.step_macs(blocks, 1, first, steps) == steps * weights + products
    ledger.begin(StageRun("decoder", 1, 5, past=held[0], seen=29, held=((0, held[0]), (1, held[1]))))
    ledger.step(1, held[0] + 5)
    ledger.visit(None, Event("cache", 1, "end", 0, "cut", held[1] + 6, held[1] + 4, (Group(1, 4, 2, 10),)))
    ledger.step(1, held[0] + 6)
    later = ledger.last["continued"]
    assert later.decodings == [Decoding(1, 0, 2)] and (later.losses(0), later.losses(1)) == ([], [(1, 2)])


def test_steps_behind_entries_that_left_begin_where_the_cache_stands():
    ledger = Ledger()
    run = ledger.begin(StageRun("decoder", 2, 20, past=4, pictures=2, seen=4))
    ledger.visit(run, Event("cache", 0, "end", 0, "cut", 24, 15, (Group(2, 12, 3, 12),)))
    ledger.visit(run, Event("cache", 1, "end", 0, "cut", 24, 11, (Group(2, 12, 0, 12),)))
    for joined in range(3):
        ledger.step(2, 15 + joined)
    assert run.decodings == [Decoding(2, 0, 3)] and ledger.fired[("cache", 1, "end", 0)] == 1
    ledger.step(2, 14, layer=1)  # by another layer as many joined
    assert run.decodings == [Decoding(2, 0, 4)]
    other = ledger.begin(StageRun("decoder", 2, 20, past=4, pictures=2, seen=4))
    assert [kept.keeps(layer) for kept in (run, other) for layer in (0, 1, 2)] == [15, 11, 24, 24, 24, 24]


def test_a_step_on_a_cache_that_was_filled_bare_has_books_of_its_own():
    ledger = Ledger()
    ledger.step(2, 9)
    run = ledger.last["continued"]
    assert (run.rows, run.entered, run.past, run.steps) == (2, 0, 9, 1)
    ledger.step(3, 10)  # rows joined
    ledger.step(3, 11)
    ledger.step(3, 8)  # the host took four tokens off
    assert [(part.rows, part.first, part.steps) for part in run.decodings] == [(2, 0, 1), (3, 1, 2), (3, -1, 1)]


# ---------------------------------------------------------------------- reading weights
class _Quantised(nn.Module):
    """A linear map that stores its weights packed."""

    in_features, out_features = 6, 10

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(30, 1), requires_grad=False)


def test_linear_maps_count_by_features_not_by_storage():
    from vlmtok.adapters.account import weights

    low_rank = nn.ModuleDict({"base_layer": nn.Linear(6, 10), "lora_A": nn.Linear(6, 2), "lora_B": nn.Linear(2, 10)})
    assert weights(_Quantised()) == 60
    assert weights(low_rank) == 60 + 12 + 20
    assert weights(nn.MultiheadAttention(8, 2)) == 4 * 64
    assert weights(nn.MultiheadAttention(8, 2, kdim=5, vdim=3)) == 64 + 40 + 24 + 64
    assert weights(nn.LayerNorm(8)) == 0


def test_accounting_imports_no_library():
    import subprocess
    import sys

    code = (
        "import sys, vlmtok; vlmtok.budget('fastv', 'llava-1.5-7b', tokens=64);"
        "print(','.join(sorted({'timm', 'open_clip', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert vlmtok.estimate is not None
