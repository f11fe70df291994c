"""Facts of vision-language families, asked of transformers for every row of `adapters/language/families.py`."""

from __future__ import annotations

import ast

from vlmtok.adapters import hosts
from vlmtok.adapters.language import masks, shapes
from vlmtok.adapters.language.hf_vlm import HFVLM
from vlmtok.adapters.language.layout import cache_layout, language_layout
from vlmtok.adapters.language.packing import Packing
from vlmtok.adapters.language.spec import VLMSpec
from vlmtok.adapters.towers import hf_rows
from vlmtok.adapters.towers.packed_rows import PackedRow

from .auto import Chooser, config_field
from .classes import Auto, External, HostClass
from .facts import Questions
from .mask_facts import mask_facts
from .needs import ROLES, module_reads, reads, wanted
from .packed import PACKED, packed_facts, whole_fields
from .shown import results_of, returned, strings
from .text import call_facts, text_facts
from .towers import tower_facts

ALSO: dict[str, dict[str, tuple[str, ...]]] = {
    "llava_next": {"text_config": ("mistral",)},
    "paligemma": {"text_config": ("gemma2",)},
}
"""Text models of published checkpoints that are not the usual one of their family's configuration."""


def family_facts(ask: Questions, chooser: Chooser, kind: str, spec: VLMSpec) -> None:
    """Asks all facts of one family.

    Args:
        ask: takes the facts.
        chooser: of the release.
        kind: ``config.model_type``.
        spec: its row.
    """
    config, top = chooser.config(kind), chooser.model(kind, "AutoModelForImageTextToText")
    if ask.check(config is not None and top is not None, "no model for pictures and text has its type"):
        assert config is not None and top is not None
        Host(ask, chooser, kind, spec, config).all(top)


class Host:
    """One family in one release.

    Args:
        ask: takes the facts.
        chooser: of the release.
        kind: ``config.model_type``.
        spec: its row.
        config: class of its configuration.
    """

    def __init__(self, ask: Questions, chooser: Chooser, kind: str, spec: VLMSpec, config: HostClass) -> None:
        self.ask = ask
        self.chooser = chooser
        self.spec = spec
        self.config = config
        self.also = ALSO.get(kind, {})

    def all(self, top: HostClass) -> None:
        """Asks everything, beginning at the class of the whole model."""
        spec = self.spec
        cores = self.follow([top], spec.core, "inner model")
        towers = self.follow(cores, spec.tower, "vision tower")
        projectors = self.follow(cores, spec.projector, "projector")
        for projector in projectors if spec.tower_cut == "slots" or spec.packing_methods is not None else ():
            self.ask.takes(projector, "the projector", ROLES["FEATURES"])
        self.configuration()
        for core in cores if spec.packing_methods is not None else ():
            self.packing(core)
        if spec.tower_cut is not None or self.packed() is not None:
            self.tower(towers)
        if spec.boundary is not None:
            return
        asked = wanted(spec)
        for tower in towers if "tower" in asked else ():
            self.ask.takes(tower, "the tower", *asked["tower"].required)
        if "whole model" in asked:
            self.ask.takes(top, "the whole model", *asked["whole model"].required)
        for core in cores:
            self.inner(core)
        texts = self.follow(cores, spec.lm, "text model")
        for owner in self.follow(cores, spec.lm.rpartition(".")[0], "text model"):
            call_facts(self.ask, owner, texts, spec)
        for text in texts:
            text_facts(self.ask, text, spec, self.settle)
        self.text_configuration(texts)
        self.itself(top, spec.core)
        for core in cores:
            self.itself(core, spec.lm.split(".")[0])

    # ------------------------------------------------------------------ where things are
    def settle(self, kinds: list[HostClass | External | Auto]) -> list[HostClass]:
        """Classes of the library, chosen ones in their place."""
        return self.chooser.settle(kinds, self.config, self.also)

    def follow(self, owners: list[HostClass], path: str, what: str) -> list[HostClass]:
        """Classes at a path of the row.

        Args:
            owners: where it begins.
            path: dotted; empty is the owner itself.
            what: is said to be there.
        """
        for part in path.split(".") if path else ():
            found: list[HostClass] = []
            for owner in owners:
                if self.ask.check(owner.has(part), f"there is no `{part}` on the way to the {what}, `{path}`", owner):
                    made = owner.made_of(part)
                    known = self.settle(made)
                    outside = any(isinstance(kind, External) for kind in made)
                    self.ask.check(known or outside, f"what `{part}` is made of cannot be read off the source", owner)
                    found += known
            owners = list(dict.fromkeys(found))
        return owners

    # ------------------------------------------------------------------ configurations
    def configuration(self) -> None:
        """The family's configuration has what the row and our code read of it."""
        spec = self.spec
        ids = () if spec.boundary is not None else spec.ids
        wanted = [*ids, *([spec.feature] if spec.feature else [])]
        for argument in (*spec.grid_arguments, *([spec.tower_size_argument] if spec.tower_size_argument else [])):
            wanted += [read.path for read in reads(shapes._BY_ARGUMENT[argument], "config")]
        if spec.packing_methods is not None:
            wanted += [read.path for read in reads(Packing._crops, "config") + reads(Packing._canvases, "config")]
            wanted += [f"vision_config.{read.path}" for read in reads(Packing._side, "vision")]
        packed = self.packed()
        if packed is not None:
            wanted += whole_fields(packed)
        elif spec.tower_cut is not None and spec.feature is not None:
            wanted += [read.path for read in reads(HFVLM.tower, "config") if read.default]
        for path in dict.fromkeys(wanted):
            self._field(self.config, path, "its configuration")

    def text_configuration(self, texts: list[HostClass]) -> None:
        """The same for its text model, and the masks that this leads to.

        Args:
            texts: classes of the text model, in the order of its types.
        """
        spec = self.spec
        types = [*self.chooser.types(self.config, "text_config")[:1], *self.also.get("text_config", ())]
        self.ask.check(types, "the type of its text model cannot be read off the source", self.config)
        fields = [read.path for function in (language_layout, cache_layout) for read in reads(function, "config")]
        last_cut = () if spec.last_cut is None else (spec.last_cut, masks.sources)  # the one asks the other
        fields += [read.path for function in last_cut for read in reads(function, "config")]
        fields += [spec.block.when[0]] if spec.block is not None and spec.block.when is not None else []
        for i, name in enumerate(types):
            text = self.chooser.config(name)
            if self.ask.check(text is not None, f"no configuration has the text model's type {name!r}"):
                assert text is not None
                for path in dict.fromkeys(fields):
                    self._field(text, path, "the text model's configuration")
                mask_facts(self.ask, self.chooser, text, texts[i : i + 1], spec.block)

    def _field(self, config: HostClass, path: str, what: str) -> None:
        first, _, rest = path.partition(".")
        if self.ask.check(config_field(config, first), f"{what} has no `{first}`", config) and rest:
            for name in self.chooser.types(config, first)[:1]:
                inner = self.chooser.config(name)
                if inner is not None:
                    self._field(inner, rest, f"the `{first}` of {what}")

    # ------------------------------------------------------------------ the inner model and its tower
    def inner(self, core: HostClass) -> None:
        """Arguments of the inner model, and what it does with encoded pictures."""
        spec = self.spec
        asked = wanted(spec)["inner model"]
        self.ask.takes(core, "the inner model", *asked.required)
        concerned = {"ENCODED": True, "CLIP_PIXELS": len(spec.ids) > 1, "IMAGE_SIZES": spec.packing_methods is not None}
        known = [ROLES[name] for name, concerns in concerned.items() if concerns]
        self.ask.takes(core, "the inner model", *(role for role in asked.optional if role in known))
        forward, signature = core.method("forward"), core.signature()
        if forward is not None and signature is not None and set(ROLES["ENCODED"].names) & set(signature.names):
            said = strings(forward)
            for word in (hosts.IMAGE_KEY, hosts.CLIP_KEY)[: len(spec.ids)]:
                self.ask.check(word in said, f"the inner model reads no {word!r} of encoded pictures", core)
        for name in ("get_image_features", "get_input_embeddings"):
            self.ask.check(core.has(name), f"the inner model has no `{name}`", core)

    def packing(self, core: HostClass) -> None:
        """The host's own packing of crops, which signals take too."""
        assert self.spec.packing_methods is not None
        pack, pool = self.spec.packing_methods
        ours = [ROLES[role] for role in ("FEATURES", "IMAGE_SIZES", "SEPARATOR")]
        self.ask.takes(core, "the inner model", *ours, method=pack)
        packed, forward = core.signature(pack), core.signature()
        others = {name for role in ours for name in role.names} | set(() if forward is None else forward.names)
        for name in () if packed is None else packed.names:
            held = name in others or config_field(self.config, name)
            self.ask.check(held, f"`{pack}` wants `{name}`, no argument of the inner model and no field", core)
        if pool:
            pooled = core.signature(pool)
            self.ask.check(pooled is not None and pooled.required == 1, f"there is no `{pool}` of features alone", core)
        self.ask.check(core.has("image_newline"), "the inner model has no embedding of separators", core)
        for name in module_reads(Packing._crops):
            place = core.module.find(name)
            self.ask.check(place is not None and isinstance(place[1], ast.FunctionDef), f"there is no `{name}()`", core)

    def packed(self) -> PackedRow | None:
        """The row of a tower that packs or pads pictures, or None where it is another."""
        kinds = self.chooser.types(self.config, "vision_config")[:1] if self.spec.patches is not None else ()
        return next((PACKED[kind] for kind in kinds if kind in PACKED), None)

    def tower(self, towers: list[HostClass]) -> None:
        """The tower is one whose blocks can be cut, or whose signals are read."""
        kinds, packed = self.chooser.types(self.config, "vision_config")[:1], self.packed()
        self.ask.check(kinds, "the type of its tower cannot be read off the source", self.config)
        for kind in kinds:
            if packed is not None:
                packed_facts(self.ask, self.chooser, kind, packed, towers)
                continue
            row = hf_rows.ROWS.get(kind)
            if self.ask.check(row is not None, f"its tower is of type {kind!r}, whose blocks no row describes"):
                assert row is not None
                tower_facts(self.ask, self.chooser, kind, row, towers)

    # ------------------------------------------------------------------ the host itself
    def itself(self, owner: HostClass, path: str) -> None:
        """What a model reads of its inner model's output is a field of it."""
        method = owner.method("forward") if path else None
        classes = [cls for inner in self.settle(owner.made_of(path)) for cls in returned(inner)] if path else []
        if method is None or not classes:
            return
        variables = results_of(method, f"self.{path}")
        told = " or ".join(dict.fromkeys(cls.name for cls in classes))
        for node in ast.walk(method):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables:
                held = any(cls.has(node.attr) or hasattr(dict, node.attr) for cls in classes)
                self.ask.check(held, f"forward reads `{node.attr}` of a {told}, which has none", owner, own=True)
