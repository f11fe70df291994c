"""What the auto classes of transformers choose: configurations and models by model type, read off their tables."""

from __future__ import annotations

import ast
import re
from functools import cached_property

from .classes import Auto, External, HostClass, dotted, host_class
from .sources import Library

TABLES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
"""Tables of class names by model type, by the class that chooses from them."""


class Chooser:
    """Finds classes of transformers by model type.

    Args:
        library: transformers.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._tables: dict[str, dict[str, str]] = {}

    @cached_property
    def configs(self) -> dict[str, tuple[str, str]]:
        """Module and name of the configuration of every model type."""
        found: dict[str, tuple[str, str]] = {}
        pattern = r"^class (\w+)|^    model_type(?::[^=\n]+)? = \"([^\"]+)\""
        name = ""
        for module, match in self.library.mentioning(pattern, r"transformers/models/.+/configuration_\w+\.py"):
            name = match[1] or name
            if match[2]:
                found.setdefault(match[2], (module, name))
        return found

    def config(self, kind: str) -> HostClass | None:
        """The configuration class of a model type, or None."""
        return self.find(*self.configs[kind]) if kind in self.configs else None

    def find(self, module: str, name: str) -> HostClass | None:
        """A class by module and name."""
        inside = self.library.module(module)
        place = None if inside is None else inside.find(name)
        return host_class(place[0], place[1]) if place is not None and isinstance(place[1], ast.ClassDef) else None

    def model(self, kind: str, chooser: str = "AutoModel") -> HostClass | None:
        """The model class of a type, or None."""
        name = self._table(TABLES[chooser]).get(kind)
        if name is None:
            return None
        # Some types have a configuration of their own and share the model of another.
        kinds = (kind, *(other for other, shared in self._table(TABLES[chooser]).items() if shared == name))
        found = (self.beside(other, name) for other in kinds)
        return next((cls for cls in found if cls is not None), None)

    def beside(self, kind: str, name: str) -> HostClass | None:
        """A class of the models that lie in the folder of a model type's configuration, or None."""
        folder = self.configs[kind][0].rpartition(".")[0].replace(".", "/") if kind in self.configs else ""
        paths = (path for path in sorted(self.library.paths) if re.fullmatch(rf"{folder}/modeling_\w+\.py", path))
        found = (self.find(path.removesuffix(".py").replace("/", "."), name) for path in paths)
        return next((cls for cls in found if cls is not None), None)

    def _table(self, name: str) -> dict[str, str]:
        """A table of names by model type; of several names the first."""
        if name in self._tables:
            return self._tables[name]
        module = self.library.module("transformers.models.auto.modeling_auto")
        place = None if module is None else module.find(name)
        found = self._tables[name] = {}
        for node in ast.walk(place[1]) if place is not None else ():
            if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
                value = node.elts[1].elts[0] if isinstance(node.elts[1], ast.Tuple) else node.elts[1]
                if isinstance(value, ast.Constant):
                    found[str(node.elts[0].value)] = str(value.value)
        return found

    def types(self, config: HostClass, field: str) -> list[str]:
        """Model types that a field of a configuration has by itself, the usual one first.

        Args:
            config: class of the outer configuration.
            field: ``text_config`` or ``vision_config``.
        """
        said: list[ast.expr] = []
        for name in ("sub_configs_defaults", "sub_configs"):
            table = config.literal(name)
            if isinstance(table, ast.Dict):
                said += [
                    v for k, v in zip(table.keys, table.values) if isinstance(k, ast.Constant) and k.value == field
                ]
        for cls in config.lineage:
            said += [value for value, _ in cls.own.get(field, ()) if value is not None]
            said += _filled(cls, field)
        found = [kind for value in said for kind in self._types(config, value)]
        return list(dict.fromkeys(found))

    def _types(self, config: HostClass, value: ast.expr) -> list[str]:
        """Model types that an expression names, by themselves or by their configuration class."""
        found = []
        for node in ast.walk(value):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in self.configs:
                found.append(node.value)
            elif isinstance(node, ast.Name):
                place = config.module.find(node.id)
                if place is not None and isinstance(place[1], ast.ClassDef):
                    own = host_class(place[0], place[1]).literal("model_type")
                    if isinstance(own, ast.Constant) and own.value:
                        found.append(str(own.value))
        return found

    def settle(
        self, kinds: list[HostClass | External | Auto], config: HostClass | None, also: dict[str, tuple[str, ...]]
    ) -> list[HostClass]:
        """Classes with those that a configuration chooses put in their place.

        Args:
            kinds: of an attribute.
            config: of the model that has the attribute.
            also: more model types by field, beside the usual one.
        """
        found: list[HostClass] = []
        for kind in kinds:
            if isinstance(kind, HostClass):
                found.append(kind)
            elif isinstance(kind, Auto) and config is not None:
                types = [*self.types(config, kind.field)[:1], *also.get(kind.field, ())]
                models = [self.model(name, kind.chooser) for name in types if kind.chooser in TABLES]
                found += [model for model in models if model is not None]
        return list(dict.fromkeys(found))


def _filled(config: HostClass, field: str) -> list[ast.expr]:
    """What a configuration writes into a dict that it was given as a field, as its model type."""
    return [
        node.value
        for node in ast.walk(config.node)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Subscript) and dotted(target.value) == f"self.{field}"
        if isinstance(target.slice, ast.Constant) and target.slice.value == "model_type"
    ]


def config_field(config: HostClass, name: str) -> bool:
    """Whether a configuration has a field, by itself or under another name of it."""
    table = config.literal("attribute_map")
    renamed = [key.value for key in table.keys if isinstance(key, ast.Constant)] if isinstance(table, ast.Dict) else []
    return config.has(name) or name in renamed
