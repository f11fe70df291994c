"""The overlay's words come from what ran, which differs between a tower, a language model, and what merges."""

import pytest
import torch
from support.checkpoints import picture, vit
from support.comparing import QUESTION, compare

from vlmtok import loading
from vlmtok.core.site import Site
from vlmtok.core.trace import PictureTrace
from vlmtok.lab.legend import legend

VISION, PROJECTED = Site("vision", 2, "mid"), Site("projected")
SECOND, SIXTH = Site("decoder", 1, "end"), Site("decoder", 6, "start")


def trace(*steps):
    return PictureTrace(torch.tensor(steps[-1][1]), tuple((site, torch.tensor(owner)) for site, owner in steps), (2, 2))


def said(*steps):
    return legend(trace(*steps))


def test_nothing_that_did_not_happen_is_said():
    merged = said((VISION, [0, 0, 2, 3]))
    assert "merged" in merged and "dark" not in merged and "dim" not in merged and "language model" not in merged
    early = said((PROJECTED, [0, -1, -1, 3]))
    assert "before the language model" in early and "merged" not in early and "layer" not in early
    late = said((SECOND, [0, -1, -1, 3]))
    assert "in the language model" in late and "layer" in late and "dark" not in late and "merged" not in late


def test_each_place_is_named_once():
    both = said((PROJECTED, [0, 1, -1, -1]), (SECOND, [0, -1, -1, -1]))
    assert "before the language model" in both and "in the language model" in both
    twice = said((SECOND, [0, 1, 2, -1]), (SIXTH, [0, 1, -1, -1]))
    assert twice.count("in the language model") == 1 and "6" in twice


def test_where_nothing_left():
    assert said((VISION, [0, 1, 2, 3])) == "every patch stayed"


@pytest.mark.parametrize(
    ("method", "holds", "lacks"),
    [
        ("todre:keep=0.1:tau=none", "before the language model", "merged"),
        ("fastv:K=2:keep=0.3", "in the language model", "before the language model"),
        ("tome:r=8", "merged", "language model"),
        ("tome:r=8+fastv:K=2:keep=0.3", "merged", "before the language model"),
    ],
)
def test_what_ran_on_a_vision_language_model(speaker, method, holds, lacks):
    words = compare(speaker, picture(), QUESTION, method).overlay_legend
    assert holds in words and lacks not in words


def test_what_ran_on_a_tower(tmp_path):
    words = compare(loading.load(str(vit(tmp_path))), picture(), None, "tome:r=3").overlay_legend
    assert "merged" in words and "language model" not in words and "projector" not in words
