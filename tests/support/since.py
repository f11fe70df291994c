"""What a host library does only since one of its releases: cases that mean nothing on an older one are left out there.

Each row says what older releases do instead, and what vlmtok makes of it. A row goes when the lower bound passes it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from importlib.util import find_spec

from packaging.version import Version
from vlmtok.adapters.host_faults import SINCE as FAMILIES

SINCE = {
    # Older ones call checkpointed layers whole, hooks included, once more inside backward.
    "checkpointing leaves a layer's own hooks outside": ("transformers", "5.23"),
    # Older ones give every chunk all pictures, so that the bare host differs from itself without chunks.
    "test_prefill_in_chunks_is_right_or_refused": ("transformers", "5.23"),
    # Beams of older ones mix up positions or states of rows: the bare host differs from itself without a cache.
    "test_beams[qwen3_5-": ("transformers", "5.20"),
    "test_beams[qwen3_5_moe-": ("transformers", "5.20"),
    "test_beams[paddleocr_vl-": ("transformers", "5.22"),
    # Older ones read off the wrong columns which tokens of a later turn are a picture; behind a cut vlmtok tells them.
    "test_a_second_turn_by_generate[gemma3-bare": ("transformers", "5.23"),
    # A forward of older ones loses the number of frames of each clip on its way to the inner model.
    "test_clips_are_counted_whole[gemma4": ("transformers", "5.23"),
    "test_signals_equal_the_hosts_own_attention[gemma4-clips": ("transformers", "5.23"),
    "test_a_plain_forward_cuts_what_generate_cuts[gemma4_unified-clips": ("transformers", "5.23"),
}
"""From a part of a test's id to the package and the release since which it holds."""

WANTS = {
    "lab/test_explore.py": "ipywidgets",
    "docs/tutorials/notebook.md": "ipywidgets",
    "to_pandas": "pandas",
}
"""From a part of a test's id to a package of the extra ``test`` without which there is nothing to test: where it is not
installed those tests are left out, and pytest says how many."""


def lacking(nodeid: str) -> bool:
    """Whether a test is of a form that needs a package which is not installed."""
    return any(find_spec(package) is None for part, package in WANTS.items() if part in nodeid)


def too_old(nodeid: str, installed: dict[str, str] | None = None) -> bool:
    """Whether a test is of something that the installed host does not do yet.

    Args:
        nodeid: of the test.
        installed: versions by package; those that are there, if None.
    """
    rows: Iterable[tuple[str, str]] = [row for part, row in SINCE.items() if part in nodeid]
    case = nodeid.partition("[")[2].rstrip("]").split("-")
    rows = [*rows, *(("transformers", FAMILIES[name]) for name in case if name in FAMILIES)]
    return any(Version((installed or _Installed())[package]) < Version(release) for package, release in rows)


def reached(release: str, package: str = "transformers") -> bool:
    """Whether an installed package is a release or a later one."""
    return Version(importlib.metadata.version(package)) >= Version(release)


class _Installed(dict[str, str]):
    def __missing__(self, package: str) -> str:
        return importlib.metadata.version(package)
