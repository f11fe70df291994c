"""Captioned pictures: splits, determinism, captions that hold of their picture and of none that is alike, shifts."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok.errors import ParameterError
from vlmtok.evaluation.scenes import galleries
from vlmtok.evaluation.scenes.captioned import (
    CLASSES,
    SIDE,
    TEMPLATE,
    Backdrop,
    Captioned,
    Thing,
    relation_of,
    sample,
)
from vlmtok.evaluation.scenes.galleries import GALLERY, gallery, lone_pictures
from vlmtok.evaluation.scenes.painting import COLORS
from vlmtok.evaluation.scenes.shifts import SEVERITIES, shift

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.sampled_from(["train", "held-out"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_pictures_are_of_their_split_and_captions_hold_of_one_alone(seed, split, lone):
    group = sample(split, 4, seed, lone=lone)
    assert group == sample(split, 4, seed, lone=lone)
    if lone:
        assert len(group[0].things) == 1 and not group[0].things[0].small and group[0].backdrop.kind == "clutter"
    rng = random.Random(seed)
    for picture in group:
        assert picture.split == split and 1 <= len(picture.things) <= 4
        claim = picture.claim(rng)
        assert [claim.holds(other) for other in group] == [other is picture for other in group]
        assert claim.key == picture.claim(rng).key  # however it is worded
        for i, thing in enumerate(picture.things):
            assert thing.radius <= min(thing.x, thing.y, SIDE - thing.x, SIDE - thing.y)
            for other in picture.things[:i]:
                assert np.hypot(thing.x - other.x, thing.y - other.y) > thing.radius + other.radius


def _read(text, picture):
    """Whether a caption is true, by another way: its words one by one, in the order in which they stand."""
    words = text.removeprefix("a picture of ").split()
    phrases = []
    while words:
        if words[0] == "a":
            phrases.append(tuple(words[1:4]))
            words = words[4:]
        else:
            phrases.append(words.pop(0))
    named = [one for one in phrases if isinstance(one, tuple)]
    seen = {("small" if t.small else "large", t.color, t.shape): t for t in picture.things}
    if set(named) != set(seen) or len(named) != len(picture.things):
        return False
    first = seen[named[0]]
    if len(named) == 1:
        across = ("left", "center", "right")[int(3 * first.x / SIDE)]
        down = ("top", "middle", "bottom")[int(3 * first.y / SIDE)]
        return phrases[-2:] == [down, across]
    second, (dx, dy) = seen[named[1]], (first.x - seen[named[1]].x, first.y - seen[named[1]].y)
    assert second is not first and min(abs(dx), abs(dy)) < max(abs(dx), abs(dy)) - 10  # nobody would argue
    if abs(dy) > abs(dx):
        return phrases[1] == ("above" if dy < 0 else "below")
    return phrases[1:3] == ["left" if dx < 0 else "right", "of"]


def test_captions_are_true_word_by_word():
    rng = random.Random(0)
    for seed in range(60):
        group = sample("train", 3, seed)
        for picture in group:
            text = picture.claim(rng).text
            assert [_read(text, other) for other in group] == [other is picture for other in group], text


def test_a_caption_that_is_wrong_in_one_word_does_not_hold():
    first = next(g[0] for g in (sample("train", 1, seed) for seed in range(100)) if len(g[0].things) == 3)
    claim = first.claim(random.Random(0))
    assert claim.holds(first)
    a, b, c = first.things
    assert not claim.holds(replace(first, things=(a, b)))
    assert not claim.holds(replace(first, things=(a, b, replace(c, small=not c.small))))
    swapped = (replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y), c)
    assert not claim.holds(replace(first, things=swapped))
    assert relation_of(a, b) != relation_of(b, a)
    assert not replace(first, things=(a,)).class_claim().holds(first)


def test_things_show_in_their_colors_and_drawing_repeats():
    for seed in range(6):
        picture = sample("train", 1, seed)[0]
        drawn = np.asarray(picture.draw(), int)
        assert drawn.shape == (SIDE, SIDE, 3) and np.array_equal(drawn, np.asarray(picture.draw(), int))
        for thing in picture.things:
            r = int(thing.radius)
            box = drawn[int(thing.y) - r : int(thing.y) + r + 1, int(thing.x) - r : int(thing.x) + r + 1]
            assert np.abs(box - COLORS[thing.color]).sum(-1).min() < 40, thing


def test_a_gallery_has_a_hundred_captions_each_true_of_one_picture():
    shown = gallery(0)
    assert len(shown) == len({one.id for one in shown}) == len({one.caption for one in shown}) == GALLERY
    assert shown == gallery(0) and shown != gallery(1)
    assert all(one.picture.split == "held-out" for one in shown)
    for one in shown[:25]:
        assert [_read(one.caption, other.picture) for other in shown].count(True) == 1, one.caption
        assert _read(one.caption, one.picture)


@pytest.mark.parametrize("first", [0, 1])
def test_a_gallery_leaves_out_what_an_old_caption_or_a_new_one_would_be_true_of_too(monkeypatch, first):
    """A caption of the one says "a above b with c" and holds of both; of the other "a above c", and holds of one."""
    a, b, c = Thing("star", "red", True, 16, 16, 6), Thing("ring", "blue", True, 16, 80, 6), "pink"
    low, aside = (Thing("cross", c, True, x, y, 6) for x, y in ((48, 112), (112, 48)))
    backdrop = Backdrop("plain", ((9, 9, 9), (9, 9, 9)), 0)
    one, other = Captioned((a, b, aside), backdrop), Captioned((a, low, b), backdrop)
    assert one.claim(random.Random(0)).holds(other) and not other.claim(random.Random(0)).holds(one)
    third = Captioned((a,), backdrop)
    given = iter([(one,), (other,), (third,)] if first == 0 else [(other,), (one,), (third,)])
    monkeypatch.setattr(galleries, "GALLERY", 2)
    monkeypatch.setattr(galleries, "sample", lambda *_: next(given))
    assert {shown.picture for shown in gallery(0)} == {one if first == 0 else other, third}


def test_lone_pictures_cover_the_classes():
    shown = lone_pictures(600)
    assert shown[:50] == lone_pictures(50)
    assert {one.caption for one in shown} == {TEMPLATE.format(*one) for one in CLASSES}
    for one in shown:
        (thing,) = one.picture.things
        assert one.caption == TEMPLATE.format(thing.color, thing.shape) and one.picture.split == "held-out"


def test_shifts_repeat_by_id_and_grow_with_severity():
    picture = lone_pictures(1)[0].picture.draw()
    levels = np.asarray(picture, float)
    for kind in SEVERITIES:
        far = []
        for severity in range(1, 6):
            worse = np.asarray(shift(picture, kind, severity, "a"), float)
            assert worse.shape == levels.shape
            assert np.array_equal(worse, np.asarray(shift(picture, kind, severity, "a"), float))
            other = np.asarray(shift(picture, kind, severity, "b"), float)
            assert np.array_equal(worse, other) == (kind != "noise")
            far.append(np.abs(worse - levels).mean())
        assert far == sorted(far) and far[0] > 0 and far[4] > 1.5 * far[0], (kind, far)
    assert np.asarray(shift(picture, "contrast", 5, "a")).std() < 0.2 * levels.std()


def test_shifts_that_do_not_exist():
    picture = lone_pictures(1)[0].picture.draw()
    with pytest.raises(ParameterError, match=r"noise, blur, contrast.*'fog'"):
        shift(picture, "fog", 1, "a")
    with pytest.raises(ParameterError, match="1 to 5, got 6"):
        shift(picture, "blur", 6, "a")
