"""VisionZip: the released tokens, and the rules every method keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoder_by_hand import golden, golden_names

from vlmtok.core.signals import tower_signals
from vlmtok.core.site import Counts, Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import ParameterError, SiteError
from vlmtok.mergers.visionzip import VisionZip, dominant_and_contextual

CLS, KEYS, TURNED = (f"{name}@vision:feature" for name in ("cls_attention", "keys", "turned_keys"))


def view(x, attention, keys, name=CLS):
    return TokenView(x, Site("features"), num_prefix=1, signals={name: attention, KEYS: keys})


def random_view(batch, n, seed=0, name=CLS):
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(*((batch, 3, n) if name == CLS else (batch, n)), generator=g)
    return view(torch.randn(batch, n, 6, generator=g), attention, torch.randn(batch, n, 4, generator=g), name)


@pytest.mark.parametrize("name", golden_names("visionzip_case*.npz"))
def test_tokens_equal_the_release(name):
    data = golden(name)
    patches, dominant, contextual = data["hidden"][:, 1:], data["dominant"], data["contextual"]
    attention, keys = data["attn_cls_row"][:, :, 1:], data["metric"][:, 1:]
    torch.testing.assert_close(attention.sum(1), data["cls_attention_sum"], atol=1e-6, rtol=0)
    kept, targets, joining, target = dominant_and_contextual(data["cls_attention_sum"], keys, dominant - 1, contextual)
    assert torch.equal(kept + 1, data["dominant_abs_sorted"][:, 1:])
    taken = torch.zeros(patches.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    rest = torch.stack([(~row).nonzero().flatten() for row in taken])
    assert torch.equal(targets, rest[:, data["target_indices"]])
    assert torch.equal(target, data["assign"])
    assert torch.equal(torch.cat([targets, joining], 1).sort(dim=1).values, rest)

    method = VisionZip(keep=dominant + contextual, contextual=contextual)
    seen = view(patches, attention, keys)
    reduction = method.reduce(seen)
    out, size = reduction.apply(patches, None, data["hidden"][:, :1])
    torch.testing.assert_close(out, data["output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, dominant:], data["contextual_tokens"], atol=1e-5, rtol=0)
    assert (size.sum(1) == patches.shape[1]).all() and (size[:, 0] == 0).all()
    assert method.count(seen.counts) == reduction.slots == dominant + contextual


def test_paper_splits():
    def split(keep):
        method = VisionZip(keep=keep)
        return method.count(Counts(Site("features"), 576, 576)), method._contextual(keep)

    assert [split(keep) for keep in (64, 128, 192)] == [(64, 10), (128, 20), (192, 30)]
    assert VisionZip().count(Counts(Site("features"), 576, 576)) == 64


def test_a_contextual_token_is_target_plus_mean():
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]])
    attention = torch.tensor([[[0.9, 0.1, 0.1, 0.1, 0.1]]])
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]]])
    # CLS, patch 0; of 1, 2, 3, 4 the targets are 1 and 3, and both others are like 1.
    out, size = (
        VisionZip(keep=4, contextual=2).reduce(view(x, attention, keys)).apply(x, None, torch.tensor([[[32.0]]]))
    )
    assert out.flatten().tolist() == [32.0, 1.0, 2.0 + (4.0 + 16.0) / 2, 8.0]
    assert size.tolist() == [[0.0, 1.0, 3.0, 1.0]]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 40),
    keep=st.one_of(st.integers(1, 50), st.floats(0.01, 1.0)),
    contextual=st.one_of(st.integers(0, 20), st.floats(0.01, 1.0)),
    name=st.sampled_from([CLS, "received_attention@vision:feature"]),
)
def test_count_is_what_reduce_keeps(n, keep, contextual, name):
    if isinstance(keep, int) and isinstance(contextual, int) and contextual >= keep:
        with pytest.raises(ParameterError, match="no dominant"):
            VisionZip(keep=keep, contextual=contextual)
        return
    method = VisionZip(keep=keep, contextual=contextual)
    seen = random_view(2, n, name=name)
    reduction = method.reduce(seen)
    assert method.count(seen.counts) == (n if reduction is None else reduction.slots)
    if reduction is not None:
        protected = torch.randn(2, 1, 6)
        out, size = reduction.apply(seen.tokens, None, protected)
        owner = reduction.assignment(n + (name == CLS))
        assert out.isfinite().all()
        if name == CLS:
            assert torch.equal(out[:, 0], protected[:, 0])
            owner = owner[:, :-1]
        assert torch.equal(size.sum(1) + (owner < 0).sum(1), torch.full((2,), float(n)))


def test_without_a_class_token_received_attention_decides():
    name = "received_attention@vision:feature"
    seen = random_view(2, 30, name=name)
    reduction = VisionZip(keep=10, contextual=3).reduce(seen)
    best = seen.signals[name].argsort(dim=1, descending=True)[:, :7].sort(dim=1).values
    assert torch.equal(reduction.keep[:, :7], best)
    assert (reduction.keep < 30).all()


def test_behind_the_projector_tokens_keep_their_order():
    g = torch.Generator().manual_seed(3)
    x, attention, keys = torch.randn(2, 20, 6), torch.rand(2, 3, 20, generator=g), torch.randn(2, 20, 4, generator=g)
    method = VisionZip(keep=9, contextual=3)
    late = TokenView(x, Site("projected"), signals={CLS: attention, TURNED: keys})
    early = TokenView(x, Site("features"), signals={"received_attention@vision:feature": attention.sum(1), KEYS: keys})
    found, plain = method.reduce(late), method.reduce(early)
    assert (found.keep.diff(dim=1) > 0).all() and (found.keep < 20).all()
    order = plain.keep.argsort(dim=1)
    assert torch.equal(plain.keep.gather(1, order), found.keep)
    (tokens, size), (unordered, sizes) = found.apply(x), plain.apply(x)
    torch.testing.assert_close(tokens, unordered.gather(1, order.unsqueeze(-1).expand(-1, -1, 6)))
    assert torch.equal(size, sizes.gather(1, order))
    pruned = VisionZip(keep=6, contextual=0).reduce(late).keep
    assert torch.equal(pruned, attention.sum(1).argsort(dim=1, descending=True)[:, :6].sort(dim=1).values)


def test_ties_nan_and_zero_keys():
    x, keys = torch.randn(1, 12, 3), torch.randn(1, 12, 4)
    attention = torch.full((1, 2, 12), 0.05)
    reduction = VisionZip(keep=6, contextual=2).reduce(view(x, attention, keys))
    assert reduction.keep[0, 1:4].tolist() == [0, 1, 2]
    attention[0, :, 1] = float("nan")
    assert 1 not in VisionZip(keep=6, contextual=2).reduce(view(x, attention, keys)).keep[0, 1:4].tolist()
    same = VisionZip(keep=6, contextual=2).reduce(view(x, torch.full((1, 2, 12), 0.05), torch.zeros(1, 12, 4)))
    assert (same.dst == 4).all()  # nothing is similar to anything: the first target


def test_batch_equals_single_rows():
    seen, method = random_view(3, 30), VisionZip(keep=12, contextual=4)
    together = method.reduce(seen)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in seen.signals.items()}
        alone = method.reduce(TokenView(seen.tokens[i : i + 1], seen.site, signals=one))
        for name in ("keep", "src", "dst", "src_weight"):
            assert torch.equal(getattr(together, name)[i : i + 1], getattr(alone, name))


def test_meta_compiled_and_half_precision():
    seen, method = random_view(2, 30), VisionZip(keep=12, contextual=4)

    def run(x, attention, keys):
        reduction = method.reduce(view(x, attention, keys))
        return reduction.apply(x, None, x[:, :1])[0]

    given = (seen.tokens, seen.signals[CLS], seen.signals[KEYS])
    assert run(*(t.to("meta") for t in given)).shape == (2, 12, 6)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), run(*given))
    half = [t.bfloat16() for t in given]
    a, b = method.reduce(view(*half)), method.reduce(view(*(t.float() for t in half)))
    assert torch.equal(a.keep, b.keep) and torch.equal(a.dst, b.dst)


def test_assignment_is_by_cosine():
    seen = random_view(1, 20, seed=4)
    score = seen.signals[CLS].sum(1)
    _, targets, joining, target = dominant_and_contextual(score, seen.signals[KEYS], 8, 3)
    keys = F.normalize(seen.signals[KEYS][0], dim=-1)
    for i, j in zip(joining[0].tolist(), target[0].tolist()):
        assert j == int((keys[targets[0]] @ keys[i]).argmax())
    none = dominant_and_contextual(score, seen.signals[KEYS], 8, 0)
    assert [t.shape[1] for t in none] == [8, 0, 0, 0]


def test_sites_and_parameters():
    def layout(prefix):
        return Layout(
            "by hand",
            {"vision": StageLayout(4, 8, 2, 2, provides=tower_signals(prefix)), "features": StageLayout(1, 8, 0, 0)},
        )

    assert VisionZip().sites(layout(1)) == [Site("features", needs=(CLS, KEYS, "protected"))]
    assert VisionZip().sites(layout(0)) == [Site("features", needs=("received_attention@vision:feature", KEYS))]
    later = {"vision": layout(1).stages["vision"], "projected": StageLayout(1, 8, 0, 0)}
    packed = Layout("packed crops", later)
    assert VisionZip().sites(packed) == [Site("projected", needs=(CLS, TURNED), separators="drop")]
    assert VisionZip(separators="keep").sites(packed) == [Site("projected", needs=(CLS, TURNED))]
    assert "projected" in VisionZip().remarks(packed)[0] and VisionZip().remarks(layout(1)) == []
    with pytest.raises(SiteError, match="features"):
        VisionZip().sites(Layout("no tower", {"projected": later["projected"]}))
    for wrong in (
        {"keep": 0},
        {"separators": True},
        {"contextual": -1},
        {"contextual": 1.5},
        {"keep": 8, "contextual": 8},
        {"contextual": True},
    ):
        with pytest.raises(ParameterError):
            VisionZip(**wrong)
    for spec in ("visionzip", "visionzip:keep=64:contextual=10", "visionzip:keep=221:contextual=30"):
        assert str(parse_methods(spec)[0]) == spec
