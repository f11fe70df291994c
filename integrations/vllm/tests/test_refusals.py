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

SIZES = ((1, 1), (1, 300), (300, 1), (7, 7), (640, 40))
"""Of pictures, odd ones, which are answered or refused."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("llava_clip", tmp_path_factory.mktemp("llava_clip"))


def test_a_refusal_says_why_and_the_next_request_is_answered(folder):
    (picture,) = pictures(1)
    text = prompt("llava_clip", 1)
    good = Request(text, (picture,), "divprune:keep=5")
    wrong = {**REFUSED, 16: "must be a spec"}
    rounds = [[good]]
    for spec in wrong:
        rounds += [[Request(text, (picture,), spec)], [good]]  # type: ignore[arg-type]
    odd = [[Request(text, (Image.new("RGB", size, (200, 30, 30)),), "divprune:keep=5")] for size in SIZES]
    (first,), *others = run(folder, [*rounds, *odd, [good]])
    assert not first.error
    for (spec, word), (refused,), (after,) in zip(wrong.items(), others[::2], others[1::2]):
        if spec:
            assert refused.error.startswith("ValueError: vlmtok: ") and word in refused.error, (spec, refused)
            assert "\n" not in refused.error.strip(), refused.error
        assert after.ids == first.ids and after.prompt == first.prompt, spec
    shown = [reply for (reply,) in others[2 * len(wrong) : -1]]
    assert len(shown) == len(SIZES) and all(len(reply.ids) == 6 or reply.error for reply in shown)
    assert others[-1][0].ids == first.ids


def test_a_spec_of_the_engine_that_cannot_be_served_ends_its_start(folder):
    with pytest.raises(RuntimeError, match="one length for all layers"):
        run(folder, [], spec="fastv")
