"""What cannot be served is refused before the engine hears of it, and the engine goes on."""

from __future__ import annotations

import pytest
from checkpoints import make, prompt
from engine_side import Request, run
from pictures import pictures
from PIL import Image

REFUSED = {
    "fastv": "one length for all layers",
    "todre": "todre:tau=none is served",
    "aim": "aim:prune=false is served",
    "prumerge": "depends on the picture",
    "averagepool:output_size=5": "cannot be divided",
    "divprune:keep=0.25:scope=sample": "scope",
    "divprune:positions=keep": "position",
    "divprune:keep=": "no value",
    "divprune:kep=4": "kep",
    "divprun:keep=4": "divprune",
    "": "",
}
"""A spec, and what its refusal must say; an empty one means none."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("llava_clip", tmp_path_factory.mktemp("llava_clip"))


def test_a_refusal_says_why_and_the_next_request_is_answered(folder):
    (picture,) = pictures(1)
    text = prompt("llava_clip", 1)
    good = Request(text, (picture,), "divprune:keep=5")
    rounds = [[good]]
    for spec in REFUSED:
        rounds += [[Request(text, (picture,), spec)], [good]]
    (first,), *others = run(folder, rounds)
    assert not first.error
    for spec, (refused,), (after,) in zip(REFUSED, others[::2], others[1::2]):
        if spec:
            assert refused.error.startswith("ValueError: vlmtok: ") and REFUSED[spec] in refused.error, (spec, refused)
            assert "\n" not in refused.error.strip(), refused.error
        assert after.ids == first.ids and after.prompt == first.prompt, spec


def test_a_setting_that_is_no_text(folder):
    (picture,) = pictures(1)
    request = Request(prompt("llava_clip", 1), (picture,), 16)  # type: ignore[arg-type]
    ((reply,),) = run(folder, [[request]])
    assert "must be a spec" in reply.error


def test_a_spec_of_the_engine_that_cannot_be_served_ends_its_start(folder):
    with pytest.raises(RuntimeError, match="one length for all layers"):
        run(folder, [], spec="fastv")


def test_pictures_that_are_too_small_or_odd_are_answered_or_refused(folder):
    sizes = ((1, 1), (1, 300), (300, 1), (7, 7), (640, 40))
    text = prompt("llava_clip", 1)
    rounds = [[Request(text, (Image.new("RGB", size, (200, 30, 30)),), "divprune:keep=5")] for size in sizes]
    good = [[Request(text, tuple(pictures(1)), "divprune:keep=5")]]
    *odd, (last,) = run(folder, [*rounds, *good])
    assert all(len(reply.ids) == 6 or reply.error for (reply,) in odd)
    assert len(last.ids) == 6
