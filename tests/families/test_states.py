"""States, key norms and active neurons of every family's decoder: equal to what hooks of these tests see of the host.

Keys behind rope are those of the host's own cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.hosts_of import cache_of, with_cache
from torch import Tensor
from vlmtok.adapters import adapter_for
from vlmtok.adapters.language.families import ROWS

import vlmtok
from vlmtok import Counts, Layout, Method, Reduction, Site, TokenView
from vlmtok.errors import MissingSignal, PassError

from .build import FAMILIES, shared
from .harness import batch

STATES = ("normed", "text_normed")
NORMS = ("key_norm", "text_key_norm")


@dataclass(eq=False)
class Listen(Method):
    """Cuts nothing and notes signals, row by row."""

    names: tuple[str, ...]
    layer: int = 1
    point: str = "end"
    seen: list[tuple[Tensor, Tensor, dict[str, Tensor | None]]] = field(default_factory=list, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("decoder", self.layer, self.point, self.names, scope="sample")]

    def reduce(self, view: TokenView) -> None:
        for row in range(len(view.tokens)):
            found = {name: view.maybe(name) for name in self.names}
            mine = {name: None if value is None else value[row] for name, value in found.items()}
            self.seen.append((view.columns[row], view.tokens[row], mine))

    def count(self, counts: Counts) -> int:
        return counts.n


@dataclass(eq=False)
class Halve(Method):
    """Every second visual token leaves somewhere in the decoder."""

    layer: int
    point: str
    gone: Tensor | None = field(default=None, repr=False)

    def sites(self, layout: Layout) -> list[Site]:
        return [Site("decoder", self.layer, self.point, scope="sample")]

    def reduce(self, view: TokenView) -> Reduction:
        self.gone = view.columns[0, 1::2]
        return Reduction(torch.arange(0, view.tokens.shape[1], 2).expand(len(view.tokens), -1))

    def count(self, counts: Counts) -> int:
        return (counts.n + 1) // 2


def text_model(model: Any) -> Any:
    return next(part for part in model.modules() if hasattr(part, "layers") and hasattr(part, "embed_tokens"))


def last_map(layer: Any) -> Any:
    mlp = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
    return next(getattr(mlp, name) for name in ("down_proj", "w2", "fc2") if hasattr(mlp, name))


def last_norm(lm: Any) -> Any:
    return lm.norm if hasattr(lm, "norm") else lm.embedding_norm


@contextlib.contextmanager
def watched(model: Any, layer: int, neurons: bool = False) -> Iterator[dict[str, Tensor]]:
    """Context in which the states behind a layer, and the input of its MLP's last map, are noted.

    Inside a compression: what the next layer gets behind cuts, and with what deepstack adds.
    """
    lm, seen = text_model(model), {}

    def note(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    hooks = [lm.layers[layer + 1].register_forward_pre_hook(note("states"), with_kwargs=True)]
    if neurons:
        hooks.append(last_map(lm.layers[layer]).register_forward_pre_hook(note("neurons"), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def rows(listen: Listen, states: Tensor, mask: Tensor) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Any]]]:
    """What was heard of each row: its number, columns of its visual tokens and of its text, and the signals.

    Args:
        listen: the method.
        states: `[B, S, C]`, the host's, by which rows are known again.
        mask: int `[B, S]`, 0 on padding.
    """
    length = mask.shape[1]
    for columns, tokens, found in listen.seen:
        every = [columns + int((one == 0).sum()) for one in mask]
        row = next(
            i for i, visual in enumerate(every) if int(visual.max()) < length and alike(states[i, visual], tokens)
        )
        visual = every[row]
        behind = sorted(set(range(int(visual[0]), length)) - set(visual.tolist()))
        yield row, visual, torch.tensor(behind, dtype=torch.int64), found


def alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6)


def layers_of(name: str) -> list[int]:
    """Layers at whose end tokens can leave."""
    stage = adapter_for(shared(name, "eager")).layout().stages["decoder"]
    return [i for i in range(stage.depth - 1) if stage.last_cut is None or i + 1 <= stage.last_cut]


DECODERS = [name for name, row in ROWS.items() if name in FAMILIES and not row.boundary]
SEEING = [name for name in DECODERS if ROWS[name].attends]


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_states_are_the_hosts_through_its_last_norm(name: str, kind: str) -> None:
    """Left padding, several pictures; at the end of a layer and at the start of the next."""
    model, inputs = shared(name, kind), batch(name).inputs()
    norm = last_norm(text_model(model))
    for layer in layers_of(name)[:2]:
        for point in ("end", "start"):
            listen = Listen(STATES, layer + (point == "start"), point)
            with torch.no_grad(), vlmtok.compress(model, listen), watched(model, layer) as host:
                model(**inputs)
            with torch.no_grad():
                expected = norm(host["states"])
            assert len(listen.seen) == len(expected) > 1
            for row, visual, text, found in rows(listen, host["states"], inputs["attention_mask"]):
                torch.testing.assert_close(found["normed"], expected[row, visual], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(found["text_normed"], expected[row, text], atol=1e-5, rtol=1e-5)


def key_norms(model: Any, layer: int, out: Any) -> Tensor:
    """L1 norms of the keys that a layer's cache holds, `[B, S]`."""
    return cache_of(out).layers[layer].keys.detach().abs().sum((1, 3))


@pytest.mark.parametrize("name", SEEING)
def test_key_norms_are_those_of_the_hosts_cache(name: str) -> None:
    """GQA, M-RoPE, norms of heads: what the cache holds is what attention compares."""
    model, inputs = shared(name, "eager"), batch(name).inputs()
    stage, heard = adapter_for(model).layout().stages["decoder"], 0
    for layer in layers_of(name):
        for point in ("end", "start"):
            if layer in stage.blind or (point == "start" and not layer):
                continue
            listen = Listen(NORMS, layer, point)
            with torch.no_grad(), vlmtok.compress(model, listen), watched(model, layer - (point == "start")) as host:
                out = model(**inputs, use_cache=True)
            expected = key_norms(model, layer, out)
            short = host["states"].shape[1] - expected.shape[1]  # a sliding cache holds the last keys only
            for row, visual, text, found in rows(listen, host["states"], inputs["attention_mask"]):
                for key, columns in (("key_norm", visual), ("text_key_norm", text)):
                    there = columns >= short
                    heard += int(there.sum())
                    wanted = expected[row, columns[there] - short]
                    torch.testing.assert_close(found[key][there], wanted, atol=1e-4, rtol=1e-5)
    assert heard > 20


@pytest.mark.parametrize("name", DECODERS)
def test_active_neurons_are_compared_row_by_row(name: str) -> None:
    """Where the MLP has neurons that tokens share; a mixture of experts is refused by name."""
    model, inputs = shared(name, "eager"), batch(name).inputs()
    stage, heard = adapter_for(model).layout().stages["decoder"], 0
    for layer in layers_of(name):
        listen = Listen(("activation_match",), layer)
        parts = text_model(model).layers[layer].named_modules()
        if any("expert" in part for part, _ in parts):
            with pytest.raises(MissingSignal, match="mixture of experts"):
                vlmtok.compress(model, listen)
            assert layer in stage.lacks["activation_match"]
            heard = 100
            continue
        with torch.no_grad(), vlmtok.compress(model, listen), watched(model, layer, neurons=True) as host:
            model(**inputs)
        on = host["neurons"] > 0
        for row, visual, text, found in rows(listen, host["states"], inputs["attention_mask"]):
            text = torch.cat([text, torch.tensor([on.shape[1] - 1])])
            both = (on[row, visual][:, None] & on[row, text][None]).sum(-1)
            assert torch.equal(found["activation_match"], both.float())
            heard += int(both.sum())
    assert heard > 20


def test_neurons_are_refused_at_a_start_and_where_the_mlp_is_unknown() -> None:
    model = FAMILIES["llava"].build("eager")
    with pytest.raises(MissingSignal, match="what the layer did"):
        vlmtok.compress(model, Listen(("activation_match",), 1, "start"))
    mlp = text_model(model).layers[1].mlp
    mlp.other_proj = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(MissingSignal, match=r"unknown form\); layers 0, 2, 3 give it"):
        vlmtok.compress(model, Listen(("activation_match",), 1))
    text_model(model).other_norm = text_model(model).norm
    del text_model(model).norm
    with pytest.raises(MissingSignal, match="last norm of unknown form"):
        vlmtok.compress(model, Listen(STATES, 1))


def test_a_projection_that_is_never_called_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that computes the MLP elsewhere must not pass for one without text."""
    model = FAMILIES["llava"].build("eager")
    mlp = text_model(model).layers[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: x)
    inputs = batch("llava").inputs()
    with torch.no_grad(), vlmtok.compress(model, Listen(("activation_match",), 1)), pytest.raises(PassError):
        model(**inputs)


# ---------------------------------------------------------------------- behind cuts and behind a past
@pytest.mark.parametrize("cut", [(1, "end"), (2, "start"), (2, "end")])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "lfm2_vl"])
def test_signals_behind_a_cut_and_behind_a_past(name: str, cut: tuple[int, str]) -> None:
    """A cut before, and one at the same place by another method; a second turn whose cache holds the first."""
    family, model = FAMILIES[name], shared(name, "eager")
    layer = 2
    picture, words = family.batch("3I2J1").inputs(mask=False), family.batch("^19").inputs(mask=False)
    norm, blind = last_norm(text_model(model)), adapter_for(model).layout().stages["decoder"].blind
    for turns in ((picture,), (words, picture)):
        names = (*STATES, *(() if layer in blind else NORMS), "activation_match")
        halve, listen, held = Halve(*cut), Listen(names, layer), {}
        with torch.no_grad(), vlmtok.compress(model, [halve, listen]), watched(model, layer, neurons=True) as host:
            for inputs in turns:
                out = model(**inputs, **held, use_cache=True)
                held = with_cache(model, cache_of(out))
        ((columns, tokens, found),) = listen.seen
        # What the next layer got is cut; what the layer itself ran with may be longer, where the cut is at its end.
        states = host["states"][0]
        assert alike(states[columns], tokens)
        text = torch.tensor(sorted(set(range(int(columns[0]), len(states))) - set(columns.tolist())))
        with torch.no_grad():
            torch.testing.assert_close(found["normed"], norm(states)[columns], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found["text_normed"], norm(states)[text], atol=1e-5, rtol=1e-5)
        on = host["neurons"].reshape(1, -1, host["neurons"].shape[-1])[0] > 0
        gone = set(halve.gone.tolist()) if cut == (layer, "end") else set()
        stays = torch.tensor([i for i in range(len(on)) if i not in gone])
        assert len(stays) == len(states)
        asked = torch.cat([text, torch.tensor([len(stays) - 1])])
        both = (on[stays][columns][:, None] & on[stays][asked][None]).sum(-1)
        assert torch.equal(found["activation_match"], both.float())
        if "key_norm" in found:
            norms = key_norms(model, layer, out)[0][-len(on) :]
            if len(norms) == len(on):
                torch.testing.assert_close(found["key_norm"], norms[stays][columns], atol=1e-4, rtol=1e-5)
                torch.testing.assert_close(found["text_key_norm"], norms[stays][text], atol=1e-4, rtol=1e-5)
