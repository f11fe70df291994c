"""Deprecations that our calls cause are errors in these tests, raised or logged."""

import logging
import re
import sys
import warnings

import pytest
from support.places import TESTS


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_is_raised_is_an_error(kind):
    with pytest.raises(kind):
        warnings.warn("`old` goes", kind, stacklevel=1)


def test_the_old_name_of_an_argument_is_an_error():
    """The shim of transformers itself, on a function of ours."""
    from transformers.utils.deprecation import deprecate_kwarg

    @deprecate_kwarg("old", version="99.0", new_name="new")
    def asked(new=None):
        return new

    assert asked(new=1) == 1
    with pytest.raises(FutureWarning, match="`old` is deprecated"):
        asked(old=1)


def test_what_transformers_logs_is_an_error_in_every_test():
    import transformers

    log = transformers.logging.get_logger("transformers.models.novel")
    for _ in range(2):
        with pytest.raises(FutureWarning, match="deprecated"):
            log.warning_once("`old` is deprecated. Use `new` instead.")
    log.warning_once("nothing of the kind")


def test_what_it_logs_of_its_own_calls_is_none(monkeypatch):
    message = "Passing `generation_config` together with arguments is deprecated"
    log = logging.getLogger("transformers.generation.utils")
    with pytest.raises(FutureWarning):
        log.warning(message)
    monkeypatch.setitem(sys._getframe().f_globals, "__name__", "transformers.generation.candidate_generator")
    log.warning(message)


def test_no_test_hands_a_cache_by_the_name_of_one_release():
    """`hosts_of.with_cache` and `cache_of` ask the host; tests of hosts that never were name what they play."""
    old = re.compile(r"past_key_values=|\.past_key_values\b")
    found = {file.relative_to(TESTS).as_posix() for file in TESTS.rglob("*.py") if old.search(file.read_text("utf-8"))}
    assert found <= {"adapters/test_deprecations.py"}
