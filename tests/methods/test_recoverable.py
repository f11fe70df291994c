"""Recoverable Compression: the released selection, the described merge, LOF by plain loops, and edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.asking import llava
from support.checks import assert_differs, assert_equal
from support.decoder_by_hand import golden, golden_names
from support.recoverable_by_hand import lof, recovered

import vlmtok
from vlmtok import Recoverable, Site, TokenView
from vlmtok.core.placing import place
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.mergers.prumerge import CLASSED, LATE, class_scores
from vlmtok.mergers.recoverable import outliers, share_of, two_choices


def view(x, q, k, relevance):
    """Features with projections, the class token first in each."""
    signals = {CLASSED[0]: q[:, :1], CLASSED[1]: k[:, :1], CLASSED[2]: k[:, 1:], "relevance": relevance}
    return TokenView(x[:, 1:], Site("features"), signals=signals)


def left(reduction, x, row=0):
    tokens, _ = reduction.apply(x)
    return tokens[row][reduction.valid[row]]


@pytest.mark.parametrize("name", golden_names("recoverable_*.npz"))
def test_selection_and_merge(name):
    data = golden(name)
    q, k, x = (data[key].unsqueeze(0) for key in ("q", "k", "x"))
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])
    assert torch.allclose(attention[0], data["cls_attention"], atol=1e-6)
    visual, text, _ = two_choices(attention, data["text_score"][None], (20, 20))
    assert sorted(data["by_visual"].tolist()) == visual[0].nonzero()[:, 0].tolist()
    assert sorted(data["by_text"].tolist()) == text[0].nonzero()[:, 0].tolist()
    made = Recoverable().reduce(view(x, q, k, data["text_score"][None]))
    kept = len(data["kept"])
    assert made.keep[0, :kept].tolist() == data["kept"].tolist()
    centres = len(data["fixed_centres"])
    assert made.keep[0, kept : kept + centres].tolist() == data["rest"][data["fixed_centres"]].tolist()
    found = left(made, x[:, 1:])
    if len(data["fixed_out"]):
        torch.testing.assert_close(found, data["fixed_out"], atol=2e-5, rtol=1e-5)
    else:  # the release returns nothing at all: the merged token stays
        torch.testing.assert_close(found, (attention[0][:, None] * x[0, 1:]).sum(0, keepdim=True), atol=2e-5, rtol=1e-5)


@settings(max_examples=40)
@given(n=st.integers(2, 40), some=st.integers(2, 40), k=st.sampled_from([1, 3, 20]), seed=st.integers(0, 999))
def test_outliers_by_plain_loops(n, some, k, seed):
    """Some of the values count, in any places; the others are never neighbours."""
    g = torch.Generator().manual_seed(seed)
    value = torch.rand(1, n, generator=g) ** 4
    valid = torch.randperm(n, generator=g)[None] < min(some, n)
    at = valid[0].nonzero()[:, 0].tolist()
    factors = lof(value[0, at].double().tolist(), k)
    found = outliers(value, valid, k)[0]
    assert not found[~valid[0]].any()
    for i, factor in zip(at, factors):
        assert abs(factor - 1.5) < 1e-9 or bool(found[i]) == (factor > 1.5)


def test_shares_are_cut_off_as_released():
    found = torch.zeros(1, 200, dtype=torch.bool)
    for count in range(200):
        found[0, :count] = True
        assert share_of(found, 200, 200).item() == int(200 * (count / 200))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 60),
    sharp=st.sampled_from([0.0, 1.0, 3.0]),
    neighbours=st.sampled_from([1, 4, 32]),
    ks=st.tuples(*(st.sampled_from([1, 3, 10, 20]) for _ in range(3))),
    seed=st.integers(0, 999),
)
def test_tokens_equal_plain_loops(n, sharp, neighbours, ks, seed):
    """Rows of a batch, each with its own number of tokens; few others than neighbours included."""
    g = torch.Generator().manual_seed(seed)
    q, k, x = (torch.randn(2, n + 1, 8, generator=g) for _ in range(3))
    s = 0.01 * torch.randn(2, n, generator=g) ** 3
    made = Recoverable(neighbours=neighbours, lof=ks).reduce(view(x, sharp * q, k, s))
    attention = class_scores(sharp * q[:, 0], k[:, 1:], k[:, :1])
    for row in range(2):
        wanted = recovered(x[row, 1:], attention[row], k[row, 1:], s[row], neighbours, 50.0, ks)
        if wanted.margin < 1e-6:
            continue
        assert made.keep[row][made.valid[row]].tolist() == list(wanted.slots)
        found = left(made, x[:, 1:], row)
        torch.testing.assert_close(found, torch.stack(list(wanted.slots.values())).float(), atol=1e-5, rtol=1e-5)


def seeded(seed, n=40):
    g = torch.Generator().manual_seed(seed)
    q, k, x = (torch.randn(1, n + 1, 8, generator=g) for _ in range(3))
    return x, q, k, 0.01 * torch.randn(1, n, generator=g) ** 3


def test_the_cases_that_the_steps_tell_apart():
    """Centres or none, something kept or nothing: seeds that have them, so that the sweep above is known to."""
    found = {}
    for seed in range(60):
        for sharp in (0.0, 1.0):
            x, q, k, s = seeded(seed)
            made = Recoverable().reduce(view(x, sharp * q, k, s))
            attention = class_scores(sharp * q[:, 0], k[:, 1:], k[:, :1])[0]
            wanted = recovered(x[0, 1:], attention, k[0, 1:], s[0])
            assert made.keep[0][made.valid[0]].tolist() == list(wanted.slots)
            merged = len(wanted.slots) - len(wanted.kept) - len(wanted.centres)
            found[bool(wanted.kept), bool(wanted.centres)] = merged
    assert found[True, True] == 1 and found[True, False] == 0


def test_nan_loses_and_spoils_nothing():
    """A token without attention or relevance stays as none and weighs nothing; the others choose as without it."""
    x, q, k, s = seeded(3)
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])
    for where in ("attention", "relevance"):
        a, r = attention.clone(), s.clone()
        (a if where == "attention" else r)[0, 7] = float("nan")
        a[0, 5] = r[0, 5] = float("nan")
        seen = TokenView(x[:, 1:], Site("projected"), signals={LATE[0]: a, LATE[1]: k[:, 1:], "relevance": r})
        made = Recoverable().reduce(seen)
        assert left(made, x[:, 1:]).isfinite().all()
        bad = a.isnan() | r.isnan()
        zeroed = torch.where(bad, 0.0, a)[0]
        lowest = torch.where(bad, r[~bad].min(), r)[0]
        wanted = recovered(x[0, 1:], zeroed, k[0, 1:], lowest)
        stays = [i for i in wanted.kept + wanted.centres if i not in (5, 7)]
        own = made.keep_weight[0] == 1.0
        assert sorted(made.keep[0][made.valid[0] & own].tolist()) == sorted(stays)
    nothing = Recoverable().reduce(view(x, q, k, torch.full_like(s, float("nan"))))
    assert left(nothing, x[:, 1:]).isfinite().all()


def by_question(width):
    """A relevance that tells tokens apart by themselves, so that rows need not be told from one another."""
    weight = torch.linspace(-1.0, 1.0, width)
    return lambda view: 0.01 * (view.tokens.float() @ weight) ** 3


def test_a_model_answers_on_the_tokens_of_plain_loops():
    """LLaVA with the tower's own projections, read by hand, and a relevance of the user's."""
    model, batch = models.shared("HF LLaVA"), models.Batch.of("^2I3")
    inputs = batch.inputs()
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        last = layers[-1]
        normed = last.layer_norm1(states[-2])
        q, k = last.self_attn.q_proj(normed)[0], last.self_attn.k_proj(normed)[0]
        attention = (k @ q[0] / k.shape[1] ** 0.5).softmax(0)[1:]
        x = states[model.config.vision_feature_layer][0, 1:]
        relevance = by_question(x.shape[1])
        wanted = recovered(x, attention, k[1:], relevance(TokenView(x[None]))[0])
        assert wanted.margin > 1e-6 and 0 < len(wanted.slots) < len(x)
        shown = model.model.multi_modal_projector(torch.stack(list(wanted.slots.values())).float())
        ids = inputs["input_ids"][0]
        words, is_picture = model.get_input_embeddings()(ids), ids == model.config.image_token_id
        at = is_picture.nonzero()[:, 0]
        row = torch.cat([words[: at[0]], shown, words[at[-1] + 1 :]])
        expected = model(inputs_embeds=row[None]).logits[0, -1]
        with vlmtok.compress(model, Recoverable(), signals={"relevance": relevance}) as run:
            found = model(**inputs).logits[0, -1]
            assert run.report().visual("decoder")[1] == len(wanted.slots)
        bare = model(**inputs).logits[0, -1]
    assert_equal(found, expected)
    assert_differs(found, bare)


def test_a_batch_answers_as_its_rows_do():
    model, batch = models.shared("HF LLaVA"), models.Batch.of("^3I5", "^2I", "I1I3", "5")
    relevance = by_question(model.config.vision_config.hidden_size)
    with torch.no_grad(), vlmtok.compress(model, "recoverable", signals={"relevance": relevance}):
        together = model(**batch.inputs()).logits[:, -1]
        for row in range(len(batch)):
            assert_equal(together[row], model(**batch.alone(row).inputs()).logits[0, -1])


def test_behind_the_projector_slots_keep_the_order_of_the_picture():
    data = golden("recoverable_01_n144.npz")
    q, k, x = (data[key].unsqueeze(0) for key in ("q", "k", "x"))
    attention = class_scores(q[:, 0], k[:, 1:], k[:, :1])
    signals = {LATE[0]: attention, LATE[1]: k[:, 1:], "relevance": data["text_score"][None]}
    late = Recoverable().reduce(TokenView(x[:, 1:], Site("projected"), signals=signals))
    early = Recoverable().reduce(view(x, q, k, data["text_score"][None]))
    kept = late.keep[0][late.valid[0]].tolist()
    assert kept == sorted(kept) and sorted(early.keep[0][early.valid[0]].tolist()) == kept


def test_rows_do_not_depend_on_each_other():
    torch.manual_seed(1)
    x, q, k, s = (torch.randn(3, 50, 6) for _ in range(3)), None, None, torch.rand(3, 49)
    x, q, k = x
    whole = Recoverable().reduce(view(x, q, k, s))
    for row in range(3):
        part = slice(row, row + 1)
        alone = Recoverable().reduce(view(x[part], q[part], k[part], s[part]))
        assert torch.equal(alone.keep[alone.valid], whole.keep[part][whole.valid[part]])


def test_it_wants_the_relevance_and_a_class_token():
    with pytest.raises(MissingSignal, match="'relevance'"):
        place(Recoverable(), llava())
    assert place(Recoverable(), llava(), frozenset({"relevance"}))[0]
    for wrong in ({"neighbours": 0}, {"lof": (1, 2)}, {"lof": (0, 1, 1)}, {"weight": -1.0}, {"separators": "all"}):
        with pytest.raises(ParameterError):
            Recoverable(**wrong)
    assert vlmtok.parse_methods("recoverable:lof=(5;5;3)")[0].lof == (5, 5, 3)
