"""Parts of the self-test by themselves: its cuts by hand, its windows, choices, rows and kernels."""

from __future__ import annotations

import torch
from support.doctor_hosts import CPU, text_of

from vlmtok.kernels import dispatch
from vlmtok.lab import doctor
from vlmtok.lab.doctor import probes, replay
from vlmtok.lab.doctor.facts import OK
from vlmtok.lab.doctor.language import Language
from vlmtok.lab.doctor.rows import cases
from vlmtok.lab.doctor.towers import Vision
from vlmtok.lab.tiny.families import FAMILIES
from vlmtok.lab.tiny.towers import TOWERS


def test_kernels_say_their_path(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETS", False)
    assert dispatch.explain(CPU)[0] == "torch"
    with dispatch.use("torch"):
        assert dispatch.explain(CPU) == ("torch", "the mode is 'torch'")
    with dispatch.use("triton"):
        assert dispatch.explain(CPU)[0] == "none" and "compiles for CUDA" in dispatch.explain(CPU)[1]
        monkeypatch.setattr(dispatch, "INTERPRETS", True)
        monkeypatch.setattr(dispatch, "HAS_TRITON", True)
        assert dispatch.explain(CPU)[0] == "triton"
    assert dispatch.explain(CPU)[0] == "torch"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.explain(CPU) == ("torch", "triton is not installed")


def test_a_cut_between_layers_by_the_oracle_is_a_cut_by_hand():
    """The host's run over the shorter row with hidden states put in, against its layers called one by one."""
    case = cases()["llava"].build(CPU)
    case.host()
    case.open()
    row, lm = case.rows[0], text_of(case.model)
    stays, wanted = case._oracle("layer", 0)
    assert 0 < len(stays) < row["input_ids"].shape[1]
    caught = []
    with replay.hooked(
        lm.layers[2].register_forward_pre_hook(lambda m, x, named: caught.append(x[0]), with_kwargs=True)
    ):
        case.forward(row)
    hidden = caught[0][:, stays]
    with torch.no_grad():
        turns = lm.rotary_emb(hidden, stays[None])
        causal = torch.full((len(stays), len(stays)), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        for layer in lm.layers[2:]:
            hidden = layer(hidden, attention_mask=causal, position_embeddings=turns)
        logits = case.model.lm_head(lm.norm(hidden))[0]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_a_window_counts_the_tokens_left():
    """Of what the oracle makes of a sliding mask: bool by bool from the definition."""
    case = cases()["gemma3"].build(CPU)
    case.host()
    case.open()
    length = case.rows[0]["input_ids"].shape[1]
    text = replay.TextModel(case.model, case.lm, case.visual(0), length)
    keep = case._oracle("input", 0)[0]
    seen, at = torch.ones(length, length, dtype=torch.bool).tril(), case.visual(0)
    seen[at[:, None], at] = True  # a picture sees itself both ways
    place, window = torch.arange(length), case.lm.config.sliding_window
    masks = {
        "full_attention": seen[None, None],
        "sliding_attention": (seen & (place[None] > place[:, None] - window))[None, None],
    }
    short = text._windowed(masks, replay.along(masks, {length: keep}), keep)["sliding_attention"][0, 0]
    left = seen[keep][:, keep]
    place = torch.arange(len(keep))
    assert torch.equal(short, left & (place[None] > place[:, None] - window))
    assert not torch.equal(short, masks["sliding_attention"][0, 0][keep][:, keep]), "the window matters here"


def test_the_choice_is_scattered_and_never_empty():
    for n in range(1, 40):
        kept = probes.scattered(n)
        assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < n
    assert len(probes.scattered(16)) == 10 and probes.some(5).tolist() == [0, 1, 3]


def test_rows_have_lengths_of_their_own():
    """Else an axis of tokens could not be told from one of channels."""
    for name in FAMILIES:
        subject = cases()[name].build(CPU)
        assert isinstance(subject, Language)
        sizes = {size for parameter in subject.model.parameters() for size in parameter.shape}
        lengths = [row["input_ids"].shape[1] for row in subject.rows]
        assert not sizes & set(lengths) and len(set(lengths)) == 2
        assert (subject.batch["attention_mask"].sum(1) < max(lengths)).any()


def test_examining_leaves_the_process_alone():
    state, threads, modes = torch.random.get_rng_state(), torch.get_num_threads(), dispatch.mode()
    doctor.examine(["timm ViT", "llava"])
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads and dispatch.mode() == modes


def test_a_vision_model_is_asked_with_two_pictures():
    tower = TOWERS["timm ViT"]
    subject = Vision(tower.build(), tower.run, tower.pictures(2))
    assert [fact.status for fact in subject.facts()] == [OK, OK, OK]
