"""Layer profiles: files, other depths, and numbers of entries."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmtok.core.layer_profile import LayerProfile, as_profile, read_profile
from vlmtok.errors import ParameterError

shares_of = st.lists(st.floats(0, 1), min_size=1, max_size=10).filter(any).map(tuple)


@given(
    shares=shares_of,
    keep=st.none() | st.floats(0, 1),
    samples=st.integers(0, 1000),
    model=st.sampled_from(["", "llava-hf/llava-1.5-7b-hf", "ein Modell für alle"]),
)
def test_a_file_holds_all_of_it(tmp_path_factory, shares, keep, samples, model):
    path = tmp_path_factory.mktemp("profiles") / "one.json"
    profile = LayerProfile(shares, model, keep, samples)
    profile.save(path)
    assert read_profile(path) == as_profile(str(path), "me") == profile
    assert json.loads(path.read_text("utf-8")).keys() == {"model", "keep", "samples", "shares"}


def test_other_depths_are_interpolated_from_end_to_end():
    profile = LayerProfile((0.8, 0.4, 0.2))
    assert profile.spread(3) == (0.8, 0.4, 0.2)
    assert profile.spread(5) == pytest.approx((0.8, 0.6, 0.4, 0.3, 0.2))
    assert profile.spread(2) == (0.8, 0.2) and profile.spread(1) == (0.4,)
    assert LayerProfile((0.3,)).spread(4) == (0.3,) * 4


@given(shares=shares_of, n=st.integers(1, 40), depth=st.integers(1, 12), keeps=st.lists(st.floats(0.01, 1), min_size=2))
def test_entries_are_exact_and_never_fewer_for_more(shares, n, depth, keeps):
    before = (0,) * depth
    for keep in sorted(keeps):
        found = LayerProfile(shares).entries(keep, n, depth)
        assert sum(found) == max(depth, int(keep * n * depth + 0.5))
        assert all(old <= new for old, new in zip(before, found)) and min(found) >= 1 and max(found) <= n
        before = found
    assert LayerProfile(shares).entries(1.0, n, depth) == LayerProfile(shares).entries(n + 5, n, depth) == (n,) * depth


def test_shares_that_meet_keep_are_taken_as_they_are():
    assert LayerProfile((0.9, 0.6, 0.3, 0.2)).entries(0.5, 20, 4) == (18, 12, 6, 4)
    assert LayerProfile((0.9, 0.6, 0.3, 0.2)).entries(10, 20, 4) == (18, 12, 6, 4)
    assert LayerProfile((0.9, 0.6, 0.3, 0.2)).entries(0.75, 20, 4) == (20, 20, 12, 8)  # what is full gives on
    assert LayerProfile((1.0, 0.0)).entries(0.75, 20, 2) == (20, 10)
    assert LayerProfile((0.5,) * 3).entries(0.5, 5, 3) == (3, 3, 2)  # 7.5 rounds up; ties to the first layers
    assert LayerProfile((0.5, 0.5)).entries(0.5, 0, 2) == (0, 0)


BAD = {
    "[0.5, 0.5]": "holds a list, not an object with 'shares'",
    "{}": "no list 'shares'",
    '{"shares": 3}': "no list 'shares'",
    '{"shares": []}': "one share",
    '{"shares": [0.5, 1.5]}': "one share",
    '{"shares": [0, 0]}': "not all 0",
    '{"shares": [true, 0.5]}': "one share",
    '{"shares": [0.5], "keep": 3}': "'keep' of",
    '{"shares": [0.5], "samples": -1}': "'samples'",
    '{"shares": [0.5], "model": 7}': "'model'",
    "not json": "is no JSON file",
    '{"shares": [NaN]}': "one share",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_profile_is_refused_in_words(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ParameterError, match=BAD[text]) as refusal:
        as_profile(path, "PrefixKV")
    assert "PrefixKV" in str(refusal.value) and "bad.json" in str(refusal.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ParameterError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(ParameterError, match=r"a path to a file \(\.json\)"):
        as_profile("shares.txt", "me")
