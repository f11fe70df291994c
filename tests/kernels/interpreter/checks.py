"""What every Triton kernel must get right, as functions of the modules that hold the kernels.

`test_kernels.py` runs them on the modules as they are, `test_mutations.py` on modules with a bug put in. The oracle is
the torch definition (itself held against naive loops elsewhere): indices exactly, also in ties.
"""

from __future__ import annotations

from inspect import isfunction

import check_attention
import check_columns
import check_cover
import check_determinant
import check_duplicates
import check_greedy
import check_matching
import check_merging
import check_plans

CHECKS = {
    name: check
    for module in (check_matching, check_plans, check_merging, check_greedy, check_cover, check_attention)
    for module in (
        check_matching,
        check_plans,
        check_merging,
        check_greedy,
        check_attention,
        check_determinant,
        check_duplicates,
    )
    for module in (check_matching, check_plans, check_merging, check_greedy, check_attention, check_columns)
    for name, check in vars(module).items()
    if isfunction(check) and check.__module__ == module.__name__ and not name.startswith("_")
}
