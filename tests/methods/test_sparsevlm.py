"""SparseVLM: the first release's raters, relevance, cuts and clusters, and the rules every method keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import PlainLlama, Run, golden, golden_names, layout, visual_tokens_by_layer

from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.mergers.sparsevlm import (
    SparseVLM,
    choose_raters,
    density_clusters,
    prune_and_recycle,
    rated_relevance,
    rater_weights,
    recycled_counts,
)

CASES = golden_names("sparsevlm_case*.npz")


def parts(data):
    """Visual embeddings, text embeddings, attention rows of text on vision, visual hidden states."""
    s, n, t = data["image_start"], data["n_image"], data["n_text"]
    e = s + n
    rows = data["attn"][:, :, e : e + t, s:e]
    return data["embeds"][:, s:e], data["embeds"][:, e : e + t], rows, data["hidden"][:, s:e]


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize("name", CASES)
def test_raters_and_relevance_equal_the_release(name):
    data = golden(name)
    visual, text, rows, _ = parts(data)
    weights = rater_weights(visual, text)
    torch.testing.assert_close(weights, data["rater_weights"], atol=1e-6, rtol=0)
    raters = choose_raters(weights)
    assert raters[0].nonzero()[:, 0].tolist() == data["rater_index"].tolist()
    torch.testing.assert_close(rated_relevance(rows, raters), data["relation"], atol=1e-6, rtol=0)


def method_of(data):
    return SparseVLM(budgets=(data["budget"],), layers=(data["layer"],))


@pytest.mark.parametrize("name", CASES)
def test_a_cut_equals_the_release(name):
    data = golden(name)
    visual, text, rows, hidden = parts(data)
    method, row = method_of(data), {}
    assert method.reduce(TokenView(visual, Site("projected"), signals={"text": text}, row=row)) is None
    site = Site("decoder", data["layer"], "end")
    view = TokenView(hidden, site, depth=32, signals={"text_attention": rows}, row=row)
    reduction = method.reduce(view)
    kept, clusters = data["keep_mask"][0].nonzero()[:, 0], data["cluster_num"]
    budget = data["budget"]
    assert reduction.keep[0, :budget].tolist() == kept.tolist()
    assert reduction.slots == method.count(view.counts) == budget + clusters
    dropped = (~data["keep_mask"][0]).nonzero()[:, 0]
    back = dropped[data["recycle_index_in_dropped"]]
    assert sorted(reduction.keep[0, budget:].tolist() + reduction.src[0].tolist()) == sorted(back.tolist())
    slots, size = reduction.apply(hidden)
    assert torch.equal(slots[:, :budget], hidden[:, kept])
    torch.testing.assert_close(slots[:, budget:], data["merged"], atol=1e-4, rtol=0)
    assert size.sum() == budget + len(back)


@pytest.mark.parametrize("name", CASES)
def test_the_released_noise_can_be_given(name):
    data = golden(name)
    _, _, _, hidden = parts(data)
    noise = torch.rand(1, len(data["recycle_index_in_dropped"]), generator=torch.Generator().manual_seed(5)) * 1e-6
    reduction = prune_and_recycle(hidden, data["relation"], data["budget"], noise)
    torch.testing.assert_close(reduction.apply(hidden)[0][:, data["budget"] :], data["merged"], atol=1e-4, rtol=0)


def test_released_budgets():
    """The budgets of the release for 576 tokens; between the cuts the recycled tokens come on top."""
    tables = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
    for tokens, budgets in tables.items():
        expected, n = [576] * 3, 576
        for budget, layers in zip(budgets, (4, 9, 16)):
            recycled = int(0.3 * (n - budget)) + 1
            n = budget + int(recycled / 10) + 1
            expected += [n] * layers
        assert visual_tokens_by_layer(SparseVLM(tokens=tokens), 32, 576) == expected
    # Five times the tokens have five times the budgets.
    assert visual_tokens_by_layer(SparseVLM(), 32, 2880)[3] == 1500 + int((0.3 * 1380 + 1) / 10) + 1


def test_published_cost():
    """Image-token MACs of LLaVA-1.5 at 192 tokens, recycled tokens left out (arXiv 2507.20630)."""
    d, m = 4096, 11008
    method = SparseVLM(tokens=192)
    counts, kept = [576] * 3, [(3, 4), (7, 9), (16, 16)]
    for first, layers in kept:
        layer = first - 1
        k = method.count(Counts(Site("decoder", layer, "end"), 576, 576, 0, 32))
        k -= recycled_counts(576 - {2: 300, 6: 200, 15: 110}[layer])[1]
        counts += [k] * layers
    cost = sum(4 * k * d * d + 2 * k * k * d + 3 * k * d * m for k in counts) / 1e12
    assert cost == pytest.approx(1.329, abs=5e-4)


# ---------------------------------------------------------------------- parts
def clusters_by_loops(x, clusters):
    """Density-peak clustering of one row in double precision, written out."""
    x = x.double()
    m = len(x)
    distance = [[float((x[i] - x[j]).norm() / x.shape[1] ** 0.5) for j in range(m)] for i in range(m)]
    density = []
    for i in range(m):
        nearest = sorted(distance[i])[:clusters]
        density.append(float(torch.tensor([-(d * d) for d in nearest], dtype=torch.float64).mean().exp()))
    top = max(max(row) for row in distance)
    apart = []
    for i in range(m):
        denser = [j for j in range(m) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min((distance[i][j] for j in denser), default=top))
    order = sorted(range(m), key=lambda i: (-density[i] * apart[i], i))
    centres = order[:clusters]
    nearest = [min(range(clusters), key=lambda c: (distance[i][centres[c]], c)) for i in range(m)]
    for c, i in enumerate(centres):
        nearest[i] = c
    return centres, nearest


@pytest.mark.parametrize("seed", range(6))
def test_clusters_equal_plain_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 25, 8, generator=generator)
    centres, cluster = density_clusters(x, 4)
    for b in range(2):
        expected = clusters_by_loops(x[b], 4)
        assert (centres[b].tolist(), cluster[b].tolist()) == expected


def test_equal_densities_prefer_the_lower_index():
    # Two pairs of mutual neighbours: all four densities are equal.
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    centres, cluster = density_clusters(x, 2)
    assert centres.tolist() == [[0, 2]]
    assert cluster.tolist() == [[0, 0, 1, 1]]


def test_clusters_do_not_depend_on_a_common_offset():
    x = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))
    plain, moved = density_clusters(x, 3), density_clusters(x + 50.0, 3)
    assert torch.equal(plain[0], moved[0]) and torch.equal(plain[1], moved[1])


def test_all_tokens_alike_and_not_a_number():
    x = torch.ones(1, 12, 4)
    centres, cluster = density_clusters(x, 2)
    assert centres.tolist() == [[0, 1]] and sorted(set(cluster[0].tolist())) == [0, 1]
    x[0, 3] = float("nan")
    centres, _ = density_clusters(x, 2)
    assert centres.max() < 12 and len(set(centres[0].tolist())) == 2


def test_recycled_counts():
    assert [recycled_counts(m) for m in (0, 1, 44, 90, 276)] == [(0, 0), (1, 1), (14, 2), (28, 3), (83, 9)]


def test_text_without_a_token_above_the_mean_rates_as_a_whole():
    assert choose_raters(torch.tensor([[1.0]])).tolist() == [[True]]
    assert choose_raters(torch.full((1, 4), 0.25)).tolist() == [[True] * 4]
    assert choose_raters(torch.tensor([[0.1, 0.6, 0.3]])).tolist() == [[False, True, False]]


def test_slots_are_plain_means_and_the_rest_is_dropped():
    generator = torch.Generator().manual_seed(0)
    x, relevance = torch.randn(2, 40, 6, generator=generator), torch.rand(2, 40, generator=generator)
    reduction = prune_and_recycle(x, relevance, 9)
    recycled, clusters = recycled_counts(31)
    owner = reduction.assignment(40)
    slots, _ = reduction.apply(x, torch.rand(2, 40) + 1)  # sizes must not matter
    for b in range(2):
        best = set(relevance[b].topk(9 + recycled).indices.tolist())
        assert {i for i in range(40) if owner[b, i] >= 0} == best
        assert (owner[b] < 0).sum() == 40 - 9 - recycled
        for c in range(9, 9 + clusters):
            torch.testing.assert_close(slots[b, c], x[b][owner[b] == c].mean(0), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- the method
def test_sites():
    sites = SparseVLM().sites(layout(32))
    assert [str(site) for site in sites] == [
        "projected",
        "decoder layer 2 end",
        "decoder layer 6 end",
        "decoder layer 15 end",
    ]
    assert sites[0].needs == ("text",) and {site.positions for site in sites[1:]} == {"renumber"}
    assert [site.layer for site in SparseVLM().sites(layout(40))[1:]] == [2, 7, 18]
    with pytest.raises(SiteError, match="layer 15 does not exist"):
        SparseVLM(layers=(2, 6, 15)).sites(layout(12))


def decoder_view(n, text=None, last=None, row=None, layer=2, entered=None):
    signals = {"text_attention": text, "last_attention": last}
    x = torch.randn(len(last), n, 4, generator=torch.Generator().manual_seed(0))
    site = Site("decoder", layer, "end")
    return TokenView(x, site, depth=32, entered=entered, signals=signals, row={} if row is None else row)


def test_prompt_that_ends_with_the_picture_is_rated_by_its_last_row():
    method = SparseVLM(budgets=(3,), layers=(2,))
    projected = TokenView(torch.rand(1, 6, 4), Site("projected"), signals={"text": None})
    assert method.reduce(projected) is None and "raters" not in projected.row
    last = torch.tensor([0.0, 5.0, 1.0, 4.0, 0.5, 3.0]).expand(1, 2, 6)
    assert method.reduce(decoder_view(6, None, last)).keep[0, :3].tolist() == [1, 3, 5]


def test_cut_without_raters_says_so():
    with pytest.raises(MissingSignal, match="chose no raters"):
        SparseVLM().reduce(decoder_view(9, torch.rand(1, 2, 3, 9), torch.rand(1, 2, 9)))


@settings(deadline=None)
@given(
    n=st.integers(1, 60),
    before=st.integers(0, 60),
    layer=st.sampled_from((2, 6, 15, 3)),
    rows=st.integers(0, 3),
    budgets=st.one_of(st.none(), st.tuples(*[st.one_of(st.integers(1, 50), st.floats(0.01, 1.0))] * 3)),
)
def test_count_is_what_reduce_keeps(n, before, layer, rows, budgets):
    method = SparseVLM(tokens=64, budgets=budgets)
    raters = {"raters": torch.ones(2, rows, dtype=torch.bool)}
    view = decoder_view(n, torch.rand(2, 2, rows, n), torch.rand(2, 2, n), raters, layer, n + before)
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert all(len(set(row)) == reduction.slots for row in reduction.keep.tolist())


def test_batch_equals_single_rows():
    generator = torch.Generator().manual_seed(1)
    x, relevance = torch.randn(3, 50, 6, generator=generator), torch.rand(3, 50, generator=generator)
    whole = prune_and_recycle(x, relevance, 8)
    for b in range(3):
        one = prune_and_recycle(x[b : b + 1], relevance[b : b + 1], 8)
        for name in ("keep", "src", "dst"):
            assert torch.equal(getattr(whole, name)[b : b + 1], getattr(one, name))


def test_runs_inside_a_llama():
    data = golden(golden_names("transprune_e2e_case*.npz")[0])
    llama = PlainLlama(data)
    method = SparseVLM(budgets=(12, 6), layers=(1, 3))
    run = Run(llama, data["inputs_embeds"][0], data["image_start"], data["n_image"], method)
    length = data["inputs_embeds"].shape[1]
    first = 12 + recycled_counts(data["n_image"] - 12)[1]
    second = 6 + recycled_counts(first - 6)[1]
    lengths = [length - data["n_image"] + n for n in (data["n_image"], first, second)]
    assert run.lengths == [lengths[0]] * 2 + [lengths[1]] * 2 + [lengths[2]] * (llama.depth - 4)
    assert all(torch.equal(ids, torch.arange(len(ids))) for ids in run.positions)
    assert run.hidden.isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": 100},
        {"budgets": ()},
        {"budgets": (0, 1, 2)},
        {"budgets": (20, 10)},
        {"budgets": (20, 10), "layers": (1, 2, 3)},
        {"layers": (6, 2, 15)},
        {"layers": (2, 6)},
        {"positions": "some"},
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(ParameterError, match="SparseVLM"):
        SparseVLM(**bad)


def test_runs_on_meta_and_compiles():
    sites = Site("projected"), Site("decoder", 2, "end")
    method = SparseVLM(budgets=(8,), layers=(2,))

    def choose(x, text, rows):
        row = {}
        method.reduce(TokenView(x, sites[0], signals={"text": text}, row=row))
        reduction = method.reduce(TokenView(x, sites[1], depth=32, signals={"text_attention": rows}, row=row))
        return reduction.keep, reduction.src, reduction.dst

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 50, 6), (2, 5, 6), (2, 4, 5, 50)
    clusters = recycled_counts(42)[1]
    assert choose(*(torch.empty(shape, device="meta") for shape in shapes))[0].shape == (2, 8 + clusters)
    real = [torch.rand(shape, generator=generator) for shape in shapes]
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*real), choose(*real)))


def test_spec_string_round_trip():
    (method,) = parse_methods("sparsevlm:budgets=(20;0.5):layers=(1;3)")
    assert method.budgets == (20, 0.5) and str(method) == "sparsevlm:budgets=(20;0.5):layers=(1;3)"
