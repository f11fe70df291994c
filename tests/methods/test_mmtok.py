"""MMTok: the released choice, plain loops, the text and the features that it takes, and what every method keeps."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.asking import llava
from support.checks import watched
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok.core.site import Counts, Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.pruners.mmtok import MMTok, multimodal_coverage, square_padding

FEATURES = "outputs@vision:feature"
CHOICES = [name for name in golden_names("mmtok_*.npz") if "padding_patches" not in name]


def view_of(x, features, text=None, **more):
    return TokenView(x, Site("projected"), signals={"text": text, FEATURES: features, **more})


# ---------------------------------------------------------------------- the release
@pytest.mark.parametrize("name", CHOICES)
def test_choice_equals_the_release(name):
    data = golden(name)
    x, features, k = data["vision_tokens"], data["tower_features"], data["k"]
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, data["padding"]] = True
    temperatures = {"alpha": data["alpha"], "tau_t": data["tv_temp"], "tau_v": data["vv_temp"]}
    order = multimodal_coverage(x, features, k, data["text"], padding=padding, **temperatures)
    assert torch.equal(order, data["order"])
    method = MMTok(keep=k, **temperatures)
    reduction = method.reduce(view_of(x, features, data["text"], padding=padding))
    assert torch.equal(reduction.keep, data["keep"])


@pytest.mark.parametrize("name", golden_names("mmtok_padding_patches.npz"))
def test_patches_of_padding_equal_the_release(name):
    data = golden(name)
    for (width, height), wanted in zip(data["sizes"].tolist(), data["padding"]):
        found = square_padding(width, height).nonzero()[:, 0]
        assert torch.equal(found, wanted[wanted >= 0].sort().values), (width, height)


# ---------------------------------------------------------------------- plain loops
def replay(x, features, text, order, alpha, tau_t, tau_v):
    """What each choice added, and the most that any would have, in plain loops and float64."""
    n = len(x)
    v, f = F.normalize(x.double(), dim=-1), F.normalize(features.double(), dim=-1)
    words = [(v @ F.normalize(word, dim=0) / tau_t).softmax(0) / len(text) for word in text.double()]
    own = [(alpha if words else 1.0) * (f @ token / tau_v).softmax(0) / n for token in f]
    table = torch.stack(words + own).tolist()
    cover, taken, best = [0.0] * len(table), [], []
    for t, pick in enumerate(order):
        gain = [sum(max(row[j] - c, 0.0) for row, c in zip(table, cover)) for j in range(n)]
        taken.append(gain[pick])
        best.append(max(gain[j] for j in range(n) if j not in order[:t]))
        cover = [max(c, row[pick]) for row, c in zip(table, cover)]
    return taken, best


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 14),
    words=st.integers(0, 4),
    k=st.integers(1, 14),
    alpha=st.sampled_from([0.0, 0.5, 3.0]),
    tau=st.sampled_from([0.02, 0.3]),
    seed=st.integers(0, 99),
)
def test_every_step_is_the_best_by_plain_loops(n, words, k, alpha, tau, seed):
    g = torch.Generator().manual_seed(seed)
    x, features, text = (torch.randn(rows, 5, generator=g) for rows in (n, n, words))
    k = min(k, n)
    order = multimodal_coverage(x[None], features[None], k, text, alpha=alpha, tau_t=tau, tau_v=0.2)[0].tolist()
    assert len(set(order)) == k
    taken, best = replay(x, features, text, order, alpha, tau, 0.2)
    assert taken == pytest.approx(best, abs=1e-6)


# ---------------------------------------------------------------------- edges
def drawn(rows=3, n=25, words=4):
    g = torch.Generator().manual_seed(5)
    return (
        torch.randn(rows, n, 8, generator=g),
        torch.randn(rows, n, 6, generator=g),
        torch.randn(rows, words, 8, generator=g),
    )


def test_text_features_and_alpha_decide():
    """Each of the three changes the choice, and nothing stands for another."""
    x, features, text = drawn(1, 80)
    full = multimodal_coverage(x, features, 8, text)
    others = (
        multimodal_coverage(x, features, 8),
        multimodal_coverage(x, x, 8, text),
        multimodal_coverage(x, features, 8, text, alpha=1000.0),
        multimodal_coverage(x, features, 8, text.flip(2)),
        multimodal_coverage(x, features, 8, text, tau_t=1.0),
        multimodal_coverage(x, features, 8, text, tau_v=0.01),
    )
    assert not any(torch.equal(full.sort().values, other.sort().values) for other in others)
    # Without a text, alpha weighs nothing against nothing.
    alone = [multimodal_coverage(x, features, 8, alpha=alpha) for alpha in (0.0, 0.5)]
    assert torch.equal(*alone)
    assert torch.equal(alone[0], multimodal_coverage(x, features, 8, text[:, :0]))


def test_when_all_words_are_covered_the_lowest_indices_follow():
    x = torch.eye(6)[None]
    order = multimodal_coverage(x, x, 4, x[0, [3, 1]], alpha=0.0, tau_t=0.001)[0].tolist()
    assert order == [1, 3, 0, 2]


def test_padding_comes_last_and_no_token_twice():
    x, features, text = drawn(1)
    padding = torch.zeros(1, 25, dtype=torch.bool)
    padding[0, :20] = True
    order = multimodal_coverage(x, features, 25, text, padding=padding)[0].tolist()
    assert sorted(order[:5]) == [20, 21, 22, 23, 24]
    assert order[5:] == list(range(20))
    free = multimodal_coverage(x, features, 5, text)[0].tolist()
    assert min(free) < 20


def test_nan_loses_and_leaves_the_others_alone():
    x, features, text = drawn(1)
    rest = torch.arange(25) != 7
    clean = multimodal_coverage(x[:, rest], features[:, rest], 24, text)
    for broken in (x, features):
        saved = broken[0, 7].clone()
        broken[0, 7] = float("nan")
        order = multimodal_coverage(x, features, 25, text)[0]
        assert order[-1] == 7
        broken[0, 7] = saved
    x[0, 7] = float("nan")
    order = multimodal_coverage(x, features, 10, text)[0]
    alone = clean[0, :10] + (clean[0, :10] >= 7).long()
    assert torch.equal(order, alone)
    padding = torch.zeros(1, 25, dtype=torch.bool)
    padding[0, 3] = True
    assert multimodal_coverage(x, features, 25, text, padding=padding)[0, -2:].tolist() == [3, 7]
    text[:] = float("nan")
    assert set(multimodal_coverage(x, features, 10, text)[0].tolist()).isdisjoint({7})


def test_a_word_that_is_not_finite_looks_at_none():
    """The others count as among so many words, which is the picture counting for more beside the finite ones alone."""
    x, features, text = torch.randn(2, 30, 8), torch.randn(2, 30, 8), torch.randn(2, 5, 8)
    worse = torch.cat([text, torch.full((2, 1, 8), float("inf"))], 1)
    expected = multimodal_coverage(x, features, 12, text, alpha=0.5 * 6 / 5)
    assert torch.equal(multimodal_coverage(x, features, 12, worse, alpha=0.5), expected)


def test_batch_equals_single_rows_and_a_shared_text():
    x, features, text = drawn()
    together = multimodal_coverage(x, features, 9, text)
    alone = [multimodal_coverage(x[i : i + 1], features[i : i + 1], 9, text[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), together)
    shared = multimodal_coverage(x, features, 9, text[0])
    assert torch.equal(shared, multimodal_coverage(x, features, 9, text[:1].expand(3, -1, -1)))


def test_half_precision_meta_and_compiled():
    x, features, text = (t.bfloat16() for t in drawn())

    def choice(x, features, text):
        return MMTok(keep=7).reduce(view_of(x, features, text)).keep

    expected = choice(x.float(), features.float(), text.float())
    assert torch.equal(choice(x, features, text), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choice(x.float(), features.float(), text.float()), expected)
    assert choice(*(t.to("meta") for t in (x, features, text))).shape == (3, 7)
    assert torch.equal(torch.compile(choice, fullgraph=True, backend="eager")(x, features, text), expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), keep=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)))
def test_count_is_what_reduce_keeps(n, keep):
    method = MMTok(keep=keep)
    seen = view_of(torch.randn(2, n, 4), torch.randn(2, n, 3), torch.randn(2, 3, 4))
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        assert (reduction.keep.diff(dim=1) > 0).all()


# ---------------------------------------------------------------------- in a model
@pytest.mark.parametrize("name", ["HF LLaVA", "HF LLaVA SigLIP"])
def test_features_are_those_that_the_projector_reads(name):
    """Several pictures in rows of a padded batch; behind a cut at `features`, of what is left."""
    model, batch = models.shared(name), models.Batch.of("^3I5", "I1I3")
    read, projector = [], model.model.multi_modal_projector
    for before in ((), vlmtok.parse_methods("scope:keep=0.5")):
        method = MMTok(keep=0.5)
        with torch.no_grad(), watched([method]) as seen, vlmtok.compress(model, [*before, method]):
            hook = projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
            model(**batch.inputs())
            hook.remove()
            found = torch.cat([one.signals[FEATURES] for one in seen if one.reduction is not None])
        assert torch.equal(found, read.pop())


def test_the_users_text_and_padding_reach_it():
    model = models.shared("HF LLaVA")
    batch = models.Batch.of("3I5")
    method = MMTok(keep=4)
    words = torch.randn(3, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1))

    def kept(**signals):
        with torch.no_grad(), watched([method]) as seen, vlmtok.compress(model, method, signals=signals):
            model(**batch.inputs())
            (cut,) = [found for found in seen if found.reduction is not None]
        return cut

    plain = kept()
    view = plain.view
    order = multimodal_coverage(view.tokens, plain.signals[FEATURES], 4, plain.signals["text"])
    assert torch.equal(order.sort(dim=1).values, plain.reduction.keep)
    own = kept(text=lambda view: words)
    order = multimodal_coverage(view.tokens, plain.signals[FEATURES], 4, words)
    assert torch.equal(order.sort(dim=1).values, own.reduction.keep)
    assert not torch.equal(own.reduction.keep, plain.reduction.keep)
    n = view.tokens.shape[1]
    hidden = torch.zeros(1, n, dtype=torch.bool).index_fill(1, plain.reduction.keep[0], True)
    assert not set(kept(padding=lambda view: hidden).reduction.keep[0].tolist()) & set(plain.reduction.keep[0].tolist())


def test_sites_and_parameters():
    layout = llava()
    needs = ("text", FEATURES)
    assert MMTok().sites(layout) == [Site("projected", needs=needs, separators="drop")]
    assert MMTok(vision="projected", positions="keep").sites(layout) == [
        Site("projected", needs=("text",), positions="keep", separators="drop")
    ]
    assert MMTok().remarks(layout) == [] and "projected tokens" in MMTok(vision="projected").remarks(layout)[0]
    bare = {name: stage for name, stage in layout.stages.items() if name != "vision"}
    with pytest.raises(MissingSignal, match=r"made of convolutions.*vision='projected'"):
        MMTok().sites(Layout("a family", bare, {"vision": "it is made of convolutions"}))
    lost = {**layout.stages, "vision": replace(layout.stages["vision"], carries=False)}
    with pytest.raises(MissingSignal, match="vision='projected'"):
        MMTok().sites(Layout("a family", lost))
    assert MMTok(vision="projected").sites(Layout("a family", bare))
    with pytest.raises(SiteError, match="projected"):
        MMTok().sites(Layout("a tower", {"vision": layout.stages["vision"]}))
    wrong = ({"keep": 0}, {"alpha": -1}, {"tau_t": 0}, {"tau_v": 0.0}, {"vision": "clip"}, {"separators": "none"})
    for one in (*wrong, {"positions": "drop"}):
        with pytest.raises(ParameterError, match="MMTok"):
            MMTok(**one)
    for spec in ("mmtok", "mmtok:keep=64:tau_t=0.01", "mmtok:vision=projected:separators=keep"):
        assert str(parse_methods(spec)[0]) == spec
    assert MMTok(keep=0.2).count(Counts(Site("projected"), 64, 64)) == 13


def test_outputs_are_asked_of_another_place():
    stage = StageLayout(4, 8, 2, 3, provides=frozenset({"outputs"}))

    class Own(vlmtok.Method):
        def sites(self, layout):
            return [Site("vision", 2, "end", needs=("outputs",))]

    from vlmtok.core.placing import place

    with pytest.raises(MissingSignal, match=r"view\.tokens"):
        place(Own(), Layout("a tower", {"vision": stage}))
