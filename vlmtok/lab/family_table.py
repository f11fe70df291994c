"""Adapters, models and families, as lists and as a table."""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, tuple[str, ...]] = {
    "timm-vit": ("tower", "tower, no CLS"),
    "timm-eva": ("tower",),
    "timm-naflex": ("tower", "tower, no CLS"),
    "open_clip": ("dual",),
    "open_clip-vit": ("tower",),
    "open_clip-timm": ("tower", "tower, no CLS"),
    "transformers-vision": ("tower", "tower, no CLS"),
    "transformers-dual": ("dual", "tower, no CLS"),
    "transformers-vlm": ("VLM, slots", "VLM, spread", "VLM", "VLM, tower"),
}
"""Kinds of models that an adapter carries."""


def models() -> list[dict[str, Any]]:
    """The adapters: name, classes, kinds of models."""
    from ..adapters.language import families as vlm_rows
    from ..adapters.language.hf_vlm import HFVLM
    from ..adapters.registry import ROWS

    classes: dict[str, list[str]] = {}
    for (module, qualified), where in ROWS.items():
        classes.setdefault(_adapter_name(where), []).append(f"{module.partition('.')[0]} {qualified}")
    classes[HFVLM.name] = [f"model type {kind}" for kind in vlm_rows.ROWS]
    return [
        {"adapter": name, "classes": found, "kinds": list(ADAPTERS.get(name, ()))} for name, found in classes.items()
    ]


def _adapter_name(where: str) -> str:
    from ..adapters.registry import load_class

    return load_class(where).name


def families() -> list[dict[str, Any]]:
    """Vision-language families of transformers: stages in which tokens can leave, or why they cannot."""
    from ..adapters.language import families as vlm_rows
    from ..adapters.refused import REFUSED

    found: list[dict[str, Any]] = []
    for name, spec in vlm_rows.ROWS.items():
        stages = {"slots": ["vision", "features"], "spread": ["vision"], "free": ["vision"]}.get(
            spec.tower_cut or "", []
        )
        stages = stages + ([] if spec.boundary else ["projected", "decoder", *([] if spec.latents else ["cache"])])
        found.append(
            {
                "family": name,
                "stages": stages,
                "tower": spec.tower_cut,
                "refused": spec.boundary,
                "example": vlm_rows.EXAMPLES[name],
            }
        )
    for name, why in vlm_rows.REFUSED.items():
        found.append({"family": name, "stages": [], "tower": None, "refused": why})
    for (module, qualified), why in REFUSED.items():
        name = f"{module.partition('.')[0]} {qualified}"
        found.append({"family": name, "stages": [], "tower": None, "refused": why})
    return found


def family_table() -> str:
    """The vision-language families of transformers as markdown: where tokens can leave, and why not elsewhere.

    Two tables, made from the rows that the adapter works with: the families, then those that are refused. Cells of the
    tower say how: ``slots``, ``spread`` or ``free``. Names link to the pages that `vlmtok.lab.pages` makes.
    """
    from ..adapters.language import families as vlm_rows

    lines = ["| model type | for example | `vision` | `projected`, `decoder`, `cache` | positions | notes |"]
    lines.append("|---|---|---|---|---|---|")
    for name, spec in vlm_rows.ROWS.items():
        features = ", `features`" if spec.tower_cut == "slots" else ""
        tower = f"{spec.tower_cut}{features}" if spec.tower_cut else f"no: {spec.whole}"
        language = f"no: {spec.boundary}" if spec.boundary else "yes"
        positions = "kept" if spec.positions == "mrope" else "kept or renumbered"
        cells = (
            f"[`{name}`]({name}.md)",
            f"`{vlm_rows.EXAMPLES[name]}`",
            tower,
            language,
            "" if spec.boundary else positions,
            "; ".join(notes(spec)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| refused | why |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in vlm_rows.REFUSED.items()]
    return "\n".join(lines)


def notes(spec: Any) -> list[str]:
    """What a row of `families.ROWS` says that users want to know."""
    parts = {
        "anyres": "thumbnail and canvas of crops",
        "chunks": "crops, thumbnail last",
        "rows": "rows with breaks between them, which stay",
    }
    said = []
    if len(spec.ids) > 1:
        said.append("pictures and clips")
    if spec.parts in parts:
        said.append(parts[spec.parts])
    elif spec.thumbnail and spec.parts == "runs":
        said.append("marks stand between crops, so each crop counts as a picture")
    if spec.patches:
        said.append("signals of the tower arrive as means over the patches of each token")
    if spec.positions == "mrope":
        said.append("M-RoPE")
    if spec.deepstack:
        said.append("deepstack features follow the cuts")
    if spec.gather:
        said.append("per-layer inputs follow the cuts")
    if spec.block:
        said.append("tokens look at each other both ways: masks are built anew")
    if spec.last_cut:
        said.append("no cut behind the first layer whose keys later ones share")
    return said
