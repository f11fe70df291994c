"""Facts of text models: their arguments and outputs, how they call their layers, how layers make queries and keys."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

from vlmtok.adapters.language import attention as decoder_attention
from vlmtok.adapters.language.spec import VLMSpec

from .classes import Auto, External, HostClass, dotted, signature_of
from .facts import Questions, either
from .needs import ROLES, Role, wanted
from .shown import calls_of, loop_calls, returned, weighted

Settle = Callable[[list[HostClass | External | Auto]], list[HostClass]]


def call_facts(ask: Questions, owner: HostClass, texts: list[HostClass], spec: VLMSpec) -> None:
    """The text model is handed what hooks look up.

    Args:
        ask: takes the facts.
        owner: the class that holds it.
        texts: classes of the text model.
        spec: the family's row.
    """
    calls = calls_of(owner, f"self.{spec.lm.rpartition('.')[2]}")
    ask.check(calls, "nothing is seen to call the text model", owner)
    for call in calls:
        for text in texts:
            _handed(ask, call, text, "the text model does", wanted(spec)["text model"].required, owner)


def text_facts(ask: Questions, text: HostClass, spec: VLMSpec, settle: Settle) -> None:
    """Facts of one class of text models and of its layers.

    Args:
        ask: takes the facts.
        text: the class.
        spec: the family's row.
        settle: puts classes in the place of those that a configuration chooses.
    """
    ask.takes(text, "the text model", *wanted(spec)["text model"].required)
    outputs, first = returned(text), ROLES["LAST_HIDDEN"].names[0]
    ask.check(outputs, "what the text model gives back cannot be read off the source", text)
    for cls in outputs:
        ask.check(first in cls.fields(), f"the text model's output has no field `{first}`", cls)
    rotary = settle(text.made_of("rotary_emb"))
    ask.check(rotary, "the text model has no `rotary_emb` of a class that is known", text)
    for cls in rotary:
        signature = cls.signature()
        named = () if signature is None else signature.names
        fits = named[1:2] == ROLES["POSITIONS"].names and named[2:] in ((), ROLES["LAYER_TYPE"].names)
        ask.check(fits, "rotary embeddings are not made of hidden states, positions and at most a layer type", cls)
    layers, calls = settle(text.made_of("layers")), loop_calls(text, "self.layers")
    ask.check(layers, "the text model has no `layers` of a class that is known", text)
    ask.check(calls, "the text model has no loop that calls its `layers`", text)
    for layer in layers:
        roles = wanted(spec)["layers"].required
        ask.takes(layer, "layers", *roles)
        ask.takes(layer, "layers", ROLES["POSITIONS"], swallows=True)  # which hooks set
        for call in calls:
            _handed(ask, call, layer, "layers do", roles, text)
        _form(ask, layer, settle, spec.attends)


def _handed(ask: Questions, call: ast.Call, cls: HostClass, who: str, roles: Iterable[Role], where: HostClass) -> None:
    """A call of a class hands some roles on, by position or by name."""
    signature = cls.signature()
    named = () if signature is None else signature.names[: len(call.args)]
    given = {*named, *(keyword.arg for keyword in call.keywords)}
    for role in roles:
        ask.check(set(role.names) & given, f"{who} not get {either(role)}", where)


def _form(ask: Questions, layer: HostClass, settle: Settle, attends: bool) -> None:
    """How a layer makes queries and keys; the same that `attention_form` asks of an instance."""
    wanted = [(decoder_attention._AFTER, "MLP")]
    if attends and _folder(layer) not in decoder_attention._UNNORMED:
        wanted.append((decoder_attention._BEFORE, "norm"))
    for names, what in wanted:
        ask.check(any(map(layer.has, names)), f"layers have no {what} called {either(names)}", layer)
    attentions = settle(layer.made_of("self_attn"))
    ask.check(attentions, "layers have no `self_attn` of a class that is known", layer)
    for attention in attentions if attends else ():
        ask.takes(attention, "attention", ROLES["HIDDEN"], ROLES["ROTARY"], ROLES["MASK"])
        _attention(ask, attention)


def _attention(ask: Questions, attention: HostClass) -> None:
    for name in ("q_proj", "k_proj", "head_dim", "scaling"):
        ask.check(attention.has(name), f"attention has no `{name}`", attention)
    out = decoder_attention._OUT
    ask.check(any(map(attention.has, out)), f"attention has no {either(out)}", attention)
    strange = sorted(set(weighted(attention)) - decoder_attention._KNOWN)
    ask.check(not strange, f"attention has weights that no form knows: {', '.join(strange)}", attention)
    own = decoder_attention.COMPLEX.get(attention.name)
    name = own or decoder_attention.ROTARY
    place = attention.module.find(name)
    if ask.check(place is not None, f"the module of attention has no `{name}`", attention):
        assert place is not None
        given = signature_of(place[1]).names if isinstance(place[1], ast.FunctionDef) else ()
        if own:
            ask.check(given[1:3] == ("xk", "freqs_cis"), f"`{name}` does not take (xq, xk, freqs_cis)", attention)
        else:
            fits = given[1:2] == ("k",) or given[1:3] == ("cos", "sin")
            ask.check(fits, f"`{name}` takes neither (q, k, cos, sin) nor (x, cos, sin)", attention)
    for name in ("use_rope", "attn_temperature_tuning", "floor_scale", "attn_scale") if own else ():
        ask.check(attention.has(name), f"attention has no `{name}`", attention)
    for cap in _caps(attention):
        said = cap == "self.attn_logit_softcapping"
        ask.check(said, f"attention caps its logits by `{cap}`, which is not looked at", attention)
    if _folder(attention) in decoder_attention._TURNED:
        ask.check(attention.has("sliding_window"), "attention has no `sliding_window`", attention)


def _folder(cls: HostClass) -> str:
    """The folder of models that a class lies in, which is the type of their configuration."""
    return cls.module.name.split(".")[-2]


def _caps(attention: HostClass) -> Iterable[str]:
    """What an attention hands on as the cap of its logits."""
    method = attention.method("forward")
    for node in ast.walk(method) if method is not None else ():
        if isinstance(node, ast.Call):
            yield from (dotted(keyword.value) for keyword in node.keywords if keyword.arg == "softcap")
