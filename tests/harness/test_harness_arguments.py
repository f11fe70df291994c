"""What stands behind ``--model_args``, as far as it needs no lmms-eval; the rest is in ``integrations/lmms_eval``."""

from types import SimpleNamespace

import pytest

from vlmtok import loading
from vlmtok.errors import MissingSignal, ParameterError, SiteError, SpecError, UnknownMethod
from vlmtok.harness.arguments import Arguments, unquoted
from vlmtok.harness.bounds import bounded


def read(**given):
    return Arguments.read({"pretrained": "tiny-llava", "method": "none", **given})


def test_values_are_read_as_lmms_eval_hands_them_over():
    found = read(
        method="'averagepool:output_size=(4,6)'", batch_size="8", max_batch_size=64, device=None, figures=False
    )
    assert found == Arguments("tiny-llava", "averagepool:output_size=(4,6)", 8, figures=False) and not found.bare
    assert read(method="None").bare and read(method='"none"').bare


@pytest.mark.parametrize(
    ("value", "plain"), [("'a,b'", "a,b"), ('"a"', "a"), ("'a", "'a"), ("'", "'"), ("a'b'", "a'b'"), (3, 3)]
)
def test_quotes_around_a_value_are_taken_off(value, plain):
    assert unquoted(value) == plain


@pytest.mark.parametrize(
    "method",
    ["tome:r=4+divprune:keep=16", "'sparsevlm:layers=(2,3,7)'", "sparsevlm:layers=(2;3;7)", "pitome:ratio=0.9+todre"],
)
def test_chains_and_brackets_fit_a_checkpoint(method):
    read(method=method).check()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"pretrained": ""}, ParameterError, "pretrained= is missing: a folder or hub id"),
        ({"method": None}, ParameterError, "method= is missing"),
        ({"method": "  "}, ParameterError, "method= is missing"),
        ({"metod": "todre"}, ParameterError, "there is no 'metod'; did you mean 'method'"),
        ({"batch_size": 0}, ParameterError, "batch_size=0"),
        ({"batch_size": "auto:4"}, ParameterError, "auto:4"),
        ({"max_pixels": "1e6"}, ParameterError, "max_pixels='1e6'"),
        ({"figures": "yes"}, ParameterError, "true or false"),
        ({"method": "tome+"}, SpecError, "tome"),
        ({"method": "none+tome"}, UnknownMethod, "none"),
        ({"method": "tome:r=nonsense"}, ParameterError, "r"),
    ],
)
def test_what_is_wrong_is_said(given, error, words):
    with pytest.raises(error, match=words):
        read(**given)


def processor(size):
    return SimpleNamespace(image_processor=SimpleNamespace(size=size))


def test_bounds_on_pixels_keep_what_is_not_asked():
    own = processor(SimpleNamespace(shortest_edge=3136, longest_edge=12845056, height=None))
    assert bounded(read(), own) == bounded(read(), processor({})) == {}
    assert bounded(read(max_pixels="1003520"), own) == {"shortest_edge": 3136, "longest_edge": 1003520}
    assert bounded(read(min_pixels=200704), own) == {"shortest_edge": 200704, "longest_edge": 12845056}
    with pytest.raises(ParameterError, match="min_pixels=3136 is above 100"):
        bounded(read(max_pixels=100), own)
    for size in ({"shortest_edge": 336}, {"height": 384, "width": 384}, {"shortest_edge": 800, "longest_edge": 1333}):
        with pytest.raises(ParameterError, match="max_pixels cannot be set"):
            bounded(read(max_pixels=1003520), processor(size))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "fastv:K=40"}, (SiteError, ParameterError, MissingSignal)),
        ({"pretrained": "no/such", "method": "divprune"}, loading.LoadError),
    ],
)
def test_a_checkpoint_is_asked_before_its_weights(given, error, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error):
        read(**given).check()
