"""IMA: the released schedule, and LLaVA with branches left out against a loop that knows nothing of the library."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest
import torch
from support import asking, models, referee
from support import skipping_by_hand as by_hand
from support.checks import Print, assert_differs, assert_equal, assert_same
from support.llava_by_oracle import ROWS, Top, assert_generates_as_the_oracle
from support.places import GOLDEN

import vlmtok
from vlmtok import IMA, Method, Site
from vlmtok.core.attachment import Attachment
from vlmtok.errors import ParameterError, SiteError, UnsupportedModel
from vlmtok.pruners.ima import skipped_layers

CASES = json.loads((GOLDEN / "ima_schedule.json").read_text())["cases"]
PARTS = {"ffn": "ffn_skipped", "attn": "attention_skipped", "block": "blocks_skipped"}
PROMPTS = ("^3I5", "2I2", "^2I1I4", "6")
STEPS = 4


@functools.cache
def llava(attention="sdpa"):
    return models.llava(attention, depth=6)


# ---------------------------------------------------------------------- the schedule
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['mode']} {case['interval']} {case['length']}")
def test_layers_that_skip_are_those_of_the_release(case):
    """A mode skips in some calls only; where it does, its layers are ours."""
    layers = skipped_layers(len(case["kv_of"]), case["interval"], case["start"], case["end"])
    for part, name in PARTS.items():
        assert case[name] in ([], layers), part
    silent = case["mode"].startswith("onlycontext") and case["length"] <= 5
    silent = silent or (not case["mode"].partition("_")[0].endswith("context") and case["length"] > 1)
    parallel = "parrallel" in case["mode"]
    assert any(case[name] for name in PARTS.values()) == (not silent and not parallel)


def test_defaults_of_the_schedule():
    assert skipped_layers(32, 2) == list(range(2, 32, 2))
    assert skipped_layers(6, 1) == [1, 2, 3, 4, 5] and skipped_layers(6, 3, -1) == [0, 3]
    assert skipped_layers(6, 2, 2, 4) == [] and skipped_layers(6, 2, 1, 4) == [2]


def test_settings_are_checked():
    for settings, words in {
        "part=all": "part",
        "interval=0": "interval",
        "interval=1.5": "interval",
        "start=-2": "start",
        "end=-1": "end",
        "end=true": "end",
    }.items():
        with pytest.raises(ParameterError, match=f"IMA.*{words}"):
            vlmtok.parse_methods(f"ima:{settings}")
    before = Print.of(llava())
    with pytest.raises(SiteError, match=r"no layer i of the 6 .* i mod 6 == 0"):
        vlmtok.compress(llava(), IMA(interval=6))
    before.assert_still(llava())


# ---------------------------------------------------------------------- against a loop
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("part", PARTS)
def test_greedy_decoding_equals_a_plain_loop(part, cached, attention):
    """Left-padded rows with one, two or no picture, with and without a cache."""
    model, batch, layers = llava(attention), models.Batch.of(*PROMPTS), [1, 3]
    given = {"max_new_tokens": STEPS, "do_sample": False, "use_cache": cached}
    given |= {"return_dict_in_generate": True, "output_logits": True}
    with vlmtok.compress(model, _Skips(dict.fromkeys(layers, part))):
        found = model.generate(**batch.inputs(), **given)
    logits = torch.stack(found.logits, 1)
    bare = torch.stack(model.generate(**batch.inputs(), **given).logits, 1)
    for row in range(len(batch)):
        tokens, wanted = by_hand.written(model, batch.rows[row], batch.pixels[row], layers, part, STEPS)
        assert found.sequences[row, -STEPS:].tolist() == tokens.tolist()
        assert_equal(logits[row], wanted, what=f"row {row}")
    assert_differs(logits[:3], bare[:3])
    assert_equal(logits[3], bare[3], what="a row without a picture")


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("part", PARTS)
def test_beams_have_the_scores_of_a_plain_loop(part, cached):
    model, batch = llava(), models.Batch.of(*PROMPTS)
    with vlmtok.compress(model, IMA(part)):
        found = model.generate(
            **batch.inputs(),
            max_new_tokens=STEPS,
            do_sample=False,
            num_beams=3,
            length_penalty=0.0,
            use_cache=cached,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for row in range(len(batch)):
        tokens = found.sequences[row, -STEPS:]
        _, logits = by_hand.written(model, batch.rows[row], batch.pixels[row], [2, 4], part, tokens)
        score = logits.log_softmax(-1)[torch.arange(STEPS), tokens].sum()
        assert_equal(found.sequences_scores[row], score, what=f"row {row}")


@pytest.mark.parametrize("part", PARTS)
def test_hidden_states_of_every_layer_are_those_of_the_loop(part):
    """And a skipped block is an identity, to the bit."""
    model, batch = llava(), models.Batch.of("^3I5")
    with torch.no_grad(), vlmtok.compress(model, IMA(part)):
        found = model(**batch.inputs(), output_hidden_states=True).hidden_states
    visual = batch.rows[0] == models.IMAGE
    states = by_hand.logits(model, batch.rows[0], batch.pixels[0], [2, 4], part)[1]
    for layer in range(6):  # the last one stands behind the final norm
        assert_equal(found[layer][0], states[layer], what=f"in front of layer {layer}")
        same = torch.equal(found[layer + 1][0, visual], found[layer][0, visual])
        assert same == (part == "block" and layer in (2, 4))
    assert not torch.equal(found[3][0, ~visual], found[2][0, ~visual])


def test_candidates_of_prompt_lookup_are_accepted_as_in_plain_decoding():
    model, inputs = llava(), models.Batch.of("^3I5").inputs()
    with vlmtok.compress(model, IMA("block", 1)):
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        drafted = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert plain.tolist() == drafted.tolist()


# ---------------------------------------------------------------------- with cuts, and what methods read
STACKS = {
    "cut in front": [IMA(), Top(0.5)],
    "cuts at skipped layers": [IMA("block", 1), Top(0.5, "decoder", 2), Top(0.5, "decoder", 4, positions="renumber")],
    "one left in the middle": [IMA("ffn", 1, -1), Top(1, "decoder", 3)],
    "a cut of the tower": [*vlmtok.parse_methods("pitome:ratio=0.8"), IMA("attn", 1)],
    "rows of attention": vlmtok.parse_methods("ima:part=block:interval=1+fastv:K=3"),
    "queries of visual tokens": vlmtok.parse_methods("ima:part=attn:interval=1+sparsevlm:layers=(2;3):budgets=(8;4)"),
    "two schedules": [IMA("ffn", 2), IMA("attn", 2), IMA("block", 3)],
    "transitions": vlmtok.parse_methods("transprune:layers=(2;4):ratios=(0.7;0.4)+ima:part=block:interval=1"),
    "transitions of the FFN": vlmtok.parse_methods("ima:interval=1+transprune:layers=(2;4):ratios=(0.7;0.4)"),
}


@pytest.mark.parametrize("stack", STACKS)
def test_with_cuts_generate_equals_the_oracle(stack):
    """Visual tokens are those still there; one that ends its row is not skipped."""
    assert_generates_as_the_oracle(llava(), models.Batch.of(*ROWS), STACKS[stack])


def test_a_cut_that_leaves_the_padded_length_moves_what_is_visual():
    """The longest row has no picture: rows stay as long as they were, and their visual tokens stand elsewhere."""
    methods = [IMA("ffn", 1, -1), Top(0.25, "decoder", 3)]
    assert_generates_as_the_oracle(llava(), models.Batch.of("^2I2", "99999"), methods)


@pytest.mark.parametrize("stack", ["cut in front", "cuts at skipped layers", "transitions"])
def test_with_cuts_uncached_generation_equals_the_oracle(stack):
    assert_generates_as_the_oracle(llava(), models.Batch.of("^3I5", "2I2"), STACKS[stack], cached=False)


@dataclass(eq=False)
class _Skips(Method):
    """Looks on, and leaves out what it is told."""

    answer: object = None

    def sites(self, layout):
        return [Site("projected")]

    def reduce(self, view):
        return None

    def skip(self, layout):
        return self.answer

    def __str__(self):
        return "skips"


def test_answers_of_another_form_are_refused_before_anything_is_changed():
    before = Print.of(llava())
    for answer, kind, words in (
        (None, ParameterError, "must return a dict"),
        ({1: "mlp"}, ParameterError, "1: 'mlp' must be a layer and one of 'ffn', 'attn', 'block'"),
        ({"1": "ffn"}, ParameterError, "'1': 'ffn' must be"),
        ({True: "ffn"}, ParameterError, "True: 'ffn' must be"),
        ({6: "ffn"}, SiteError, "decoder layer 6 does not exist; .* has layers 0 to 5"),
        ({-1: "ffn"}, SiteError, "decoder layer -1 does not exist"),
    ):
        with pytest.raises(kind, match=f"_Skips.*{words}"):
            vlmtok.compress(llava(), _Skips(answer))
    before.assert_still(llava())


def test_no_layer_left_out_changes_no_bit():
    model, inputs = llava(), models.Batch.of(*PROMPTS).inputs()
    with torch.no_grad():
        bare = model(**inputs).logits
        with vlmtok.compress(model, _Skips({})):
            assert_same(model(**inputs).logits, bare)
        with vlmtok.compress(model, IMA()) as run:
            assert_differs(model(**inputs).logits, bare)
            words = models.Batch.of("6", "4").inputs()
            with run.paused():
                without = model(**words).logits
            assert_same(model(**words).logits, without)
        assert_same(model(**inputs).logits, bare)


# ---------------------------------------------------------------------- what is saved
@pytest.mark.parametrize(
    ("part", "each"), [("ffn", 3 * 32 * 64), ("attn", 2 * 32 * 32), ("block", 3 * 32 * 64 + 2 * 32 * 32)]
)
def test_what_is_saved_is_what_the_formula_says(part, each):
    """Of every visual token in two layers: three matrices of the FFN; the query and output projections."""
    model, inputs = llava("eager"), models.Batch.of("^3I5", "^3I1I4").inputs()
    assert (model.config.text_config.hidden_size, model.config.text_config.intermediate_size) == (32, 64)
    flops = []
    with torch.no_grad(), vlmtok.compress(model, IMA(part)) as run:
        for paused in (False, True):
            with referee.counter() as counter:
                if paused:
                    with run.paused():
                        model(**inputs)
                else:
                    model(**inputs)
            flops.append(counter.get_total_flops())
        report = run.report()
    assert flops[1] - flops[0] == 2 * 2 * 48 * each
    assert report.macs.before - report.macs.after.low == 2 * 48 * each


def test_a_layer_whose_queries_are_read_makes_them_all():
    model, inputs = llava(), models.Batch.of("^3I5").inputs()
    with (
        torch.no_grad(),
        vlmtok.compress(model, vlmtok.parse_methods("ima:part=attn:interval=1+fastv:K=3:keep=1.0")) as run,
    ):
        model(**inputs)
        skips = run._attachment.ledger.last["decoder"].skips
    assert [(skip.layer, skip.module) for skip in skips][:3] == [(1, "query"), (1, "output"), (2, "output")]
    assert {skip.tokens for skip in skips} == {16}


def test_a_paper_size_estimate():
    """LLaVA-1.5-7B, 576 visual tokens, every second FFN: 15 x 3 x 4096 x 11008 x 576 MACs."""
    report = vlmtok.estimate("llava-1.5-7b", IMA(), text_tokens=64)
    assert report.macs.before - report.macs.after.low == 15 * 3 * 4096 * 11008 * 576
    assert [line.mlp.low for line in report.layers if line.stage == "decoder"][:4] == [640, 640, 64, 640]
    bare, left = report.by("transprune").before, report.by("transprune").after.low
    assert bare - left == 15 * 3 * 4096 * 11008 * 576
    text = str(report)
    assert "leaves ffn of decoder layers 2, 4, 6" in " ".join(text.split())


# ---------------------------------------------------------------------- training
def test_gradients_are_those_of_masked_branches():
    model, batch = models.llava("eager", depth=3), models.Batch.of("^3I5")
    visual = batch.rows[0] == models.IMAGE
    weight = model.model.language_model.layers[1].mlp.down_proj.weight
    with vlmtok.compress(model, IMA("ffn", 1, 0, 2)):
        model(**batch.inputs()).logits[0, -1].square().sum().backward()
    found, weight.grad = weight.grad, None
    model.zero_grad()
    mask = lambda module, args, output: output.masked_fill(visual[None, :, None], 0.0)  # noqa: E731
    handle = model.model.language_model.layers[1].mlp.register_forward_hook(mask)
    model(**batch.inputs()).logits[0, -1].square().sum().backward()
    handle.remove()
    assert_equal(found, weight.grad)
    assert found.abs().max() > 1e-3


def test_layers_of_an_unknown_form_are_refused():
    """A bias behind a branch would be added where it is left out; a third part would run all the same."""
    for change, words in (
        (lambda layer: setattr(layer, "post_mlp_layernorm", torch.nn.LayerNorm(32)), "bias of post_mlp_layernorm"),
        (lambda layer: layer.add_module("memory", torch.nn.MultiheadAttention(32, 2)), "memory beside a mixer"),
    ):
        model = models.llava(depth=3)
        change(model.model.language_model.layers[2])
        before = Print.of(model)
        with pytest.raises(UnsupportedModel, match=words):
            vlmtok.compress(model, IMA())
        before.assert_still(model)


def test_neurons_of_a_skipped_mlp_cannot_be_read():
    """CoreMatching looks inside the MLP that would run without the tokens that it compares."""
    layer = vlmtok.CoreMatching().sites(asking.llava())[0].layer
    with pytest.raises(SiteError, match=f"a method reads the neurons of decoder layer {layer}"):
        Attachment([vlmtok.CoreMatching(), vlmtok.IMA(interval=1)], asking.llava())
    Attachment([vlmtok.CoreMatching(), vlmtok.IMA(interval=1, part="attn")], asking.llava())
