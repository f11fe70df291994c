"""What `import vlmtok` brings in, how long it takes, and that the adapters are one package whichever way they lie."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlmtok

HOSTS = {"timm", "open_clip", "transformers"}
HEAVY = {*HOSTS, "triton", "torchvision", "PIL", "typer", "rich", "safetensors"}
"""Modules that `import vlmtok` leaves alone, as far as torch has not brought them in."""


def run(code: str) -> str:
    """What a fresh interpreter prints, in the folder of this checkout or of the installed package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vlmtok.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_brings_in_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import vlmtok; "
        "print(*(set(sys.modules) - before) & {heavy!r}, sep=','); "
        "vlmtok.parse_methods('pitome+todre'); vlmtok.compress, vlmtok.TokenView, vlmtok.viz; "
        "from vlmtok.adapters import adapter_for; vlmtok.list_methods(); "
        "print(*(set(sys.modules) - before) & {late!r}, sep=',')"
    )
    assert run(code.format(heavy=HEAVY, late={*HOSTS, "torch._dynamo"})) == ""  # Dynamo alone takes a second


def test_importing_is_quick():
    """Under 0.2 s beyond torch: the best of five, so that a busy machine does not fail it."""
    code = "import time, torch; begin = time.perf_counter(); import vlmtok; print(time.perf_counter() - begin)"
    taken = []
    for _ in range(5):
        taken.append(float(run(code)))
        if taken[-1] < 0.2:
            return
    pytest.fail(f"import vlmtok took {min(taken):.2f} s beyond torch, of 0.2 s allowed")


def test_adapters_are_one_package():
    """No second copy under the name `adapters`, which belongs to another project."""
    found = run(
        "import sys, vlmtok, timm; "
        "model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=0, img_size=32); "
        "run = vlmtok.compress(model, vlmtok.Random(stage='vision', layer=0)); "
        "import vlmtok.adapters.base as base; "
        "bases = {id(m.Adapter) for m in list(sys.modules.values()) if m and hasattr(m, 'Adapter') "
        "and m.__name__.endswith('adapters.base')}; "
        "print('adapters' in sys.modules, len(bases), base.Adapter.__module__)"
    )
    assert found == "False 1 vlmtok.adapters.base"


def test_models_are_recognised_without_importing_their_library():
    """A class that is called like one of timm's is refused, and timm stays out."""
    found = run(
        "import sys, torch, vlmtok\n"
        "class VisionTransformer(torch.nn.Module): pass\n"
        "try:\n    vlmtok.compress(VisionTransformer(), 'tome')\n"
        "except vlmtok.errors.UnsupportedModel as refusal:\n    print('no adapter carries' in str(refusal))\n"
        "print(*{'timm', 'open_clip', 'transformers'} & set(sys.modules))"
    )
    assert found == "True"


def test_public_names():
    assert set(vlmtok._HOME) <= set(dir(vlmtok))
    for name in dir(vlmtok):
        assert getattr(vlmtok, name) is not None
    assert vlmtok.estimate.__module__ == "vlmtok.estimate", "the function, not the module"
    importlib.import_module("vlmtok.budget")
    importlib.import_module("vlmtok.estimate")
    assert callable(vlmtok.estimate) and callable(vlmtok.budget), "importing the module hid the function"
    with pytest.raises(AttributeError, match="module 'vlmtok' has no attribute 'compres'"):
        vlmtok.compres  # noqa: B018


def test_the_version_is_that_of_the_package():
    pyproject = Path(vlmtok.__file__).parents[1] / "pyproject.toml"
    assert re.fullmatch(r"\d+\.\d+\.\d+", vlmtok.__version__)
    if pyproject.exists():
        assert f'version = "{vlmtok.__version__}"' in pyproject.read_text()
