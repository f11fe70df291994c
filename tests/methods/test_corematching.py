"""CoreMatching: counts, elbow and core tokens of the release, plain loops, and the rules every method keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from support.asking import llava
from support.checks import watched
from support.decoder_by_hand import golden, golden_names

import vlmtok
from vlmtok.core.signals import DECODER_SIGNALS, DecoderTaps
from vlmtok.core.site import Counts, Layout, Site, StageLayout
from vlmtok.core.spec import parse_methods
from vlmtok.core.view import TokenView
from vlmtok.errors import MissingSignal, ParameterError, SiteError
from vlmtok.pruners.corematching import CoreMatching, core_tokens, elbow

END = Site("decoder", 5, "end")


def kept(reduction):
    """Tokens that stay of each row."""
    return [row[real].tolist() for row, real in zip(reduction.keep, reduction.valid)]


def view_of(match):
    return TokenView(torch.zeros(*match.shape[:2], 3), END, signals={"activation_match": match})


# ---------------------------------------------------------------------- the release
def match_of(data):
    """The signal, derived from the packed signs of a file."""
    bits = np.unpackbits(data["positive"].numpy(), axis=1)[:, : data["F"]]
    on = torch.from_numpy(bits).bool()[None]
    row = torch.arange(data["N"])[None]
    visual, text = row[:, data["start"] : data["end"]], row[:, data["end"] :]
    taps = DecoderTaps(
        lambda _: None, lambda: None, 1.0, lambda _: None, row, visual, text, active=lambda places: on[:, places[0]]
    )
    return DECODER_SIGNALS["activation_match"](taps)


@pytest.mark.parametrize("name", golden_names("corematching_*.npz"))
def test_core_tokens_equal_the_release(name):
    data = golden(name)
    match = match_of(data)
    if data["activations"].numel():
        packed = np.packbits((data["activations"] > 0).numpy(), axis=1)
        assert (packed == data["positive"].numpy()).all()
    counts = match[..., :-1][..., data["ref"]]
    assert torch.equal(counts[0].long(), data["counts"])
    assert elbow(counts).tolist() == [[data["elbow"]]]
    assert (counts >= elbow(counts)).nonzero()[:, 1].tolist() == data["core_inclusive"].tolist()
    reduction = CoreMatching(reference=data["ref"]).reduce(view_of(match))
    assert kept(reduction) == [data["core"].tolist()]
    gone = set(range(data["end"] - data["start"])) - set(kept(reduction)[0])
    assert sorted(gone) == [column - data["start"] for column in sorted(data["zeroed"].tolist())]


# ---------------------------------------------------------------------- plain loops
def by_loops(counts):
    """Core tokens of one row, in whole numbers."""
    y = sorted(counts, reverse=True)
    n = len(y)
    far = [abs((y[-1] - y[0]) * i - (n - 1) * (y[i] - y[0])) for i in range(n)]
    bend = y[far.index(max(far))]
    core = [j for j in range(n) if counts[j] > bend]
    return core or [counts.index(max(counts))]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=24))
def test_elbow_equals_plain_loops(counts):
    score = torch.tensor([counts])
    assert core_tokens(score).nonzero()[:, 1].tolist() == by_loops(counts)
    reduction = CoreMatching().reduce(view_of(torch.tensor([counts]).float()[..., None].expand(-1, -1, 6)))
    if len(counts) == 1:
        assert reduction is None
    else:
        assert kept(reduction) == [by_loops(counts)]
        assert sorted(set(reduction.keep[0].tolist())) == sorted(reduction.keep[0].tolist())


def test_distances_are_compared_exactly():
    """Large counts, whose distances differ by less than fp32 can tell."""
    y = [3 * 2**22, 2 * 2**22 - 1, 2**22 - 1, 0]
    assert elbow(torch.tensor([y])).item() == y[1]
    y = [3 * 2**22, 2 * 2**22 - 1, 2**22 - 2, 0]
    assert elbow(torch.tensor([y])).item() == y[2]


# ---------------------------------------------------------------------- text
def test_reference_counts_from_the_texts_end():
    """Column r of the signal is the r-th row of the text, the last one the prompt's last token."""
    match = torch.stack([torch.eye(8)[i] for i in range(7)], 1)[None]  # row i of the text goes with token i

    def best(text, reference):
        given = torch.cat([match[..., :text], torch.eye(8)[None, :, 7:]], 2)
        return CoreMatching(keep=1, reference=reference).reduce(view_of(given)).keep.item()

    assert [best(6, r) for r in (-1, -5, -6, -7, -99)] == [5, 1, 0, 0, 0]
    assert best(2, -5) == 0 and best(1, -1) == 0
    assert best(0, -5) == 7  # no text: the prompt's last token, so that `keep` keeps its word
    nothing = torch.eye(8)[None, :, 7:]
    assert CoreMatching().reduce(view_of(nothing)) is None


def drawn(rows=3, n=20, text=7):
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 40, (rows, n, text + 1), generator=g).float()


def test_batch_equals_single_rows():
    match = drawn()
    together = kept(CoreMatching().reduce(view_of(match)))
    assert [kept(CoreMatching().reduce(view_of(match[i : i + 1])))[0] for i in range(3)] == together
    assert len({len(row) for row in together}) > 1, "rows keep different numbers, or raggedness was not tried"
    top = CoreMatching(keep=6).reduce(view_of(match))
    assert top.valid is None and top.slots == 6 and (top.keep.diff(dim=1) > 0).all()
    score = match[..., -6]
    assert all(score[i, top.keep[i]].sum() == score[i].topk(6).values.sum() for i in range(3))


def test_ties_and_nan():
    equal = torch.full((1, 9, 6), 4.0)
    assert kept(CoreMatching().reduce(view_of(equal))) == [[0]]
    assert CoreMatching(keep=3).reduce(view_of(equal)).keep.tolist() == [[0, 1, 2]]
    equal[0, 0] = float("nan")
    reduction = CoreMatching().reduce(view_of(equal))
    assert kept(reduction) == [[1]] and 0 not in reduction.keep[0].tolist()
    assert 0 not in CoreMatching(keep=8).reduce(view_of(equal)).keep[0].tolist()


def test_meta_compiled_and_counts():
    match = drawn(2)

    def choice(match):
        found = CoreMatching().reduce(view_of(match))
        return found.keep, found.valid

    expected = choice(match)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, choice(match), expected))
    assert [tuple(t.shape) for t in choice(match.to("meta"))] == [(2, 19), (2, 19)]
    compiled = torch.compile(choice, fullgraph=True, backend="eager")(match)
    assert all(map(torch.equal, compiled, expected))
    assert CoreMatching().count(Counts(END, 20, 20)) is None
    for keep in (1, 6, 0.5, 40):
        reduction = CoreMatching(keep=keep).reduce(view_of(match))
        assert CoreMatching(keep=keep).count(Counts(END, 20, 20)) == (20 if reduction is None else reduction.slots)


# ---------------------------------------------------------------------- in a model
def test_rows_of_a_padded_batch_answer_as_alone():
    """Left padding, two pictures, no text behind the picture, text alone; what stays is what hooks of the test say."""
    model = models.shared("HF LLaVA")
    batch = models.Batch.of("^3I7", "^2I", "I1I6", "^4I1I", "5")
    more = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for spec in ("corematching:layer=1", "corematching:layer=2:keep=0.3:reference=-2:positions=renumber"):
        (method,) = vlmtok.parse_methods(spec)
        with torch.no_grad(), vlmtok.compress(model, method):
            with watched([method]) as seen:
                together = model.generate(**batch.inputs(), **more)
            for row in range(len(batch)):
                alone = model.generate(**batch.alone(row).inputs(), **more)
                for a, b in zip(together.logits, alone.logits):
                    torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)
        assert any(one.reduction is not None for one in seen)
        if method.keep is None:
            bare = [one.reduction is None for one in seen if one.signals["activation_match"].shape[2] == 1]
            assert bare == [True] * len(bare) and bare
            left = [int(n) for one in seen if one.reduction is not None for n in one.reduction.valid.sum(1)]
            assert min(left) >= 1 and max(left) < 16


def test_sites_and_parameters():
    layout = llava()  # 16 layers
    need = ("activation_match",)
    assert CoreMatching().sites(layout) == [Site("decoder", 3, "end", need, positions="keep")]
    for depth, layer in ((32, 5), (28, 4), (40, 6), (2, 0), (4, 1)):
        stage = StageLayout(depth, 8, 2, depth - 1, frozenset({"end"}), frozenset(need))
        assert CoreMatching().sites(Layout("a model", {"decoder": stage}))[0].layer == layer
    assert CoreMatching(layer=7, positions="renumber").sites(layout)[0] == Site(
        "decoder", 7, "end", need, positions="renumber"
    )
    with pytest.raises(SiteError, match="does not exist"):
        CoreMatching(layer=16).sites(layout)
    wrong = ({"keep": 0}, {"keep": 1.5}, {"layer": -1}, {"layer": 1.0}, {"reference": 0}, {"reference": -1.0})
    for one in (*wrong, {"at": "cache"}, {"positions": None}):
        with pytest.raises(ParameterError, match="CoreMatching"):
            CoreMatching(**one)
    for spec in ("corematching", "corematching:keep=64:layer=2", "corematching:reference=-1:positions=renumber"):
        assert str(parse_methods(spec)[0]) == spec
    with pytest.raises(MissingSignal, match="activation_match"):
        CoreMatching().reduce(TokenView(torch.randn(1, 20, 4), END))
