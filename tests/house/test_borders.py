"""Three parties that know nothing of each other's business: methods, adapters, core.

That mypy looks into adapters/ is proved by `.ci/run`, which seeds a type error there.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import vlmtok.adapters

import vlmtok

PACKAGE = Path(vlmtok.__file__).parent
ADAPTERS = Path(vlmtok.adapters.__file__).parent
HOSTS = ("timm", "open_clip", "transformers")

OUTSIDE = {"loading.py", "session.py", "suite.py", "catalogue.py", "bench.py", "cli.py"}
"""What the command line is made of: it loads checkpoints, and is no part of the core."""


def modules(folder: Path, skip: frozenset[str] | set[str] = frozenset()) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*.py")) if path.name not in skip]
    assert found
    return found


BUILDERS = PACKAGE / "tiny"
"""Builds models of the libraries, so it imports them when it does."""
INSIDE = [path for path in modules(PACKAGE, OUTSIDE) if not {ADAPTERS, BUILDERS} & set(path.parents)]


def named(path: Path) -> str:
    folder = ADAPTERS if ADAPTERS in path.parents else PACKAGE
    return f"{folder.name}/{path.relative_to(folder)}"


def code_of(path: Path) -> tuple[set[str], list[str]]:
    """Modules that a file imports, by their full names, and its identifiers and strings; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported, words = set(), []
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {"." * node.level + ".".join(filter(None, (node.module, alias.name))) for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            words.append(node.value)
        elif isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            words.append(node.name)
    return imported, words


@pytest.mark.parametrize("path", INSIDE, ids=named)
def test_methods_kernels_and_core_import_no_host(path):
    imported, words = code_of(path)
    assert not {name for name in imported if name.split(".")[0] in HOSTS}
    loaders = {"import_module", "__import__"} & set(words)
    assert not loaders or not {word for word in words if word.split(".")[0] in HOSTS}


def at_import(path: Path) -> set[str]:
    """Modules that a file imports as soon as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []  # in place, before the walk gets there
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {"." * n.level + (n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("path", [*modules(BUILDERS), *modules(PACKAGE / "doctor")], ids=named)
def test_tiny_models_and_the_self_test_import_hosts_late(path):
    assert not {name for name in at_import(path) if name.split(".")[0] in HOSTS}


def test_the_test_of_late_imports_can_fail(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("if True:\n    import timm.models\nclass A:\n    def b(self):\n        import open_clip\n")
    assert at_import(wrong) == {"timm.models"}


def test_the_oracle_of_the_self_test_is_torch_alone():
    """Nothing of the core, of adapters or of a host."""
    found = {name.split(".")[0] for name in at_import(PACKAGE / "doctor" / "replay.py")}
    assert found <= {"__future__", "collections", "contextlib", "dataclasses", "inspect", "typing", "torch"}
    assert found == {name.lstrip(".").split(".")[0] for name in code_of(PACKAGE / "doctor" / "replay.py")[0]}


PURE = [path for path in INSIDE if path.parent.name in ("pruners", "mergers", "kernels")]


@pytest.mark.parametrize("path", PURE, ids=named)
def test_methods_and_kernels_are_tensor_maths(path):
    """They name no host in code, but where they say what they were compared with, and take the core's words alone."""
    imported, words = code_of(path)
    assert not [word for word in words if word.split(".")[0] in HOSTS]
    above = {name for name in imported if name.startswith("..")}
    allowed = {"kernels", "method", "reduction", "view", "errors", "signals", "pruners", "mergers"}
    assert {name.strip(".").split(".")[0] for name in above} <= allowed


CORE = [path for path in INSIDE if path.parent == PACKAGE and path.name in {
    "attachment.py", "compression.py", "errors.py", "ledger.py", "method.py", "reduction.py", "rows.py", "sequence.py",
    "signals.py", "stream.py", "trace.py", "view.py",
}]  # fmt: skip
METHOD_CLASSES = {vlmtok.method_class(name).__name__ for name in vlmtok.list_methods()}
NAMES = set(vlmtok.list_methods()) - {"scope", "random"}
"""Names in the registry; those two are words of the contract and of the standard library too."""


@pytest.mark.parametrize("path", [*CORE, *modules(ADAPTERS)], ids=named)
def test_core_and_adapters_name_no_method(path):
    """By no class, no name in the registry, no import; error messages included."""
    imported, words = code_of(path)
    spoken = {word for text in words for word in re.findall(r"\w+", text)}
    assert not spoken & METHOD_CLASSES
    assert not spoken & NAMES
    assert not {name for name in imported if {"pruners", "mergers"} & set(name.split("."))}


@pytest.mark.parametrize("path", CORE, ids=named)
def test_the_core_names_no_host(path):
    words = code_of(path)[1]
    assert not [word for word in words if re.search(rf"\b({'|'.join(HOSTS)})\b", word)]


def test_the_tests_of_layers_can_fail(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text('"""timm in a docstring is fine."""\nfrom timm.models import vit\nx = ToMe("open_clip")\n')
    imported, words = code_of(wrong)
    assert imported == {"timm.models.vit"}
    assert set(words) == {"open_clip", "ToMe", "x"}


def test_no_adapter_file_is_named_like_a_library():
    """`import timm` inside the folder must never find a file of ours."""
    assert not {path.stem for path in modules(ADAPTERS)} & {*HOSTS, "torch", "triton", *sys.stdlib_module_names}


def test_adapters_import_each_other_and_the_core_relatively():
    for path in modules(ADAPTERS):
        imported, _ = code_of(path)
        assert not {name for name in imported if name.split(".")[0] in ("vlmtok", "adapters")}, path
