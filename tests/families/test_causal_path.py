"""Rows without padding keep the causal path behind a cut: attention gets no mask where the bare host gives it none.

A mask keeps SDPA from its flash kernel on a GPU. So every call of `scaled_dot_product_attention` is looked at, bare and
with cuts at the language model's input, between its layers, and both.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.core.attention_kernel import kernel_of

from .build import FAMILIES, shared
from .harness import MODES, generate
from .methods import compressed

SDPA = [name for name, family in FAMILIES.items() if "sdpa" in family.attentions]


@contextmanager
def attended(within=None):
    """Calls of SDPA, where a module is given while it runs: queries, whether there is a mask, whether it is causal."""
    found, running, real = Counter(), [within is None], F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
        several = key.shape[2] > query.shape[2]  # a step; hosts may put heads in the place of rows there
        found["step" if several else "rows", attn_mask is not None, is_causal] += running[-1]
        return real(query, key, value, attn_mask, dropout_p, is_causal, **rest)

    hooks = []
    if within is not None:
        hooks.append(within.register_forward_pre_hook(lambda *_: running.append(True)))
        hooks.append(within.register_forward_hook(lambda *_: running.append(False)))
    F.scaled_dot_product_attention = spy
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = real
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", SDPA)
def test_masks_are_those_of_the_bare_host(name):
    model, family = shared(name), FAMILIES[name]
    alone = family.batch(family.rows[0]).inputs()
    seen = {}
    for mode in ("bare", "boundary", "half", "both"):
        with compressed(model, MODES[mode]), attended() as found:
            generate(model, alone, 3)
        seen[mode] = found
    bare = seen.pop("bare")
    assert bare.total() and set(seen) == {"boundary", "half", "both"}
    for found in seen.values():
        assert found.total() == bare.total(), seen
        for (what, masked, causal), count in found.items():
            # Fewer masks are no loss: a step of full attention needs none, though some hosts make one.
            assert count <= bare[what, masked, causal] or (what == "step" and not masked), (bare, seen)


def told(run):
    """How many masked attentions behind a cut a report names."""
    return sum(count for what, count in run.report().kernels.items() if what.startswith("masked attention behind"))


@pytest.mark.parametrize("mode", ["boundary", "both+half"])
@pytest.mark.parametrize("name", SDPA)
def test_the_report_tells_of_every_masked_attention_behind_a_cut(name, mode):
    """Also of masks that the host makes itself for rows that were cut at its language model's input; no other layer."""
    model, family = shared(name), FAMILIES[name]
    lm = adapter_for(model).lm
    for inputs in (family.batch(*family.rows).inputs(), family.batch(family.rows[0]).inputs()):
        with compressed(model, MODES[mode]) as run, attended(lm) as found:
            generate(model, inputs, 3)
            assert told(run) == sum(count for (_, masked, _), count in found.items() if masked)


@pytest.mark.parametrize("mode", ["decoder", "half"])
def test_the_report_names_the_kernel_of_masked_attention(mode):
    """Behind a cut, where rows are padded; nothing is said where no mask is needed."""
    model, family = shared("llava"), FAMILIES["llava"]
    padded = family.batch(*family.rows).inputs()
    assert not padded["attention_mask"].all()

    def said(inputs, **options):
        with compressed(model, MODES[mode]) as run:
            generate(model, inputs, 1, **options)
            return {k: v for k, v in run.report().kernels.items() if k.startswith("masked")}, str(run.report())

    layers = 4 - 2  # behind the cut
    assert said(family.batch(family.rows[0]).inputs())[0] == {}
    counts, text = said(padded)
    assert counts == {"masked attention behind a cut:sdpa (flash)": layers}  # a CPU's flash kernel takes masks
    assert f"masked attention behind a cut on sdpa (flash) ({layers})" in text
    with sdpa_kernel(SDPBackend.MATH):
        assert said(padded)[0] == {"masked attention behind a cut:sdpa (math)": layers}


def test_another_attention_is_called_by_its_name():
    model, family = shared("llava", "eager"), FAMILIES["llava"]
    with torch.no_grad(), vlmtok.compress(model, "fastv:K=2") as run:
        model.generate(**family.batch(*family.rows).inputs(), max_new_tokens=1, do_sample=False)
    assert run.report().kernels["masked attention behind a cut:eager"] == 2


@pytest.mark.parametrize(("given", "asked"), [(torch.bool, torch.bool), (torch.float32, torch.bfloat16)])
def test_torch_is_asked_about_the_attention_that_runs(given, asked, monkeypatch):
    """With the sizes of queries and keys, and the mask in a dtype that SDPA takes beside them."""
    seen = []

    def choice(*inputs):
        seen.extend(inputs)
        return SDPBackend.EFFICIENT_ATTENTION.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    mask = torch.ones(2, 1, 5, 9, dtype=given)
    assert kernel_of("sdpa", torch.zeros(2, 5, 32, dtype=torch.bfloat16), 4, 8, mask) == "sdpa (efficient)"
    q, k, v, told, dropout, causal = seen
    assert q.shape == (2, 4, 5, 8) and k.shape == v.shape == (2, 4, 9, 8) and q.dtype == k.dtype == torch.bfloat16
    assert told.shape == mask.shape and told.dtype == asked and dropout == 0 and causal is False
