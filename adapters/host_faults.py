"""Families that a release of their own library lacks or cannot run: nothing of ours is in the way or can help.

The self-test, the adapters and the tests read the same table, so that such a family is refused with the reason instead
of failing somewhere. A row goes when the library mends it: `vlmtok doctor` says so when it runs after all.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault of a library.

    Attributes:
        family: ``config.model_type`` of a vision-language model.
        library: distribution at fault.
        first: first version that has it.
        last: last version that has it, or None where no later one was seen without it.
        why: what happens to the bare model, without vlmtok.
    """

    family: str
    library: str
    first: str
    last: str | None
    why: str

    def holds(self, version: str) -> bool:
        """Whether a version of the library has it."""
        here = _number(version)
        return _number(self.first) <= here and (self.last is None or here <= _number(self.last))


FAULTS: tuple[Fault, ...] = (
    Fault(
        "llama4",
        "transformers",
        "5.24.0",
        None,
        "its forward reads image_outputs, which its output does not have (AttributeError)",
    ),
)

SINCE = {
    "molmo2": "5.20",
    "muse_spark": "5.20",
    "unlimited_ocr": "5.20",
    "minicpm_ocr": "5.22",
    "mistral_large4": "5.22",
    "dots3_note": "5.23",
    "granite_docling": "5.23",
    "inkling2": "5.23",
    "lfm3_vl": "5.23",
    "apertus1p5": "5.24",
    "hy_v4_vl": "5.24",
    "inkling2_loop": "5.24",
}
"""From ``config.model_type`` to the release of transformers that it came with, where that is above the lower bound."""


def _number(version: str) -> tuple[int, ...]:
    """The release of a version, so that releases compare; what stands behind it (``.dev0``, ``rc1``) is left out."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in found[0].split(".")] if found else []
    return tuple(parts + [0] * (3 - len(parts)))


def fault_of(family: str) -> str | None:
    """Why the installed library lacks a family or cannot run it by itself, or None where it can as far as is known.

    Args:
        family: ``config.model_type``.

    Returns:
        A sentence that names library and version.
    """
    for fault in FAULTS:
        version = _installed(fault.library) if fault.family == family else None
        if version is not None and fault.holds(version):
            return f"{fault.library} {version} itself cannot run it: {fault.why}"
    if there(family):
        return None
    return f"transformers {_installed('transformers')} does not have it: it came with {SINCE[family]}"


def there(family: str) -> bool:
    """Whether the installed transformers is new enough to have a family.

    Args:
        family: ``config.model_type``.
    """
    version = _installed("transformers")
    return version is None or family not in SINCE or _number(version) >= _number(SINCE[family])


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
