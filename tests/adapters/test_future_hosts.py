"""A host of another day never makes a compression wrong in silence: the right answer, or an error that says why.

Each case changes one thing of today's host (see `future`). The bare model must answer as before, else the play itself
is wrong; the compressed one must answer as the compressed model of today, or refuse with an error of ours.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families.build import FAMILIES
from families.harness import MODES, batch, generate
from families.methods import compressed
from support import future, models
from torch import nn
from vlmtok.adapters import adapter_for, hosts
from vlmtok.adapters.base import child
from vlmtok.adapters.language.families import ROWS
from vlmtok.adapters.language.placeholders import placeholders

import vlmtok
from vlmtok.errors import HostChanged, UnsupportedModel, VlmtokError

NAMES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "internvl")
RIGHT = "right"


@dataclass(frozen=True)
class Parts:
    """A model and where its parts are."""

    model: nn.Module
    core: Any
    text: Any
    layers: Any
    spec: Any


@dataclass(frozen=True)
class Change:
    """Something that a future host does otherwise.

    Attributes:
        play: does it to a model.
        outcome: ``right``, or the class of the error that must come.
        says: what the error must say.
        names: families it is played on.
    """

    play: Callable[[Parts], None]
    outcome: Any
    says: str = ""
    names: tuple[str, ...] = NAMES


def name_of(module: nn.Module, role: hosts.Role) -> str:
    """What a module of today calls a role."""
    named = [p.name for p in hosts.parameters_of(module)]
    return next(name for name in role.names if name in named)


def text_with(**how: Any) -> Callable[[Parts], None]:
    def play(at: Parts) -> None:
        future.play(at.text, **{key: value(at.text) if callable(value) else value for key, value in how.items()})

    return play


def layers_with(**how: Any) -> Callable[[Parts], None]:
    def play(at: Parts) -> None:
        for layer in at.layers:
            future.play(layer, **{key: value(layer) if callable(value) else value for key, value in how.items()})

    return play


def called(role: hosts.Role, new: str) -> Callable[[nn.Module], dict[str, str]]:
    return lambda module: {name_of(module, role): new}


def outputs(module: str, old: str, new: str) -> Callable[[Parts], None]:
    def play(at: Parts) -> None:
        give, take = future.other_field(old, new)
        future.play(getattr(at, module), give=give, take=take)

    return play


def wrapping(how: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> Callable[[Parts], None]:
    def play(at: Parts) -> None:
        for layer in at.layers:
            future.play(layer, give=how, take=unwrap)

    return play


def positional(module: str, first: tuple[hosts.Role, ...]) -> Callable[[Parts], None]:
    """Arguments come by position, these first."""

    def play(at: Parts) -> None:
        for part in [at.text] if module == "text" else at.layers:
            wanted = [name_of(part, role) for role in first]
            future.play(part, order=lambda names, w=wanted: [*w, *(n for n in names if n not in w)])

    return play


def held_inside(at: Parts) -> None:
    """The text model keeps its cache for itself: nobody passes one to it."""
    name, kept = name_of(at.text, hosts.CACHE), []
    kind = type(at.text)

    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kept[:] = [kwargs.pop(name, None)]
        return kind.__call__(self, *args, **kwargs)

    def forward(self: nn.Module, **kwargs: Any) -> Any:
        return kind.forward(self, **{**kwargs, name: kept[0]})

    forward.__signature__ = hosts.inspect.signature(kind.forward)
    at.text.__class__ = type(
        kind.__name__, (kind,), {"__call__": outer, "forward": forward, "__module__": kind.__module__}
    )


def without(role: hosts.Role) -> Callable[[Parts], None]:
    """The inner model's caller uses a name for it that goes by in `**kwargs`."""

    def play(at: Parts) -> None:
        future.play(at.core, hidden={name_of(at.core, role): "of_another_day"})

    return play


def other_key(at: Parts) -> None:
    """Encoded pictures come under another key."""
    name, kind = name_of(at.core, hosts.ENCODED), type(at.core)

    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(name):
            kwargs[name] = {f"{key}s": value for key, value in kwargs[name].items()}
        return kind.__call__(self, *args, **kwargs)

    def forward(self: nn.Module, **kwargs: Any) -> Any:
        if kwargs.get(name):
            kwargs[name] = {key[:-1]: value for key, value in kwargs[name].items()}
        return kind.forward(self, **kwargs)

    forward.__signature__ = hosts.inspect.signature(kind.forward)
    at.core.__class__ = type(
        kind.__name__, (kind,), {"__call__": outer, "forward": forward, "__module__": kind.__module__}
    )


def one_more(at: Parts) -> None:
    """The text model gets one more thing with an entry for each token, inside an object."""
    kind = type(at.text)

    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = future.Box(kwargs["inputs_embeds"][..., 0])
        return kind.__call__(self, *args, **kwargs, metadata=made)

    def forward(self: nn.Module, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    at.text.__class__ = type(
        kind.__name__, (kind,), {"__call__": outer, "forward": forward, "__module__": kind.__module__}
    )


CHANGES: dict[str, Change] = {
    # names
    "text: cache renamed": Change(text_with(rename=called(hosts.CACHE, "kv")), UnsupportedModel, "cache"),
    "text: positions renamed": Change(text_with(rename=called(hosts.POSITIONS, "where")), UnsupportedModel, "position"),
    "text: mask renamed": Change(text_with(rename=called(hosts.MASK, "padding")), UnsupportedModel, "mask"),
    "text: embeddings renamed": Change(text_with(rename=called(hosts.EMBEDDINGS, "x")), UnsupportedModel, "embeddings"),
    "layers: cache renamed": Change(layers_with(rename=called(hosts.CACHE, "kv")), UnsupportedModel, "cache"),
    "layers: rotary renamed": Change(layers_with(rename=called(hosts.ROTARY, "rope")), UnsupportedModel, "rotary"),
    "layers: mask renamed": Change(layers_with(rename=called(hosts.MASK, "bias")), UnsupportedModel, "mask"),
    "layers: hidden states renamed": Change(
        layers_with(rename=called(hosts.HIDDEN, "stream")), UnsupportedModel, "hidden"
    ),
    # the signature says one thing, callers another
    "text: cache by an unknown name": Change(text_with(hidden=called(hosts.CACHE, "kv")), RIGHT),
    "text: positions by an unknown name": Change(
        text_with(hidden=called(hosts.POSITIONS, "where")), VlmtokError, "where"
    ),
    "text: mask by an unknown name": Change(text_with(hidden=called(hosts.MASK, "padding")), VlmtokError),
    "core: features by an unknown name": Change(without(hosts.ENCODED), HostChanged, "placeholders"),
    "core: cache by an unknown name": Change(without(hosts.CACHE), RIGHT),
    "core: encoded pictures under another key": Change(other_key, HostChanged, "placeholders"),
    # order
    "text: by position": Change(positional("text", ()), RIGHT),
    "text: by position, another order": Change(positional("text", (hosts.EMBEDDINGS, hosts.CACHE, hosts.MASK)), RIGHT),
    "layers: by position": Change(positional("layers", ()), RIGHT),
    "layers: by position, another order": Change(positional("layers", (hosts.ROTARY, hosts.HIDDEN)), RIGHT),
    # what is gone, or hidden
    "text: cache kept inside": Change(held_inside, HostChanged, "cache"),
    "text: cache in an object": Change(text_with(box=called(hosts.CACHE, "state")), UnsupportedModel, "cache"),
    "text: one more thing for each token": Change(one_more, UnsupportedModel, "metadata"),
    # outputs
    "text: last hidden states renamed": Change(outputs("text", "last_hidden_state", "final"), RIGHT),
    "text: cache field renamed": Change(outputs("text", "cache", "kv"), RIGHT),
    "layers: output in a tuple": Change(wrapping(future.in_tuple, lambda x: x[0]), RIGHT),
    "layers: output in an object with fields": Change(wrapping(future.in_dict, lambda x: x.hidden_states), RIGHT),
    "layers: output behind something else": Change(wrapping(future.last_tensor, lambda x: x[1]), RIGHT),
}
CASES = [pytest.param(name, change, id=f"{name}: {change}") for change in CHANGES for name in CHANGES[change].names]


def parts(name: str) -> Parts:
    model = FAMILIES[name].build("sdpa")
    spec = ROWS[model.config.model_type]
    core = child(model, spec.core)
    text = child(core, spec.lm)
    return Parts(model, core, text, text.layers, spec)


def asked(name: str, model: nn.Module) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return generate(model, batch(name).inputs(), 3)


@functools.cache
def today(name: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    at = parts(name)
    bare = asked(name, at.model)
    with compressed(at.model, MODES["both+half"]):
        return bare, asked(name, at.model)


@pytest.mark.parametrize(("name", "change"), CASES)
@pytest.mark.filterwarnings("ignore:the hooks of:vlmtok.errors.VlmtokWarning")
def test_a_host_of_another_day_is_right_or_refused(name: str, change: str) -> None:
    what, at = CHANGES[change], parts(name)
    if change == "text: cache field renamed" and hosts.CACHE.names[0] not in name_of(at.text, hosts.CACHE):
        what = Change(outputs("text", "past_key_values", "kv"), RIGHT)
    what.play(at)
    bare, short = today(name)
    for found, wanted in zip(asked(name, at.model), bare):
        assert torch.equal(found, wanted), "the play changes the bare model"
    state = {key: value.clone() for key, value in at.model.state_dict().items()}
    if what.outcome is RIGHT:
        with compressed(at.model, MODES["both+half"]):
            tokens, logits = asked(name, at.model)
        assert torch.equal(tokens, short[0]) and torch.allclose(logits, short[1], atol=1e-5)
    else:
        refused = pytest.raises(what.outcome, match=re.escape(what.says))
        with refused as error, compressed(at.model, MODES["both+half"]):
            asked(name, at.model)
        assert "transformers" in str(error.value), "the error names the library"
    after = at.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    for found, wanted in zip(asked(name, at.model), bare):
        assert torch.equal(found, wanted), "the model was not left as it was"


@dataclass(frozen=True)
class TowerChange:
    """The same for the blocks of a tower.

    Attributes:
        play: does it to each block.
        outcome: ``right``, or the class of the error that must come.
        says: what the error must say.
    """

    play: Callable[[nn.Module, Any], None]
    outcome: Any
    says: str = ""


def block_gives(how: Callable[[Any], Any], unwrap: Callable[[Any], Any]) -> Callable[[nn.Module, Any], None]:
    return lambda block, spec: future.play(block, give=how, take=unwrap)


def renamed_bias(block: nn.Module, spec: Any) -> None:
    attn = child(block, spec.attn)
    future.play(attn, rename={name_of(attn, spec.bias): "logit_offset"})


def by_name(block: nn.Module, spec: Any) -> None:
    """Callers pass everything by name."""
    kind = type(block)
    names = [p.name for p in hosts.parameters_of(block)]

    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, **{**dict(zip(names, args)), **kwargs})

    block.__class__ = type(kind.__name__, (kind,), {"__call__": outer, "__module__": kind.__module__})


TOWER_CHANGES = {
    "hidden states renamed": TowerChange(
        lambda block, spec: future.play(block, rename={name_of(block, hosts.HIDDEN): "stream"}),
        UnsupportedModel,
        "hidden states",
    ),
    "everything by name": TowerChange(by_name, RIGHT),
    "output in a tuple": TowerChange(block_gives(future.in_tuple, lambda x: x[0]), RIGHT),
    "output in an object with fields": TowerChange(block_gives(future.in_dict, lambda x: x.hidden_states), RIGHT),
    "output in an unknown object": TowerChange(block_gives(future.in_box, lambda x: x.value), HostChanged, "output"),
    "bias renamed": TowerChange(renamed_bias, UnsupportedModel, "bias"),
}
TOWER_NAMES = ("timm ViT", "timm EVA-02", "open_clip VisionTransformer", "HF CLIP vision", "HF DINOv2")


@pytest.mark.parametrize("name", TOWER_NAMES)
@pytest.mark.parametrize("change", TOWER_CHANGES)
@pytest.mark.filterwarnings("ignore:the hooks of:vlmtok.errors.VlmtokWarning")
def test_a_tower_of_another_day_is_right_or_refused(name: str, change: str) -> None:
    tower, what = models.TOWERS[name], TOWER_CHANGES[change]
    x, method = tower.pictures(2), "tome:r=3"
    with torch.no_grad():
        model = tower.build()
        bare = tower.run(model, x)
        with vlmtok.compress(model, method):
            short = tower.run(model, x)
        spec = adapter_for(model).tower()
        for block in spec.blocks:
            what.play(block, spec.block)
        assert torch.equal(tower.run(model, x), bare), "the play changes the bare model"
        if what.outcome is RIGHT:
            with vlmtok.compress(model, method):
                assert torch.allclose(tower.run(model, x), short, atol=1e-6)
        else:
            with pytest.raises(what.outcome, match=re.escape(what.says)), vlmtok.compress(model, method):
                tower.run(model, x)
        assert torch.equal(tower.run(model, x), bare), "the model was not left as it was"


@pytest.mark.parametrize("name", [name for name in TOWER_NAMES if "open_clip" not in name])
@pytest.mark.parametrize("which", ["attn", "mid", "branch_end", "mlp"])
def test_a_module_that_is_gone_is_named_before_anything_is_changed(name: str, which: str) -> None:
    model = models.TOWERS[name].build()
    spec = adapter_for(model).tower()
    path = getattr(spec.block, which)
    for block in spec.blocks:
        block._modules["of_another_day"] = block._modules.pop(path)
    with pytest.raises(UnsupportedModel, match=path):
        vlmtok.compress(model, "tome:r=3")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_configuration_without_placeholders_is_refused() -> None:
    core = SimpleNamespace(config=SimpleNamespace(image_placeholder=7))
    with pytest.raises(UnsupportedModel, match="image_token_id"):
        placeholders(core, ROWS["llava"])


def test_methods_of_todays_release_still_compress() -> None:
    """The cuts of these tests do something, or all would be right whatever came."""
    for name in NAMES:
        bare, short = today(name)
        assert not torch.allclose(bare[1], short[1], atol=1e-3)
    assert vlmtok.errors.HostChanged is HostChanged
