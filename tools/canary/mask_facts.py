"""Facts of the host's mask functions: our own calls of them, held against their signatures."""

from __future__ import annotations

import ast
from functools import lru_cache

from vlmtok.adapters.language import masks
from vlmtok.adapters.language.spec import BlockRule

from .auto import Chooser, config_field
from .classes import HostClass, Signature, dotted, signature_of
from .facts import Questions, either
from .needs import MaskCall, mask_calls, reads, role_of
from .shown import strings


@lru_cache(maxsize=1)
def mask_functions(chooser: Chooser) -> tuple[dict[str, Signature], dict[str, str]]:
    """Functions of the host's module of masks, and which of them each layer type has."""
    module = chooser.library.module("transformers.masking_utils")
    if module is None:
        return {}, {}
    functions = {name: signature_of(n) for name, n in module.defined.items() if isinstance(n, ast.FunctionDef)}
    mapping = module.defined.get("LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING")
    table = {}
    for key, value in zip(mapping.keys, mapping.values) if isinstance(mapping, ast.Dict) else ():
        inner = value.args[0] if isinstance(value, ast.Call) and value.args else value
        if isinstance(key, ast.Constant) and dotted(inner):
            table[str(key.value)] = dotted(inner)
    return functions, table


def mask_facts(
    ask: Questions, chooser: Chooser, text: HostClass, models: list[HostClass], rule: BlockRule | None
) -> None:
    """The host's functions take what we hand them, for the layer types and blocks of a family.

    Args:
        ask: takes the facts.
        chooser: of the release.
        text: configuration of the text model.
        models: classes of it.
        rule: its bidirectional blocks, or None.
    """
    functions, table = mask_functions(chooser)
    said = {word for cls in text.lineage[:2] for word in strings(cls.node)} & {*table, *masks.RECURRENT}
    listed = config_field(text, "layer_types")
    ask.check(listed or not said, "the text model's configuration has types of layers and no `layer_types`", text)
    window = config_field(text, "sliding_window")
    kinds = sorted(said - set(masks.RECURRENT)) if listed else ["sliding_attention"] * window
    for kind, function in table.items():
        if kind in ("sliding_attention", "chunked_attention") and _mentioned(models, function):
            ask.check(
                kind in kinds, f"the text model makes masks of {kind} layers, of which its configuration knows none"
            )
    for kind in dict.fromkeys(["full_attention", *kinds]):
        calls, missing = mask_calls(kind, rule, functions, table)
        ask.check(missing is None, f"masks of {kind} layers: {missing}")
        for call in dict.fromkeys(calls):
            _taken(ask, call, functions[call.function])
        if kind == "sliding_attention":
            for read in reads(masks.build_mask, "config"):
                ask.check(config_field(text, read.path), f"the text model's configuration has no `{read.path}`", text)


def _mentioned(models: list[HostClass], name: str) -> bool:
    """Whether one of some classes speaks of a function."""
    nodes = (node for model in models for node in ast.walk(model.node))
    return any(isinstance(node, ast.Name) and node.id == name for node in nodes)


def _taken(ask: Questions, call: MaskCall, signature: Signature) -> None:
    """A function takes what one of our calls hands it, and wants nothing else."""
    ask.check(call.count <= len(signature.names), f"{call.function}() takes no {call.count} arguments")
    for role in map(role_of, call.names):
        ask.check(ask.use(role, signature), f"{call.function}() has no argument {either(role)}")
    for name in signature.names[call.count : signature.required]:
        ask.check(name in call.names, f"{call.function}() wants `{name}`, which it is not handed")
    ask.deprecated(signature)
