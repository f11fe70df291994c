"""ToDRE alone: reference vectors of its selection and of its relevance."""

from __future__ import annotations

import pytest
import torch
from support.merging_by_hand import golden, golden_names

from vlmtok import Site, ToDRE, TokenView

KINDS = {"maxsum": "sum", "kcenter": "max"}


@pytest.mark.parametrize("name", golden_names("todre_maxsum_*.npz", 9) + golden_names("todre_kcenter_*.npz", 9))
def test_todre_selection_reference_vectors(name):
    from vlmtok.pruners.todre import diverse_subset

    data = golden(name)
    x, n = data["x"], data["x"].shape[1]
    k = min(data["k"], n)
    keep, order = diverse_subset(x, k, data["pivot"], rule=KINDS[name.split("_")[1]])
    assert torch.equal(keep, data["keep_sorted"])
    assert torch.equal(order, data["order"])
    # The same through the method, as the core calls it: the pivot is the token that the class token looks at most.
    attention = data.get("cls_attn")
    if attention is None or k == n:
        return
    signals, part = {"cls_attention@vision:-1": attention.reshape(x.shape[0], 1, -1).expand(-1, 3, -1)}, None
    if "thumb_len" in data:
        part = torch.ones(1, n, dtype=torch.int64)
        part[:, : data["thumb_len"]] = 0
    view = TokenView(x, Site("projected"), part=part, signals=signals)
    if "frames" in data:
        return  # which frame the pivot comes from is the host's business
    reduction = ToDRE(keep=data["k"], rule=KINDS[name.split("_")[1]], tau=None).reduce(view)
    assert torch.equal(reduction.keep, data["keep_sorted"])


@pytest.mark.parametrize("name", golden_names("todre_stage2_*.npz", 6))
def test_todre_relevance_reference_vectors(name):
    from vlmtok.pruners.todre import relevance

    data = golden(name)
    kind, attention = data["token_type"], data["attn"]
    visual, text = (kind == 1).nonzero()[:, 0], (kind == 2).nonzero()[:, 0]
    to_vision = attention[:, text][:, :, visual][None]
    to_text = attention[:, visual][:, :, text].sum(-1).mean(0)[None]
    found = relevance(to_vision, to_text)
    assert abs(float(found[0]) - data["a_tv"]) < 1e-6
    assert abs(float(found[1]) - data["a_vt"]) < 1e-6
    for tau, drop in zip(data["taus"].tolist(), data["drop"].tolist()):
        view = TokenView(
            torch.zeros(1, len(visual), 4),
            Site("decoder", 3, "end"),
            signals={"text_attention": to_vision, "attention_to_text": to_text},
        )
        reduction = ToDRE(keep=None, tau=tau).reduce(view)
        assert bool(reduction.valid.any()) is not bool(drop)
        assert bool(reduction.valid.all()) is not bool(drop)
