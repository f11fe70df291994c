"""Where a method acts, and what a model offers there: `Site`, `Layout`, and the words for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import SiteError

T = TypeVar("T")

STAGES = ("vision", "features", "projected", "decoder", "cache", "text")
"""Stages in the order in which a forward passes them (``text`` is the text tower of a dual encoder). At ``cache``
entries of the key-value cache leave, behind the prefill that brought them."""

LAYERED = ("vision", "decoder", "cache", "text")
"""Stages that have layers; the others are a single moment."""

POINTS = ("start", "mid", "end")

SCOPES = ("picture", "part", "sample", "frame", "clip", "head")
"""What one view row is: a picture or clip with its separators; a crop or frame; all of a prompt; a frame of a clip, or
a whole picture; a picture or clip without its separators, in whose order frames lie one behind the other; one key-value
head of a picture (at ``cache`` alone)."""

BUDGET_SCOPES = ("picture", "frame", "part", "sample")
"""Scopes that a `keep` can be meant for, where a method lets the user say."""

POSITIONS = ("keep", "renumber")

SEPARATORS = ("keep", "drop")

SKIPS = ("ffn", "attn", "block")
"""What a decoder layer can leave out for visual tokens; a block is both branches."""


@dataclass(frozen=True)
class Site:
    """A place where a method acts or observes.

    Attributes:
        stage: ``vision``, ``features``, ``projected``, ``decoder``, ``cache`` or ``text``.
        layer: 0-based block; None for ``features`` and ``projected``.
        point: ``start``, ``mid`` (between attention and MLP, towers only) or ``end`` of the block.
        needs: signals, by name (``"keys"``) or with a place (``"cls_attention@vision:-1"``).
        positions: ``keep`` or ``renumber``, what happens to the position ids of what stays; None means the stage's
            default: renumber at ``features`` and ``projected``, keep in the decoder.
        scope: what one view row is; None means the method's.
        separators: what becomes of the tokens that a host puts between rows of patches (newlines) when their picture is
            cut here: ``keep`` or, at ``projected`` alone, ``drop``.
        every: at ``cache``, decode steps after which the method is asked again; 0 asks it behind the prefill alone.
        window: at ``cache``, last rows of the prompt (and of what is written) that ``recent_mass`` sums over.
        forget: in the decoder, whether entries of tokens that leave here leave the caches of the layers before, too.
    """

    stage: str
    layer: int | None = None
    point: str = "end"
    needs: tuple[str, ...] = ()
    positions: str | None = None
    scope: str | None = None
    separators: str = "keep"
    every: int = 0
    window: int = 0
    forget: bool = False

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise SiteError(f"stage {self.stage!r} does not exist; stages: {', '.join(STAGES)}")
        if self.point not in POINTS:
            raise SiteError(f"point {self.point!r} does not exist; points: {', '.join(POINTS)}")
        if (self.layer is not None) != (self.stage in LAYERED):
            raise SiteError(f"stage {self.stage!r} {'needs a' if self.stage in LAYERED else 'has no'} layer")
        if self.positions not in (None, *POSITIONS):
            raise SiteError(f"positions {self.positions!r}: one of {', '.join(POSITIONS)}")
        if self.scope not in (None, *SCOPES):
            raise SiteError(f"scope {self.scope!r}: one of {', '.join(SCOPES)}")
        if self.separators not in SEPARATORS:
            raise SiteError(f"separators {self.separators!r}: one of {', '.join(SEPARATORS)}")
        if self.separators == "drop" and self.stage != "projected":
            raise SiteError(f"separators='drop' is for the stage 'projected'; at {self} there are none")
        if self.forget and self.stage != "decoder":
            raise SiteError(f"forget is for the stage 'decoder'; at {self} no layer before holds entries")
        cached = {"every": self.every, "window": self.window, "scope='head'": self.scope == "head"}
        for name, value in cached.items():
            if value and (self.stage != "cache" or value < 0):
                raise SiteError(f"{name} at {self}: it is a number from 0 on, and for the stage 'cache' alone")
        if self.stage == "cache" and (self.point != "end" or self.positions is not None):
            raise SiteError(f"{self}: entries leave a cache at the end, and keep their positions")

    def __str__(self) -> str:
        return self.stage if self.layer is None else f"{self.stage} layer {self.layer} {self.point}"


def runs_of_layers(items: Iterable[T], site: Callable[[T], Site], same: Callable[[T], object]) -> list[list[T]]:
    """Groups items at neighbouring layers that are alike.

    Args:
        items: in order.
        site: of an item.
        same: what alike items share, beside stage and point.

    Returns:
        Runs; an item without a layer is one by itself.
    """
    runs: list[list[T]] = []
    for item in items:
        last = runs[-1][-1] if runs else None
        if last is not None and _follows(site(last), site(item)) and same(last) == same(item):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs


def _follows(one: Site, other: Site) -> bool:
    alike = (one.stage, one.point) == (other.stage, other.point)
    return alike and one.layer is not None and other.layer == one.layer + 1


def named(run: Sequence[Site]) -> str:
    """Sites of a run of layers in words."""
    first, last = run[0], run[-1]
    return str(first) if len(run) == 1 else f"{first.stage} layers {first.layer} - {last.layer} {first.point}"


def layer_of(layer: int | None, point: str) -> int:
    """The first layer that runs with what a decoder site leaves."""
    return (layer or 0) + (point == "end")


@dataclass(frozen=True)
class Counts:
    """A view as host ints: what `Method.count` decides on.

    Attributes:
        site: where the method acts.
        n: tokens of a view row that arrive.
        entered: tokens of the row when it entered the stage.
        num_prefix: protected tokens in front.
        depth: layers of the stage.
        grid: rows and columns of the patches, or None where there is no single grid.
        frames: frames of the clip that a view row is, as the language model gets them; 0 where it is none.
        cells: tokens of each frame while all are whole and alike; else 0.
    """

    site: Site
    n: int
    entered: int
    num_prefix: int = 0
    depth: int = 1
    grid: tuple[int, int] | None = None
    frames: int = 0
    cells: int = 0

    @property
    def layer(self) -> int:
        """The site's layer; 0 where the stage has none."""
        return self.site.layer or 0


@dataclass(frozen=True)
class StageLayout:
    """What one stage of a model offers.

    Attributes:
        depth: layers (1 for a stage without layers).
        width: channels of a token.
        heads: attention heads (0 for a stage without layers).
        last: the last layer whose output is used; later sites are skipped.
        points: points at which a method may act.
        provides: signals that can be derived at this stage.
        num_prefix: protected tokens in front of a row.
        blind: layers that have no attention rows, and what they have instead.
        last_cut: the last layer at whose start tokens may leave; None means any.
        carries: whether signals of this stage reach later ones, or which do.
        renumbers: whether position ids can become contiguous; not where they are places in a picture (M-RoPE).
        lacks: by signal, layers that do not give it though others do or could, and why.
        why: why signals are missing that others of its kind give; empty where none are.
        whole: why no token can leave here, though signals can be read; empty where some can.
        windowed: layers in which a token sees those of its window alone.
        untried: what no release does to tokens that leave here, as a clause about them; empty where some does.
    """

    depth: int
    width: int
    heads: int
    last: int
    points: frozenset[str] = frozenset({"end"})
    provides: frozenset[str] = frozenset()
    num_prefix: int = 0
    blind: Mapping[int, str] = field(default_factory=dict)
    last_cut: int | None = None
    carries: bool | frozenset[str] = True
    renumbers: bool = True
    lacks: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    why: str = ""
    whole: str = ""
    windowed: frozenset[int] = frozenset()
    untried: str = ""

    def room(self) -> int:
        """Layers from the first on at whose start tokens may leave, the first included."""
        return self.depth if self.last_cut is None else self.last_cut + 1

    def seeing(self, layer: int, point: str) -> int | None:
        """The first layer from one on that has attention rows, and at whose `point` tokens can leave; None for none."""
        layers = range(layer, self.last + 1)
        return next((i for i in layers if i not in self.blind and layer_of(i, point) < self.room()), None)


@dataclass(frozen=True)
class Layout:
    """What a model offers to methods: its stages and their signals.

    Attributes:
        family: name of the adapter that carries the model.
        stages: stage name to `StageLayout`.
        without: why stages are missing that others of its kind have.
    """

    family: str
    stages: Mapping[str, StageLayout] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)

    def has(self, stage: str) -> bool:
        """Whether tokens can leave at this stage of the model."""
        return stage in self.stages and not self.stages[stage].whole

    def stage(self, name: str, by: str = "this method") -> StageLayout:
        """The stage of that name, for a method that acts there.

        Raises:
            SiteError: the model has none, or no token can leave there.
        """
        whole = self.stages[name].whole if name in self.stages else self.without.get(name, "")
        if name not in self.stages or whole:
            why = f" ({whole})" if whole else ""
            open_to_cuts = (other for other, stage in self.stages.items() if not stage.whole)
            raise SiteError(
                f"{by} acts at stage {name!r}, which {self.family} does not offer{why}; it offers: "
                f"{', '.join(open_to_cuts)}"
            )
        return self.stages[name]

    def gives(self, stage: str, signal: str, later: bool = False) -> bool:
        """Whether `signal` can be derived at `stage`, and, if asked, reach a later stage."""
        if stage not in self.stages:
            return False
        reach = self.stages[stage].carries
        if later and not (signal in reach if isinstance(reach, frozenset) else reach):
            return False
        return signal in self.stages[stage].provides

    def feature_stage(self, by: str, signals: Iterable[str]) -> str:
        """Where a method that papers place before the projector acts.

        Args:
            by: the method, for the error.
            signals: of the tower, that it decides on.

        Returns:
            ``features`` where the model offers it, else ``projected`` where the signals reach it.

        Raises:
            SiteError: neither, or the tower's attention cannot be read.
        """
        tower = self.stages.get("vision")
        later = self.has("projected") and all(self.gives("vision", name, later=True) for name in signals)
        if later and not self.has("features"):
            return "projected"
        if tower is not None and tower.why and not self.has("features"):
            raise SiteError(f"{by} decides on the tower's attention, which {self.family} does not give: {tower.why}")
        self.stage("features", by)
        return "features"

    def said_of_stage(self, by: str, stage: str) -> list[str]:
        """What a report says of a method's place from `feature_stage`: nothing where it is the papers' own."""
        if stage != "projected":
            return []
        why = self.without.get("features") or "nothing can leave before its projector"
        said = [
            f"{by} acts at 'projected', on what the projector made of crops, pictures or frames: {self.family} offers "
            f"no 'features' ({why})"
        ]
        tower = self.stages["vision"]
        if tower.last in tower.windowed:
            said.append(
                f"{by} scores patches by attention within windows: block {tower.last} of the tower, the last one of "
                f"{self.family}, sees no further"
            )
        return said

    def positions(self, stage: str, asked: str | None, released: str = "renumber") -> str:
        """What becomes of position ids at a stage, for a method that leaves it to the model unless asked.

        Args:
            stage: a stage of the model.
            asked: ``keep``, ``renumber``, or None for what was released, where the model can.
            released: ``keep`` or ``renumber``.

        Returns:
            ``keep`` or ``renumber``.
        """
        if asked is not None:
            return asked
        return released if self.stages[stage].renumbers else "keep"

    def positions_at(self, site: Site) -> str:
        """What becomes of the language model's position ids where tokens leave at a site.

        Args:
            site: on a stage of the model.

        Returns:
            ``keep`` or ``renumber``. Patches that leave inside a tower take their placeholders along where the model
            offers ``features``; elsewhere rows get their length back, or there is no language model.
        """
        if site.stage in ("vision", "features"):
            return "renumber" if "features" in self.stages else "keep"
        if site.stage == "cache":
            return "keep"
        if site.positions is not None:
            return site.positions
        return "renumber" if site.stage == "projected" and self.stages["projected"].renumbers else "keep"

    def cached_layers(self, layers: Any = None, by: str = "this method") -> list[int]:
        """Layers of the language model whose caches can lose entries.

        Args:
            layers: None for all of them, an int, or several; negatives count from the end.
            by: who asks, for the error.

        Returns:
            Ascending 0-based layers. Layers that were not asked for by number, and keep no keys of their own for all
            that came, are left out.

        Raises:
            SiteError: a layer does not exist, or keeps no such keys; or none does.
        """
        blind = self.stage("cache", by).blind
        found = self.layers("cache", layers, by)
        if layers is None:
            found = [layer for layer in found if layer not in blind]
        for layer in found:
            if layer in blind:
                raise SiteError(f"{by}: layer {layer} of {self.family} has no entries that can leave: {blind[layer]}")
        return found

    def layers(self, stage: str, layers: Any = None, by: str = "this method") -> list[int]:
        """Resolves a `layers` parameter: None for all that matter, an int, or several; negatives count from the end.

        Args:
            stage: a stage with layers.
            layers: None, int, or a sequence of ints.
            by: who asks, for the error.

        Returns:
            Ascending 0-based layers up to ``last`` (later ones are skipped: nobody reads their output).

        Raises:
            SiteError: a layer does not exist.
        """
        layout = self.stage(stage, by)
        if layers is None:
            return list(range(layout.last + 1))
        asked = [layers] if isinstance(layers, int) else list(layers)
        found = []
        for layer in asked:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -layout.depth <= layer < layout.depth:
                raise SiteError(
                    f"{by}: layer {layer!r} does not exist; {stage} of {self.family} has layers 0 to "
                    f"{layout.depth - 1} (negative ones count from the end)"
                )
            found.append(layer % layout.depth)
        return sorted({layer for layer in found if layer <= layout.last})
