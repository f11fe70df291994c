"""`examples/my_method.py`, a method in a file outside the package: it runs wherever a built-in one runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from support import models, oracle
from support.checks import Print, Subject, assert_differs, assert_equal, assert_same, watched
from support.places import ROOT
from support.player import Player

import vlmtok
from vlmtok.core import registry

FILE = ROOT / "examples" / "my_method.py"


@pytest.fixture(scope="module")
def example():
    """The file, loaded from where it lies; what it registers is gone behind these tests."""
    vlmtok.list_methods()  # so that what is built in stays
    known = dict(registry._METHODS)
    spec = importlib.util.spec_from_file_location("my_method", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]
        registry._METHODS.clear()
        registry._METHODS.update(known)


def test_it_is_registered(example):
    assert "normkeep" in vlmtok.list_methods()
    (made,) = vlmtok.parse_methods("normkeep:keep=0.25")
    assert type(made) is example.NormKeep and str(made) == "normkeep:keep=0.25"


@pytest.mark.parametrize("name", models.BUILDERS)
def test_it_runs_on_every_adapter(example, name):
    """It cuts, equals rows alone, agrees with its count and leaves the exact model."""
    subject, made = Subject(name), example.NormKeep(keep=0.4)
    before = Print.of(subject.model)
    with torch.no_grad():
        bare = subject.out()
        with vlmtok.compress(subject.model, made) as run:
            with watched([made]) as seen:
                found, alone = subject.out(), subject.out(row=0)
            report = str(run.report())
        assert_same(subject.out(), bare)
    before.assert_still(subject.model)
    assert_differs(found, bare)
    assert_equal(alone, subject.row_of(found, 0))
    assert "normkeep" in report.lower()
    cuts = [s for s in seen if s.reduction is not None]
    assert cuts and all(made.count(s.view.counts) == s.reduction.slots for s in cuts)
    for s in cuts:
        norms = s.view.tokens.norm(dim=-1)
        for row, kept in zip(norms, s.reduction.keep):
            assert kept.tolist() == sorted(row.argsort(descending=True, stable=True)[: len(kept)].tolist())


def test_a_tower_equals_the_oracle(example):
    tower, model = models.TOWERS["timm ViT"], models.shared("timm ViT")
    pictures, made = tower.pictures(1), [example.NormKeep(keep=0.4)]
    with torch.no_grad(), vlmtok.compress(model, made) as run:
        found = tower.run(model, pictures)
    vision = oracle.vision_of(model)
    with torch.no_grad():
        wanted = oracle.run_tower(vision, pictures, Player(made, run.layout))
        assert_equal(found, vision.head(vision.tokens(wanted.x[None])))


class Bare(ast.NodeTransformer):
    """Takes off what the page leaves out: annotations of functions and their docstrings."""

    def visit_FunctionDef(self, node):
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node


def class_of(code):
    (found,) = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    return ast.unparse(Bare().visit(found))


def test_the_file_is_what_the_page_prints():
    page = (ROOT / "docs" / "howto" / "own-method.md").read_text(encoding="utf-8")
    printed = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    assert class_of(printed) == class_of(FILE.read_text(encoding="utf-8"))
    assert "NormKeep().reduce(vlmtok.TokenView(x))" in page  # which tests/house/test_docs.py runs


def test_contributing_sends_to_the_page():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = contributing.partition("## Write a method")[2].partition("\n## ")[0]
    assert "(docs/howto/own-method.md)" in section and "examples/my_method.py" in section


def test_it_runs_as_a_program():
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "normkeep:keep=0.25" in done.stdout.lower()
    assert "vision" in done.stdout
