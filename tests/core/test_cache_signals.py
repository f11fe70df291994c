"""Masses of caches: made together they are what each is alone, over the rows that it is a sum over."""

from itertools import combinations

import pytest
import torch

from vlmtok import kernels
from vlmtok.core.cache_signals import MASSES, apart, masses, queries, recent_rows
from vlmtok.core.decoder_signals import DecoderTaps

B, H, KV, D, L, PAST, WINDOW = 2, 4, 2, 8, 150, 6, 7
S = PAST + L + 3  # columns of padding between what was held before and the row


def taps(masked, text=(3, 4, 148, 149)):
    """A layer that saw padding; some text stands among the last rows, some does not."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, n, S, D, generator=generator) for n in (H, KV))
    here = torch.arange(S - L, S).expand(B, -1)
    real = ((torch.arange(S) < PAST) | (torch.arange(S) >= S - L)).expand(B, -1)
    seen = (torch.ones(S, S).tril().bool() & real[0])[None, None] if masked else None
    valid = None if masked else real

    def bias(rows):
        return kernels.row_bias(here.gather(1, rows), S, valid=valid, mask=seen)

    def of(rows):
        return q.gather(2, here.gather(1, rows)[:, None, :, None].expand(-1, H, -1, D))

    visual, places = torch.arange(5, 140).expand(B, -1), torch.tensor(text, dtype=torch.int64).expand(B, -1)
    return DecoderTaps(of, lambda: k, 0.3, bias, here, visual, places, told=lambda: (seen, valid))


def alone(name, of):
    """The sum over the attention of the rows, written out."""
    rows = {"attention_mass": torch.arange(L), "text_mass": of.text[0], "recent_mass": torch.arange(L - WINDOW, L)}[
        name
    ]
    rows = rows.expand(B, -1)
    attention = kernels.attention_rows(of.q(rows), of.k(), scale=of.scale, bias=of.bias(rows))
    return attention.sum(2).unflatten(1, (KV, H // KV)).mean(2)[:, :, S - L :]


SUBSETS = [names for count in (1, 2, 3) for names in combinations(sorted(MASSES), count)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_together_they_are_what_each_is_alone(names, masked):
    of, asked = taps(masked), []
    make = of.q
    of.q = lambda rows: (asked.append(rows.shape[1]), make(rows))[1]
    found = masses(names, of, KV, WINDOW)
    assert asked == [queries(names, L, 4, WINDOW)] and set(found) == set(names)
    for name, sums in found.items():
        torch.testing.assert_close(sums, alone(name, taps(masked)), atol=1e-5, rtol=1e-5)
        assert sums.shape == (B, KV, L)


@pytest.mark.parametrize("names", [("text_mass",), ("attention_mass", "text_mass"), ("recent_mass", "text_mass")])
def test_without_text_nothing_is_of_text(names):
    of = taps(False, ())
    assert masses(names, of, KV, WINDOW)["text_mass"].eq(0).all() and queries(("text_mass",), L, 0, WINDOW) == 0


def test_a_window_longer_than_the_row_is_the_row():
    found = masses(("recent_mass", "attention_mass"), taps(False), KV, L + 50)
    torch.testing.assert_close(found["recent_mass"], found["attention_mass"])
    assert queries(("recent_mass",), L, 4, L + 50) == L
    lone = masses(("recent_mass",), taps(False), KV, L + 50)["recent_mass"]
    assert torch.equal(lone, found["attention_mass"])


def test_the_last_rows_one_by_one_are_their_sum():
    of = taps(False)
    rows = recent_rows(of, KV, WINDOW)
    assert rows.shape == (B, KV, L, WINDOW)
    torch.testing.assert_close(rows.sum(3), alone("recent_mass", of))
    assert recent_rows(of, KV, L + 3)[..., :3].eq(0).all()


def test_what_is_made_together():
    assert apart({"recent_mass", "attention_mass"}, 0) == (["attention_mass", "recent_mass"], False)
    assert apart({"recent_mass", "attention_mass"}, 2) == (["attention_mass"], True)
    assert apart({"text_mass"}, 2) == (["text_mass"], False)
    assert queries([], L, 4, WINDOW) == 0
