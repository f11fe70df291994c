"""Greedy coverage: the rule against naive loops in double precision, its lazy form against the rule, bit for bit."""

import naive
import pytest
import torch
from drawn import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtok import kernels
from vlmtok.kernels.reference import coverage, lazy_coverage
from vlmtok.kernels.reference.coverage import cover_plainly
from vlmtok.kernels.reference.lazy_coverage import BLOCK, added, places_behind

TABLES = ("normal", "quantised", "duplicates", "looks", "zeros")
WEIGHTS = (None, "uniform", "quantised")


def drawn_table(kind, batch, n, targets, generator):
    table = torch.randn(batch, n, targets, generator=generator)
    if kind == "quantised":
        return (2 * table).round() / 2
    if kind == "duplicates":
        return table[:, torch.randint(0, max(1, n // 3), (n,), generator=generator)]
    if kind == "looks":
        return (5 * table).softmax(1)
    if kind == "zeros":
        return table * (torch.rand(batch, n, 1, generator=generator) > 0.5)
    return table


def drawn_weight(kind, batch, n, generator):
    weight = torch.rand(batch, n, generator=generator)
    return None if kind is None else (3 * weight).floor() if kind == "quantised" else weight


def plainly(table, k, weight, late):
    first = added(table, table.new_zeros(len(table), 1, table.shape[2]), weight)
    return cover_plainly(table, k, weight, places_behind(first, late))


def same_bits(found, expected):
    order, gain = found
    assert order.dtype == torch.int64 and gain.dtype == torch.float32
    assert torch.equal(order, expected[0])
    assert torch.equal(gain.nan_to_num(-1.0), expected[1].nan_to_num(-1.0))


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(TABLES),
    weighted=st.sampled_from(WEIGHTS),
    batch=st.integers(1, 3),
    n=st.integers(1, 60),
    targets=st.sampled_from([0, 1, 7, 64, 700]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    threads=st.sampled_from([1, 2]),
    late=st.booleans(),
    seed=st.integers(0, 10_000),
)
@pytest.mark.usefixtures("_threads")
def test_the_lazy_form_has_the_bits_of_the_rule(kind, weighted, batch, n, targets, share, threads, late, seed):
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    table = drawn_table(kind, batch, n, targets, g)
    weight = drawn_weight(weighted, batch, n, g)
    tiers = torch.randint(-1, 4, (batch, n), generator=g) if late else None
    k = max(1, round(share * n))
    found = kernels.greedy_cover(table, k, weight=weight, late=tiers)
    torch.set_num_threads(1)
    same_bits(found, plainly(table, k, weight, tiers))
    assert all(len(set(order)) == k for order in found[0].tolist())
    for i in range(batch):  # a batch is its pictures
        own = {
            "weight": None if weight is None else weight[i : i + 1],
            "late": None if tiers is None else tiers[i : i + 1],
        }
        same_bits(kernels.greedy_cover(table[i : i + 1], k, **own), (found[0][i : i + 1], found[1][i : i + 1]))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weighted", [None, "uniform"])
def test_large_tables_have_the_bits_of_the_rule_on_more_threads_too(threads, weighted):
    """Rows long enough that torch shares sums among threads, of one row and of many."""
    g = torch.Generator().manual_seed(0)
    x = kernels.unit_rows(torch.randn(2, 90, 24, generator=g))
    table = torch.cat([x @ x.transpose(1, 2)] * 400, 2)  # 36,000 targets
    weight = drawn_weight(weighted, 2, 90, g)
    expected = plainly(table[:1], 12, None if weight is None else weight[:1], None)
    torch.set_num_threads(threads)
    order, gain = kernels.greedy_cover(table, 12, weight=weight)
    same_bits((order[:1], gain[:1]), expected)
    one = kernels.greedy_cover(table[:1, :1], 1)  # a single row alone
    two = kernels.greedy_cover(table[:1, [0, 0]], 1)
    assert torch.equal(one[1], two[1])


def test_little_is_summed_again(monkeypatch):
    """The point of it: a tenth of the rows that the rule sums, or less."""
    summed = []

    def counted(rows, *args):
        summed.append(rows.shape[-2])
        return added(rows, *args)

    monkeypatch.setattr(lazy_coverage, "added", counted)
    x = kernels.unit_rows(rows(1, 1000, 64))
    kernels.greedy_cover(x @ x.transpose(1, 2), 100, weight=rows(1, 1000, 1, seed=1)[..., 0].abs())
    assert 0 < sum(summed) < 0.1 * 100 * 1000
    summed.clear()
    order, gain = kernels.greedy_cover(torch.zeros(1, 1000, 8), 100)  # a bound of nothing is what is added
    assert len(summed) == 1 and order[0].tolist() == list(range(100)) and gain.eq(0).all()


@pytest.mark.parametrize("n", [20, 1000])
def test_more_rows_tie_than_are_summed_at_a_time(n, monkeypatch):
    """`topk` takes any of equal bounds; the lowest index, which wins, must be among them."""
    summed = []

    def counted(rows, *args):
        summed.append(rows.shape[-2])
        assert len(summed) < 1000, "no end"
        return added(rows, *args)

    monkeypatch.setattr(lazy_coverage, "added", counted)
    for table in (torch.eye(n), torch.eye(n).flip(1), torch.eye(n // 2).repeat(2, 1)):
        order, gain = kernels.greedy_cover(table.unsqueeze(0), 9)
        assert order[0].tolist() == list(range(9)) and gain.eq(1).all()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(TABLES),
    n=st.integers(1, 12),
    targets=st.integers(1, 9),
    weighted=st.sampled_from(WEIGHTS),
    late=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_step_is_the_best_by_plain_loops(kind, n, targets, weighted, late, seed):
    g = torch.Generator().manual_seed(seed)
    table, weight = drawn_table(kind, 2, n, targets, g), drawn_weight(weighted, 2, n, g)
    tiers = torch.randint(0, 3, (2, n), generator=g) if late else None
    order, gain = kernels.greedy_cover(table, n, weight=weight, late=tiers)
    for p in range(2):
        left = n if tiers is None else int((tiers[p] == 0).sum())
        taken, best = naive.cover_gains(table[p], order[p].tolist(), None if weight is None else weight[p], left)
        assert taken == pytest.approx(best, abs=1e-5)
        assert gain[p, :left].tolist() == pytest.approx(taken, abs=1e-5) and gain[p, left:].isnan().all()
        if tiers is not None:
            assert order[p, left:].tolist() == sorted(
                (j for j in range(n) if tiers[p, j] > 0), key=lambda j: (int(tiers[p, j]), j)
            )


def test_ties_and_tiers():
    """Candidates, then rows that are not finite, then late ones by their numbers, then invalid ones."""
    table = torch.ones(1, 8, 3)
    table[0, 2, 1], table[0, 6, 0] = float("nan"), float("inf")
    late = torch.tensor([[0, 2**62 + 9, 0, 1, 0, 7, 0, -5]])
    valid = torch.tensor([[True, True, True, True, False, True, True, True]])
    order, gain = kernels.greedy_cover(table, 8, late=late, valid=valid)
    assert order.tolist() == [[0, 7, 2, 6, 3, 5, 1, 4]]
    assert gain[0, :2].tolist() == [3.0, 0.0] and gain[0, 2:].isnan().all()
    order, _ = kernels.greedy_cover(table, 8, valid=valid)
    assert order.tolist() == [[0, 1, 3, 5, 7, 2, 6, 4]]


def test_weights_below_zero_count_as_nothing_and_nan_loses():
    table = rows(1, 6, 5).abs()
    weight = torch.tensor([[1.0, -3.0, 2.0, float("nan"), 1.0, float("inf")]])
    order, gain = kernels.greedy_cover(table, 6, weight=weight)
    assert order[0, 3:].tolist() == [1, 3, 5] and gain[0, 3] == 0 and gain[0, 4:].isnan().all()
    found = kernels.greedy_cover_cosine(table, 6, weight=weight)[0]
    assert found[0, 3:].tolist() == [1, 3, 5]


def test_rows_that_are_not_finite_come_before_invalid_ones_and_behind_rows_that_add_nothing():
    x = rows(1, 8, 6)
    x[0, 2], x[0, 3], x[0, 5] = float("nan"), 0.0, float("inf")
    valid = torch.ones(1, 8, dtype=torch.bool)
    valid[0, 0] = False
    order, gain = kernels.greedy_cover_cosine(x, 8, valid=valid)
    assert order[0, 4:].tolist() == [3, 2, 5, 0] and gain[0, 4] == 0 and gain[0, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_views_are_the_same_table(dtype):
    table = rows(2, 20, 30, dtype)
    expected = kernels.greedy_cover(table.float(), 9)
    same_bits(kernels.greedy_cover(table, 9), expected)
    turned = table.transpose(1, 2).contiguous().transpose(1, 2)
    same_bits(kernels.greedy_cover(turned, 9), expected)


# ---------------------------------------------------------------------- rows that cover each other
@settings(max_examples=60, deadline=None)
@given(st.one_of(st.integers(2, 15), st.integers(16, 60)), st.integers(1, 100), st.integers(0, 10_000))
def test_equal_rows_tie_whatever_the_size(n, d, seed):
    """MKL multiplies small matrices and edges another way: equal rows of one product differ there by an ulp."""
    x = rows(1, n, d, seed=seed)
    first, last = sorted(torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    x[:, last] = x[:, first]
    order = kernels.greedy_cover_cosine(x, n)[0][0].tolist()
    assert order.index(first) < order.index(last)


def test_it_is_the_coverage_of_cosines():
    x = rows(2, 40, 8)
    x[0, 3], x[1, 5, 2] = float("nan"), float("inf")
    valid = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) > 0.2
    order, _ = kernels.greedy_cover_cosine(x, 40, weight=torch.ones(2, 40), valid=valid)
    for p in range(2):
        there = [j for j in range(40) if valid[p, j] and x[p, j].isfinite().all()]
        broken = [j for j in range(40) if valid[p, j] and j not in there]
        invalid = [j for j in range(40) if not valid[p, j]]
        alone, _ = kernels.greedy_cover_cosine(x[p : p + 1, there], len(there))
        assert order[p].tolist() == [*(there[j] for j in alone[0].tolist()), *broken, *invalid]
        cosine = torch.nn.functional.normalize(x[p, there].double(), dim=-1)
        taken, best = naive.cover_gains(cosine @ cosine.T, alone[0].tolist(), None, len(there))
        assert taken == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("n", [1, 20, BLOCK, BLOCK + 3, 3 * BLOCK - 1])
@pytest.mark.parametrize("weighted", WEIGHTS)
def test_blocks_that_are_multiplied_again_choose_the_same(n, weighted, monkeypatch):
    """Rows of which every product is exact, so that both ways have the same bits; ties are ties in both."""
    g = torch.Generator().manual_seed(n)
    x = torch.zeros(2, n, 16)
    x[..., :4] = torch.randint(0, 2, (2, n, 4), generator=g) - 0.5  # unit rows: halves
    x[0, n // 2] = float("nan")
    weight = drawn_weight(weighted, 2, n, g)
    valid = torch.rand(2, n, generator=g) > 0.1
    k = max(1, n // 2)
    expected = kernels.greedy_cover_cosine(x, k, weight=weight, valid=valid)
    monkeypatch.setattr(coverage, "TABLE_BYTES", 0)
    monkeypatch.setattr(coverage, "square_products", None)  # no table is made
    same_bits(kernels.greedy_cover_cosine(x, k, weight=weight, valid=valid), expected)


def test_blocks_choose_the_best_and_are_few(monkeypatch):
    x = rows(1, 500, 32)
    expected = kernels.greedy_cover_cosine(x, 60)
    multiplied = []
    original = lazy_coverage.added

    def counted(products, *args):
        multiplied.append(len(products))
        return original(products, *args)

    monkeypatch.setattr(coverage, "TABLE_BYTES", 0)
    monkeypatch.setattr(lazy_coverage, "added", counted)
    order, gain = kernels.greedy_cover_cosine(x, 60)
    assert torch.equal(order, expected[0])
    torch.testing.assert_close(gain, expected[1])
    assert set(multiplied) == {BLOCK, 500 % BLOCK} and sum(multiplied) < 60 * 500


def test_one_table_is_held_at_a_time(monkeypatch):
    held = []
    original = coverage.square_products

    def seen(x):
        held.append(len(x))
        return original(x)

    monkeypatch.setattr(coverage, "square_products", seen)
    x = rows(2, 1500, 4)
    kernels.greedy_cover_cosine(x, 2)
    assert held == [1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_faked_it_is_the_rule():
    """Where the host may not look at a tensor, the plain loop runs, or nothing but shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    table = rows(1, 9, 40)
    expected = kernels.greedy_cover(table, 4)[0]
    traced = torch.jit.trace(lambda t: kernels.greedy_cover(t, 4)[0], (table,), check_trace=False)
    assert torch.equal(traced(table), expected) and torch.equal(traced(table.flip(1)), 8 - expected)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(table)
        order, gain = kernels.greedy_cover(fake, 4)
        assert order.shape == gain.shape == (1, 4)
        assert kernels.greedy_cover_cosine(fake, 4)[0].shape == (1, 4)
    meta = table.to("meta")
    assert kernels.greedy_cover_cosine(meta, 4)[0].is_meta
    compiled = torch.compile(lambda t: kernels.greedy_cover(t, 4)[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(table), expected)
    exported = torch.export.export(Chooses(), (table,))
    assert torch.equal(exported.module()(table.flip(1)), 8 - expected)


class Chooses(torch.nn.Module):
    def forward(self, table):
        return kernels.greedy_cover(table, 4)[0]
