"""Language models of every family: what a report says of prefill, steps and cache is what ran, bare and compressed."""

import dataclasses

import pytest
import torch
from support.counted import Outside, bytes_of
from support.hosts_of import cache_of, with_cache
from vlmtok.adapters import adapter_for

import vlmtok
from vlmtok import estimate
from vlmtok.errors import ParameterError

from .build import FAMILIES, gemma4, llama4
from .harness import batch, generate

TWO_CUTS = "random:keep=0.5+random:keep=0.6:stage=decoder:layer=1:seed=1"
"""In front of the language model, and in front of the first layer that keeps keys where others stand before it."""
OTHER_LAYERS = ("qwen3_5", "qwen3_5_moe", "gemma4", "llama4", "lfm2_vl")
"""Families with layers that are not attention and one MLP, or whose layers keep different things."""

EXPERTS = ("muse_spark", "step3p7", "aria")
"""Families with experts whose names do not say so."""

pytestmark = pytest.mark.usefixtures("counted_paths")


@pytest.fixture
def counted_paths():
    with vlmtok.kernels.use("torch"):
        yield


def built(name, dtype=torch.float32, **settings):
    """A family with other settings of its language model, on the attention and experts that the counter sees."""
    family = FAMILIES[name]
    if settings:
        make = {"gemma4": gemma4, "llama4": llama4}[name]
        family = dataclasses.replace(family, make=lambda: remade(make(), settings))
    model = family.build("eager").to(dtype).requires_grad_(False)
    if "moe" in name or name in EXPERTS or "enable_moe_block" in settings:
        model.set_experts_implementation("eager")  # the fused one has no formula in the counter
    return model


def remade(model, settings):
    config = model.config
    given = {name: value for name, value in config.text_config.to_dict().items() if name != "per_layer_config"}
    config.text_config = type(config.text_config)(**{**given, **settings})
    return type(model)(config)


def outside(model):
    """Torch's count without tower and projector."""
    adapter = adapter_for(model)
    spared = {id(below) for below in (adapter.lm, model.get_output_embeddings())}
    beside = [part for part in adapter.core.children() if not any(id(below) in spared for below in part.modules())]
    return Outside(*beside)


def held_to_the_counter(model, method, call, bare=True):
    """Runs bare and compressed, and holds what the report says of the language model to what was counted.

    Returns:
        The report of the last pass.
    """
    with torch.no_grad(), vlmtok.compress(model, method) as run:
        with outside(model) as counted:
            call()
        report = run.report(total=True)
        lines = [line for line in report.lines if line.name not in ("vision", "projector")]
        assert lines[0].name == "prefill"
        assert all(line.after.fixed for line in lines)
        assert 2 * sum(line.after.low for line in lines) == counted.flops
        if bare:
            with run.paused(), outside(model) as counted:
                call()
            assert 2 * sum(line.before for line in lines) == counted.flops
        return run.report()


def dialogue(model, family):
    """A prompt with a picture, a later turn and a step, on one cache; how large that is behind each prompt."""
    from transformers import DynamicCache

    dtype, sizes = next(model.parameters()).dtype, []
    given = family.batch(family.rows[0], family.rows[0]).inputs(mask=False)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    later = torch.tensor([[5, 6, 7, 8, 9]] * 2)

    def call():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**given, **with_cache(model, cache), logits_to_keep=1)
        sizes.append(bytes_of(cache))
        model(input_ids=later, **with_cache(model, cache), logits_to_keep=2)
        model(input_ids=later[:, :1], **with_cache(model, cache), logits_to_keep=1)

    return call, sizes


UNCOUNTED = ("kimi_k25",)
"""Families whose language model has attention of another form: it is named, and not counted."""
COUNTED = [name for name in FAMILIES if name not in UNCOUNTED]


# ---------------------------------------------------------------------- every family
@pytest.mark.parametrize("name", UNCOUNTED)
def test_latent_attention_is_not_counted_and_named(name):
    model = built(name)
    with torch.no_grad(), vlmtok.compress(model, "random:keep=0.5") as run:
        model(**batch(name).inputs())
        report = run.report()
    assert report.total is None and not [line for line in report.lines if line.name == "prefill"]
    assert any("layer 0 of DeepseekV3Model has parts of another form" in reason for reason in report.missing)


@pytest.mark.parametrize("name", COUNTED)
def test_a_plain_forward_is_counted_exactly_and_its_cache(name):
    model, caches = built(name), []
    report = held_to_the_counter(
        model, "random:keep=0.5", lambda: caches.append(cache_of(model(**batch(name).inputs())))
    )
    prefill = next(line for line in report.lines if line.name == "prefill")
    assert prefill.after.low < prefill.before
    assert [report.cache.after.low, report.cache.before] == [bytes_of(cache) for cache in caches]
    assert not any("language model is not counted" in note for note in report.notes)


@pytest.mark.parametrize("name", COUNTED)
def test_generate_is_counted_exactly_behind_two_cuts(name):
    model = built(name)
    report = held_to_the_counter(model, TWO_CUTS, lambda: generate(model, batch(name).inputs()))
    assert report.passes["decode steps"] == 5
    assert [line.before for line in report.layers if line.stage == "decoder"]


@pytest.mark.parametrize("name", COUNTED)
def test_an_estimate_from_a_configuration_equals_the_run(name):
    model, family = built(name), FAMILIES[name]
    prompt = family.prompt(family.rows[0])
    visual = sum(len(picture.columns) for picture in prompt.pictures)
    before = int(prompt.pictures[0].columns[0])
    given = {"visual_tokens": visual, "text_tokens": (before, len(prompt.ids) - visual - before)}
    with torch.no_grad(), vlmtok.compress(model, "random:keep=0.5") as run:
        generate(model, family.batch(family.rows[0]).inputs(), steps=2)
        ran = run.report()
    if adapter_for(model).account().tile == 0:  # how many crops does not follow; the language model does not care
        given["crops"] = 1
    planned = estimate(model.config, "random:keep=0.5", parts=1, **given)
    for told in (planned, estimate(model, "random:keep=0.5", parts=1, **given)):
        assert [line for line in told.lines if line.name == "prefill"] == [
            line for line in ran.lines if line.name == "prefill"
        ]
        assert (told.step, told.cache) == (ran.step, ran.cache)
        assert [one for one in told.layers if one.stage == "decoder"] == [
            one for one in ran.layers if one.stage == "decoder"
        ]


# ---------------------------------------------------------------------- layers of other forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_later_turns_and_caches_are_counted_exactly(name, dtype):
    model = built(name, dtype)
    call, sizes = dialogue(model, FAMILIES[name])
    report = held_to_the_counter(model, TWO_CUTS, call)
    assert [report.cache.after.low, report.cache.before] == sizes


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_rows_of_several_chunks_and_windows_are_counted_exactly(name):
    model, family = built(name), FAMILIES[name]
    long = family.batch("9999I9999I99999", "99I99999J9").inputs()
    assert long["input_ids"].shape[1] > 65
    held_to_the_counter(model, TWO_CUTS, lambda: generate(model, long))


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_prompts_shorter_than_a_kernel_are_counted_exactly(name):
    model, family = built(name), FAMILIES[name]

    def call():
        model(**family.batch(family.rows[0]).inputs())
        model(input_ids=torch.tensor([[5, 6]]))

    held_to_the_counter(model, "random:keep=0.5", call)


WAYS = {
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize(
    "name, way",
    [(name, way) for name in OTHER_LAYERS for way in WAYS if (name, way) != ("llama4", "beams")],
)
def test_ways_to_generate_are_counted_exactly(name, way):
    model, family = built(name), FAMILIES[name]
    inputs = family.batch(family.rows[0]).inputs()
    if name.startswith("qwen3_5") and way == "prompt lookup":
        with pytest.raises(ValueError, match="stateful"):  # the host's own refusal
            model.generate(**inputs, max_new_tokens=2, **WAYS[way])
        return
    options = {"max_new_tokens": 6, "do_sample": False, **WAYS[way]}
    # How many drafts are right depends on what the model says.
    held_to_the_counter(model, TWO_CUTS, lambda: model.generate(**inputs, **options), bare=way != "prompt lookup")


@pytest.mark.parametrize("name", [name for name in OTHER_LAYERS if name != "llama4"])
def test_signals_of_such_models_are_counted_exactly(name):
    model = built(name)
    ahead = next(i for i, mixer in enumerate(mixers(model)) if mixer is None and i > 0)
    for method in (f"fastv:K={ahead + 1}:keep=0.5", f"pyramiddrop:layers=({ahead};):ratios=(0.5;)"):
        report = held_to_the_counter(model, method, lambda: generate(model, batch(name).inputs(), steps=2))
        assert next(line for line in report.lines if line.name == "signals").after.low > 0


def mixers(model):
    return [block.mixer for block in adapter_for(model).account().language.blocks]


SETTINGS = {
    "experts beside the MLP": (
        "gemma4",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "keys that are values": (
        "gemma4",
        {"attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1},
    ),
    "other head widths, wide MLPs": ("gemma4", {"use_double_wide_mlp": True, "global_head_dim": 32}),
    "nothing shared": (
        "gemma4",
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 16},
    ),
    "every second layer dense": ("llama4", {"moe_layers": [1, 3]}),
}


@pytest.mark.parametrize("name, settings", SETTINGS.values(), ids=SETTINGS)
def test_other_settings_of_published_models_are_counted_exactly(name, settings):
    model = built(name, **settings)
    call, sizes = dialogue(model, FAMILIES[name])
    report = held_to_the_counter(model, TWO_CUTS, call)
    assert [report.cache.after.low, report.cache.before] == sizes


# ---------------------------------------------------------------------- what is not counted says so
@pytest.mark.parametrize("name", ["transprune", "pyramiddrop", "fastv", "todre", "aim"])
def test_formulas_of_papers_refuse_layers_of_other_forms(name):
    told = {
        "qwen3_5": "a state in the place of attention",
        "lfm2_vl": "a state in the place of attention",
        "gemma4": "the keys of earlier layers and weights beside",
    }
    for family, what in told.items():
        given = {"visual_tokens": 16, "crops": 1}
        report = estimate(FAMILIES[family].build(), "random:keep=0.5", **given)
        with pytest.raises(ParameterError, match=f"{name}.* has layers with {what}.*'language' counts them"):
            report.by(name)
        planned = estimate(headless(family), "random:keep=0.5", **given)
        assert report.by("language").before == 2 * sum(line.before for line in planned.lines if line.name == "prefill")
    assert estimate(FAMILIES["llama4"].build(), "random:keep=0.5", visual_tokens=16).by(name).before


def headless(family):
    shape = adapter_for(FAMILIES[family].build()).account()
    return dataclasses.replace(shape, language=dataclasses.replace(shape.language, head=None))


def test_a_layer_with_an_unknown_part_is_not_counted_and_named():
    for part in (torch.nn.Bilinear(4, 4, 4), torch.nn.Conv1d(8, 8, 3)):
        model = FAMILIES["llava"].build()
        model.model.language_model.layers[2].extra = part
        shape = adapter_for(model).account()
        assert shape.language is None
        assert any("layer 2 of LlamaModel" in one.what and "extra" in one.what for one in shape.uncounted)
