"""All facts of one release of a host library."""

from __future__ import annotations

from collections.abc import Callable

from vlmtok.adapters import ROWS as CLASSES
from vlmtok.adapters.language import families
from vlmtok.adapters.towers import hf_rows

from .auto import Chooser
from .facts import Findings
from .others import open_clip_facts, shared_facts, timm_facts
from .packed import PACKED, packed_facts
from .sources import Library
from .towers import class_facts, tower_facts
from .vlm import family_facts


def transformers_facts(findings: Findings, chooser: Chooser) -> None:
    """Facts of transformers: what families share, each family, each tower."""
    shared_facts(findings, chooser)
    for kind, spec in families.ROWS.items():
        family_facts(findings.about(kind), chooser, kind, spec)
    for kind, row in hf_rows.ROWS.items():
        tower = chooser.model(kind)  # towers of some families have no model of their own
        tower_facts(findings.about(kind), chooser, kind, row, [] if tower is None else [tower])
    for kind, packed in PACKED.items():
        tower = chooser.model(kind)
        packed_facts(findings.about(kind), chooser, kind, packed, [] if tower is None else [tower])
    for (module, name), where in CLASSES.items():
        if module.startswith("transformers."):
            class_facts(findings, chooser, module, name, where.rpartition(":")[2])


FACTS: dict[str, Callable[[Findings, Chooser], None]] = {
    "transformers": transformers_facts,
    "timm": timm_facts,
    "open_clip_torch": open_clip_facts,
}
"""By name on the index."""


def examine(library: Library) -> Findings:
    """Asks everything of one release.

    Args:
        library: its sources.
    """
    findings = Findings(library.package, library.version)
    FACTS[library.package](findings, Chooser(library))
    return findings
