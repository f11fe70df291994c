"""`vlmtok doctor` on hosts that changed or are wrong by themselves, known faults among them: each is named."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.doctor_hosts import CPU, broken, mask_dropped, played, row_of, straight, text_of
from vlmtok.adapters import host_faults

from vlmtok.lab.doctor.facts import BROKEN, OK, REFUSED
from vlmtok.lab.doctor.rows import Case


# ---------------------------------------------------------------------- played hosts
def cache_name(module):
    names = inspect.signature(type(module).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def rotary_in_one_tensor(model):
    """The layers' rotary pair comes as one tensor under another name."""

    def call(run, *given, position_embeddings, **named):
        return run(*given, turns=torch.stack(position_embeddings), **named)

    def forward(run, *given, turns, **named):
        return run(*given, position_embeddings=tuple(turns), **named)

    played(text_of(model).layers, call, forward, {"position_embeddings": "turns"})


def cache_in_a_box(model):
    """The text model gets the cache inside something that is none."""
    name = cache_name(text_of(model))

    class Box:
        def __init__(self, inside):
            self.inside = inside

    def call(run, *given, **named):
        return run(*given, memory=Box(named.pop(name, None)), **named)

    def forward(run, *given, memory, **named):
        return run(*given, **{name: memory.inside}, **named)

    played([text_of(model)], call, forward, {name: "memory"})


def cache_left_behind(model):
    """Layers keep their own cache; the one that is handed around stays empty."""
    name, own = cache_name(text_of(model)), {}

    def forward(run, *given, **named):
        handed = named.get(name)
        if handed is not None:
            kept = own.setdefault("of", handed)
            if kept is not handed and handed.get_seq_length() == 0:
                own["of"] = handed
            named[name] = type(handed)()
        return run(*given, **named)

    played(text_of(model).layers, straight, forward)


def layers_called_otherwise(model):
    """The forward of layers was renamed, and they run by that name: no hook of theirs is called."""
    without_hooks(text_of(model).layers)


def deepstack_renamed(model):
    """Features for the first layers come under another name."""

    def call(run, *given, deepstack_visual_embeds=None, **named):
        return run(*given, lower_features=deepstack_visual_embeds, **named)

    def forward(run, *given, lower_features=None, **named):
        return run(*given, deepstack_visual_embeds=lower_features, **named)

    played([text_of(model)], call, forward, {"deepstack_visual_embeds": "lower_features"})


def blocks_in_parallel(model):
    """Attention and MLP read the same input: nothing lies between them any more."""
    kind = type(model.blocks[0])

    def forward(self, x, *given, **named):
        x1 = self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + x1 + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    made = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for block in model.blocks:
        block.__class__ = made


def blocks_called_otherwise(model):
    """The same for the blocks of a tower."""
    without_hooks(model.blocks)


def without_hooks(modules):
    """Calls go to `forward` at once."""
    kind = type(modules[0])
    call = {"__call__": lambda self, *given, **named: self.forward(*given, **named), "__module__": kind.__module__}
    made = type(kind.__name__, (kind,), call)
    for module in modules:
        module.__class__ = made


PLAYED = [
    ("llava", rotary_in_one_tensor, {"layer"}),
    ("qwen2_5_vl", rotary_in_one_tensor, {"layer"}),
    ("gemma3", rotary_in_one_tensor, {"layer"}),
    ("qwen2_5_vl", cache_in_a_box, {"generate"}),
    ("llava", cache_in_a_box, {"generate"}),
    ("llava", layers_called_otherwise, {"neutral", "layer"}),
    ("internvl", layers_called_otherwise, {"neutral", "layer"}),
    ("qwen3_vl", deepstack_renamed, {"input"}),
    ("timm ViT", blocks_in_parallel, {"tower"}),
    ("timm ViT", blocks_called_otherwise, {"neutral", "tower"}),
]


@pytest.mark.parametrize(
    ("name", "change", "facts"), PLAYED, ids=[f"{name}-{change.__name__}" for name, change, _ in PLAYED]
)
def test_a_host_that_changed_is_named(name, change, facts):
    """The host alone is right, and what we make of it is not; an adapter that refuses such a host breaks more facts."""
    row = row_of(name, change)
    assert row.status == BROKEN and row.fact("bare").status == OK, row
    assert broken(row) >= facts or row.fact("neutral").why.startswith("vlmtok refuses"), broken(row)
    assert all(fact.why for fact in row.facts if fact.status == BROKEN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (mask_dropped, "logits of row 1 in a padded batch differ"),
        (cache_left_behind, "with a cache"),
    ],
)
def test_a_host_that_is_wrong_by_itself_is_told_apart(change, said):
    row = row_of("llava", change)
    assert row.status == BROKEN and [fact.name for fact in row.facts] == ["bare"]
    assert row.why.startswith("bare: the host fails bare: ") and said in row.why, row.why


def test_a_host_that_raises_says_where():
    def change(model):
        def forward(run, *given, **named):
            raise AttributeError("no such thing\nand more of it")

        played(text_of(model).layers[1:2], straight, forward)

    row = row_of("llava", change)
    assert "the host fails bare: AttributeError: no such thing (" in row.why and "test_doctor_hosts.py:" in row.why


def test_a_library_that_cannot_be_imported():
    def build(device):
        raise ModuleNotFoundError("No module named 'timm'")

    row = Case("timm ViT", "timm", build).run(CPU)
    assert row.status == BROKEN and row.why == (
        "bare: the host cannot build it: ModuleNotFoundError: No module named 'timm'"
    )


# ---------------------------------------------------------------------- faults of hosts
@pytest.fixture
def fault(monkeypatch):
    def put(family, first="0.1", last=None):
        row = host_faults.Fault(family, "transformers", first, last, "it trips over itself")
        monkeypatch.setattr(host_faults, "FAULTS", (row,))

    return put


def test_a_known_fault_of_a_host_is_refused_with_its_reason(fault):
    fault("llava")
    row = row_of("llava", mask_dropped)
    assert (
        row.status == REFUSED and row.why.startswith("bare: transformers 5.") and row.why.endswith("trips over itself")
    )
    assert not broken(row)


def test_a_known_fault_that_is_gone_is_said(fault):
    fault("llava")
    row = row_of("llava")
    assert row.fact("bare").status == BROKEN and "host_faults.py is outdated" in row.why


def test_a_family_that_came_later_is_refused_with_its_release(monkeypatch):
    def lacking(device):
        raise AttributeError("module transformers has no attribute LlavaForConditionalGeneration")

    monkeypatch.setattr(host_faults, "SINCE", {"llava": "99.0"})
    row = Case("llava", "transformers", lacking).run(CPU)
    assert row.status == REFUSED and row.why.endswith("does not have it: it came with 99.0")
    assert "host_faults.py is outdated" in row_of("llava").why
    monkeypatch.setattr(host_faults, "SINCE", {"llava": "5.0"})
    assert Case("llava", "transformers", lacking).run(CPU).status == BROKEN


def test_a_fault_of_another_version_excuses_nothing(fault):
    fault("llava", "0.1", "4.99.9")
    assert row_of("llava", mask_dropped).status == BROKEN
    assert host_faults.fault_of("llava") is None


@pytest.mark.parametrize(
    ("first", "last", "version", "holds"),
    [
        ("5.24.0", None, "5.23.0", False),
        ("5.24.0", None, "5.24.0", True),
        ("5.24", None, "5.24.0", True),
        ("5.24.0", None, "5.100.1", True),
        ("5.24.0", "5.24.1", "5.24.1", True),
        ("5.24.0", "5.24.1", "5.24.2", False),
        ("5.24.0", "5.24.1", "5.25.0.dev0", False),
    ],
)
def test_versions_of_a_fault(first, last, version, holds):
    assert host_faults.Fault("x", "y", first, last, "").holds(version) is holds


def test_a_fault_of_a_library_that_is_not_here(monkeypatch):
    monkeypatch.setattr(host_faults, "FAULTS", (host_faults.Fault("llava", "no-such-library", "1", None, ""),))
    assert host_faults.fault_of("llava") is None
