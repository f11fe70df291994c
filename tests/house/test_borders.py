"""Who may import whom, who names whom: the walls of the house, as one table and a few words that must not be spoken.

Every import counts: those inside functions, and those for type checkers. What fails prints the line, and what to do.
That mypy looks into adapters/ is proved by `.ci/run`, which seeds a type error there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.imports import Import, circles, files, imports
from vlmtok.adapters import hosts
from vlmtok.adapters.hosts import Role

import vlmtok

WINGS: dict[str, tuple[str, ...]] = {
    "ground": (),
    "kernels": ("ground",),
    "core": ("ground", "kernels"),
    "methods": ("ground", "kernels", "core"),
    "adapters": ("ground", "core"),
    "adapters.towers": ("ground", "core", "adapters"),
    "adapters.language": ("ground", "kernels", "core", "adapters", "adapters.towers"),
    "adapters.finder": ("ground", "adapters", "adapters.language"),
    "cost": ("ground", "kernels", "core", "adapters.language", "adapters.finder"),
    "compression": ("ground", "core", "adapters", "adapters.finder", "cost"),
    "loading": ("ground", "adapters.finder"),
    "forecast": ("ground", "core", "adapters.finder", "cost", "compression", "loading"),
    "serving": ("ground", "kernels", "core", "adapters", "adapters.finder", "cost"),
    "lab.tiny": (),
    "lab": (
        *("ground", "kernels", "core", "adapters", "adapters.language", "adapters.finder"),
        *("cost", "compression", "loading", "forecast", "lab.tiny"),
    ),
    "harness": ("ground", "core", "cost", "compression", "loading", "forecast", "lab"),
    "evaluation": (
        *("ground", "core", "adapters", "adapters.finder", "cost", "compression", "loading", "forecast", "lab"),
    ),
    "cli": ("ground", "core", "adapters.finder", "cost", "forecast", "loading", "lab", "evaluation"),
    "front": (
        "ground",
        "core",
        "compression",
        "cost",
        "serving",
        "forecast",
        "loading",
        "lab",
        "evaluation",
        "cli",
        "methods",
    )
    + ("kernels", "adapters.finder"),
}
"""Each wing and those it may import, besides itself; whoever stands higher may be asked by nobody below."""

ROOMS = {
    "vlmtok": "front",
    "vlmtok.surface": "front",
    "vlmtok.moved": "front",
    "vlmtok.__main__": "front",
    "vlmtok.errors": "ground",
    "vlmtok.guard": "ground",
    "vlmtok.sheet": "ground",
    "vlmtok.tabular": "ground",
    "vlmtok.timing": "ground",
    "vlmtok.version": "ground",
    "vlmtok.pruners": "methods",
    "vlmtok.mergers": "methods",
    "vlmtok.dispatcher": "compression",
    "vlmtok.compression": "compression",
    "vlmtok.adapters": "adapters.finder",
    **{f"vlmtok.adapters.{wing}": f"adapters.{wing}" for wing in ("towers", "language")},
}
"""Modules and packages whose wing is not the second word of their name; the longest that fits counts."""

CORE_FOR_METHODS = {f"vlmtok.core.{room}" for room in (
    "aliases", "between_layers", "cache_scores", "clips", "layer_profile", "method", "reduction", "registry",
    "selection", "settings", "site", "tower_scores", "view",
)}  # fmt: skip
"""What methods see of the core: the contract, and nothing of what carries it."""

HOSTS = ("timm", "open_clip", "transformers")
HOSTS_IN = (
    *("vlmtok.adapters", "vlmtok.loading", "vlmtok.lab.tiny", "vlmtok.lab.suite_models"),
    "vlmtok.serving.stand_in",
)
"""What knows model libraries: that which hooks into them, loads from them, and builds models of them."""

PACKAGE = files()
ALL = list(imports(PACKAGE))


def wing(module: str) -> str:
    """The wing of a module."""
    if module.startswith("vlmtok.lab.tiny"):
        return "lab.tiny"
    if not module.startswith("vlmtok"):
        return "outside"
    name = module
    while name not in ROOMS and name.count(".") > 1:
        name = name.rpartition(".")[0]
    if module.startswith("vlmtok.adapters.") and name == "vlmtok.adapters":
        return "adapters"
    if module.startswith("vlmtok.adapters.") and module.count(".") == 2 and name not in ROOMS:
        return "adapters"
    return ROOMS.get(name) or module.split(".")[1]


def crossings(found: Iterable[Import]) -> Iterator[str]:
    """Imports that the table does not allow, with what is allowed."""
    for one in found:
        if not one.gives.startswith("vlmtok"):
            continue
        asks, gives = wing(one.asks), wing(one.gives)
        if asks != gives and gives not in WINGS[asks]:
            yield (
                f"{one}\n    {asks} may not import {gives}; it may import {', '.join(WINGS[asks]) or 'no wing'}. "
                "Hand what is needed in, or move what both need to a wing below both"
            )


def test_every_module_stands_in_a_wing():
    assert {wing(module) for module in PACKAGE} == set(WINGS)
    assert len(PACKAGE) > 150 and len(ALL) > 800


def test_wings_import_only_what_the_table_allows():
    wrong = list(crossings(ALL))
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_permission_that_nobody_uses():
    """A permission is a hole in a wall; those that nothing needs are closed."""
    used = {(wing(one.asks), wing(one.gives)) for one in ALL if one.gives.startswith("vlmtok")}
    idle = [(asks, gives) for asks, allowed in WINGS.items() for gives in allowed if (asks, gives) not in used]
    assert not idle, f"nobody needs {idle}; take them out of WINGS"


def test_wings_form_no_circle():
    order = list(WINGS)
    for name, allowed in WINGS.items():
        late = [other for other in allowed if order.index(other) > order.index(name)]
        assert not late, f"{name} may import {late}, which stand above it"


def test_modules_form_no_circle():
    arrows, lines = defaultdict(set), defaultdict(list)
    for one in ALL:
        if one.gives in PACKAGE and one.gives != one.asks:
            arrows[one.asks].add(one.gives)
            lines[one.asks, one.gives].append(str(one))
    said = [
        f"{' <-> '.join(group)}\n    "
        + "\n    ".join(line for a in group for b in group for line in lines.get((a, b), ()))
        + "\n    Move what both need to a module of its own, below both"
        for group in circles(arrows)
    ]
    assert not said, "\n".join(said)


def test_methods_see_the_contract_alone():
    wrong = [
        f"{one}\n    a method sees {', '.join(sorted(CORE_FOR_METHODS))}; ask for a signal, or extend `TokenView`"
        for one in ALL
        if wing(one.asks) == "methods" and wing(one.gives) == "core" and one.gives not in CORE_FOR_METHODS
    ]
    assert not wrong, "\n".join(wrong)


def test_model_libraries_stay_in_their_rooms():
    wrong = [
        f"{one}\n    only {', '.join(HOSTS_IN)} may import a model library; ask the adapter, or `vlmtok.loading`"
        for one in ALL
        if one.gives.split(".")[0] in HOSTS and not one.asks.startswith(HOSTS_IN)
    ]
    assert not wrong, "\n".join(wrong)


def test_lmms_eval_is_the_business_of_its_wing_and_nobody_asks_that():
    """It is no dependency: whoever imports it needs an environment of its own (``.ci/lmms-eval``)."""
    asking = {one.asks for one in ALL if one.gives.split(".")[0] in ("lmms_eval", "loguru", "tqdm")}
    assert {wing(module) for module in asking} == {"harness"}
    assert not [str(one) for one in ALL if wing(one.gives) == "harness" != wing(one.asks)]


# ---------------------------------------------------------------------- words
METHOD_CLASSES = {vlmtok.method_class(name).__name__ for name in vlmtok.list_methods()}
NAMES = set(vlmtok.list_methods()) - {"scope", "grid", "random"}
"""Names in the registry; those three are words of the contract and of the standard library too."""
ROLES = {role for role in vars(hosts).values() if isinstance(role, Role)}
PLAIN = {"x", "query", "input", "config", "rope", "cache"}
"""Names of hosts' arguments that are words of ours too."""


def words_of(path: Path) -> list[tuple[int, str]]:
    """Identifiers and strings of a file with their lines; docstrings are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words.append((node.lineno, node.value))
        elif isinstance(node, ast.Name):
            words.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute):
            words.append((node.lineno, node.attr))
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            words.append((node.lineno, node.name))
    return words


def in_wings(*wings: str) -> list[str]:
    return [module for module in PACKAGE if wing(module).startswith(wings)]


def place(module: str) -> str:
    return module.removeprefix("vlmtok.")


@pytest.mark.parametrize("module", in_wings("core", "compression", "adapters"), ids=place)
def test_core_and_adapters_name_no_method(module):
    """By no class, no name in the registry; error messages included. That they import none, the table holds."""
    for line, text in words_of(PACKAGE[module]):
        spoken = set(re.findall(r"\w+", text)) & (METHOD_CLASSES | NAMES)
        assert not spoken, f"{PACKAGE[module].name}:{line}: {text!r} names {spoken}; say it by a property of Method"


@pytest.mark.parametrize("module", in_wings("ground", "core", "methods", "kernels"), ids=place)
def test_core_methods_and_kernels_name_no_host(module):
    for line, text in words_of(PACKAGE[module]):
        spoken = re.search(rf"\b({'|'.join(HOSTS)})\b", text)
        allowed = module in ("vlmtok.timing", "vlmtok.guard") or re.fullmatch(r".*\s.*", text)  # records; prose
        assert not spoken or allowed, f"{PACKAGE[module].name}:{line}: {text!r}; what hosts do is adapters' business"


def named_arguments(tree: ast.AST) -> list[tuple[int, str]]:
    """Names of hosts' arguments that stand as strings; names of attributes are the business of rows."""
    names = {name for role in ROLES for name in role.names} - PLAIN
    attributes = {
        id(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr") and len(node.args) > 1
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names and id(node) not in attributes
    ]


def read_by_hand(tree: ast.AST) -> list[tuple[int, str]]:
    """Places that take an argument out of a hook's `args` or `kwargs` themselves."""
    found = []
    for node in ast.walk(tree):
        target = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            target = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            target = node.value
        if isinstance(target, ast.Name) and target.id in ("args", "kwargs"):
            found.append((node.lineno, ast.unparse(node)))
    return found


INSIDE = in_wings("ground", "core", "compression", "cost", "forecast", "adapters", "methods")


def trees(modules: Iterable[str]) -> Iterator[tuple[str, ast.AST]]:
    for module in modules:
        if module != "vlmtok.adapters.hosts":
            yield module, ast.parse(PACKAGE[module].read_text("utf-8"))


def test_no_other_file_names_an_argument_of_a_host():
    wrong = [f"{module}:{line} {what!r}" for module, tree in trees(INSIDE) for line, what in named_arguments(tree)]
    assert not wrong, f"names of hosts outside adapters/hosts.py, where a Role should stand: {', '.join(wrong)}"


def test_no_argument_is_read_with_a_default_of_ours():
    wrong = [f"{m}:{line} {what}" for m, tree in trees(in_wings("adapters")) for line, what in read_by_hand(tree)]
    assert not wrong, f"read arguments through hosts.Arguments, which knows the host's own default: {', '.join(wrong)}"


# ---------------------------------------------------------------------- what comes in when
def at_import(path: Path) -> set[str]:
    """Modules that a file imports as soon as it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = []  # in place, before the walk gets there
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {"." * n.level + (n.module or "") for n in nodes if isinstance(n, ast.ImportFrom)}


@pytest.mark.parametrize("module", [m for m in PACKAGE if m.startswith(("vlmtok.lab", "vlmtok.loading"))], ids=place)
def test_hosts_are_imported_late(module):
    assert not {name for name in at_import(PACKAGE[module]) if name.split(".")[0] in HOSTS}


def test_the_oracle_of_the_self_test_is_torch_alone():
    """Nothing of the core, of adapters or of a host."""
    found = {one.gives.split(".")[0] for one in ALL if one.asks == "vlmtok.lab.doctor.replay"}
    assert found <= {"__future__", "collections", "contextlib", "dataclasses", "inspect", "typing", "torch"}


def test_no_adapter_file_is_named_like_a_library():
    """`import timm` inside the folder must never find a file of ours."""
    stems = {module.rpartition(".")[2] for module in PACKAGE if module.startswith("vlmtok.adapters.")}
    assert not stems & {*HOSTS, "torch", "triton", *sys.stdlib_module_names}


def test_adapters_import_each_other_and_the_core_relatively():
    for module in in_wings("adapters"):
        tree = ast.parse(PACKAGE[module].read_text("utf-8"))
        plain = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        plain += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        assert not {name for name in plain if name.split(".")[0] in ("vlmtok", "adapters")}, module


# ---------------------------------------------------------------------- files that fit in a head
LARGE: dict[str, str] = {}
"""Files above 400 lines, with the reason."""


def test_files_fit_in_a_head():
    lines = {module: path.read_text("utf-8").count("\n") for module, path in PACKAGE.items()}
    assert {module for module, count in lines.items() if count > 400} == set(LARGE)
    assert sorted(lines.values())[len(lines) * 4 // 5] <= 250


# ---------------------------------------------------------------------- these tests can fail
@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "adapters").mkdir()
    (tmp_path / "core" / "a.py").write_text("def f():\n    from .b import x\n    from ..adapters.base import y\n")
    (tmp_path / "core" / "b.py").write_text("if TYPE_CHECKING:\n    from .a import f\nimport timm.models\n")
    (tmp_path / "adapters" / "base.py").write_text('z = ToMe("open_clip")\n"""timm in a docstring is fine."""\n')
    return files({"vlmtok": tmp_path})


def test_the_table_can_be_broken(wrong):
    found = list(imports(wrong))
    (said,) = crossings(found)
    assert said.startswith("core/a.py:3: from ..adapters.base import y") and "may not import adapters" in said
    arrows = defaultdict(set)
    for one in found:
        arrows[one.asks].add(one.gives)
    assert circles(arrows) == [["vlmtok.core.a", "vlmtok.core.b"]]
    assert "timm.models" in {one.gives for one in found}
    assert {text for _, text in words_of(wrong["vlmtok.adapters.base"])} == {"z", "ToMe", "open_clip"}


def test_imports_in_functions_are_late(tmp_path):
    late = tmp_path / "late.py"
    late.write_text("if True:\n    import timm.models\nclass A:\n    def b(self):\n        import open_clip\n")
    assert at_import(late) == {"timm.models"}


def test_arguments_by_name_are_seen():
    tree = ast.parse('kwargs.get("past_key_values")\nargs[0]\ngetattr(model, "attn_mask")\n')
    assert [what for _, what in named_arguments(tree)] == ["past_key_values"]
    assert len(read_by_hand(tree)) == 2
