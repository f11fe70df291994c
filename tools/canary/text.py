"""Facts of text models: their arguments and outputs, how they call their layers, how layers make queries and keys."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

from vlmtok.adapters import decoder_attention
from vlmtok.adapters.base import VLMSpec
from vlmtok.adapters.decoder_attention import AttentionForm

from .classes import Auto, External, HostClass, dotted, signature_of
from .facts import Questions, either
from .needs import module_reads, names_of
from .roles import ROLES
from .shown import calls_of, loop_calls, returned, weighted

Settle = Callable[[list[HostClass | External | Auto]], list[HostClass]]


def call_facts(ask: Questions, owner: HostClass, spec: VLMSpec) -> None:
    """The text model is called by name.

    Args:
        ask: takes the facts.
        owner: the class that holds it.
        spec: the family's row.
    """
    calls = calls_of(owner, f"self.{spec.lm.rpartition('.')[2]}")
    ask.check(calls, "nothing is seen to call the text model", owner)
    wanted = [ROLES[role] for role in ("EMBEDDINGS", "MASK", "POSITIONS", "CACHE")]
    wanted += [names_of(thing) for thing in (*spec.gather, *(spec.deepstack or ()))]
    for call in calls:
        ask.check(not call.args, "the text model gets arguments by position", owner)
        given = {keyword.arg for keyword in call.keywords}
        for names in wanted:
            ask.check(set(names) & given, f"the text model does not get {either(names)} by name", owner)


def text_facts(ask: Questions, text: HostClass, spec: VLMSpec, settle: Settle) -> None:
    """Facts of one class of text models and of its layers.

    Args:
        ask: takes the facts.
        text: the class.
        spec: the family's row.
        settle: puts classes in the place of those that a configuration chooses.
    """
    roles = [ROLES[role] for role in ("IDS", "EMBEDDINGS", "MASK", "POSITIONS", "CACHE")]
    ask.takes(text, "the text model", *roles, *spec.gather, *(spec.deepstack or ()))
    _outputs(ask, text)
    rotary = settle(text.made_of("rotary_emb"))
    ask.check(rotary, "the text model has no `rotary_emb` of a class that is known", text)
    for cls in rotary:
        signature = cls.signature()
        named = () if signature is None else signature.names
        fits = named[1:2] == ROLES["POSITIONS"] and named[2:] in ((), ROLES["LAYER_TYPE"])
        ask.check(fits, "rotary embeddings are not made of hidden states, positions and at most a layer type", cls)
    calls = loop_calls(text, "self.layers")
    ask.check(calls, "the text model has no loop that calls its `layers`", text)
    for call in calls:
        ask.check(call.args, "layers get no hidden states by position", text)
        given = {keyword.arg for keyword in call.keywords}
        for names in (ROLES["ROTARY"], ROLES["MASK"]):
            ask.check(set(names) & given, f"layers do not get {either(names)} by name", text)
        extra = len(call.args) - 1
        ask.check(extra == len(spec.layer_args), f"layers get {extra} arguments by position behind hidden states", text)
    layers = settle(text.made_of("layers"))
    ask.check(layers, "the text model has no `layers` of a class that is known", text)
    for layer in layers:
        _layer(ask, layer, spec, settle)


def _outputs(ask: Questions, text: HostClass) -> None:
    classes = returned(text)
    ask.check(classes, "what the text model gives back cannot be read off the source", text)
    for cls in classes:
        fields = cls.fields()
        first = ROLES["LAST_HIDDEN"][0]
        ask.check(fields[:1] == [first], f"the first field of the text model's output is not `{first}`", cls)
        found = next((name for name in ROLES["CACHE"] if name in fields), None)
        ask.check(found, f"the text model's output has no field {either(ROLES['CACHE'])}", cls)
        ask.use(ROLES["CACHE"], found)


def _layer(ask: Questions, layer: HostClass, spec: VLMSpec, settle: Settle) -> None:
    signature = layer.signature()
    first = () if signature is None else signature.names[:1]
    ask.check(
        set(first) & set(ROLES["HIDDEN"]), f"the first argument of layers is not {either(ROLES['HIDDEN'])}", layer
    )
    named = [thing for thing in spec.layer_args if not isinstance(thing, int)]
    ask.takes(layer, "layers", ROLES["ROTARY"], ROLES["MASK"], *named)
    ask.takes(layer, "layers", ROLES["POSITIONS"], swallows=True)
    if not spec.attention:
        return
    for names, what in ((decoder_attention._BEFORE, "norm"), (decoder_attention._AFTER, "MLP")):
        ask.check(any(map(layer.has, names)), f"layers have no {what} called {either(names)}", layer)
    attentions = settle(layer.made_of("self_attn"))
    ask.check(attentions, "layers have no `self_attn` of a class that is known", layer)
    for attention in attentions:
        _attention(ask, attention)


def _attention(ask: Questions, attention: HostClass) -> None:
    """How an attention makes queries and keys; the same that `attention_form` asks of an instance."""
    for name in ("q_proj", "k_proj", "head_dim", "scaling"):
        ask.check(attention.has(name), f"attention has no `{name}`", attention)
    out = decoder_attention._OUT
    ask.check(any(map(attention.has, out)), f"attention has no {either(out)}", attention)
    strange = sorted(set(weighted(attention)) - decoder_attention._KNOWN)
    ask.check(not strange, f"attention has weights that no form knows: {', '.join(strange)}", attention)
    for name in module_reads(AttentionForm.rotate):
        place = attention.module.find(name)
        if ask.check(place is not None, f"the module of attention has no `{name}`", attention):
            assert place is not None
            given = signature_of(place[1]).names if isinstance(place[1], ast.FunctionDef) else ()
            fits = given[1:2] == ("k",) or given[1:3] == ("cos", "sin")
            ask.check(fits, f"`{name}` takes neither (q, k, cos, sin) nor (x, cos, sin)", attention)
    for cap in _caps(attention):
        said = cap == "self.attn_logit_softcapping"
        ask.check(said, f"attention caps its logits by `{cap}`, which is not looked at", attention)
    if attention.module.name.split(".")[-2] in decoder_attention._TURNED_IN_WINDOWS:
        ask.check(attention.has("sliding_window"), "attention has no `sliding_window`", attention)


def _caps(attention: HostClass) -> Iterable[str]:
    """What an attention hands on as the cap of its logits."""
    method = attention.method("forward")
    for node in ast.walk(method) if method is not None else ():
        if isinstance(node, ast.Call):
            yield from (dotted(keyword.value) for keyword in node.keywords if keyword.arg == "softcap")
