"""CrossGET: the released reducer and loss, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crossget_views import layout
from support.decoder_by_hand import golden, golden_names

from vlmtok import kernels
from vlmtok.core.registry import create_method
from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.mergers.crossget import CrossGET, attention_importance, cross_loss, ensemble


# ---------------------------------------------------------------------- the released reducer
def split(data, llava):
    """Places of the tokens that the reducer may touch, `[B, n]`, by the released rule."""
    batch, n, _ = data["x"].shape
    protected = torch.zeros(batch, n, dtype=torch.bool)
    if data["class_token"] or llava:
        protected[:, 0] = True
    if data["class_token"]:
        protected[:, -1] = True
    if "eot" in data:
        protected[torch.arange(batch), data["eot"]] = True
    return torch.stack([(~row).nonzero().flatten() for row in protected])


def whole_row(data, place, reduction):
    """The released output: what the view's slots and the other tokens give together, in the order of the row."""
    size = data["token_size"][..., 0]
    tokens, sizes = reduction.apply(kernels.take_rows(data["x"], place), size.gather(1, place))
    row, at = data["x"].clone(), place.gather(1, reduction.keep)
    row.scatter_(1, at.unsqueeze(-1).expand_as(tokens), tokens)
    size = size.clone().scatter_(1, at, sizes)
    kept = data["kept_idx"]
    return kernels.take_rows(row, kept), size.gather(1, kept).unsqueeze(-1)


def check(data, view, place, method):
    reduction = method.reduce(view)
    if data["r"] == 0:
        assert reduction is None
        assert torch.equal(data["x"], data["out_x"])
        return
    joined = place.gather(1, reduction.keep).gather(1, reduction.dst)
    assert torch.equal(place.gather(1, reduction.src), data["src_idx"])
    assert torch.equal(joined, data["dst_idx"])
    tokens, size = whole_row(data, place, reduction)
    torch.testing.assert_close(tokens, data["out_x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(size, data["out_token_size"], atol=1e-5, rtol=0)
    assert method.count(view.counts) == reduction.slots


@pytest.mark.parametrize("name", golden_names("crossget_clip_*.npz"))
def test_clip_reducer_equals_the_release(name):
    data = golden(name)
    place = split(data, llava=False)
    guidance = "cross" if data["guided"] else None
    text = "eot" in data
    signals = {"keys_full": kernels.take_rows(data["key"], place)}
    if "query_token" in data:
        # The query asked is EOT's in text (first), the cross token's in vision (last).
        other = torch.full_like(data["query_token"], float("nan"))
        pair = [data["query_token"], other] if text else [other, data["query_token"]]
        signals["protected_queries"] = torch.cat(pair, 1)
        importance = kernels.query_cosine(data["key"], data["query_token"][:, 0])
        torch.testing.assert_close(importance, data["importance"], atol=1e-6, rtol=0)
    size = data["token_size"][..., 0].gather(1, place)
    site = Site("text" if text else "vision", 0, "mid")
    view = TokenView(kernels.take_rows(data["x"], place), site, size, signals=signals)
    method = CrossGET(rv=None if text else data["r"], rl=data["r"] if text else None, guidance=guidance)
    check(data, view, place, method)


@pytest.mark.parametrize("name", golden_names("crossget_llava_*.npz"))
def test_llava_reducer_equals_the_release(name):
    data = golden(name)
    place = split(data, llava=True)
    n = place.shape[1]
    columns = data["attn"].gather(2, place.unsqueeze(1).expand(-1, data["attn"].shape[1], -1))
    rows = columns[:, [0, -1]] if data["class_token"] else columns[:, -1:]  # CLS, cross token
    received = columns.mean(1)
    importance = attention_importance(received, rows[:, -1:], data["x"].shape[1] - n)
    torch.testing.assert_close(importance, data["importance"].gather(1, place), atol=1e-6, rtol=0)
    signals = {
        "keys": kernels.take_rows(data["key"], place),
        "received_attention": received,
        "protected_attention": rows.unsqueeze(2),
    }
    size = data["token_size"][..., 0].gather(1, place)
    view = TokenView(kernels.take_rows(data["x"], place), Site("vision", 0, "mid"), size, signals=signals)
    r = data["r"] if data["protected"] < 0 else min(data["r"], (data["x"].shape[1] - data["protected"]) // 2)
    check(data, view, place, CrossGET(rv=r, guidance="attention"))


def test_weights_are_those_of_the_release():
    data = golden("crossget_clip_07_sizes.npz")
    place = split(data, llava=False)
    importance = data["importance"].gather(1, place)
    size = data["token_size"][..., 0].gather(1, place)
    keep, src, dst = kernels.complete_match(kernels.take_rows(data["key"], place), importance, data["r"])
    reduction = ensemble(keep, src, dst, importance, size)
    total = size.gather(1, keep).scatter_add(1, dst, size.gather(1, src)).gather(1, dst)
    share = 2.0 * data["weight"][..., 0] * size.gather(1, src) / total
    torch.testing.assert_close(reduction.src_weight, share, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", golden_names("crossget_e2e_*.npz"))
def test_loss_equals_the_release_and_js_is_another(name):
    data = golden(name)
    torch.testing.assert_close(
        cross_loss(data["image_cross"], data["text_cross"]).item(), data["loss_js"], atol=1e-6, rtol=0
    )
    p, q = data["image_cross"].softmax(-1), data["text_cross"].softmax(-1)
    m = (p + q) / 2
    true = sum(F.kl_div(m.log(), x, reduction="batchmean") for x in (p, q)) / 2
    torch.testing.assert_close(cross_loss(data["image_cross"], data["text_cross"], "js"), true, atol=1e-6, rtol=0)
    assert abs(true.item() - data["loss_js"]) > 0.02


# ---------------------------------------------------------------------- rules of every method
def mid_view(batch, n, stage="vision", seed=0, prefix=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    signals = {
        "keys_full": rand(batch, n, 12),
        "keys": rand(batch, n, 4),
        "protected_queries": rand(batch, prefix + 1, 12),
        "received_attention": torch.rand(batch, n, generator=g),
        "protected_attention": torch.rand(batch, prefix + 1, 3, n, generator=g),
    }
    return TokenView(rand(batch, n, 8), Site(stage, 1, "mid"), num_prefix=prefix, depth=4, signals=signals)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 24),
    r=st.integers(0, 14),
    batch=st.integers(1, 2),
    guidance=st.sampled_from(["cls", "cross", "attention", None]),
    stage=st.sampled_from(["vision", "text"]),
)
def test_count_is_what_reduce_keeps(n, r, batch, guidance, stage):
    if guidance == "attention":
        stage = "vision"
    method = CrossGET(guidance=guidance, **({"rv": r} if stage == "vision" else {"rv": None, "rl": r}))
    view = mid_view(batch, n, stage)
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        owner = reduction.assignment(n)
        assert (owner >= 0).all()  # nothing is dropped
        _, size = reduction.apply(view.tokens)
        assert torch.allclose(size.sum(1), torch.full((batch,), float(n)))
        assert (reduction.keep.diff(dim=1) > 0).all()
    for point in ("start", "end"):
        assert method.count(Counts(Site(stage, 1, point), n, n)) == n


@pytest.mark.parametrize("guidance", ["cls", "cross", "attention", None])
def test_batch_equals_single_rows(guidance):
    method = CrossGET(rv=5, guidance=guidance)
    view = mid_view(3, 17, seed=1)
    together = method.reduce(view)
    for i in range(3):
        signals = {name: value[i : i + 1] for name, value in view.signals.items()}
        alone = method.reduce(TokenView(view.tokens[i : i + 1], view.site, signals=signals))
        for name in ("keep", "src", "dst"):
            assert torch.equal(getattr(together, name)[i : i + 1], getattr(alone, name))


@pytest.mark.parametrize("guidance", ["cls", "cross", "attention", None])
def test_runs_on_meta_and_compiled(guidance):
    method = CrossGET(rv=5, guidance=guidance)
    view = mid_view(2, 17)
    signals = {name: value.to("meta") for name, value in view.signals.items()}
    shape = method.reduce(TokenView(view.tokens.to("meta"), view.site, signals=signals))
    assert shape.keep.shape == (2, 12) and shape.src.shape == (2, 5)

    def run(tokens, signals):
        return method.reduce(TokenView(tokens, view.site, signals=signals)).apply(tokens)[0]

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(view.tokens, view.signals), run(view.tokens, view.signals))


def test_ties_go_to_the_lowest_index():
    keys = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]].unsqueeze(0)
    view = TokenView(torch.zeros(1, 8, 4), Site("vision", 0, "mid"), signals={"keys_full": keys})
    reduction = CrossGET(rv=2, guidance=None).reduce(view)
    # Every pair ties: the lower index of a pair ranks first, looks at the other, and is the source.
    assert reduction.src.tolist() == [[0, 1]]
    assert reduction.keep.gather(1, reduction.dst).tolist() == [[4, 5]]
    assert reduction.keep_weight is None  # no guidance is the size-weighted mean


def test_nan_tokens_stay_out():
    view = mid_view(1, 12, seed=3)
    view.signals["keys_full"][0, 5] = float("nan")
    view.tokens[0, 5] = float("nan")
    reduction = CrossGET(rv=6).reduce(view)
    assert 5 not in reduction.src[0].tolist()
    out, _ = reduction.apply(view.tokens)
    assert int(out.isnan().any(-1).sum()) == 1


def test_important_tokens_merge_later():
    torch.manual_seed(0)
    keys = torch.randn(1, 10, 6).repeat_interleave(2, 1) + 0.01 * torch.randn(1, 20, 6)
    query = keys[:, 7]
    signals = {"keys_full": keys, "protected_queries": torch.stack([query, -query], 1)}
    view = TokenView(torch.randn(1, 20, 4), Site("vision", 0, "mid"), signals=signals)
    assert not {6, 7} & set(CrossGET(rv=5).reduce(view).src[0].tolist())  # CLS asks for 7 and its twin
    assert {6, 7} & set(CrossGET(rv=5, guidance="cross").reduce(view).src[0].tolist())  # the cross token does not


def test_who_guides_is_chosen_by_what_the_tower_has():
    view = mid_view(2, 16)
    auto, told = CrossGET(rv=4).reduce(view), CrossGET(rv=4, guidance="cls").reduce(view)
    assert torch.equal(auto.src, told.src) and torch.equal(auto.src_weight, told.src_weight)
    bare = TokenView(view.tokens, view.site, signals={"keys_full": view.signals["keys_full"]})
    auto, told = CrossGET(rv=4).reduce(bare), CrossGET(rv=4, guidance=None).reduce(bare)
    assert torch.equal(auto.src, told.src) and torch.equal(auto.dst, told.dst) and auto.keep_weight is None


def test_half_precision_is_compared_in_fp32():
    view = mid_view(2, 16, dtype=torch.bfloat16)
    wide = {name: value.float() for name, value in view.signals.items()}
    a = CrossGET(rv=4).reduce(view)
    b = CrossGET(rv=4).reduce(TokenView(view.tokens.float(), view.site, signals=wide))
    assert torch.equal(a.src, b.src) and torch.equal(a.keep, b.keep) and torch.equal(a.keep_weight, b.keep_weight)


def test_sites():
    def listed(method, plan=None):
        return [(s.stage, s.layer, s.point) for s in method.sites(plan or layout())]

    assert listed(CrossGET()) == [("vision", i, "mid") for i in range(4)]
    both = [("vision", i, p) for i in range(4) for p in ("start", "mid")]
    assert listed(CrossGET(guidance="cross")) == both
    assert listed(CrossGET(guidance="cross", rl=0)) == both + [("text", i, "start") for i in range(4)]
    assert listed(CrossGET.preset("llava")) == [*both, ("features", None, "end")]
    assert listed(CrossGET.preset("llava"), layout(stages=("vision",))) == both
    assert listed(CrossGET(rv=0)) == []
    assert listed(CrossGET(guidance=None), layout(prefix=0)) == [("vision", i, "mid") for i in range(4)]
    with pytest.raises(MissingSignal, match="guidance=None"):
        CrossGET(guidance="cls").sites(layout(prefix=0))
    with pytest.raises(SiteError, match="text"):
        CrossGET(rl=2).sites(layout(stages=("vision",)))
    assert CrossGET().sites(layout()) == CrossGET(guidance="cls").sites(layout())
    assert CrossGET().sites(layout(prefix=0)) == CrossGET(guidance=None).sites(layout(prefix=0))
    assert "guidance=None" in CrossGET().remarks(layout(prefix=0))[0]
    assert CrossGET().remarks(layout()) == [] == CrossGET(guidance=None).remarks(layout(prefix=0))
    assert CrossGET().build(layout()) is None
    assert CrossGET.preset("llava").build(layout()).cross_text is None


def test_parameters():
    for wrong in ({"rv": -1}, {"rv": True}, {"guidance": "text"}, {"rv": None}, {"guidance": "attention", "rl": 2}):
        with pytest.raises(ParameterError):
            CrossGET(**wrong)
    with pytest.raises(ParameterError):
        CrossGET.preset("blip")
    for spec in ("crossget", "crossget:rv=13:guidance=attention", "crossget:rl=6:guidance=none:prop_attn=false"):
        assert str(parse_methods(spec)[0]) == spec
    assert create_method("crossget", preset="llava").rv == 13
    assert not CrossGET(prop_attn=False).proportional


def test_token_counts_of_the_paper():
    def after(n, depth, **settings):
        method, found = CrossGET(**settings), []
        stage = "vision" if settings.get("rv") else "text"
        protected = 2 if stage == "vision" else 3  # CLS, or EOT and the text's first token; and the cross token
        n -= protected
        for layer in range(depth):
            n = method.count(Counts(Site(stage, layer, "mid"), n, n, 1, depth))
            found.append(n + protected)
        return found

    assert after(198, 12, rv=16) == [182, 166, 150, 134, 118, 102, 86, 70, 54, 38, 22, 12]
    assert after(198, 12, rv=12)[-2:] == [66, 54]
    assert after(78, 12, rv=None, rl=6)[-3:] == [18, 12, 8]
    assert after(578, 24, rv=13)[-3:] == [292, 279, 266]
