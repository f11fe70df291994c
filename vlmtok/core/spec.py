"""Spec strings: ``"todre:keep=0.1+fastv"`` becomes methods."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ParameterError, SpecError, hint
from ..guard import guarded
from .method import Method
from .registry import create_method, list_methods

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")

_WORD = re.compile(r"(?:\.{0,2}/|[A-Za-z_])[\w./@-]*$")


@guarded
def parse_methods(spec: str) -> list[Method]:
    """Makes the methods that a spec string names: ``name[:key=value]*[+name...]``.

    A value is an int, a float, true, false, none, a word, an ``(a;b)`` tuple or an ``[a;b]`` list, nestable; inside
    brackets a comma does for a semicolon. ``+`` separates methods only outside values and before a letter. Spaces
    around marks count for nothing. A setting may have the name that the paper gives it (`Method.aliases`).

    Args:
        spec: for instance ``"pitome:ratio=0.9:margin=0.5+todre:keep=0.1"``.

    Returns:
        The methods, in order.

    Raises:
        SpecError: the string cannot be parsed.
        UnknownMethod: no method of that name.
        ParameterError: no such parameter or value.
    """
    methods = []
    for part in _split(spec, "+"):
        name, *settings = _split(part, ":")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            like = hint(name.partition(" ")[0], list_methods()).rstrip(".")
            raise SpecError(f"{name!r} in {spec!r} is no method name{like}; write name:key=value:key=value+name")
        values: dict[str, Any] = {}
        for item in settings:
            key, equals, text = (piece.strip() for piece in item.partition("="))
            if not equals or not key.isidentifier():
                raise SpecError(f"{item!r} in {spec!r} is no setting; write key=value")
            if key in values:
                raise SpecError(f"{key!r} is given twice in {spec!r}")
            values[key] = parse_value(text, spec)
        methods.append(create_method(name.lower(), **values))
    return methods


def counted_form(method: Method) -> Method:
    """A method with the settings of its `Method.counted`, the others as they are; itself where it has none.

    Args:
        method: the method.
    """
    if not method.counted:
        return method
    (asked,) = parse_methods(f"{method.spec_name()}:{method.counted}")
    names = [item.partition("=")[0].strip() for item in _split(method.counted, ":")]
    return dataclasses.replace(method, **{name: getattr(asked, name) for name in names})


def _split(text: str, mark: str) -> list[str]:
    """Splits at `mark` outside brackets; a ``+`` counts only before a letter."""
    parts, depth, at = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            raise SpecError(f"bracket closed but not opened in {text!r}")
        follows = text[i + 1 :].lstrip()[:1]
        if letter == mark and depth == 0 and (mark != "+" or follows.isalpha() or follows == "_"):
            parts.append(text[at:i])
            at = i + 1
    if depth:
        raise SpecError(f"bracket opened but not closed in {text!r}")
    return [part.strip() for part in (*parts, text[at:])]


def parse_value(text: str, spec: str | None = None) -> Any:
    """A value as it stands in spec strings.

    Args:
        text: the value.
        spec: where it stands, for the error.

    Raises:
        SpecError: it is none.
    """
    text = text.strip()
    where = repr(text) if spec is None else f"{text!r} in {spec!r}"
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    if text[:1] in "([" and text[-1:] in ")]" and text:
        if {"(": ")", "[": "]"}[text[0]] != text[-1]:
            raise SpecError(f"{where} opens and closes with different brackets")
        inside = text[1:-1].strip()
        parts = [item for part in _split(inside, ";") for item in _split(part, ",")]
        items = [parse_value(item, spec) for item in (parts if parts[-1] else parts[:-1])]
        return tuple(items) if text[0] == "(" else items
    if _NUMBER.match(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if _WORD.match(text):
        return text
    raise SpecError(f"{where} is no value; an int, a float, true, false, none, a word, (a;b) or [a;b]")


@guarded
def expand(spec: str) -> list[str]:
    """The spec strings that one with swept values stands for: ``"fastv:keep=0.25,0.5"`` is two.

    Args:
        spec: a spec string, in which values may have alternatives behind commas.

    Returns:
        One spec string for each combination, the last parameter moving fastest.

    Raises:
        SpecError: an alternative is missing, or a bracket does not close.
        ParameterError: alternatives of one parameter are counts and shares, which mean different things.
    """
    found = [""]
    for index, part in enumerate(_split(spec, "+")):
        pieces = _split(part, ":")
        ways = [[("+" if index else "") + pieces[0]]]
        for piece in pieces[1:]:
            name, equals, values = (text.strip() for text in piece.partition("="))
            choices = [value.strip() for value in _split(values, ",")]
            if len(choices) > 1 and not all(choices):
                raise SpecError(f"{piece!r} in {spec!r} has an empty alternative")
            if len(choices) > 1:
                kinds = {type(parse_value(value, spec)) for value in choices} & {int, float}
                if len(kinds) > 1:
                    raise ParameterError(
                        f"{piece!r} sweeps counts (1) beside shares (1.0), which mean different things; write all of "
                        "them with a point, or none"
                    )
            ways.append([f":{name}{equals}{value}" for value in choices])
        found = [before + "".join(way) for before in found for way in itertools.product(*ways)]
    return found


def as_methods(method: Method | str | Sequence[Method | str]) -> list[Method]:
    """What a user may give for methods, as methods.

    Args:
        method: a method, a spec string, or several of them.

    Raises:
        ParameterError: something else, or none.
        UnknownMethod, SpecError: of spec strings.
    """
    if isinstance(method, (Mapping, set, frozenset)):
        names = [name for name in method if isinstance(name, str)]
        like = f'vlmtok.create_method("{names[0]}", ...)' if names else "vlmtok.create_method(name, ...)"
        raise ParameterError(
            f"compress() takes a method, a spec string, or a list of them, got a {type(method).__name__} "
            f'({method!r}); give settings in a spec string ("name:key=value") or make it: {like}'
        )
    items = list(method) if isinstance(method, Iterable) and not isinstance(method, str) else [method]
    methods: list[Method] = []
    for item in items:
        if isinstance(item, str):
            methods += parse_methods(item)
        elif isinstance(item, Method):
            methods.append(item)
        else:
            what = f"a model ({type(item).__name__}); it comes first" if isinstance(item, nn.Module) else repr(item)
            raise ParameterError(
                f"compress() takes methods or spec strings, got {what}"
                + ("; make an instance first" if isinstance(item, type) and issubclass(item, Method) else "")
            )
    if not methods:
        raise ParameterError("compress() needs at least one method")
    return methods
