"""A page a family of models: where tokens can leave, why not elsewhere, and which methods attach.

What a vision-language family offers is asked of its adapter, with a model without data that transformers makes of the
family's default configuration. Towers and dual encoders are shown by the published shapes of `catalogue.KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ...adapters import adapter_for
from ...adapters.language import families as vlm_rows
from ...adapters.registry import REFUSED
from ...core.method import Method
from ...core.registry import create_method, list_methods
from ...core.site import STAGES, Layout, StageLayout
from ...loading.models import configured
from ..catalogue import KINDS, refusal, sites
from ..family_table import ADAPTERS, family_table, models, notes
from ..tables import table
from .methods import first_clause, grouped
from .section import Section

CONFIGURED: dict[str, dict[str, Any]] = {
    # The default has 14 heads, which do not divide its width; this is the tower of aya-vision-8b.
    "aya_vision": {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 364,
            "patch_size": 14,
        }
    },
    # Defaults name no sizes; these are of Perception-LM-1B's tower.
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "model_args": {"embed_dim": 1024, "depth": 23, "img_size": [448, 448], "global_pool": ""},
        }
    },
    # Defaults name no rotary embeddings for each type of layer.
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [24, 20, 20]},
                "full_attention": None,
            }
        }
    },
}
"""What is changed in a default configuration of which no model can be made."""

TOWER_CUTS = {
    "slots": "inside its blocks; what is left takes the picture's first placeholders",
    "spread": "inside its blocks; behind the last one every patch gets the features of its slot, so that the language "
    "model's row keeps its length",
    "free": "inside its blocks; whatever reads the tower takes any number",
}


def family_pages() -> Section:
    """The index, a page for each family, and one for each adapter of towers."""
    rows = vlm_rows.ROWS
    towers = {row["adapter"]: row["classes"] for row in models() if row["adapter"] in ADAPTERS}
    towers = {name: classes for name, classes in towers.items() if not name.endswith("-vlm")}
    made = {f"families/{name}.md": family_page(name) for name in rows}
    made.update({f"families/{name}.md": tower_page(name, classes) for name, classes in towers.items()})
    made["families/index.md"] = _index(towers)
    named = [[{name: f"families/{name}.md"} for name in group] for group in (rows, towers)]
    groups = zip(("Vision-language models", "Towers and dual encoders"), named)
    return Section(made, ["families/index.md", *({title: group} for title, group in groups)])


def _index(towers: Mapping[str, list[str]]) -> str:
    carried, refused = family_table().split("\n\n")
    listed = table(
        ("adapter", "classes"),
        [(f"[{name}]({name}.md)", ", ".join(f"`{one}`" for one in classes)) for name, classes in towers.items()],
    )
    whole = table(
        ("refused", "why"), [(f"`{module.partition('.')[0]} {name}`", why) for (module, name), why in REFUSED.items()]
    )
    return "\n\n".join(
        (
            "# Families of models",
            "`vlmtok.compress` finds the adapter by the class of the model. What it cannot carry is refused with the "
            "reason, before anything is changed. `vlmtok list --models` prints the same.",
            "## Vision-language models of transformers",
            carried,
            'A family that is not listed may run with `vlmtok.compress(model, method, adapter="generic-vlm")`.',
            "### Refused {#refused}",
            refused,
            _census(),
            "## Towers and dual encoders",
            listed,
            "### Refused {#refused-towers}",
            whole + "\n",
        )
    )


def _census() -> str:
    """How many types are carried, and how many refused."""
    carried, refused = len(vlm_rows.ROWS), len(vlm_rows.REFUSED)
    return (
        f"Of the {carried + refused} model types of transformers {vlm_rows.LOOKED_THROUGH} that take pictures, "
        f"{carried} are carried and {refused} refused; a test walks transformers' own tables and fails where one is "
        "neither."
    )


# ---------------------------------------------------------------------- vision-language models
def family_page(name: str) -> str:
    """The page of a vision-language family.

    Args:
        name: its model type, a key of `families.ROWS`.
    """
    spec, layout = vlm_rows.ROWS[name], family_layout(name)
    facts = [
        ("for example", f"`{vlm_rows.EXAMPLES[name]}`"),
        ("adapter", f"`{layout.family}`"),
        ("position ids", "kept (M-RoPE)" if spec.positions == "mrope" else "kept or renumbered, as a method asks"),
    ]
    peculiar = notes(spec)
    said = (
        f"Asked of the model that transformers {version('transformers')} makes of this family's default configuration; "
        "checkpoints of another depth have their cuts at other layers."
    )
    parts = [
        f"# {name}",
        table(("", ""), facts),
        "## Where tokens can leave",
        table(
            ("stage", "tokens can leave"),
            [(f"`{stage}`", _offer(stage, layout, spec)) for stage in STAGES if stage != "text"],
        ),
    ]
    if peculiar:
        parts += ["## What is peculiar to it", "\n".join(f"- {one}" for one in peculiar)]
    parts += ["## Methods", said, _methods(layout)]
    return "\n\n".join(parts) + "\n"


def family_layout(name: str, changes: dict[str, Any] | None = None) -> Layout:
    """What a family offers, at the depth of its default configuration.

    Args:
        name: its model type.
        changes: of its default configuration; None takes what `CONFIGURED` says.
    """
    changed = CONFIGURED.get(name, {}) if changes is None else changes
    return adapter_for(configured({"model_type": name, **changed})).layout()


def _offer(stage: str, layout: Layout, spec: Any) -> str:
    """Where in a stage tokens can leave, or why they cannot."""
    if stage not in layout.stages:
        # What goes with a stage of which the reason is known goes for the same.
        reasons = [layout.without[one] for one in (stage, "vision", "projected", "decoder") if one in layout.without]
        return f"no: {reasons[0]}"
    offered = layout.stages[stage]
    if offered.whole:
        return f"no: {offered.whole}; later stages can read its signals"
    if stage == "vision":
        return f"yes, {TOWER_CUTS[spec.tower_cut]}; {_depth(offered)}"
    if stage == "decoder":
        return f"yes; {_depth(offered)}"
    if stage == "cache":
        return f"yes, behind the prefill, from {_caches(offered)}"
    return {"features": "yes, what the projector gets", "projected": "yes, at the language model's input"}[stage]


def _caches(offered: StageLayout) -> str:
    """Layers whose caches can lose entries, and why others cannot."""
    left = offered.depth - len(offered.blind)
    said = f"the caches of {'all' if left == offered.depth else left} of {offered.depth} layers"
    why = {re.sub(r"of layer \d+", "of an earlier layer", one) for one in offered.blind.values()}
    return said + (f"; of the others no entry can leave: {'; '.join(sorted(why))}" if why else "")


def _depth(offered: StageLayout) -> str:
    said = f"{offered.depth} layers, the last that matters is {offered.last}"
    if offered.last_cut is not None:
        said += f", the last cut at the start of {offered.last_cut}"
    if offered.blind:
        said += f"; {len(offered.blind)} of them have no attention rows, and sites there act at the next that has some"
    return said + (f"; {offered.why}" if offered.why else "")


# ---------------------------------------------------------------------- towers
def tower_page(name: str, classes: list[str]) -> str:
    """The page of an adapter of towers or dual encoders.

    Args:
        name: of the adapter.
        classes: that it carries.
    """
    parts = [f"# {name}", "Classes and those that inherit from them: " + ", ".join(f"`{one}`" for one in classes) + "."]
    for kind in (KINDS[one] for one in ADAPTERS[name]):
        layout = kind.layout()
        rows = [
            (f"`{stage}`", f"yes, inside its blocks; {_depth(layout.stages[stage])}")
            if stage in layout.stages
            else (f"`{stage}`", "no: there is none")
            for stage in STAGES
        ]
        parts += [
            f"## {kind.what.removeprefix('a ').capitalize()}",
            f"For example the shape `{kind.shape}`.",
            "### Where tokens can leave",
            table(("stage", "tokens can leave"), rows),
            "### Methods",
            _methods(layout),
        ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------- methods
def _methods(layout: Layout) -> str:
    rows = [(f"[`{name}`](../methods/{name}.md)", _fit(create_method(name), layout)) for name in list_methods()]
    return table(("method, with its defaults", "acts or looks at"), rows)


def _fit(method: Method, layout: Layout) -> str:
    why = refusal(method, layout)
    if why is not None:
        return f"no: {first_clause(why)}"
    found = [{**row, "scope": "", "positions": "", "needs": ()} for row in sites(method, layout)[1]]
    return "; ".join(row["site"] for row in grouped(found))
