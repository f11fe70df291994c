"""`vlmtok doctor` on faults of ours: a wrong choice, a hook that stays, one bit, wrong decoding; none is `ok`."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.doctor_hosts import broken, row_of, text_of
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.core.attachment import Attachment
from vlmtok.lab.doctor import language, probes, replay
from vlmtok.lab.doctor.facts import REFUSED
from vlmtok.lab.doctor.language import Language


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "blip-2", "open_clip CLIP", "timm EVA-02"])
def test_a_wrong_choice_shows(name, monkeypatch):
    """Other tokens stay than the oracle keeps, as many of them."""

    def reduce(self, view):
        batch, n, _ = view.tokens.shape
        kept = probes.some(n)
        return vlmtok.Reduction(((n - 1) - kept).sort().values.expand(batch, -1))

    monkeypatch.setattr(probes.Fixed, "reduce", reduce)
    row = row_of(name)
    wanted = {fact.name for fact in row.facts if fact.status != REFUSED} - {"bare", "neutral"}
    assert broken(row) == wanted and wanted, row
    assert all("the oracle's" in row.fact(fact).why for fact in wanted)


@pytest.mark.parametrize("name", ["llava", "timm ViT"])
def test_hooks_that_never_run_show(name, monkeypatch):
    monkeypatch.setattr(Attachment, "hook", lambda self, *given, **named: None)
    row = row_of(name)
    assert "methods were never asked at" in row.fact("neutral").why
    assert "nothing was cut" in row.fact("tower").why


@pytest.mark.parametrize("name", ["llava", "timm ViT"])
def test_one_bit_shows(name, monkeypatch):
    """A compression that cuts nothing and adds the smallest step to the output is not neutral."""
    from vlmtok.lab.doctor import towers

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        head = model.lm_head if hasattr(model, "lm_head") else model.head
        with vlmtok.compress(model, method, adapter=adapter):
            up = head.register_forward_hook(lambda m, x, out: torch.nextafter(out, out + 1))
            try:
                yield
            finally:
                up.remove()

    for module in (language, towers):
        monkeypatch.setattr(module, "compress", compress)
    assert broken(row_of(name)) == {"neutral"}


@pytest.mark.parametrize(("cached", "step", "said"), [(True, 2, "step 2, with a cache"), (False, 0, "without a cache")])
def test_wrong_decoding_shows(cached, step, said, monkeypatch):
    """With cuts in place, a later step on the cache is off, or the first one without."""
    cutting, generate = [], Language.generate

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        with vlmtok.compress(model, method, adapter=adapter):
            cutting.append(isinstance(method, list))
            yield
            cutting.pop()

    def off(self, with_cache=True):
        found = generate(self, with_cache)
        if with_cache is cached and any(cutting):
            found.logits[1, step] += 0.01
        return found

    monkeypatch.setattr(language, "compress", compress)
    monkeypatch.setattr(Language, "generate", lambda self, cached=True: off(self, cached))
    row = row_of("llava")
    assert broken(row) == {"generate"} and said in row.why and "row 1" in row.why, row.why


def test_a_hook_that_stays_shows(monkeypatch):
    """What a removed compression leaves behind is no longer the bare model."""

    @contextlib.contextmanager
    def compress(model, method, adapter=None):
        yield
        if isinstance(method, probes.Nothing):
            method.asked.update(map(str, method.sites(adapter_for(model).layout())))
            model.lm_head.register_forward_hook(lambda m, x, out: 2 * out)

    monkeypatch.setattr(language, "compress", compress)
    assert "logits after removal" in row_of("llava").fact("neutral").why


def test_a_cut_that_moves_nothing_proves_nothing():
    """An output that does not depend on visual tokens is no success, and is not called one."""

    def blind(model):
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.zero_()
            model.model.multi_modal_projector.linear_2.bias.zero_()
            for layer in text_of(model).layers:
                layer.self_attn.v_proj.weight.zero_()

    row = row_of("llava", blind)
    assert row.fact("input").status == REFUSED and "proves nothing" in row.fact("input").why


def test_the_oracle_knows_when_it_does_not_know_the_call(monkeypatch):
    """With all tokens kept it must be the bare model; else its word is worth nothing, and it says so."""
    monkeypatch.setattr(replay.TextModel, "_windowed", lambda self, before, after, keep: dict.fromkeys(after))
    row = row_of("gemma3")
    assert "how it is called is not known" in row.fact("input").why
