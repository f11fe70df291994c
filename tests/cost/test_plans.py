"""Plans and profiles as data: rows of counts are the rows that run, and every visit costs once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vlmtok import Random, Reduction, Site
from vlmtok.core.ledger import Decoding, Event, Group, StageRun
from vlmtok.core.model_shape import BlockShape, LanguageShape, Part, Tokens
from vlmtok.core.pictures import TEXT, Picture
from vlmtok.core.rows import PromptRows
from vlmtok.cost.assemble import uncut
from vlmtok.cost.flops import Account, count_decoder, tower_profiles
from vlmtok.cost.planned_rows import PlannedRows, Prompt, share
from vlmtok.forecast.estimate import attach, estimate, shape_of


# ---------------------------------------------------------------------- rows as counts are the rows that run
def real_rows(prompt: Prompt, grid: tuple[int, int] | None = None) -> PromptRows:
    """The row that a prompt describes, with columns."""
    line, pictures = [(TEXT, 0)] * prompt.text[0], []
    for index in range(prompt.pictures):
        first = len(line)
        parts = prompt.parts or (prompt.visual,)
        line += [(index, part) for part, n in enumerate(parts) for _ in range(n)]
        behind = sum(prompt.text[index + 1 :])
        columns = list(range(first, len(line)))
        picture = Picture(0, index, columns, grid=grid, text_after=behind, text_after_last=behind, n=len(columns))
        pictures.append(picture)
        line += [(TEXT, 0)] * prompt.text[index + 1]
    label, part = (torch.tensor([[one[i] for one in line]]) for i in (0, 1))
    place = torch.arange(len(line))[None]
    return PromptRows(1, len(line), [len(line)], pictures, label, part if prompt.parts else None, None, place, place)


def seen(groups) -> list[tuple[int, ...]]:
    """Views of both kinds of groups, one by one."""
    return sorted(
        (group.n, group.entered, group.text, group.length, len(group.units), int(group.mixed)) for group in groups
    )


@given(
    text=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    parts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    scopes=st.lists(st.sampled_from(["picture", "sample", "part"]), min_size=1, max_size=2),
    keep=st.integers(1, 3),
    inside=st.booleans(),
)
def test_groups_of_a_plan_are_those_of_the_rows(text, parts, scopes, keep, inside):
    """Of every scope, with pictures side by side, in parts and at the end; behind one cut too."""
    assume(sum(text) + sum(parts))
    pieces = tuple(parts) if len(parts) > 1 else ()
    prompt = Prompt(pictures=len(text) - 1, text=tuple(text), visual=sum(parts), parts=pieces)
    planned, real = PlannedRows(prompt), real_rows(prompt)
    for rows in (planned, real):
        rows.enter(hold=inside)
    assert planned.length == real.length
    assert [shown.n for shown in planned.pictures] == [real.count(picture) for picture in real.pictures]
    for scope in scopes:
        groups = planned.groups(scope, by_text=True), real.groups(scope, by_text=True)
        assert seen(groups[0]) == seen(groups[1])
        planned.cut([(group, min(keep, group.n)) for group in groups[0]])
        cuts = [(g, Reduction(torch.arange(min(keep, g.n)).expand(len(g.units), -1))) for g in groups[1]]
        real.cut(torch.zeros(1, real.length, 1), cuts, False)
        assert planned.length == real.length
        if scope == "sample" or (scope == "picture" and pieces):
            return  # what is left of one picture, or of one part, is content


@pytest.mark.parametrize("scope", ["picture", "sample", "part"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("parts", [(6,), (6, 3), (4, 6, 6)])
def test_grids_of_a_plan_are_those_of_the_rows(parts, pictures, scope):
    """Of one picture, or of one of its parts, if the tokens are as many."""
    pieces = parts if len(parts) > 1 else ()
    prompt = Prompt(pictures=pictures, text=(1,) * (pictures + 1), visual=sum(parts), parts=pieces)
    groups = PlannedRows(prompt, (2, 3)).groups(scope), real_rows(prompt, (2, 3)).groups(scope)
    planned, real = ([(group.n, group.grid) for group in sorted(found, key=lambda g: g.n)] for found in groups)
    assert planned == real
    assert ((6, (2, 3)) in planned) == (scope == "part" or (not pieces and (scope == "picture" or pictures == 1)))


@given(count=st.integers(0, 60), among=st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_a_share_adds_up_and_is_even(count, among):
    parts = share(count, among)
    if not sum(among):
        assert parts == [0] * len(among)
        return
    assert sum(parts) == count and len(parts) == len(among)
    assert all(abs(part - count * n / sum(among)) < 1 for part, n in zip(parts, among))


def test_a_sample_shortens_all_its_pictures():
    rows = PlannedRows(Prompt(pictures=3, text=(1, 1, 1, 1), visual=12))
    (group,) = rows.groups("sample")
    rows.cut([(group, 9)])
    assert [picture.n for picture in rows.pictures] == [3, 3, 3] and rows.length == 13


@pytest.mark.parametrize(("behind", "left"), [(0, 575), (1, 576)])
def test_a_picture_that_ends_its_row_is_held_inside(behind, left):
    """Its last token decides and is never cut: one token less is shown, none leaves."""
    report = estimate("llava-1.5-7b", "pyramiddrop:layers=(8;):ratios=(1.0;)", text_tokens=(64, behind))
    (line,) = [line for line in report.sites if line.site.stage == "decoder"]
    assert (line.before, line.after.high) == (640 + behind, 640 + behind)
    run = report._runs[-1]
    (group,) = [group for event in run.events for group in event.groups]
    assert (group.n, group.entered) == (left, left)


# ---------------------------------------------------------------------- towers
def test_several_insertions_into_one_block():
    run = StageRun("vision", 1, 10)
    run.events = [
        Event("vision", 0, "start", 0, "insert", 10, 12),
        Event("vision", 0, "start", 1, "insert", 12, 13),
        Event("vision", 0, "mid", 0, "cut", 13, 11),
    ]
    after = tower_profiles(run, 2, protected=1)[1]
    assert after.layers == (Tokens(13, 13, 11, 9), Tokens(8, 8, 8, 7)) and after.left == 8


class Two(Random):
    """At the end of two blocks that do not follow each other."""

    def sites(self, layout):
        return [Site("vision", 0, "end"), Site("vision", 2, "end")]


def test_sites_are_joined_only_where_they_follow_each_other():
    report = estimate("vit-b-16", Two(keep=150))
    assert [(line.before, line.after.high) for line in report.sites] == [(197, 151), (151, 151)]
    same = [dataclasses.replace(line, before=197, after=report.sites[0].after) for line in report.sites]
    report.sites = same
    text = report.to_markdown()
    assert "vision layer 0 end" in text and "vision layer 2 end" in text and "layers 0 - 2" not in text


def test_rows_are_spread_behind_the_last_block_that_is_used():
    shape = shape_of("vit-b-16")
    shape = dataclasses.replace(shape, vision=dataclasses.replace(shape.vision, spread=True))
    layers = [layer.attention.high for layer in estimate(shape, "tome:r=8").layers]
    assert layers == [197 - 8 * i for i in range(12)]


@pytest.mark.parametrize("crops", [1, 2, 5])
def test_crops_bring_their_tokens(crops):
    shape = shape_of("llava-next-7b")
    layers = estimate(shape, "fastv", crops=crops).layers
    tower, language = ([layer for layer in layers if layer.stage == stage] for stage in ("vision", "decoder"))
    assert language[0].before - 64 == shape.visual * crops // shape.crops == crops * (tower[0].before - 1)


# ---------------------------------------------------------------------- passes that ran several times
def test_steps_of_equal_passes_are_added_up():
    block = BlockShape.of(4, 8, 2)
    shape = LanguageShape((block,) * 2, Part("lm_head", 40, path="lm_head"))
    run = StageRun("decoder", 2, 30, pictures=2, visual=40, parts={"lm_head": 2})
    run.decodings = [Decoding(2, 0, 3, 6)]
    once, thrice = Account(), Account()
    count_decoder(once, run, shape)
    count_decoder(thrice, run, shape, 3)
    assert once.stepped == 3 and thrice.stepped == 9
    assert thrice.steps == (3 * once.steps[0], 3 * once.steps[1]) and once.steps[0] > 0
    assert thrice.lines["prefill"] == tuple(3 * macs for macs in once.lines["prefill"])


# ---------------------------------------------------------------------- what cut nothing
def test_a_count_that_cuts_one_view_of_several_did_something():
    attachment = attach(shape_of("llava-1.5-7b"), "random:keep=5")
    large, small = Group(1, 9, 5, 9), Group(1, 3, 3, 3)

    def said(*groups):
        run = StageRun("decoder", 2, 20, pictures=2)
        run.events = [Event("projected", None, "end", 0, "cut", 20, 16, groups)]
        return list(uncut(attachment, [run]))

    assert said(large, small) == said(small, large) == said(large) == []
    assert len(said(small)) == 1 and "the largest one had 3 tokens" in said(small)[0]
