"""TransPrune in a whole Llama: cuts, lengths of the layers, logits and greedy tokens of the released model."""

import pytest
import torch
from decoder_by_hand import PlainLlama, Run, golden, golden_names

from vlmtok.pruners.transprune import TransPrune


def method_of(data, **settings):
    return TransPrune(
        ratios=tuple(data["ratios"].tolist()),
        layers=tuple(data["prune_layers_1based"].tolist()),
        accumulate=tuple((data["acc_layers_1based"] - 1).tolist()),
        **settings,
    )


def shares(score):
    return score / (score.sum() + 1e-8)


@pytest.mark.parametrize("name", golden_names("transprune_e2e_case*.npz"))
def test_prefill_equals_the_release(name):
    data = golden(name)
    llama = PlainLlama(data)
    run = Run(llama, data["inputs_embeds"][0], data["image_start"], data["n_image"], method_of(data))
    assert len(run.cuts) == len(data["ratios"])
    for i, (site, reduction, signals, state) in enumerate(run.cuts):
        places = run.plan[site.layer]
        attention, variation = shares(signals["text_attention"].mean((1, 2))[0]), shares(state["variation"][0])
        torch.testing.assert_close(attention, data[f"stage{i}_iga_norm"], atol=1e-6, rtol=0)
        torch.testing.assert_close(variation, data[f"stage{i}_ttv_norm"], atol=1e-6, rtol=0)
        torch.testing.assert_close(attention + variation, data[f"stage{i}_score"], atol=1e-6, rtol=0)
        assert (reduction.keep[0] + run.start).tolist() == data[f"stage{i}_keep_abs"].tolist()
        assert places.tolist() == data[f"stage{i}_keep_orig"].tolist()
    torch.testing.assert_close(llama.head(run.hidden), data["prefill_logits"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", golden_names("transprune_e2e_case*.npz"))
def test_decoding_equals_the_release(name):
    data = golden(name)
    llama = PlainLlama(data)
    run = Run(llama, data["inputs_embeds"][0], data["image_start"], data["n_image"], method_of(data))
    table = llama.weights["model.embed_tokens.weight"]
    tokens, logits = [llama.head(run.hidden)[-1].argmax().item()], []
    for _ in data["decode_tokens"]:
        logits.append(llama.head(run.replay(table[torch.tensor(tokens)]))[-1])
        tokens.append(logits[-1].argmax().item())
    assert tokens[:-1] == data["decode_tokens"].tolist()
    torch.testing.assert_close(torch.stack(logits), data["decode_logits"], atol=1e-4, rtol=0)
    assert [length + len(logits) for length in run.lengths] == data["kv_len_per_layer"].tolist()
