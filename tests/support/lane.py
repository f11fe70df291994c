"""The contract subset (``pytest --lane``): what other releases of the host libraries are tried on, in a few minutes.

It holds what can go wrong between vlmtok and a host: every fact of the hosts, the fresh process of README's first
command, and a few cases of each test of the contract, of towers, LLaVA and lifetimes, and of four families that differ
in kind (positions in one dimension and in three, sliding windows with blocks of pictures, a projector that shuffles).
What is compiled stays out: it takes long, and is torch's business. The full suite runs on ``constraints.txt``.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
WHOLE = (
    "house/test_fresh_process.py",
    "adapters/test_host_facts_torch.py",
    "adapters/test_host_facts_towers.py",
    "adapters/test_host_facts_libraries.py",
    "adapters/test_host_facts_llava.py",
)
"""Files of which every case runs."""
SAMPLED = {
    "methods/test_contract.py": 12,
    "methods/test_contract_rows.py": 12,
    "methods/test_contract_oracle.py": 12,
    "methods/test_contract_counts.py": 12,
    "methods/test_contract_selection.py": 12,
    "adapters/towers/test_towers.py": 3,
    "adapters/towers/test_tower_combinations.py": 3,
    "adapters/towers/test_tower_gradients.py": 3,
    "methods/test_matching_vectors.py": 3,
    "methods/test_todre_vectors.py": 3,
    "adapters/language/test_llava.py": 3,
    "adapters/language/test_llava_forward.py": 3,
    "adapters/language/test_llava_generate.py": 3,
    "adapters/language/test_llava_refused.py": 3,
    "adapters/language/test_llava_turns.py": 3,
    "adapters/language/test_llava_views.py": 3,
    "core/test_lifetime.py": 3,
    "core/test_lifetime_entries.py": 3,
    "core/test_lifetime_handles.py": 3,
    "core/test_lifetime_refused.py": 3,
    "adapters/test_host_facts_families.py": 100,
    "adapters/test_host_facts_families_masks.py": 100,
    "families/test_attention.py": 4,
    "families/test_bare.py": 4,
    "families/test_dialogue.py": 4,
    "families/test_families.py": 8,
    "families/test_packing.py": 2,
    "families/test_pairs.py": 4,
    "families/test_spans.py": 4,
    "families/test_towers.py": 4,
    "families/test_unlisted.py": 4,
}
"""Files of which each test runs in this many of its cases, spread evenly over them."""
FAMILIES = {"llava", "qwen2_5_vl", "gemma3", "internvl"}
"""Families whose cases are taken."""
GOLDEN = (5**0.5 - 1) / 2


def place(path: Path) -> str:
    """A file's name as in the tables above."""
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else path.name


def belongs(path: Path) -> bool:
    """Whether a file has tests of the subset."""
    return place(path) in {*WHOLE, *SAMPLED}


def chosen(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases of the subset, in their order: the same in every worker."""
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if belongs(item.path) and _family(item) in (None, *FAMILIES) and "compile" not in item.nodeid:
            groups[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for cases in groups.values():
        limit = SAMPLED.get(place(cases[0].path), len(cases))
        kept.update(id(cases[index]) for index in spread(len(cases), limit))
    return [item for item in items if id(item) in kept]


def spread(size: int, limit: int) -> list[int]:
    """At most `limit` of `size` places, one in each stretch, never at the same depth of it: grids have periods."""
    if size <= limit:
        return list(range(size))
    return [int((index + index * GOLDEN % 1) * size / limit) for index in range(limit)]


def _family(item: pytest.Item) -> str | None:
    """The family of a case, if it is of one."""
    if not place(item.path).startswith(("families/", "adapters/test_host_facts_families")) or not hasattr(
        item, "callspec"
    ):
        return None
    return item.callspec.params.get("name")
