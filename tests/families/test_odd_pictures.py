"""Strips and pictures of a few pixels on a checkpoint of every family: where the bare model answers, so does every
method that attaches, and where it does not, one line says so."""

import pytest
from PIL import Image
from support.checkpoints import picture

import vlmtok
from vlmtok import loading
from vlmtok.errors import VlmtokError
from vlmtok.lab.comparing import Comparing
from vlmtok.loading import LoadError

from .test_checkpoints import QUESTION, SAVED

SIZES = ((640, 40), (40, 640), (10, 900), (900, 10), (3, 50), (8, 8), (1, 1))
METHODS = ("todre:keep=0.2", "visionzip", "fastv:K=1", "random:keep=0.5")


@pytest.mark.parametrize("name", SAVED)
def test_odd_pictures_are_answered_where_the_bare_model_answers(name, tmp_path):
    model = loading.load(str(SAVED[name](tmp_path)))
    methods = [method for method in METHODS if _attaches(model, method)]
    answered = 0
    for size in SIZES:
        image = picture(*size) if min(size) > 9 else Image.new("RGB", size, (200, 30, 30))
        try:
            comparing = Comparing(model, image, QUESTION, max_new_tokens=2)
            comparing.bare()
        except LoadError as problem:  # the processor's own refusal
            assert "\n" not in str(problem)
            continue
        except Exception:  # the model's: a compressed one says that the bare one fails
            for method in methods:
                with pytest.raises(LoadError, match="bare as it is"):
                    comparing.with_method(method, rounds=0)
            continue
        for method in methods:
            found = comparing.with_method(method, rounds=0)
            assert found.overlay is not None, (size, method, found.overlay_problem)
            answered += 1
    assert answered >= 2 * len(methods) or not methods or name == "llama4"  # its host falls over every picture


def _attaches(model, method):
    try:
        vlmtok.compress(model.model, method).remove()
    except VlmtokError:
        return False
    return True
