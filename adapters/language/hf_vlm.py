"""The adapter of transformers' vision-language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.sight import Sight
from ...core.signals import PER_TOKEN
from ...core.site import Layout, StageLayout
from ...errors import UnsupportedModel
from ..base import Adapter, TowerSpec, child
from ..towers.hf_rows import check_bias, vision_spec
from ..towers.packed_spec import packed_spec
from ..towers.packed_tower import PackedTower
from ..towers.pooling import wished_pooling
from ..towers.tower import Tower
from . import language_account
from .decoder import Decoder
from .families import REFUSED, ROWS
from .layout import language_layout
from .preview import preview
from .spec import VLMSpec

if TYPE_CHECKING:
    from ...core.attachment import Attachment
    from ...core.model_shape import ModelShape


class HFVLM(Adapter):
    """A vision-language model of transformers."""

    name = "transformers-vlm"

    def __init__(self, model: Any, spec: VLMSpec | None = None) -> None:
        super().__init__(model)
        kind = model.config.model_type
        if spec is None and kind in REFUSED:
            raise self.refuse(REFUSED[kind])
        spec = spec or ROWS.get(kind)
        if spec is None:
            raise self.refuse(
                f"no row for model type {kind!r} (rows: {', '.join(ROWS)}); adapter='generic-vlm' carries families "
                "that call their text model in the standard way"
            )
        # A bare inner model (LlavaModel) is its own core.
        inner = spec.core and hasattr(model, spec.core)
        self.core = child(model, spec.core) if inner else model
        self.spec = spec
        self.lm = None if spec.boundary else child(self.core, spec.lm)

    def tower(self) -> TowerSpec | None:
        """The tower as data, or None where nothing of it can be reached."""
        if getattr(self.core, self.spec.tower.split(".")[0], None) is None:
            return None
        tower = child(self.core, self.spec.tower)
        config = self.core.config
        packed = None if self.spec.patches is None else packed_spec(tower, config)
        if packed is None and self.spec.tower_cut is None:
            return None  # before the index is read: a family without a row has none
        index = -1 if self.spec.feature is None else getattr(config, self.spec.feature)
        if packed is not None:
            return self._packed(packed, index)
        if not isinstance(index, int):
            return None  # features of several layers are concatenated: they must have equal lengths
        try:
            depth = len(vision_spec(tower).blocks)
        except UnsupportedModel:
            return None
        last = _block_of(index, depth)
        spec = vision_spec(tower, max(last, 0))
        if getattr(config, "vision_feature_select_strategy", "default") == "full" and spec.num_prefix:
            return None  # CLS would take a placeholder of its own
        if last < 0:
            return None
        grid = self.spec.tower_cut == "spread"
        later = self.spec.packing_methods or self.spec.patches
        return replace(spec, returns_grid=grid, carries=PER_TOKEN if later else not grid)

    def _packed(self, spec: TowerSpec, index: Any) -> TowerSpec | None:
        """A packed tower whose hidden state `index` the projector reads."""
        assert spec.packed is not None
        form, last = spec.packed, -1
        if isinstance(index, int):
            last = _block_of(index, len(spec.blocks))
            if last < 0:
                return None
        elif not form.lacks:
            form = replace(form, lacks=f"its projector reads features of several layers: {list(index)}")
        return replace(spec, packed=form, last=last, carries=PER_TOKEN, whole=self.spec.whole or form.lacks)

    def layout(self) -> Layout:
        """Tower, features, projected tokens and decoder."""
        stages: dict[str, StageLayout] = {}
        tower = self.tower()
        if tower is not None:
            stages["vision"] = Tower.layout(tower)
            if self.spec.tower_cut == "slots":
                stages["features"] = StageLayout(1, tower.width, 0, 0, provides=frozenset({"protected"}))
        if self.lm is not None:
            stages.update(language_layout(self.lm, self.spec))
        return Layout(f"{self.name} ({self.model.config.model_type})", stages, self._without(stages))

    def _without(self, stages: dict[str, StageLayout]) -> dict[str, str]:
        """Why stages are missing."""
        why: dict[str, str] = {}
        if self.spec.boundary:
            why.update(projected=self.spec.boundary, decoder=self.spec.boundary)
        if self.spec.whole:
            why["vision"] = why["features"] = self.spec.whole
        if self.spec.tower_cut == "spread" and not self.spec.whole:
            why["features"] = "its projector " + (
                "reads the whole grid" if self.spec.patches is None else "joins squares of patches, and needs them all"
            )
        return {name: reason for name, reason in why.items() if name not in stages}

    def check(self, attachment: Attachment) -> None:
        """Refuses what the tower cannot do for methods whose sites it has.

        Raises:
            ParameterError, UnsupportedModel: what they wish of its attention or its pools.
        """
        spec = self.tower()
        if spec is not None:
            check_bias(spec, attachment)
            wished_pooling(attachment, spec)

    def install(self, attachment: Attachment) -> None:
        """Hooks on the tower, the projector and the language model."""
        spec = self.tower()
        tower = None
        self.check(attachment)
        if spec is not None and (attachment.at("vision") or attachment.tapped("vision") or attachment.at("features")):
            tower = attachment.drivers["vision"] = self._driver(attachment, spec)
        if self.lm is None:
            return
        grid = None if spec is None else spec.grid
        waited = bool((self.spec.packing_methods or self.spec.patches) and attachment.awaited("vision"))
        reader = tower if self.spec.tower_cut == "slots" or waited else None
        attachment.drivers["decoder"] = Decoder(attachment, self.spec, self.model, self.core, reader, grid)

    def _driver(self, attachment: Attachment, spec: TowerSpec) -> Tower:
        """What drives the tower."""
        if spec.packed is None:
            return Tower(attachment, spec)
        return PackedTower(attachment, spec, raster=self.spec.patches == "raster")

    def preview(self, inputs: Mapping[str, Any], between: int | None = None) -> Sight:
        """The pictures of a prompt as counts."""
        spec = self.tower()
        return preview(self.spec, self.core, None if spec is None else spec.stem, inputs, between)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return language_account.of_hf_vlm(self)


def _block_of(index: int, depth: int) -> int:
    """The block whose output is a hidden state: number 0 is the embedding, so number i is the output of block i - 1."""
    return (index if index >= 0 else depth + 1 + index) - 1
