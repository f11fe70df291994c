"""Work of decoder layers that methods leave out for visual tokens, which stay in their rows (`Method.skip`).

A skipped part adds nothing to a token: its residual connection is all that is left of it. Nothing leaves, so caches and
positions are those of the bare model; keys and values are made of every token, since text looks at them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ..errors import ParameterError, SiteError
from .site import SKIPS, Layout

if TYPE_CHECKING:
    from .method import Method

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
            if isinstance(layer, bool) or not isinstance(layer, int) or part not in SKIPS:
                raise ParameterError(
                    f"{by}.skip: {layer!r}: {part!r} must be a layer and one of {', '.join(map(repr, SKIPS))}"
                )
            if not 0 <= layer < depth:
                raise SiteError(
                    f"{by}: decoder layer {layer} does not exist; {layout.family} has layers 0 to {depth - 1}"
                )
            branches = {"ffn", "attn"} if part == "block" else {part}
            found[layer] = found.get(layer, frozenset()) | branches
    return dict(sorted(found.items()))


def work(
    skips: Mapping[int, frozenset[str]], layout: Layout, read: Collection[int | None], inside: Collection[int | None]
) -> dict[int, tuple[str, ...]]:
    """Modules that run without visual tokens, by layer, as hooks are placed and MACs are counted.

    Args:
        skips: of `asked`.
        layout: of the model.
        read: layers of which methods read queries; these are made of every token.
        inside: layers of which methods read what happens inside the MLP.

    Raises:
        SiteError: that MLP would run without visual tokens.
    """
    found = {}
    for layer, branches in skips.items():
        if "ffn" in branches and layer in inside:
            raise SiteError(
                f"a method reads the neurons of decoder layer {layer}, whose MLP another one leaves out for visual "
                "tokens; let one of the two act at other layers"
            )
        parts = [MLP] if "ffn" in branches else []
        if "attn" in branches:
            whole = [MIXER] if layer in layout.stages["decoder"].blind else [OUTPUT]
            parts += whole if whole == [MIXER] or layer in read else [QUERY, OUTPUT]
        found[layer] = tuple(parts)
    return found
