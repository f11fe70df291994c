"""The room for what hosts call things, and that nobody else knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import ModelOutput
from vlmtok.adapters import host_objects, hosts
from vlmtok.adapters.hosts import Arguments, Role

from vlmtok.errors import HostChanged, UnsupportedModel


class Layer(nn.Module):
    def forward(
        self, hidden_states: Any, attention_mask: Any = None, *, past_key_values: Any = None, **rest: Any
    ) -> Any:
        return hidden_states


class Passing(Layer):
    def forward(self, *args: Any, more: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Bare(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


@pytest.mark.parametrize("make", [Layer, Passing, lambda: torch.compile(Layer())])
def test_arguments_are_found_by_place_and_by_name(make: Any) -> None:
    found = Arguments(make(), [hosts.HIDDEN, hosts.MASK, hosts.CACHE], [hosts.POSITIONS])
    assert found.get(hosts.HIDDEN, (1, 2), {}) == 1 and found.get(hosts.MASK, (1, 2), {}) == 2
    assert found.get(hosts.MASK, (1,), {"attention_mask": 3}) == 3 and found.get(hosts.MASK, (1,), {}) is None
    assert found.get(hosts.CACHE, (1,), {"past_key_values": 4}) == 4
    assert found.get(hosts.CACHE, (1,), {"cache": 5}) == 5, "a caller may use the other name while both live"
    assert found.get(hosts.POSITIONS, (1,), {}) is None and not found.has(hosts.POSITIONS)
    with pytest.raises(HostChanged, match="hidden states.*attention_mask"):
        found.get(hosts.HIDDEN, (), {"attention_mask": 1})


def test_values_are_put_where_the_caller_had_them() -> None:
    found = Arguments(Layer(), [hosts.HIDDEN, hosts.MASK, hosts.CACHE], [hosts.POSITIONS])
    assert found.put((1, 2), {}, {hosts.MASK: 3}) == ((1, 3), {})
    assert found.put((1,), {"attention_mask": 2}, {hosts.HIDDEN: 5, hosts.MASK: 3}) == ((5,), {"attention_mask": 3})
    args, kwargs = found.put((1,), {"cache": 2}, {hosts.CACHE: 3, hosts.POSITIONS: None})
    assert args == (1,) and kwargs == {"past_key_values": 3, "position_ids": None}, "never both names"


@pytest.mark.parametrize(("module", "role"), [(Layer(), hosts.ROTARY), (Bare(), hosts.HIDDEN)])
def test_a_role_without_a_name_is_refused(module: nn.Module, role: Role) -> None:
    with pytest.raises(UnsupportedModel, match=role.what):
        Arguments(module, [role])


def test_a_cache_is_known_by_its_type() -> None:
    layer, cache = Layer(), DynamicCache()
    found = Arguments(layer, [hosts.CACHE])
    for kwargs in ({"past_key_values": cache}, {"cache": cache}, {"kv": cache}, {"kv": cache, "cache": cache}):
        assert host_objects.cache_in(layer, found, (), kwargs) is cache
    assert host_objects.cache_in(layer, found, (), {"attention_mask": torch.ones(1, 2)}) is None
    with pytest.raises(HostChanged, match="two caches"):
        host_objects.cache_in(layer, found, (), {"cache": cache, "other": DynamicCache()})
    with pytest.raises(HostChanged, match="no transformers.Cache"):
        host_objects.cache_in(layer, found, (), {"cache": ((torch.ones(1), torch.ones(1)),)})


def test_what_a_cache_holds_is_asked_with_care() -> None:
    layer, cache = Layer(), DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert (
        host_objects.length_of(layer, None) == 0
        and host_objects.length_of(layer, cache) == host_objects.length_of(layer, cache, 0) == 3
    )
    assert host_objects.keys_in(layer, cache, 0).shape == (1, 2, 3, 4) and host_objects.span_of(layer, cache, 2, 0) == (
        5,
        0,
    )
    stranger = SimpleNamespace()
    for ask in (
        lambda: host_objects.length_of(layer, stranger),
        lambda: host_objects.span_of(layer, stranger, 1, 0),
        lambda: host_objects.keys_in(layer, stranger, 0),
        lambda: host_objects.keys_in(layer, cache, 7),
    ):
        with pytest.raises(HostChanged, match="cache"):
            ask()


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "output",
    [X, (X, None), [X], (torch.zeros(1), X), ModelOutput(last_hidden_state=X), {"a": torch.zeros(2), "b": X}],
    ids=["tensor", "tuple", "list", "behind", "output", "mapping"],
)
def test_hidden_states_are_found_and_put_back(output: Any) -> None:
    assert host_objects.hidden_of(Layer(), output) is X
    other = torch.ones(2, 5, 4)
    assert host_objects.hidden_of(Layer(), host_objects.with_hidden(output, other)) is other
    assert type(host_objects.with_hidden(output, other)) is type(output)


@pytest.mark.parametrize(
    "output", [None, SimpleNamespace(x=X), (), (None, 1), torch.zeros(2, 3), ModelOutput(loss=X[0, 0])]
)
def test_an_output_without_hidden_states_is_named(output: Any) -> None:
    with pytest.raises(HostChanged, match="hidden states"):
        host_objects.hidden_of(Layer(), output)


def test_a_function_of_the_host_gets_its_own_names() -> None:
    def old(config: Any, past_key_values: Any) -> None: ...

    def new(config: Any, cache: Any) -> None: ...

    values = {hosts.CONFIG: 1, hosts.CACHE: 2}
    assert hosts.named(old, values) == {"config": 1, "past_key_values": 2}
    assert hosts.named(new, values) == {"config": 1, "cache": 2}
    with pytest.raises(UnsupportedModel, match="layer_idx"):
        hosts.named(new, {hosts.LAYER: 3})


def test_messages_name_library_and_version() -> None:
    import timm
    import transformers

    assert hosts.library_of(DynamicCache()) == f"transformers {transformers.__version__}"
    assert hosts.library_of(timm.create_model) == f"timm {timm.__version__}"
    assert hosts.version_of("open_clip") == __import__("open_clip").__version__
