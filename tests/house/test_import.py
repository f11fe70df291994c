"""What `import vlmtok` brings in, how long it takes, and that the adapters are one package whichever way they lie."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vlmtok
from vlmtok import moved
from vlmtok.surface import HOME

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
        "vlmtok.parse_methods('pitome+todre'); vlmtok.compress, vlmtok.TokenView, vlmtok.lab.overlay; "
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


PUBLIC = """
AIM AveragePool CDPruner Comparison Compression CoreMatching Counts CrossGET DART DivPrune EMSStyle EVS Evaluation
FastV FasterVLM HiPrune HoloV IMA KVNorm KVRandom LayerProfile Layout Learned MMTok Matrix Method PiToMe PrefixKV
PruMerge PyramidDrop Random Recommendation Recoverable Reduction Report Reports SCOPE Site SnapKV SparseVLM
StageLayout Streaming Sweep TCA ToDRE ToMe TokenCorr TokenView Trace TransPrune UniformGrid VidCom2 VisPruner
VisionZip __version__ adapters budget calibrate compare compress create_method errors estimate evaluate explore
keep_count kernels lab list_methods load loading matrix method_class overlay parse_methods recommend register_method
remove serving sweep zero_shot
"""


def test_public_names():
    """`dir`, a star import and the names that type checkers see are one list, which only a decision changes."""
    found = run(
        "import vlmtok; print(*dir(vlmtok)); names = {}; exec('from vlmtok import *', names); "
        "print(*sorted(set(names) - {'__builtins__'})); print(*(getattr(vlmtok, n) is None for n in dir(vlmtok)))"
    )
    shown, starred, missing = (line.split() for line in found.split("\n"))
    assert shown == starred == PUBLIC.split() and set(missing) == {"False"}
    tree = ast.parse(Path(vlmtok.__file__).read_text("utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    seen = {alias.asname: f"{n.module or alias.name}" for n in block.body for alias in n.names}
    assert sorted(seen) == shown, "add or take out the line under TYPE_CHECKING in vlmtok/__init__.py"
    assert {name: seen[name] for name in HOME} == HOME


def test_functions_win_over_modules_of_their_name():
    assert vlmtok.estimate.__module__ == "vlmtok.forecast.estimate"
    importlib.import_module("vlmtok.forecast.budget")
    importlib.import_module("vlmtok.lab.overlay")
    assert callable(vlmtok.estimate) and callable(vlmtok.budget) and callable(vlmtok.overlay)
    assert vlmtok.lab.overlay.__name__ == "vlmtok.lab.overlay" and vlmtok.lab.compare.compare is vlmtok.compare


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(AttributeError, match="module 'vlmtok' has no attribute 'compres'; did you mean 'compress'"):
        vlmtok.compres  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'PiToMe'"):
        vlmtok.PiToMee  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from vlmtok import nonsense")


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_old_places_lead_to_the_new_ones(old):
    """Each says where its contents are, and has them."""
    sys.modules.pop(f"vlmtok.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"vlmtok.{old} is now vlmtok\..*goes in 0.3"):
        module = importlib.import_module(f"vlmtok.{old}")
    for place in moved.MODULES[old]:
        new = importlib.import_module(f"vlmtok.{place}")
        names = [n for n, v in vars(new).items() if getattr(v, "__module__", None) == new.__name__]
        assert all(hasattr(module, name) for name in names)
    with pytest.raises(AttributeError, match=f"vlmtok.{old}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_type_checkers_see_the_public_names(tmp_path):
    """mypy knows each name and its parameters, and flags those that are not there."""
    file = tmp_path / "user.py"
    names = [name for name in PUBLIC.split() if not name.startswith("_")]
    file.write_text(
        "import vlmtok\n" + "".join(f"vlmtok.{name}\n" for name in names) + "vlmtok.ToDRE(keep=0.1)\n"
        "vlmtok.nonsense\nvlmtok.ToDRE(kep=1)\nvlmtok.lab.overlay.overlay\nvlmtok.lab.nonsense\n"
    )
    others = ("torch", "numpy", "PIL", "rich", "typer", "timm", "open_clip", "transformers", "triton", "safetensors")
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = true\n" for name in others)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\ncache_dir = {tmp_path}\n{skipped}")
    environment = {**os.environ, "MYPYPATH": str(Path(vlmtok.__file__).parents[1])}
    words = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    said = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    last = len(names) + 2
    assert len(said) == 3, done.stdout + done.stderr
    assert said[0].startswith(f'user.py:{last + 1}: error: Module has no attribute "nonsense"')
    assert said[1].startswith(f'user.py:{last + 2}: error: Unexpected keyword argument "kep" for "ToDRE"')
    assert said[2].startswith(f'user.py:{last + 4}: error: Module has no attribute "nonsense"')


def test_the_version_is_that_of_the_package():
    pyproject = Path(vlmtok.__file__).parents[1] / "pyproject.toml"
    assert re.fullmatch(r"\d+\.\d+\.\d+", vlmtok.__version__)
    if pyproject.exists():
        assert f'version = "{vlmtok.__version__}"' in pyproject.read_text()
