"""HoloV: released quotas and sets, what overflow becomes, and that the variance cancels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok import HoloV, Site, TokenView
from vlmtok.errors import ParameterError
from vlmtok.pruners.holov import handed_on, most_attended, quotas_of, run_scores, run_sizes

NAME = "cls_attention@vision:feature"


def view(x, attention):
    return TokenView(x, Site("projected"), signals={NAME: attention.unsqueeze(1)})


@pytest.mark.parametrize("name", golden_names("holov_*.npz"))
def test_quotas_and_sets_equal_the_release(name):
    data = golden(name)
    x, a, k = data["tokens"], data["attention"], data["k"]
    sizes = run_sizes(x.shape[1], data["runs"])
    assert sizes == data["run_sizes"].tolist()
    score = run_scores(x, a, sizes, 0.09)
    torch.testing.assert_close(score, data["run_score"], rtol=1e-4, atol=1e-5)
    quota, weight = quotas_of(score, k)
    assert torch.equal(quota, data["quota"])
    # As released: a run gives no more than it has, and what is missing is rows of zeros (-1).
    chosen = most_attended(a, sizes, torch.minimum(quota, torch.tensor(sizes)))
    for row, keep in zip(chosen, data["keep"]):
        assert row.nonzero()[:, 0].tolist() == [i for i in keep.tolist() if i >= 0]
    made = HoloV(keep=k, runs=data["runs"]).reduce(view(x, a))
    for kept, keep, row in zip(made.keep.tolist(), data["keep"].tolist(), range(len(x))):
        real = {i for i in keep if i >= 0}
        assert len(set(kept)) == k and kept == sorted(kept) and real <= set(kept)
        assert handed_on(quota, weight, sizes, k)[row].sum() == k


def as_released(x, a, runs, k):
    """Places in the order of the release, run by run and there by attention; -1 for a row of zeros."""
    sizes = run_sizes(x.shape[1], runs)
    quota, _ = quotas_of(run_scores(x, a, sizes, 0.09), k)
    rows = []
    for scores, counts in zip(a.tolist(), quota.tolist()):
        places, at = [], 0
        for size, count in zip(sizes, counts):
            run = list(range(at, at + size))
            places += run if count >= size else sorted(run, key=lambda i: -scores[i])[:count]
            at += size
        rows.append((places + [-1] * k)[:k])
    return rows


@pytest.mark.parametrize("name", golden_names("holov_*.npz"))
def test_the_order_of_the_release_follows_from_the_quotas(name):
    data = golden(name)
    rows = as_released(data["tokens"], data["attention"], data["runs"], data["k"])
    assert rows == data["positions"].tolist()
    made = HoloV(keep=data["k"], runs=data["runs"]).reduce(view(data["tokens"], data["attention"]))
    for row, places in zip(made.keep.tolist(), rows):
        assert {place for place in places if place >= 0} <= set(row)


def by_loops(a, sizes, k):
    """Quotas in proportion to mean attention, overflow by weight, the most attended of each run."""
    runs, at = [], 0
    for size in sizes:
        runs.append(list(range(at, at + size)))
        at += size
    means = [sum(a[i] for i in run) / len(run) * (1000.0 if len(run) > 1 else 1.0) for run in runs]
    shares = [m / sum(means) * k for m in means]
    quota = [int(s) for s in shares]
    order = sorted(range(len(runs)), key=lambda p: (-means[p], p))
    for p in order[: k - sum(quota)]:
        quota[p] += 1
    quota = [min(q, len(run)) for q, run in zip(quota, runs)]
    for p in order:
        more = min(k - sum(quota), len(runs[p]) - quota[p])
        quota[p] += more
    close = min(abs(s - round(s)) for s in shares)
    kept = [i for run, q in zip(runs, quota) for i in sorted(run, key=lambda i: (-a[i], i))[:q]]
    return sorted(kept), close


@settings(max_examples=40)
@given(n=st.integers(2, 70), runs=st.integers(1, 20), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_by_plain_loops_without_the_variance(n, runs, share, seed):
    """The caveat as a definition: quotas are those of alpha = 0."""
    g = torch.Generator().manual_seed(seed)
    x, a = torch.randn(1, n, 6, generator=g), torch.rand(1, n, generator=g) ** 3
    k = max(1, int(share * n))
    wanted, close = by_loops(a[0].double().tolist(), run_sizes(n, runs), k)
    made = HoloV(keep=k, runs=runs).reduce(view(x, a))
    if close > 1e-4:
        assert made.keep[0].tolist() == wanted
    assert made.slots == k


def test_zero_attention_and_nan():
    x = torch.randn(1, 12, 4)
    assert HoloV(keep=5, runs=4).reduce(view(x, torch.zeros(1, 12))).keep[0].tolist() == [0, 1, 3, 6, 9]
    a = torch.rand(1, 12)
    a[0, 1] = float("nan")
    assert 1 not in HoloV(keep=6, runs=4).reduce(view(x, a)).keep[0].tolist()
    a, x = torch.ones(1, 12), x.clone()
    x[0, 4] = float("nan")  # the best of its run, were it not for that
    assert 4 not in HoloV(keep=8, runs=4).reduce(view(x, a)).keep[0].tolist()


def test_settings():
    for wrong in ({"runs": 0}, {"alpha": -1}, {"keep": 0}, {"separators": "all"}):
        with pytest.raises(ParameterError):
            HoloV(**wrong)
