"""Linears of another class, as LoRA and quantisation leave them: they are called, and nobody reads their weights."""

from __future__ import annotations

import ast
import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import models
from support.checks import assert_differs, assert_equal
from torch import Tensor, nn
from vlmtok.adapters import base

import vlmtok
from vlmtok import Method, Site

POINTS = ("start", "mid", "end")
LAYER = 2


class Delta(nn.Linear):
    """A linear with a low-rank addition beside its weight, that counts its calls."""

    calls = 0

    def addition(self) -> Tensor:
        """What is added to the weight, `[out, in]`."""
        generator = torch.Generator().manual_seed(self.out_features + 7 * self.in_features)
        up, down = (torch.randn(n, 2, generator=generator) for n in (self.out_features, self.in_features))
        return up @ down.T * (0.5 / self.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        Delta.calls += 1
        return super().forward(x) + F.linear(x, self.addition().to(x))


def bypassed(model: nn.Module) -> set[nn.Module]:
    """Linears that the host itself does not call: EvaAttention reads the weight where q has its own bias."""
    return {
        m.qkv
        for m in model.modules()
        if getattr(m, "q_bias", None) is not None and not getattr(m, "qkv_bias_separate", True)
    }


def plain_linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if type(m) is nn.Linear]


def wrapped(model: nn.Module) -> nn.Module:
    """Every linear of a copy, with its addition beside the weight."""
    made = copy.deepcopy(model)
    for linear in plain_linears(made):
        linear.__class__ = Delta
    return made


def merged(model: nn.Module) -> nn.Module:
    """The same with every addition in the weight, as far as the host calls the module."""
    made = copy.deepcopy(model)
    without = bypassed(made)
    with torch.no_grad():
        for linear in plain_linears(made):
            if linear not in without:
                linear.weight += Delta.addition(linear)  # type: ignore[arg-type]
    return made


def int8(model: nn.Module) -> nn.Module:
    """Every linear of a copy that the host calls, quantised by torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


# ---------------------------------------------------------------------- outputs
METHODS = ("tome:r=4", "pitome:ratio=0.8", "crossget:rv=6", "tca:ratio=0.6:update=false", "random:keep=0.5")


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", models.TOWERS)
def test_an_addition_beside_the_weight_counts_like_one_in_it(name: str, spec: str) -> None:
    tower, model = models.TOWERS[name], models.shared(name)
    x = tower.pictures(2)
    one, other = merged(model), wrapped(model)
    with torch.no_grad():
        Delta.calls = 0
        assert_equal(tower.run(other, x), tower.run(one, x), 1e-4, "the bare models")
        assert Delta.calls >= 1
        assert_differs(tower.run(one, x), tower.run(model, x))
        found = []
        for made in (one, other):
            try:
                run = vlmtok.compress(made, spec)
            except vlmtok.errors.VlmtokError as refusal:
                found.append(str(refusal))
                continue
            with run:
                found.append(tower.run(made, x))
    if isinstance(found[0], str):
        assert found[0] == found[1], "a wrapped model is refused for the same reasons"
        return
    assert_differs(found[0], tower.run(one, x).detach())
    assert_equal(found[1], found[0], 1e-4)


# ---------------------------------------------------------------------- signals
class Look(Method):
    """Notes the signals of one layer at all three points."""

    proportional = False
    NAMES = ("keys", "keys_full", "received_attention", "protected_queries", "protected_keys", "protected_attention")

    def __init__(self, layer: int = LAYER) -> None:
        self.layer = layer
        self.seen: dict[str, dict[str, Tensor]] = {}

    def sites(self, layout: Any) -> list[Site]:
        return [Site("vision", self.layer, point, self.NAMES) for point in POINTS]

    def reduce(self, view: Any) -> None:
        seen = {name: view.maybe(name) for name in self.NAMES}
        self.seen[view.site.point] = {name: value.clone() for name, value in seen.items() if value is not None}

    def count(self, counts: Any) -> int:
        return counts.n

    def __str__(self) -> str:
        return "look"


@contextlib.contextmanager
def spied(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """q, k and bias of every attention that the host computes, as it hands them to the kernel."""
    found: list[dict[str, Tensor]] = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **rest: Any) -> Tensor:
        found.append({"q": q.clone(), "k": k.clone(), "bias": attn_mask, "scale": rest.get("scale")})
        return real(q, k, v, attn_mask, *args, **rest)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = spy
    try:
        yield found
    finally:
        F.scaled_dot_product_attention = real
        torch.backends.mha.set_fastpath_enabled(fast)


def expected(call: dict[str, Any], before: dict[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """Signals by their definition, from what the host computed."""
    q, k, scale = call["q"].float(), call["k"].float(), call["scale"]
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if call["bias"] is not None:
        logits = logits + call["bias"]
    attention = logits.softmax(-1)

    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    own_q, own_k = before.get("q", call["q"]), before.get("k", call["k"])  # before rope
    found = {
        "keys": own_k[:, :, prefix:].mean(1),
        "keys_full": flat(own_k[:, :, prefix:]),
        "received_attention": attention.mean((1, 2))[:, prefix:],
    }
    if prefix:
        found["protected_queries"] = flat(own_q[:, :, :prefix])
        found["protected_keys"] = flat(own_k[:, :, :prefix])
        found["protected_attention"] = attention[:, :, :prefix, prefix:].transpose(1, 2)
    return found


def check_signals(model: nn.Module, run: Any, blocks: Any, prefix: int, with_cut: bool, within: float) -> None:
    """Looks at one layer of a model and compares with what the host computed there."""
    look, before = Look(), {}
    attn = next(m for m in blocks[LAYER].modules() if hasattr(m, "num_heads") or hasattr(m, "num_attention_heads"))
    handles = [
        getattr(attn, f"{which}_norm").register_forward_hook(lambda m, a, y, w=which: before.update({w: y.clone()}))
        for which in "qk"
        if hasattr(attn, f"{which}_norm") and hasattr(attn, "fused_attn")  # timm's, by head and before rope
    ]
    methods = [*([vlmtok.ToMe(r=4, prop_attn=False)] if with_cut else []), look]
    with torch.no_grad(), spied(model) as calls, vlmtok.compress(model, methods):
        run()
    for handle in handles:
        handle.remove()
    # Look sits behind ToMe at `mid`, so that its signals at `mid` and `end` are those of what is left.
    wanted = expected(calls[LAYER], before, prefix)
    for point in POINTS if not with_cut else ("start",):
        assert set(look.seen[point]) >= set(wanted), point
        for name, value in wanted.items():
            assert_equal(look.seen[point][name].float(), value.float(), within, f"{name} at {point}")


SPIED = [name for name in models.TOWERS if not name.endswith("eager")]


@pytest.mark.parametrize("with_cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", SPIED)
def test_signals_are_those_of_the_modules_that_the_host_calls(name: str, with_cut: bool) -> None:
    from vlmtok.adapters import adapter_for

    tower, model = models.TOWERS[name], wrapped(models.shared(name))
    adapter = adapter_for(model)
    adapter = getattr(adapter, "vision", adapter) if name.startswith("open_clip") else adapter
    adapter = getattr(adapter, "inner", adapter)
    x = tower.pictures(2)
    check_signals(model, lambda: tower.run(model, x), adapter.tower().blocks, tower.prefix, with_cut, 1e-4)


@pytest.mark.parametrize("name", SPIED)
def test_signals_of_linears_quantised_to_int8(name: str) -> None:
    from vlmtok.adapters import adapter_for

    tower = models.TOWERS[name]
    if bypassed(models.shared(name)):
        with pytest.raises((TypeError, AttributeError)):  # the host multiplies by a weight that is no tensor any more
            tower.run(int8(models.shared(name)), tower.pictures(1))
        return
    model = int8(models.shared(name))
    adapter = adapter_for(model)
    adapter = getattr(adapter, "vision", adapter) if name.startswith("open_clip") else adapter
    adapter = getattr(adapter, "inner", adapter)
    x = tower.pictures(2)
    check_signals(model, lambda: tower.run(model, x), adapter.tower().blocks, tower.prefix, False, 1e-4)
    with torch.no_grad(), vlmtok.compress(model, "tome:r=4") as run:
        assert_differs(tower.run(model, x), tower.run(models.shared(name), x))
        counted = run.report().macs.before
    with torch.no_grad(), vlmtok.compress(models.shared(name), "tome:r=4") as run:
        tower.run(models.shared(name), x)
        assert run.report().macs.before == counted, "int8 linears count by their features"


# ---------------------------------------------------------------------- nobody reads a weight
ALLOWED = {
    "timm_vit.py": 1,  # EvaAttention, as the host does
}


def test_no_adapter_computes_with_the_weight_of_a_linear() -> None:
    """`account.py` counts weights; nn.MultiheadAttention's projection is a parameter of its own, no module."""
    found: dict[str, int] = {}
    for path in Path(base.__file__).parent.rglob("*.py"):
        if path.name.endswith("account.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "weight":
                found[path.name] = found.get(path.name, 0) + 1
    assert found == ALLOWED


# ---------------------------------------------------------------------- towers of language models
def _vlm(name: str) -> tuple[nn.Module, dict[str, Any]]:
    from families.build import FAMILIES, TOWER_ONLY

    family = {**FAMILIES, **TOWER_ONLY}[name]
    return family.build(), family.batch(*family.rows).inputs()


@pytest.mark.parametrize("name", ["blip-2", "instructblip", "internvl", "idefics3", "llava"])
@pytest.mark.parametrize("wrap", [wrapped, int8])
def test_signals_of_towers_below_language_models(name: str, wrap: Any) -> None:
    from vlmtok.adapters import adapter_for

    model, inputs = _vlm(name)
    model = wrap(model)
    with torch.no_grad():
        spec = adapter_for(model).tower()
        attn = next(m for m in spec.blocks[0].modules() if hasattr(m, "num_heads"))
        norms: dict[str, Tensor] = {}
        with spied(model) as calls:
            look = Look(0)
            look.sites = lambda layout: [Site("vision", 0, p, Look.NAMES) for p in POINTS]
            with vlmtok.compress(model, look):
                model(**inputs)
    call = next(c for c in calls if c["q"].shape[1] == attn.num_heads and c["q"].shape == c["k"].shape)
    wanted = expected(call, norms, spec.num_prefix)
    for point in POINTS:
        for key, value in wanted.items():
            assert_equal(look.seen[point][key].float(), value.float(), 1e-4, f"{key} at {point}")


# ---------------------------------------------------------------------- what looking ahead costs
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ["timm ViT", "timm EVA", "timm EVA-02", "open_clip CLIP", "HF ViT"])
def test_signals_cost_what_the_report_says(name: str, point: str) -> None:
    from support import referee

    tower, model = models.TOWERS[name], models.shared(name)
    look, x = Look(), tower.pictures(2)
    look.sites = lambda layout: [Site("vision", LAYER, point, Look.NAMES)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), vlmtok.compress(model, look) as run:
            with referee.counter() as counter:
                tower.run(model, x)
            signals = run.report().line("signals").after
            with run.paused(), referee.counter() as bare:
                tower.run(model, x)
        assert signals.fixed and signals.low > 0
        assert 2 * signals.low == counter.get_total_flops() - bare.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
