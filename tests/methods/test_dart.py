"""DART: the released choice in both orders of its pivots, TensorRT-Edge-LLM's reference, a whole Llama, plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.asking import llava
from support.checks import watched
from support.decoder_by_hand import golden, golden_names
from support.hosts_of import cache_of
from support.llama_in_llava import llava_of

import vlmtok
from vlmtok.core.signals import DECODER_SIGNALS, DecoderTaps
from vlmtok.core.site import Counts, Site
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError
from vlmtok.pruners.dart import DART, largest, quotas, spread

RELEASED = golden_names("dart_dec_*.npz")


# ---------------------------------------------------------------------- the release
def released_view(data):
    """What a view shows at the end of layer K - 1, with the norms derived from keys of the file."""
    start, n = data["image_start"], data["n_image"]
    length = data["states"].shape[0]
    row = torch.arange(length)[None]
    states, keys = data["states"][None], data["keys"][None]
    taps = DecoderTaps(
        lambda _: None,
        lambda: keys,
        1.0,
        lambda _: None,
        row,
        row[:, start : start + n],
        row[:, start + n :],
        normed=lambda places: states[:, places[0]],
    )
    names = ("key_norm", "text_key_norm", "normed", "text_normed")
    signals = {name: DECODER_SIGNALS[name](taps) for name in names}
    return TokenView(states[:, start : start + n], Site("decoder", 1, "end"), signals=signals)


def wanted(data):
    """What a setting of the release asks for: a number, or a share."""
    if data["max_num"] >= 0:
        return {"keep": data["max_num"]}
    if data["retain_next"] >= 0:
        return {"keep": data["retain_next"]}
    return {"keep": 1.0 - data["reduction_ratio"]}


@pytest.mark.parametrize("name", RELEASED)
def test_choice_equals_the_release(name):
    """Norms, pivots, what each pivot takes and in which order; in the order that the release walks, and in ours."""
    data = golden(name)
    start, n = data["image_start"], data["n_image"]
    view = released_view(data)
    torch.testing.assert_close(view.signal("key_norm")[0], data["key_l1"][start : start + n], atol=1e-3, rtol=1e-6)
    first = largest(view.signal("key_norm"), data["pivot_image"])
    assert torch.equal(first[0], data["image_pivots"])
    if data["pivot_text"]:
        assert torch.equal(largest(view.signal("text_key_norm"), data["pivot_text"])[0], data["text_pivots"])
    for order in ("released", "ordered"):
        columns = data[f"visit_{order}"]
        pivots = data["states"][columns][None]
        rest = spread(view.tokens, pivots, [data["per_pivot"]] * len(columns), first)
        assert torch.equal(rest[0], data[f"chosen_{order}"].flatten())
        kept = torch.cat([first, rest], 1)[0].sort().values
        assert torch.equal(kept, data[f"keep_{order}"])


@pytest.mark.parametrize("name", RELEASED)
def test_method_keeps_what_the_release_keeps_in_our_order(name):
    data = golden(name)
    if data["pivot_text"] == 0:
        assert released_view(data).maybe("text_normed") is None
    method = DART(**wanted(data), pivots=(data["pivot_image"], data["pivot_text"]), counts="released")
    view = released_view(data)
    reduction = method.reduce(view)
    assert torch.equal(reduction.keep[0], data["keep_ordered"])
    assert method.count(view.counts) == data["keep_count"] == reduction.slots


def test_orders_of_pivots_differ():
    """The vectors tell the two orders apart, or neither test above would prove which one is ours."""
    differ = [name for name in RELEASED if not torch.equal(golden(name)["keep_released"], golden(name)["keep_ordered"])]
    assert len(differ) >= 3


# ---------------------------------------------------------------------- the embedding form
def edge_count(n, ratio):
    """How many tokens of a span TensorRT-Edge-LLM keeps; the ratio is in single precision, the rest is not."""
    return max(1, min(n, math.ceil(n * (1.0 - ratio))))


@pytest.mark.parametrize("name", golden_names("dart_*emb_*.npz"))
def test_embedding_form_equals_the_edge_runtime(name):
    """Span by span, with all text of the request as the signal ``text``."""
    data = golden(name)
    x, seen = data["x"], data["is_image"]
    spans = data["spans"].tolist()
    few = int(seen.sum()) < data["min_visual"]
    kept, picked = [], []
    for start, end in spans:
        n = end - start
        k = n if few else edge_count(n, data["reduction_ratio"])
        method = DART(keep=k, pivots=(data["pivot_image"], data["pivot_text"]), at="embeddings")
        view = TokenView(x[None, start:end], Site("projected"), signals={"text": x[~seen][None]})
        reduction = method.reduce(view)
        kept.append(torch.arange(start, end) if reduction is None else reduction.keep[0] + start)
        picked.append(k)
    assert picked == data["keep_per_span"].tolist()
    assert torch.equal(torch.cat(kept), data["keep"])


@pytest.mark.parametrize("name", golden_names("dart_*emb_*.npz"))
def test_rounds_equal_the_edge_runtime(name):
    """Pivots, quotas and the order of picking."""
    data = golden(name)
    if not len(data["visited"]) or len(data["spans"]) > 1:
        return
    (start, end), x, seen = data["spans"][0].tolist(), data["x"], data["is_image"]
    norm = x.abs().sum(-1)
    first = largest(norm[None, start:end], data["pivot_image"])
    text = (~seen).nonzero()[:, 0]
    behind = text[largest(norm[text][None], data["pivot_text"])[0]]
    assert torch.cat([first[0] + start, behind]).tolist() == data["visited"].tolist()
    shares = quotas(len(data["keep"]) - first.shape[1], first.shape[1] + len(behind))
    assert shares == data["quota"].tolist()
    rest = spread(x[None, start:end], x[data["visited"]][None], shares, first)
    assert torch.equal(torch.cat([first, rest], 1)[0] + start, data["pick_order"])


# ---------------------------------------------------------------------- a whole Llama
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", golden_names("dart_e2e_*.npz"))
def test_a_compressed_model_equals_the_release(name, attention):
    data = golden(name)
    model, ids = llava_of(data, attention)
    start = data["image_start"]
    method = DART(
        keep=1.0 - data["reduction_ratio"],
        K=data["K"],
        pivots=(data["pivot_image"], data["pivot_text"]),
        counts="released",
    )
    with torch.no_grad(), watched([method]) as seen, vlmtok.compress(model, method) as run:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.zeros(1, 3, 16, 16),
            max_new_tokens=len(data["decode_tokens"]) + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=list(range(data["vocab_size"], int(ids.max()) + 1)),
        )
        (cut,) = [found for found in seen if found.reduction is not None]
        assert run.report().visual("decoder")[-1] == data["keep_rel_sorted"].numel()
    assert torch.equal(cut.reduction.keep[0], data["keep_rel_sorted"])
    states = torch.cat([cut.signals["normed"], cut.signals["text_normed"]], 1)[0]
    torch.testing.assert_close(states, data["states"][start:], atol=1e-5, rtol=1e-5)
    norms = torch.cat([cut.signals["key_norm"], cut.signals["text_key_norm"]], 1)[0]
    repeated = data["num_heads"] // data["num_kv_heads"]  # the release repeats key-value heads first
    torch.testing.assert_close(repeated * norms, data["key_l1"][start:], atol=1e-5, rtol=1e-5)
    assert [layer.keys.shape[2] for layer in cache_of(out).layers] == data["kv_len_per_layer"].tolist()
    assert out.sequences[0, ids.shape[1] :].tolist()[:-1] == data["decode_tokens"].tolist()
    logits = torch.cat(out.logits)[:, : data["vocab_size"]]
    torch.testing.assert_close(logits[0], data["prefill_logits"][0, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1:], data["decode_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", ["dart:keep=0.4", "dart:keep=3:pivots=(2;3):K=3", "dart:at=embeddings:keep=0.4"])
def test_rows_of_a_padded_batch_answer_as_alone(spec):
    """Left padding, two pictures, no text behind the picture, fewer words than pivots."""
    model = models.shared("HF LLaVA")
    batch = models.Batch.of("^3I5", "^2I", "I1I3", "^4I1I", "5")
    more = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), vlmtok.compress(model, spec):
        together = model.generate(**batch.inputs(), **more)
        for row in range(len(batch)):
            alone = model.generate(**batch.alone(row).inputs(), **more)
            for a, b in zip(together.logits, alone.logits):
                torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- plain loops
def loops(x, norm, text, text_norm, k, pivots):
    """What stays of one picture, in float64 and plain loops; None where a choice hangs on less than 1e-6."""
    order = sorted(range(len(x)), key=lambda i: (-norm[i], i))
    kept = order[: min(pivots[0], k)]
    steering = [x[i] for i in kept]
    steering += [text[i] for i in sorted(range(len(text)), key=lambda i: (-text_norm[i], i))[: pivots[1]]]
    left = k - len(kept)
    for i, pivot in enumerate(steering):
        share = math.ceil(left / (len(steering) - i))
        pool = [j for j in range(len(x)) if j not in kept]
        far = {j: float(F.cosine_similarity(pivot.double(), x[j].double(), dim=0, eps=1e-8)) for j in pool}
        ranked = sorted(pool, key=lambda j: (far[j], j))
        if 0 < share < len(ranked) and far[ranked[share]] - far[ranked[share - 1]] < 1e-6:
            return None
        kept += ranked[:share]
        left -= share
    return sorted(kept)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 24),
    words=st.integers(0, 6),
    k=st.integers(1, 24),
    pivots=st.tuples(st.integers(1, 5), st.integers(0, 5)),
    seed=st.integers(0, 999),
)
def test_method_equals_plain_loops(n, words, k, pivots, seed):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, n, 6, generator=g), torch.randn(1, words, 6, generator=g)
    norm, text_norm = torch.rand(1, n, generator=g), torch.rand(1, words, generator=g)
    signals = {"key_norm": norm, "normed": x, "text_key_norm": text_norm, "text_normed": text}
    if not words:
        signals |= {"text_key_norm": None, "text_normed": None}
    method = DART(keep=k, pivots=pivots)
    view = TokenView(torch.zeros(1, n, 3), Site("decoder", 1, "end"), signals=signals)
    reduction = method.reduce(view)
    assert method.count(view.counts) == (n if reduction is None else reduction.slots)
    if reduction is None:
        assert k >= n
        return
    expected = loops(x[0], norm[0].tolist(), text[0], text_norm[0].tolist(), k, pivots)
    if expected is not None:
        assert reduction.keep[0].tolist() == expected


@pytest.mark.parametrize("pivots", [(4, 4), (1, 3), (5, 2), (2, 0), (3, 9)])
def test_pivots_of_picture_and_text_are_as_many_as_asked(pivots):
    """Larger draws than those above: more tokens and words than pivots."""
    hard = 0
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        x, text = torch.randn(1, 40, 6, generator=g), torch.randn(1, 7, 6, generator=g)
        norm, text_norm = torch.rand(1, 40, generator=g), torch.rand(1, 7, generator=g)
        expected = loops(x[0], norm[0].tolist(), text[0], text_norm[0].tolist(), 22, pivots)
        if expected is not None:
            hard += 1
            assert DART(keep=22, pivots=pivots).reduce(view_of(x, norm, text, text_norm)).keep[0].tolist() == expected
    assert hard > 6


def test_quotas_are_shares_of_what_is_left():
    assert quotas(92, 8) == [12, 12, 12, 12, 11, 11, 11, 11]
    assert quotas(3, 8) == [1, 1, 1, 0, 0, 0, 0, 0]
    assert quotas(0, 4) == [0, 0, 0, 0]
    for m in range(40):
        for p in range(1, 12):
            assert sum(quotas(m, p)) == m and sorted(quotas(m, p), reverse=True) == quotas(m, p)


def test_counts_of_the_release():
    """The numbers of the release's scripts, for 576 tokens and 8 pivots."""
    one = Counts(Site("decoder", 1, "end"), 576, 576)
    found = [DART(keep=k, counts="released").count(one) for k in (192, 128, 64, 1 - 0.778, 1 - 0.667, 1 - 0.889)]
    assert found == [196, 132, 68, 124, 188, 60]
    assert [DART(keep=k).count(one) for k in (192, 128, 64)] == [192, 128, 64]
    qwen = Counts(one.site, 256, 256)
    assert DART(keep=0.25, counts="released").count(qwen) == 68
    assert DART(keep=1, counts="released").count(Counts(one.site, 3, 3)) == 3
    assert parse_methods("dart:reduction_ratio=0.778")[0].keep == 0.222


# ---------------------------------------------------------------------- what every method keeps
def view_of(x, norm, text, text_norm):
    signals = {"key_norm": norm, "normed": x, "text_key_norm": text_norm, "text_normed": text}
    return TokenView(x, Site("decoder", 1, "end"), signals=signals)


def drawn(rows, n=30, words=7):
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, n, 8, generator=g),
        torch.rand(rows, n, generator=g),
        torch.randn(rows, words, 8, generator=g),
        torch.rand(rows, words, generator=g),
    )


def test_batch_equals_single_rows_and_signs_count():
    together = DART(keep=12).reduce(view_of(*drawn(3))).keep
    alone = [DART(keep=12).reduce(view_of(*(t[i : i + 1] for t in drawn(3)))).keep for i in range(3)]
    assert torch.equal(torch.cat(alone), together)
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    assert spread(x, x[:, :1], [3], torch.tensor([[0]])).tolist() == [[1, 2, 3]]  # signed, not absolute


def test_ties_nan_and_a_pivot_of_nan():
    x = torch.ones(1, 8, 4)
    norm = torch.ones(1, 8)
    assert DART(keep=5, pivots=(2, 0)).reduce(view_of(x, norm, x[:, :0], norm[:, :0])).keep.tolist() == [
        [0, 1, 2, 3, 4]
    ]
    x, norm, text, text_norm = drawn(1)
    x[0, 5], norm[0, 5] = float("nan"), float("nan")
    assert 5 not in DART(keep=29).reduce(view_of(x, norm, text, text_norm)).keep[0].tolist()
    text[0] = float("nan")
    kept = DART(keep=20).reduce(view_of(x, norm, text, text_norm)).keep[0].tolist()
    assert len(set(kept)) == 20 and 5 not in kept
    assert largest(torch.tensor([[float("nan"), 1.0, 3.0, 3.0]]), 4).tolist() == [[2, 3, 1, 0]]


def test_half_precision_meta_and_compiled():
    x, norm, text, text_norm = drawn(2)
    x, text = x.bfloat16(), text.bfloat16()

    def choice(x, norm, text, text_norm):
        return DART(keep=11).reduce(view_of(x, norm, text, text_norm)).keep

    expected = choice(x.float(), norm, text.float(), text_norm)
    assert torch.equal(choice(x, norm, text, text_norm), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choice(x.float(), norm, text.float(), text_norm), expected)
    meta = [t.to("meta") for t in (x, norm, text, text_norm)]
    assert choice(*meta).shape == (2, 11)
    compiled = torch.compile(choice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, norm, text, text_norm), expected)


def test_sites_and_parameters():
    layout = llava()
    needs = ("key_norm", "normed", "text_key_norm", "text_normed")
    assert DART().sites(layout) == [Site("decoder", 1, "end", needs, positions="keep")]
    assert DART(pivots=(8, 0), K=3).sites(layout) == [Site("decoder", 2, "end", needs[:2], positions="keep")]
    assert DART(at="embeddings").sites(layout) == [Site("projected", needs=("text",), positions="keep")]
    wrong = ({"keep": 0}, {"K": 0}, {"pivots": (0, 4)}, {"pivots": 4}, {"pivots": (4, -1)}, {"pivots": (4, 1.5)})
    for one in (*wrong, {"at": "features"}, {"counts": "paper"}, {"positions": "drop"}):
        with pytest.raises(ParameterError, match="DART"):
            DART(**one)
    for spec in ("dart", "dart:keep=64:pivots=(8;0)", "dart:at=embeddings:positions=none", "dart:counts=released"):
        assert str(parse_methods(spec)[0]) == spec
    with pytest.raises(MissingSignal, match="key_norm"):
        DART().reduce(TokenView(torch.randn(1, 20, 4), Site("decoder", 1, "end")))
