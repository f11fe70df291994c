"""Speculative decoding on every family: prompt lookup and an assistant choose what greedy decoding chooses."""

import copy
import functools

import pytest
import torch
from support.hosts_of import cache_of
from transformers import DynamicCache

import vlmtok
from vlmtok.errors import HostChanged

from .build import FAMILIES, shared
from .harness import MODES
from .methods import compressed
from .prompts import Prompt

STEPS = 10
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
STATEFUL = {"qwen3_5", "qwen3_5_moe"}
"""Layers with a state cannot take drafts back; the host refuses."""
DRAFTED = [name for name in FAMILIES if name not in STATEFUL and not FAMILIES[name].prefix]
"""PaliGemma's first forward would take drafts for its prompt, which sees itself whole: bare it chooses other tokens."""
TURNED = [name for name in DRAFTED if FAMILIES[name].positions == "mrope"]


def model_of(name):
    return shared(name, FAMILIES[name].attentions[0])


@functools.cache
def inputs_of(name):
    """A prompt of one row, whose text repeats, so that there is something to look up."""
    family = FAMILIES[name]
    prompt = family.prompt("3I6")
    tail = prompt.ids[-3:]
    return family.collect(Prompt(torch.cat([prompt.ids, tail, tail]), prompt.pictures)).inputs()


def generate(name, **more):
    inputs = inputs_of(name)
    found = model_of(name).generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, **more)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


def assistant(name, script):
    """A model that says a script, wrong in every third place, so that drafts are both taken and thrown away."""
    model = copy.deepcopy(model_of(name))
    start = inputs_of(name)["input_ids"].shape[1]

    def say(module, args, output):
        at = cache_of(output).get_seq_length() - start
        word = script[at] if at < len(script) and at % 3 != 2 else 7
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(word), output.logits.shape[-1]).to(
            output.logits
        )
        return output

    model.register_forward_hook(say)
    return model


@pytest.fixture
def tried(monkeypatch):
    """How often a cache was cropped."""
    cropped = []
    original = DynamicCache.crop

    def crop(self, *given, **more):
        cropped.append(self)
        return original(self, *given, **more)

    monkeypatch.setattr(DynamicCache, "crop", crop)
    return cropped


def forwards(model):
    """A list that grows with every forward of a model, and the handle that stops it."""
    seen = []
    return seen, model.register_forward_pre_hook(lambda *_: seen.append(1))


@pytest.mark.parametrize("way", ["lookup", "assistant"])
@pytest.mark.parametrize("mode", ["bare", "boundary", "decoder", "both+half"])
@pytest.mark.parametrize("name", DRAFTED)
def test_drafts_equal_greedy(name, mode, way, tried):
    with compressed(model_of(name), MODES[mode]):
        greedy = generate(name)
        more = LOOKUP if way == "lookup" else {"assistant_model": assistant(name, greedy)}
        seen, handle = forwards(model_of(name))
        found = generate(name, **more)
        handle.remove()
    assert found == greedy
    assert tried, "nothing was ever taken back: this test did not try what it is for"
    if way == "assistant":
        assert len(seen) < STEPS - 2, "no draft was taken: this test did not try what it is for"


INSIDE = (
    "fastv:K=1:keep=0.5",
    "dart:K=1:keep=0.5",
    "aim:first=1:last=3",
    "pyramiddrop:layers=(1;2):ratios=(0.6;0.3):positions=keep",
)
BEHIND = [("gemma4", "fastv:K=1:keep=0.5"), *((name, spec) for name in TURNED for spec in INSIDE)]
BEHIND += [(name, "corematching:layer=0:reference=-2:keep=0.5") for name in TURNED if "moe" not in name]
BEHIND += [(name, "divprune:keep=0.4") for name in [*TURNED, "gemma4"]]


@pytest.mark.parametrize(("name", "spec"), BEHIND)
def test_methods_of_the_registry_choose_the_same_behind_drafts(name, spec, tried):
    """The first forward brings drafts behind the prompt, which are text on every axis of positions."""
    with vlmtok.compress(model_of(name), spec) as run:
        greedy = generate(name)
        for more in (LOOKUP, {"assistant_model": assistant(name, greedy)}):
            assert generate(name, **more) == greedy
        assert all(line.before > line.after.low for line in run.report().sites)
    assert tried


@pytest.mark.parametrize("name", sorted(STATEFUL))
def test_families_with_a_state_are_refused_by_their_host(name):
    """With a compression as without one, before anything ran."""
    for mode in ("bare", "boundary"):
        with compressed(model_of(name), MODES[mode]):
            generate(name)
            with pytest.raises(ValueError, match="not supported with stateful models"):
                generate(name, **LOOKUP)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma4"])
def test_a_compressed_assistant_is_refused_with_the_cure(name):
    """Hosts give an assistant the prompt without its pictures: a compression of it has nothing to cut."""
    helper = copy.deepcopy(model_of(name))
    with vlmtok.compress(helper, "divprune:keep=0.5"):
        with pytest.raises(HostChanged, match="an assistant gets the prompt without its pictures; compress the model"):
            generate(name, assistant_model=helper)
        helper.generate(**inputs_of(name), max_new_tokens=2, do_sample=False)
