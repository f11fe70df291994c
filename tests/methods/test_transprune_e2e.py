"""TransPrune in a whole Llama: cuts, lengths of the layers, logits and greedy tokens of the released model."""

import pytest
import torch
from support import models
from support.checks import watched
from support.decoder_by_hand import PlainLlama, Run, golden, golden_names
from support.hosts_of import cache_of
from support.llama_in_llava import llava_of

import vlmtok
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


# ---------------------------------------------------------------------- the core, in a model of transformers
def run_golden(data, attention, **settings):
    """Answer, cache lengths, and visual tokens kept at every cut, of the compressed model."""
    model, ids = llava_of(data, attention)
    method = method_of(data, **settings)
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
        cuts = [found.reduction.keep[0] for found in seen if found.reduction is not None]
        assert run.report() is not None
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    logits = torch.cat(out.logits)[:, : data["vocab_size"]]
    return out.sequences[0, ids.shape[1] :].tolist(), logits, lengths, cuts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", golden_names("transprune_e2e_case*.npz"))
def test_a_compressed_model_equals_the_release(name, attention):
    data = golden(name)
    tokens, logits, lengths, cuts = run_golden(data, attention)
    for i, keep in enumerate(cuts):
        inside = data[f"stage{i}_keep_abs"]  # visual places of the then current sequence
        assert (keep + data["image_start"]).tolist() == inside.tolist()
    assert len(cuts) == len(data["ratios"])
    assert lengths == data["kv_len_per_layer"].tolist()
    assert tokens[:-1] == data["decode_tokens"].tolist()
    torch.testing.assert_close(logits[0], data["prefill_logits"][0, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1:], data["decode_logits"], atol=1e-4, rtol=0)


def test_every_setting_is_another_run():
    """What the release cannot do by parameter changes the outcome, so none of the settings is without effect."""
    data = golden("transprune_e2e_case0.npz")
    released = run_golden(data, "sdpa")
    for settings in ({"alpha": 1.0}, {"alpha": 0.0}, {"direction": "paper"}):
        cuts = run_golden(data, "sdpa", **settings)[3]
        assert any(not torch.equal(a, b) for a, b in zip(cuts, released[3])), settings
    kept = run_golden(data, "sdpa", positions="keep")
    assert kept[2] == released[2] and torch.equal(kept[3][0], released[3][0])
    assert (kept[1] - released[1]).abs().max() > 1e-3


SPEC = "transprune:layers=(3;5;8):ratios=(0.8;0.5;0.2)"


@pytest.mark.parametrize("settings", ["", ":alpha=1.0", ":alpha=0.0", ":direction=paper", ":positions=keep"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_pictures_and_prompts_that_end_with_one(attention, settings):
    """Rows of a batch answer as alone: grouped queries, left padding, two pictures, no text behind the picture."""
    model = models.shared("HF LLaVA" if attention == "sdpa" else "HF LLaVA eager")
    batch = models.Batch.of("^3I5", "^2I", "I1I3", "^4I1I", "5")
    more = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        bare = model.generate(**batch.inputs(), **more)
        with vlmtok.compress(model, SPEC + settings) as run:
            together = model.generate(**batch.inputs(), **more)
            stay = [layer.visual for layer in run.report().layers if layer.stage == "decoder"]
            for row in range(len(batch)):
                alone = model.generate(**batch.alone(row).inputs(), **more)
                for a, b in zip(together.logits, alone.logits):
                    torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together.logits[0][:4], bare.logits[0][:4], atol=1e-3)
    torch.testing.assert_close(together.logits[0][4], bare.logits[0][4], atol=1e-4, rtol=1e-4)  # text alone
    assert len(set(stay)) == 4, "three cuts"
