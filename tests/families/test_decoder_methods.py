"""Methods that decide inside decoders whose layers differ: recurrent ones, convolutions, no positions, shared keys.

What they keep, and what the model says then, equals an oracle that runs the host's own layers with its eager attention
and is told where each method acts.
"""

import functools

import pytest
import torch
from support.hosts_of import cache_of
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok.core.placing import place
from vlmtok.errors import MissingSignal, SiteError

from .build import FAMILIES
from .by_attention import Asked
from .deep import deep, released
from .harness import NOISE, generate

STEPS, ROWS = 3, ("3I2I6", "2J1I2I4")
DEPTHS = {"qwen3_5": 16, "qwen3_5_moe": 16, "lfm2_vl": 16, "llama4": 16, "gemma4": 20}
RENUMBER = ("pyramiddrop", "sparsevlm", "transprune")


def ends(*layers):
    return {(layer, "end"): layer for layer in layers}


def starts(*layers):
    return {(layer, "start"): layer for layer in layers}


QWEN = {
    "fastv:keep=0.5": {(3, "end"): 1},
    "pyramiddrop:ratios=(0.8;0.5;0.3)": {(7, "start"): 4, (11, "start"): 8, (15, "start"): 12},
    "sparsevlm": ends(3, 7),
    "transprune:ratios=(0.8;0.5;0.3)": {**ends(*range(6, 15)), (7, "start"): 7, (11, "start"): 9, (15, "start"): 12},
    "aim:passes=0": ends(7, 11),
    "todre:keep=none:tau=1.0:check_layer=9": {(11, "end"): 9},
}
PLACES = {
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "lfm2_vl": {
        "fastv:keep=0.5": {(2, "end"): 1},
        "pyramiddrop:ratios=(0.8;0.5;0.3)": {(5, "start"): 4, (8, "start"): 8, (12, "start"): 12},
        "sparsevlm": {(2, "end"): 1, (5, "end"): 3, (8, "end"): 7},
        "transprune:ratios=(0.8;0.5;0.3)": {
            **ends(*range(7, 12)),
            (8, "start"): 7,
            (10, "start"): 9,
            (12, "start"): 12,
        },
        "aim:passes=0": ends(8, 10, 11),
        "todre:keep=none:tau=1.0:check_layer=9": {(10, "end"): 9},
    },
    "llama4": {
        "fastv:keep=0.5": ends(1),
        "fastv:K=4:keep=0.5": ends(3),
        "pyramiddrop:ratios=(0.8;0.5;0.3)": starts(4, 8, 12),
        "sparsevlm": ends(1, 3, 7),
        "transprune:ratios=(0.8;0.5;0.3)": {**ends(*range(6, 12)), **starts(7, 9, 12)},
        "aim:passes=0": ends(7, 8, 9, 10, 11),
        "todre:keep=none:tau=1.0": ends(13),
    },
    "gemma4": {
        "pyramiddrop:layers=(3;7;10):ratios=(0.8;0.5;0.3)": starts(3, 7, 10),
        "sparsevlm:layers=(0;2;6)": ends(0, 2, 6),
        "transprune:ratios=(0.8;0.5;0.3)": {**ends(*range(6, 12)), **starts(7, 9, 12)},
        "aim:passes=0:first=7:last=10": ends(6, 7, 8, 9),
        "todre:keep=none:tau=1.0:check_layer=11": ends(11),
    },
}
"""Where methods act, and the layer that they name there; worked out by hand."""
CASES = [(name, spec) for name, specs in PLACES.items() for spec in specs]


def placed(run):
    """Where methods act in the decoder, and the layer that they named."""
    return {(entry.site.layer, entry.site.point): entry.asked.layer for entry in run._attachment.at("decoder")}


def places_of(model, spec):
    """The same of a model that is not there, and what is said of it."""
    (method,) = vlmtok.parse_methods(spec)
    found, said = place(method, adapter_for(model).layout())
    return {(p.site.layer, p.site.point): p.asked.layer for p in found if p.site.stage == "decoder"}, said


@functools.cache
def batch(name):
    """Rows of different lengths, with several pictures each."""
    return FAMILIES[name].batch(*ROWS)


@functools.cache
def wanted(name, spec):
    """What the oracle says to each row: tokens, logits, and the visual tokens left behind each cut."""
    (method,) = vlmtok.parse_methods(spec)
    renumber = method.spec_name() in RENUMBER and FAMILIES[name].positions == "1d"
    found = []
    for prompt in batch(name).prompts:
        asked = Asked(name, deep(name, DEPTHS[name], "eager"), method, PLACES[name][spec], renumber)
        found.append((*asked.generate(prompt, STEPS), asked.left))
    return found


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_methods_equal_the_oracle(name, spec):
    model, inputs, rows = deep(name, DEPTHS[name]), batch(name).inputs(), wanted(name, spec)
    with vlmtok.compress(model, spec) as run, torch.no_grad():
        tokens, logits = generate(model, inputs, STEPS)
        plain = model(**inputs).logits[:, -1]
        places, report = placed(run), run.report()
    assert places == PLACES[name][spec]
    for row, (said, at, left) in enumerate(rows):
        assert left and left[-1] < (batch(name).prompts[row].owner >= 0).sum()
        assert (logits[row] - at).abs().max() <= NOISE
        assert (plain[row] - at[0]).abs().max() <= NOISE
        assert torch.equal(tokens[row], said)
    assert (logits[:, 0] - generate(model, inputs, 1)[1][:, 0]).abs().max() > 10 * NOISE
    moved = [at for at, asked in places.items() if at[0] != asked]
    assert len([note for note in report.notes if "no attention rows" in note and "acts at" in note]) == len(moved)


@pytest.mark.parametrize("name", PLACES)
def test_caches_are_shorter_from_the_layer_on_that_has_attention(name):
    model, spec = deep(name, DEPTHS[name]), next(iter(PLACES[name]))
    places = sorted(layer + (point == "end") for layer, point in PLACES[name][spec])
    with vlmtok.compress(model, spec):
        out = model.generate(**batch(name).inputs(), max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    whole = max(len(prompt.ids) for prompt in batch(name).prompts)
    kinds = model.config.get_text_config().layer_types
    for layer, held in enumerate(cache_of(out).layers):
        if kinds[layer] == "full_attention" and hasattr(held, "get_seq_length"):
            assert (held.get_seq_length() == whole) == (layer < places[0]), layer


# ---------------------------------------------------------------------- at the depth of a release
DEFAULTS = {
    "qwen3_5": {
        "fastv": {(3, "end"): 1},
        "dart": {(3, "end"): 1},
        "pyramiddrop": {(11, "start"): 8, (19, "start"): 16, (27, "start"): 24},
        "sparsevlm": {(3, "end"): 2, (7, "end"): 6, (15, "end"): 15},
        "transprune": {**ends(*range(6, 15)), (7, "start"): 7, (11, "start"): 9, (15, "start"): 12},
        "aim": ends(15, 19, 23),
        "todre": ends(27),
    },
    "lfm2_vl": {
        "fastv": {(2, "end"): 1},
        "dart": {(2, "end"): 1},
        "pyramiddrop": {(5, "start"): 4, (8, "start"): 8, (12, "start"): 12},
        "sparsevlm": {(2, "end"): 1, (5, "end"): 3, (8, "end"): 7},
        "transprune": {**ends(*range(7, 12)), (8, "start"): 7, (10, "start"): 9, (12, "start"): 12},
        "aim": ends(8, 10, 11),
        "todre": {(14, "end"): 13},
    },
    "llama4": {
        "fastv": ends(1),
        "dart": ends(1),
        "pyramiddrop": starts(12, 24, 36),
        "sparsevlm": ends(3, 9, 22),
        "transprune": {**ends(*range(6, 12)), **starts(7, 9, 12)},
        "aim": ends(*range(23, 36)),
        "todre": ends(41),
    },
    "gemma4": {"fastv": ends(1), "transprune": {**ends(*range(6, 12)), **starts(7, 9, 12)}},
}
FITTED = {
    "pyramiddrop": ("pyramiddrop:layers=(3;7;10)", starts(3, 7, 10)),
    "sparsevlm": ("sparsevlm:layers=(0;2;6)", ends(0, 2, 6)),
    "aim": ("aim:first=7:last=10", ends(6, 7, 8, 9)),
    "todre": ("todre:check_layer=11", ends(11)),
}
"""What refusals name for Gemma 4: fourteen layers at whose start tokens may leave."""


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in DEFAULTS for method in DEFAULTS[name]])
def test_defaults_at_the_depth_of_a_release(name, method):
    assert places_of(released(name), method)[0] == DEFAULTS[name][method]


@pytest.mark.parametrize("method", FITTED)
def test_schedules_that_reach_layers_which_share_keys_are_refused_with_one_that_does_not(method):
    spec, places = FITTED[method]
    with pytest.raises(SiteError, match="reuse keys of earlier ones") as problem:
        vlmtok.compress(released("gemma4"), method)
    assert f"; {spec} spreads its schedule over the layers before that" in str(problem.value)
    assert not any(module._forward_pre_hooks for module in released("gemma4").modules())
    assert places_of(released("gemma4"), spec)[0] == places
    for own in ("pyramiddrop:layers=(8;16;24)", "aim:first=20:last=22", "todre:check_layer=30"):
        with pytest.raises(SiteError, match=r"layer \d+ start$"):
            vlmtok.compress(released("gemma4"), own)


# ---------------------------------------------------------------------- what is said, and what is refused
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("fastv", ["layer 1 has no attention rows (linear attention); it acts at decoder layer 3 end"]),
        ("fastv:K=4", []),
        (
            "sparsevlm:layers=(4;5;9)",
            [
                "layers 4, 5 have no attention rows (linear attention); it acts at decoder layer 7 end, once, as it "
                "would at decoder layer 5 end",
                "layer 9 has no attention rows (linear attention); it acts at decoder layer 11 end",
            ],
        ),
        (
            "sparsevlm",
            ["layer 1 has no attention rows (linear attention); what would leave there leaves at decoder layer 3 end"],
        ),
    ],
)
def test_what_moved_is_said(spec, said):
    name = spec.partition(":")[0]
    assert places_of(deep("qwen3_5", 16), spec)[1] == [f"{name}: decoder {one}" for one in said]


def test_a_layer_behind_which_no_attention_comes_is_refused():
    model = deep("qwen3_5", 16)
    for spec in ("fastv:K=13", "todre:check_layer=12"):  # the last layer has attention, and nothing comes behind it
        with pytest.raises(MissingSignal, match=r"layer 12 end, but no attention rows .*linear attention.*later layer"):
            vlmtok.compress(model, spec)
    assert places_of(model, "pyramiddrop:layers=(12;):ratios=(0.5;)")[0] == {(15, "start"): 12}


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "transprune", "aim", "todre"])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "llama4"])
def test_an_estimate_acts_where_the_model_does(name, method):
    spec = next(spec for spec in PLACES[name] if spec.startswith(method))
    model, prompt = deep(name, DEPTHS[name]), FAMILIES[name].prompt("3I6")
    with vlmtok.compress(model, spec) as run, torch.no_grad():
        model(**FAMILIES[name].collect(prompt).inputs())
        report = run.report()
    visual = len(prompt.pictures[0].columns)
    text = (int(prompt.pictures[0].columns[0]), len(prompt.ids) - 1 - int(prompt.pictures[0].columns[-1]))
    made = vlmtok.estimate(model, spec, text_tokens=text, visual_tokens=visual, crops=1, logits="all", counts=run)
    assert made.layers == report.layers
    assert made.line("prefill") == report.line("prefill") and made.line("signals") == report.line("signals")
    notes = [[note for note in one.notes if "attention rows" in note] for one in (made, report)]
    assert notes[0] == notes[1] and bool(notes[0]) == (name != "llama4")
