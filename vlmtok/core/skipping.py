"""Work of decoder layers that methods leave out for visual tokens, which stay in their rows (`Method.skip`).

A skipped part adds nothing to a token: its residual connection is all that is left of it. Nothing leaves, so caches and
positions are those of the bare model; keys and values are made of every token, since text looks at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import ParameterError, SiteError
from .signals import BY_ATTENTION
from .site import Layout

if TYPE_CHECKING:
    from .attachment import Entry
    from .method import Method

PARTS: dict[str, frozenset[str]] = {
    "ffn": frozenset({"ffn"}),
    "attn": frozenset({"attn"}),
    "block": frozenset({"ffn", "attn"}),
}
"""What `Method.skip` may say of a layer, and the branches that this names."""

NEURONS = "activation_match"
"""The signal that is read off the inside of an MLP."""

MLP, QUERY, OUTPUT, MIXER = "mlp", "query", "output", "mixer"
"""Modules by their task: an MLP, the projections of an attention, and what stands in an attention's place. The last one
runs for every token, since its state is made of them; only what it adds to visual tokens is left out."""


def asked(methods: Iterable[Method], layout: Layout) -> dict[int, frozenset[str]]:
    """Branches that methods leave out, by decoder layer.

    Args:
        methods: of a compression.
        layout: of the model.

    Raises:
        ParameterError: an answer of another form than `Method.skip` gives.
        SiteError: there is no such layer, or no language model.
    """
    found: dict[int, frozenset[str]] = {}
    for method in methods:
        by, answer = type(method).__name__, method.skip(layout)
        if not isinstance(answer, Mapping):
            raise ParameterError(f"{by}.skip must return a dict, got {type(answer).__name__}")
        if not answer:
            continue
        if method.min_tokens:
            raise ParameterError(
                f"{method}: min_tokens={method.min_tokens} leaves small pictures whole where tokens leave; {by} leaves "
                "work out for tokens that stay, by layers and not by pictures; min_tokens=0"
            )
        depth = layout.stage("decoder", by).depth
        for layer, part in answer.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or part not in PARTS:
                raise ParameterError(
                    f"{by}.skip: {layer!r}: {part!r} must be a layer and one of {', '.join(map(repr, PARTS))}"
                )
            if not 0 <= layer < depth:
                raise SiteError(
                    f"{by}: decoder layer {layer} does not exist; {layout.family} has layers 0 to {depth - 1}"
                )
            found[layer] = found.get(layer, frozenset()) | PARTS[part]
    return dict(sorted(found.items()))


def work(skips: Mapping[int, frozenset[str]], layout: Layout, entries: Iterable[Entry]) -> dict[int, tuple[str, ...]]:
    """Modules that run without visual tokens, by layer, as hooks are placed and MACs are counted.

    Args:
        skips: of `asked`.
        layout: of the model.
        entries: methods at their sites; those that read the queries of a layer have them made of every token.

    Raises:
        SiteError: a method reads the neurons of an MLP that runs without visual tokens.
    """
    inside = [e for e in entries if (e.site.stage, e.site.point) == ("decoder", "end")]
    read = {e.site.layer for e in inside for need in e.needs if need.stage is None and need.name in BY_ATTENTION}
    for entry in inside:
        layer = entry.site.layer
        if layer is not None and "ffn" in skips.get(layer, ()) and any(n.name == NEURONS for n in entry.needs):
            raise SiteError(
                f"{entry.method} reads the neurons of decoder layer {layer}, whose MLP another method leaves out for "
                "visual tokens; let one of the two act at other layers"
            )
    found = {}
    for layer, branches in skips.items():
        parts = [MLP] if "ffn" in branches else []
        if "attn" in branches:
            whole = [MIXER] if layer in layout.stages["decoder"].blind else [OUTPUT]
            parts += whole if whole == [MIXER] or layer in read else [QUERY, OUTPUT]
        found[layer] = tuple(parts)
    return found
