"""Streaming: sinks and the last entries."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.caches import kept, view_of

from vlmtok import Streaming
from vlmtok.errors import ParameterError


@given(n=st.integers(1, 40), keep=st.integers(1, 40), sinks=st.integers(0, 12), batch=st.integers(1, 2))
def test_the_first_and_the_last_stay(n, keep, sinks, batch):
    method = Streaming(keep=keep, sinks=sinks)
    view = view_of({"attention_mass": torch.zeros(batch, n)})
    reduction = method.reduce(view)
    k = method.count(view.counts)
    assert k == min(keep, n) and (reduction is None) == (k == n)
    if reduction is not None:
        first = min(sinks, k)
        assert kept(reduction, n) == [[*range(first), *range(n - (k - first), n)]] * batch


def test_by_hand():
    view = view_of({"attention_mass": torch.zeros(1, 10)})
    assert kept(Streaming(keep=0.5, sinks=2).reduce(view), 10) == [[0, 1, 7, 8, 9]]
    assert Streaming.scope == "sample"


@pytest.mark.parametrize("bad", [{"sinks": -1}, {"sinks": 1.0}, {"keep": 0}])
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="Streaming"):
        Streaming(**bad)
