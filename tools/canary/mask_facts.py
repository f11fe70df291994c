"""Facts of the host's mask functions: our own calls of them, held against their signatures."""

from __future__ import annotations

import ast
from functools import lru_cache

from vlmtok.adapters import masks
from vlmtok.adapters.base import BlockRule

from .auto import Chooser, config_field
from .classes import HostClass, Signature, dotted, signature_of
from .facts import Questions, either
from .needs import mask_calls, names_of, reads
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


def mask_facts(ask: Questions, chooser: Chooser, text: HostClass, rule: BlockRule | None) -> None:
    """The host's functions take what we hand them, for the layer types and blocks of a family.

    Args:
        ask: takes the facts.
        chooser: of the release.
        text: configuration of the text model.
        rule: its bidirectional blocks, or None.
    """
    functions, table = mask_functions(chooser)
    said = {word for cls in text.lineage[:2] for word in strings(cls.node)} & {*table, *masks.RECURRENT}
    listed = config_field(text, "layer_types")
    ask.check(listed or not said, "the text model's configuration has types of layers and no `layer_types`", text)
    window = config_field(text, "sliding_window")
    kinds = sorted(said - masks.RECURRENT) if listed else ["sliding_attention"] * window
    for kind in dict.fromkeys(["full_attention", *kinds]):
        calls, missing = mask_calls(kind, rule, functions, table)
        ask.check(missing is None, f"masks of {kind} layers: {missing}")
        for call in dict.fromkeys(calls):
            _taken(ask, call.function, call.names, functions[call.function])
        if kind == "sliding_attention":
            for read in reads(masks.build_mask, "config"):
                ask.check(config_field(text, read.path), f"the text model's configuration has no `{read.path}`", text)


def _taken(ask: Questions, function: str, given: tuple[str, ...], signature: Signature) -> None:
    renamed = {old for old, _, _ in signature.renamed}
    for name in given:
        names = names_of(name)
        ask.check(name in signature.names or name in renamed, f"{function}() has no argument {either(names)}")
        ask.use(names, next((known for known in names if known in signature.names), None))
    known = {other for name in given for other in names_of(name)}
    for name in signature.names[: signature.required]:
        ask.check(name in known, f"{function}() wants `{name}`, which we do not hand it")
    ask.deprecated(signature)
