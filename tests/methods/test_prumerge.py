"""LLaVA-PruMerge and PruMerge+: the released tokens, the edges done right, and the rules every method keeps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.checks import watched
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.mergers.prumerge import LATE, PruMerge, adaptive_choice, class_scores, outlier_count, prune_and_merge

NEEDS = ("protected_queries@vision:-1", "protected_keys@vision:-1", "keys_full@vision:-1")


def view(x, query, key):
    return TokenView(
        x[:, 1:], Site("features"), num_prefix=1, signals=dict(zip(NEEDS, (query[:, :1], key[:, :1], key[:, 1:])))
    )  # fmt: skip


def random_view(batch, n, seed=0, sharp=3.0):
    g = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, n + 1, 8, generator=g) for _ in range(2))
    return view(torch.randn(batch, n + 1, 5, generator=g), sharp * query, key)


def tokens(reduction, seen, row=0):
    """Tokens of one row, and those that kept their own slot."""
    out, _ = reduction.apply(seen.tokens, seen.size)
    many = reduction.slots if reduction.valid is None else int(reduction.valid[row].sum())
    if reduction.valid is not None:
        assert reduction.valid[row, :many].all()  # invalid slots are the last
    return out[row, :many], reduction.keep[row, : many - 1]


@pytest.mark.parametrize("name", golden_names("prumerge_case*.npz"))
def test_tokens_equal_the_release(name):
    data = golden(name)
    seen = view(data["features"], data["query"], data["key"])
    score = class_scores(data["query"][:, 0], data["key"][:, 1:], data["key"][:, :1])
    torch.testing.assert_close(score, data["cls_attn"], atol=1e-6, rtol=0)
    n = score.shape[1]
    adaptive = outlier_count(score).item() == round(data["reduction_ratio"] * n)
    method = PruMerge(keep=None if adaptive else data["reduction_ratio"], plus="plus" in data["variant"])
    reduction = method.reduce(seen)
    out, kept = tokens(reduction, seen)
    assert kept.tolist() == data["keep_index"][0].tolist()
    torch.testing.assert_close(out, data["output"][0], atol=1e-5, rtol=0)
    assert method.count(seen.counts) == (None if adaptive else reduction.slots)
    assert (reduction.valid is None) == (not adaptive)


def test_outliers_by_quartiles():
    score = torch.rand(4, 50) ** 6
    first, third = np.percentile(score.numpy(), [25, 75], axis=1)
    limit = third + 1.5 * (third - first)
    assert outlier_count(score).tolist() == (score.numpy() > limit[:, None]).sum(1).tolist()
    assert outlier_count(torch.full((2, 9), 0.1)).tolist() == [0, 0]
    assert outlier_count(torch.rand(200, 40) ** 9).max() <= 10  # never more than a quarter


def loops(seen, x, query, key, count, plus, neighbours=32):
    """Tokens of one row in plain loops and float64; `count` outliers."""
    n = seen.tokens.shape[1]
    q, k = query[0].double(), key.double()
    a = (k @ q / k.shape[1] ** 0.5).softmax(0)[1:]
    k, x = F.normalize(k[1:], dim=-1), x.double()
    kept = a.argsort(descending=True, stable=True)[:count].tolist()
    if plus:
        step = max(1, int(int(1 / (max(count, 1) / n)) / 3))
        kept += [i for i in range(0, n, step) if i not in kept]
    out = []
    for i in kept:
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-(k[i] @ k[j]).item(), j))[:neighbours]
        out.append(x[i] + sum(a[j] * x[j] for j in others))
    if len(kept) < n:
        out.append(sum(a[j] * x[j] for j in range(n) if j not in kept))
    return kept, torch.stack(out).float()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 60), plus=st.booleans(), neighbours=st.integers(1, 40), seed=st.integers(0, 999))
def test_tokens_equal_plain_loops(n, plus, neighbours, seed):
    g = torch.Generator().manual_seed(seed)
    query, key, x = (
        3 * torch.randn(2, n + 1, 8, generator=g),
        torch.randn(2, n + 1, 8, generator=g),
        torch.randn(2, n + 1, 5),
    )
    seen = view(x, query, key)
    reduction = PruMerge(plus=plus, neighbours=neighbours).reduce(seen)
    score = class_scores(query[:, 0], key[:, 1:], key[:, :1])
    for row in range(2):
        count = int(n * (int(outlier_count(score)[row]) / n))
        kept, expected = loops(seen, x[row, 1:], query[row], key[row], count, plus, neighbours)
        out, ours = tokens(reduction, seen, row)
        assert (reduction.keep[row].tolist() if len(kept) == n else ours.tolist()) == kept
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_picture_without_outliers():
    x, flat = torch.randn(1, 31, 5), torch.zeros(1, 31, 8)
    seen = view(x, flat, flat)  # attention is the same everywhere
    out, kept = tokens(PruMerge().reduce(seen), seen)
    assert kept.tolist() == [] and out.shape == (1, 5)
    torch.testing.assert_close(out[0], x[0, 1:].sum(0) / 31)
    _, kept = tokens(PruMerge(plus=True).reduce(seen), seen)
    assert kept.tolist() == [0, 10, 20]


def test_spaced_tokens_reach_the_end_of_the_grid():
    score = torch.rand(1, 26) * 0.01
    score[0, :2] = 1.0
    order, count = adaptive_choice(score, torch.tensor([2]), plus=True)
    assert order[0, : count.item()].tolist()[2:] == [i for i in range(0, 26, 4) if i > 1]
    score = torch.rand(1, 25) * 0.01
    order, count = adaptive_choice(score, torch.tensor([1]), plus=True)
    assert 24 in order[0, : count.item()].tolist()  # the last place; the stride is 8


def test_everything_may_be_spaced():
    seen = random_view(1, 16)
    score = class_scores(seen.signals[NEEDS[0]][:, 0], seen.signals[NEEDS[2]], seen.signals[NEEDS[1]])
    order, count = adaptive_choice(score, torch.tensor([4]), plus=True)
    assert count.item() == 16 and sorted(order[0].tolist()) == list(range(16))
    reduction = prune_and_merge(seen.signals[NEEDS[2]], score, order, count, 16)
    assert reduction.valid.all() and (reduction.keep_weight == 1).all()
    assert (reduction.dst[:, -16:] == -1).all()  # nothing is left to merge


def test_slots():
    keys, score = torch.randn(2, 8, 4), torch.rand(2, 8)
    order = torch.tensor([[3, 6, 0, 1, 2, 4, 5, 7], [7, 6, 5, 4, 3, 2, 1, 0]])
    reduction = prune_and_merge(keys, score, order, torch.tensor([2, 0]), 4, neighbours=2)
    assert reduction.keep.tolist() == [[3, 6, 0, 1], [7, 6, 5, 4]]
    assert reduction.valid.tolist() == [[True, True, True, False], [True, False, False, False]]
    torch.testing.assert_close(reduction.keep_weight[0, :3], torch.tensor([1.0, 1.0, score[0, 0].item()]))
    assert torch.equal(reduction.src_weight, score.gather(1, reduction.src))
    near, merged = reduction.dst[:, :8], reduction.dst[:, 8:]
    assert near.tolist() == [[0, 0, 1, 1, -1, -1, -1, -1], [-1] * 8]
    assert merged.tolist() == [[-1, 2, 2, -1, 2, 2, -1, 2], [0, 0, 0, 0, 0, 0, 0, -1]]
    assert not (reduction.src[0, :2] == 3).any() and not (reduction.src[0, 2:4] == 6).any()


@pytest.mark.parametrize("form", [{}, {"keep": 6}, {"plus": True}], ids=str)
def test_behind_the_projector_slots_lie_in_the_pictures_order(form):
    seen = random_view(3, 40)
    score = class_scores(seen.signals[NEEDS[0]][:, 0], seen.signals[NEEDS[2]], seen.signals[NEEDS[1]])
    signals = {LATE[0]: score, LATE[1]: seen.signals[NEEDS[2]]}
    late = TokenView(seen.tokens, Site("projected"), signals=signals)
    found, plain = PruMerge(**form).reduce(late), PruMerge(**form).reduce(seen)
    (tokens, size), (unordered, sizes) = found.apply(seen.tokens), plain.apply(seen.tokens)
    for row in range(3):
        real = slice(None) if found.valid is None else found.valid[row]
        same = slice(None) if plain.valid is None else plain.valid[row]
        assert (found.keep[row][real].diff() > 0).all()
        order = plain.keep[row][same].argsort()
        torch.testing.assert_close(tokens[row][real], unordered[row][same][order])
        assert torch.equal(size[row][real], sizes[row][same][order])
    if found.valid is not None:
        assert (found.valid.to(torch.int8).diff(dim=1) <= 0).all()


def test_one_head_over_the_full_width_is_what_the_class_token_sees():
    """`flat_attention` gives the scores that the released formula has of queries and keys, bit for bit."""
    model, heard = models.shared("HF LLaVA"), []

    class Both(PruMerge):
        def sites(self, layout):
            return [Site("features", needs=(*NEEDS, *LATE))]

        def reduce(self, view):
            query, protected, keys = (view.signal(name) for name in NEEDS)
            heard.append((class_scores(query[:, 0], keys, protected), *(view.signal(name) for name in LATE), keys))

    with torch.no_grad(), vlmtok.compress(model, Both()):
        model(**models.Batch.of("^3I5", "2I2").inputs())
    ((wanted, flat, turned, keys),) = heard
    assert torch.equal(flat, wanted) and torch.equal(turned, keys)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), keep=st.one_of(st.none(), st.integers(1, 50), st.floats(0.01, 1.0)), plus=st.booleans())
def test_count_is_what_reduce_keeps(n, keep, plus):
    method = PruMerge(keep=keep, plus=plus)
    seen = random_view(2, n)
    reduction, count = method.reduce(seen), method.count(seen.counts)
    if reduction is None:
        assert count == n
        return
    assert (count is None) == (reduction.valid is not None)
    assert count in (None, reduction.slots)
    assert reduction.apply(seen.tokens)[0].isfinite().all()
    assert reduction.slots <= n
    assert all(len(set(row)) == len(row) for row in reduction.keep.tolist())
    if reduction.valid is None:
        assert (reduction.assignment(n) >= 0).all()
    else:
        assert reduction.valid[:, 0].all()


def test_batch_equals_single_rows():
    for method in (PruMerge(), PruMerge(plus=True), PruMerge(keep=5)):
        seen = random_view(3, 40)
        together = method.reduce(seen)
        for i in range(3):
            one = {name: value[i : i + 1] for name, value in seen.signals.items()}
            alone = method.reduce(TokenView(seen.tokens[i : i + 1], seen.site, signals=one))
            for name in ("keep", "src", "dst", "valid"):
                a, b = getattr(together, name), getattr(alone, name)
                assert (a is None and b is None) or torch.equal(a[i : i + 1], b)


@pytest.mark.parametrize("form", [{}, {"plus": True}, {"keep": 6}], ids=str)
def test_meta_compiled_and_half_precision(form):
    method, seen = PruMerge(**form), random_view(2, 30)

    def run(x, *signals):
        reduction = method.reduce(TokenView(x, Site("features"), signals=dict(zip(NEEDS, signals))))
        return reduction.apply(x)[0]

    given = (seen.tokens, *(seen.signals[name] for name in NEEDS))
    assert run(*(t.to("meta") for t in given)).shape == run(*given).shape
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), run(*given))

    def choice(*given):
        return method.reduce(TokenView(given[0], Site("features"), signals=dict(zip(NEEDS, given[1:])))).keep

    half = [t.bfloat16() for t in given]
    assert torch.equal(choice(*half), choice(*(t.float() for t in half)))


def test_ties_and_nan():
    order, _ = adaptive_choice(torch.full((1, 6), 0.2), torch.tensor([2]))
    assert order.tolist() == [list(range(6))]
    score = torch.tensor([[0.1, float("nan"), 0.3]])
    assert adaptive_choice(score, torch.tensor([1]))[0].tolist() == [[2, 0, 1]]


def test_sites_and_parameters():
    def layout(prefix):
        return Layout(
            "by hand",
            {"vision": StageLayout(4, 8, 2, 2, provides=tower_signals(prefix)), "features": StageLayout(1, 8, 0, 0)},
        )

    assert PruMerge().sites(layout(1)) == [Site("features", needs=NEEDS)]
    assert PruMerge().sites(layout(0)) == [Site("features", needs=LATE)]
    assert "no class token" in PruMerge().remarks(layout(0))[0] and PruMerge().remarks(layout(1)) == []
    packed = Layout("packed", {"vision": layout(1).stages["vision"], "projected": StageLayout(1, 8, 0, 0)})
    assert PruMerge().sites(packed) == [Site("projected", needs=LATE, separators="drop")]
    assert PruMerge(separators="keep").sites(packed) == [Site("projected", needs=LATE)]
    assert "projected" in PruMerge().remarks(packed)[0]
    with pytest.raises(SiteError, match="features"):
        PruMerge().sites(Layout("no tower", {"projected": StageLayout(1, 8, 0, 0)}))
    for wrong in ({"keep": 0}, {"plus": 2}, {"neighbours": 0}, {"separators": "all"}):
        with pytest.raises(ParameterError):
            PruMerge(**wrong)
    for spec in ("prumerge", "prumerge:plus=true", "prumerge:keep=0.125:neighbours=16"):
        assert str(parse_methods(spec)[0]) == spec


def test_a_batch_reports_the_tokens_that_are_there():
    """Pictures keep different numbers and rows are padded: the report counts what is kept, not the padding."""
    model, batch = models.shared("HF LLaVA"), models.Batch.of("^3I5", "^2I", "I1I3", "^4I1I", "5")
    method = PruMerge()
    with torch.no_grad(), watched([method]) as seen, vlmtok.compress(model, method) as run:
        model.generate(**batch.inputs(), max_new_tokens=2, do_sample=False)
        kept = seen[0].reduction.valid.sum(1)
        assert len(set(kept.tolist())) > 1 and kept.sum() < kept.numel() * kept.max()
        report = run.report()
        assert report.visual("decoder") == pytest.approx((6 * models.PLACEHOLDERS / 5, kept.sum().item() / 5))
        again = vlmtok.estimate(model, PruMerge(), counts={"features": 3}, text_tokens=(4, 5))
        assert again.visual("decoder")[1] == 3
