"""The checks find bugs: each one put into a copy of a kernel makes its check fail.

A bug is a piece of source and what replaces it; the piece must occur exactly once, so that a kernel that changes
takes its bugs along. None of them writes out of bounds: the interpreter would crash.
"""

import sys
from pathlib import Path

import bugs
import checks
import pytest
from test_kernels import NAMES, modules

import vlmtok.kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("bug", bugs.BUGS)
def test_bug_is_found(bug, tmp_path, monkeypatch):
    name, piece, wrong, check = bugs.BUGS[bug]
    source = (Path(vlmtok.kernels.__file__).parent / f"triton_{name}.py").read_text()
    assert source.count(piece) == 1, f"{piece!r} occurs {source.count(piece)} times in triton_{name}.py"
    (tmp_path / f"triton_{name}.py").write_text(source.replace(piece, wrong.replace("BN_", "4096")))
    monkeypatch.setattr(vlmtok.kernels, "__path__", [str(tmp_path), *vlmtok.kernels.__path__])
    for short in NAMES:  # import all anew: they hold on to each other's functions
        monkeypatch.delitem(sys.modules, f"vlmtok.kernels.triton_{short}", raising=False)
        monkeypatch.delattr(vlmtok.kernels, f"triton_{short}", raising=False)
    mutant = modules()
    assert Path(getattr(mutant, name).__file__).parent == tmp_path
    with pytest.raises((AssertionError, IndexError)):
        checks.CHECKS[check](mutant)
