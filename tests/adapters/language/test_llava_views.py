"""What views, signals and traces show inside LLaVA."""

from __future__ import annotations

import torch
from support import oracle
from support.checks import assert_equal, gap
from support.llava_by_oracle import decider, llava
from support.models import Batch

import vlmtok
from vlmtok import Reduction, Site
from vlmtok.core.view import TokenView


def test_views_show_the_rows_without_padding():
    """columns, entered, text and sizes of every view, row by row against the oracle's."""
    from support.checks import watched

    model, batch = llava(), Batch.of("^3I5", "2I2", "^2I1I4", "6")
    methods = vlmtok.parse_methods("pitome:ratio=0.8+sparsevlm:tokens=192:layers=(2;4):budgets=(5;3)")
    with torch.no_grad(), watched(methods) as seen, vlmtok.compress(model, methods) as run:
        model(**batch.inputs())
    found = {}
    for s in seen:
        if s.view.site.stage == "vision":
            continue
        for g in range(s.view.tokens.shape[0]):
            found.setdefault(str(s.view.site), []).append((s, g))
    expected = {}
    with torch.no_grad():
        for row in range(len(batch)):
            player = decider(methods, run)()
            oracle.Llava(model).forward(batch.rows[row], batch.pixels[row], player, row)
            for note in player.notes:
                if note.view.site.stage != "vision":
                    expected.setdefault(str(note.view.site), []).append(note.view)
    assert set(found) == set(expected)
    for site, views in expected.items():
        rest = list(found[site])
        assert len(rest) == len(views)
        for view in views:
            match = [
                (s, g)
                for s, g in rest
                if s.view.tokens.shape[1] == view.tokens.shape[1] and gap(s.view.tokens[g], view.tokens[0]) < 1e-5
            ]
            assert len(match) == 1, f"no view of {site} holds these tokens"
            s, g = match[0]
            rest.remove((s, g))
            assert s.view.entered == view.entered
            assert s.view.depth == view.depth
            assert s.view.columns[g].tolist() == view.columns[0].tolist()
            sizes = torch.ones(view.tokens.shape[1]) if view.size is None else view.size[0]
            mine = torch.ones(view.tokens.shape[1]) if s.view.size is None else s.view.size[g]
            assert_equal(mine, sizes, 0)
            for name, value in s.signals.items():
                other = view.maybe(name)
                assert (value is None) == (other is None), name
                if value is not None:
                    assert_equal(value[g], other[0], what=name)


def test_users_signals_reach_every_stage():
    model, batch = llava(), Batch.of("^3I5")

    class Mine(vlmtok.Random):
        def sites(self, layout):
            return [Site("projected", needs=("mine",)), Site("decoder", 2, "start", ("mine",))]

        def reduce(self, view):
            score = view.signal("mine")
            best = score.argsort(dim=1, stable=True)[:, : view.tokens.shape[1] // 2]
            return Reduction(best.sort(dim=1).values)

    caught = []

    def mine(view):
        assert isinstance(view, TokenView)
        caught.append(view.site.stage)
        return -view.columns.float()

    with torch.no_grad(), vlmtok.compress(model, Mine(), signals={"mine": mine}, trace=True) as run:
        model(**batch.inputs())
        owner = run.trace()[0].owner
    assert caught == ["projected", "decoder"]
    assert (owner >= 0).tolist() == [False] * 12 + [True] * 4


def test_traces_equal_the_oracle():
    model, batch = llava(), Batch.of("^3I5", "^2I1I4")
    methods = vlmtok.parse_methods("pitome:ratio=0.8+random:keep=0.6+random:keep=0.5:stage=decoder:layer=3")
    with torch.no_grad(), vlmtok.compress(model, methods, trace=True) as run:
        model(**batch.inputs())
        trace = run.trace()
    assert len(trace) == 3
    at = 0
    with torch.no_grad():
        for row in range(2):
            for index in range(len(batch.pixels[row])):
                player = decider(methods, run)()
                _, kept = oracle.Llava(model).forward(batch.rows[row], batch.pixels[row], player, row)
                tower = oracle.run_tower(
                    oracle.Llava(model).vision, batch.pixels[row][index : index + 1], decider(methods[:1], run)()
                )
                left = kept.rank[kept.picture == index].tolist()
                wanted = [slot in left for slot in tower.source.tolist()]
                assert (trace[at].owner >= 0).tolist() == wanted
                assert trace[at].kept == len(left)
                groups = {}
                for patch, slot in enumerate(tower.source.tolist()):
                    groups.setdefault(slot, set()).add(int(trace[at].owner[patch]))
                assert all(len(owners) == 1 for owners in groups.values())
                at += 1
