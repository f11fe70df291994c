"""What a pass will do, from `Method.count` alone: the same books as the ledger's, without running a model.

Sites are walked in the order of the forward, as adapters visit them. Where a count depends on content, a plan takes
what a run recorded, or one of two bounds: nothing dropped, or everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.attachment import Attachment, Entry
from ..core.ledger import Event, Group, Skip, StageRun
from ..core.model_shape import LanguageShape, ModelShape, PackedTowerShape, TowerShape
from ..core.sequence import TowerRow
from ..core.sight import Grid
from ..core.site import Counts, layer_of
from ..core.skipping import MIXER
from ..errors import NotCounted
from .flops import feature_tokens, tower_profiles
from .packed import planned
from .packed_stretches import Stretches, booked
from .past import Past, arrived, left_of
from .planned_cache import PlannedCache
from .planned_rows import PlannedGroup, PlannedRows, Prompt
from .rehearsal import Rehearsal

Clip = tuple[int, int]
"""Frames of a view row that is a clip, and tokens of each; zeros where it is none."""

NO_CLIP = (0, 0)

Ask = Callable[[Entry, int, int, Grid | None, Clip], "int | None"]
"""Slots that a method leaves of a view row: of its entry, tokens, tokens as it entered the stage, grid and frames."""


def plan(attachment: Attachment, shape: ModelShape, prompt: Prompt, past: Past | None = None) -> list[StageRun]:
    """The passes of one call, as the ledger would book them.

    Args:
        attachment: methods at their sites; no hook is needed.
        shape: the model.
        prompt: what goes in.
        past: what is known of counts that depend on content.

    Returns:
        One run for each stage, in the order of the forward.
    """
    return Planner(attachment, shape, prompt, past or Past()).runs()


def left_in_front(attachment: Attachment, shape: ModelShape, prompt: Prompt, ask: Ask) -> list[int]:
    """What a language model is given of each picture, where nothing leaves between its layers.

    Args:
        attachment: methods at their sites, none of them in the decoder.
        shape: the model; its language model need not be counted.
        prompt: what goes in.
        ask: says what methods leave, or refuses.

    Returns:
        The tokens left of each picture of the prompt.
    """
    if shape.language is None:  # what it costs is not known; what it is given is
        shape = replace(shape, language=LanguageShape(blocks=()))
    planner = Planner(attachment, shape, prompt, Past(), ask)
    planner.runs()
    return planner.left


class Planner:
    """Walks the sites of one call; see `plan`.

    Attributes:
        left: tokens of each picture behind the last site.
    """

    def __init__(
        self, attachment: Attachment, shape: ModelShape, prompt: Prompt, past: Past, ask: Ask | None = None
    ) -> None:
        self.attachment = attachment
        self._counts = ask or self._told
        self.shape = shape
        self.prompt = prompt
        self.past = past
        self.left: list[int] = []

    def runs(self) -> list[StageRun]:
        """One run for each stage, in the order of the forward."""
        prompt, shape, runs = self.prompt, self.shape, []
        if shape.vision is not None:
            seen = StageRun("vision", prompt.batch * prompt.rows, shape.vision.protected + prompt.patches)
            runs.append(self.vision(seen))
        elif shape.packed is not None:
            runs.append(self.packed(planned(shape.packed, shape.projector, prompt), shape.packed))
        if shape.text is not None and prompt.words:
            runs.append(self.text(StageRun("text", prompt.batch, prompt.words)))
        if shape.language is not None:
            runs.append(self.language(runs[0] if shape.vision is not None else None))
        return runs

    # ------------------------------------------------------------------ towers
    def vision(self, run: StageRun) -> StageRun:
        """A pass through the vision tower, the visits at ``features`` and the projector."""
        tower = self.shape.vision
        assert tower is not None
        self.tower(run, tower)
        if self.shape.language is None:
            return run
        n = tower_profiles(run, tower.depth, tower.protected)[1].left - tower.protected
        entered = run.entered - tower.protected
        grid = _grid(tower, entered)
        for entry in self.attachment.at("features"):
            slots, kind = self._slots(run, entry, n, entered, grid)
            group = Group(run.rows, n, slots, entered)
            ragged = self._counts(entry, n, entered, grid, NO_CLIP) is None
            run.events.append(Event("features", None, "end", entry.index, kind, n, slots, (group,), ragged))
            n = slots
        for part in self.shape.projector:
            run.parts[part.name] = run.rows * n // part.joins
        return run

    def text(self, run: StageRun) -> StageRun:
        """A pass through a text tower."""
        tower = self.shape.text
        assert tower is not None
        self.tower(run, tower)
        return run

    def tower(self, run: StageRun, tower: TowerShape) -> None:
        """Books the parts of a tower and the visits of its sites."""
        run.parts.update({part.name: run.rows for part in tower.parts})
        again = Rehearsal(self.attachment, self.shape, run, lambda: 0)
        row = TowerRow(tower.protected, run.entered - tower.protected)
        entered, cut, grid = row.n, False, _grid(tower, row.n)
        for layer in range(tower.depth):
            for point in ("start", "mid", "end"):
                for entry in self.attachment.at(run.stage, layer, point):
                    if entry.inserts:
                        row = self._insert(run, tower, again, entry, row)
                    slots, kind = self._slots(run, entry, row.n, entered, grid)
                    group = Group(run.rows, row.n, slots, entered, 0, row.length)
                    left = TowerRow(row.prefix, slots, row.inserted)
                    event = Event(run.stage, layer, point, entry.index, kind, row.length, left.length, (group,))
                    run.events.append(event)
                    row, cut = left, cut or kind == "cut"
            again.settle()
            row = TowerRow(row.prefix, row.n)
            if tower.spread and cut and layer == self.attachment.layout.stages[run.stage].last:
                event = Event(run.stage, layer, "end", -1, "spread", row.length, run.entered)
                run.events.append(event)
                row, cut = TowerRow(row.prefix, entered), False

    def packed(self, run: StageRun, tower: PackedTowerShape) -> StageRun:
        """A pass through a tower that takes pictures of any size: each method is asked for every length of a stretch.

        Raises:
            NotCounted: methods act inside, and how its rows get shorter is not known.
        """
        inside = self.attachment.at("vision")
        if not inside:
            return run
        if not run.grids or not tower.shared:
            why = (
                "without rows and columns of its pictures; give image_size" if tower.shared else "where they are padded"
            )
            raise NotCounted(
                f"{inside[0].method.spec_name()} acts inside the vision tower, and how short its rows get is not known "
                f"{why}"
            )
        row, cut = Stretches(tower, run.grids), False
        for layer in range(len(tower.blocks)):
            for entry in (e for point in ("mid", "end") for e in self.attachment.at("vision", layer, point)):
                views, before = row.views(), row.total
                left = [self._slots(run, entry, n, entered)[0] for _, n, entered in views]
                groups = booked(views, left, before)
                row.cut(groups)
                cut = cut or row.total < before
                kind = "cut" if any(group.slots != group.n for group in groups) else "observe"
                run.events.append(
                    Event("vision", layer, entry.site.point, entry.index, kind, before, row.total, groups)
                )
            if cut and layer == self.attachment.layout.stages["vision"].last:
                run.events.append(Event("vision", layer, "end", -1, "spread", row.total, run.entered))
        return run

    def _insert(self, run: StageRun, tower: TowerShape, again: Rehearsal, entry: Entry, row: TowerRow) -> TowerRow:
        count = again.inserted(tower, entry, row)
        if not count:
            return row
        event = Event(run.stage, entry.site.layer, "start", entry.index, "insert", row.length, row.length + count)
        run.events.append(event)
        return TowerRow(row.prefix, row.n, row.inserted + count)

    # ------------------------------------------------------------------ language models
    def language(self, seen: StageRun | None) -> StageRun:
        """A prefill.

        Args:
            seen: the pass of the vision tower in front of it.
        """
        from ..adapters.language.decoder import BY_LENGTH, BY_TEXT

        prompt, shape = self.prompt, self.shape
        assert shape.language is not None
        rows = PlannedRows(prompt, None if shape.vision is None else shape.vision.grid)
        visual = prompt.batch * sum(picture.tokens for picture in prompt.shown)
        run = StageRun("decoder", prompt.batch, rows.length, 0, prompt.batch * prompt.pictures, True, visual)
        if shape.language.head is not None:
            run.parts[shape.language.head.name] = prompt.batch * (rows.length if prompt.every else 1)
        if shape.language.late is not None and not prompt.every:
            run.parts[shape.language.late.name] = prompt.batch
        if seen is not None and shape.vision is not None and "features" in self.attachment.layout.stages:
            self._hand_over(run, rows, seen, shape.vision)
        rows.enter()
        inside = self.attachment.at("decoder")
        cache = PlannedCache(self.attachment, shape.language.depth)
        layers = sorted(self.attachment.skips, reverse=True)  # those to come, the next one last
        for entry in (*self.attachment.at("projected"), *inside):
            if inside and entry is inside[0]:
                rows.enter(hold=True)
                cache.enter(rows)
            while layers and entry in inside and layers[-1] < layer_of(entry.site.layer, entry.site.point):
                self._skip(run, rows, layers.pop())
            names, whole, site = {need.name for need in entry.needs}, rows.copy(), entry.site
            shown = rows.groups(entry.scope, bool(names & BY_TEXT), bool(names & BY_LENGTH))
            groups = self._visit(run, entry, rows, shown, rows.length)
            if entry in inside:
                cache.follow(whole, rows, layer_of(site.layer, site.point), entry)
            if run.events[-1].kind == "cut" and site.separators == "drop":
                self._drop_separators(run, rows, [group for group, slots in groups if slots != group.n])
        if not inside:
            if layers:
                rows.enter(hold=True)
            cache.enter(rows)
        while layers:
            self._skip(run, rows, layers.pop())
        self.left = [picture.n for picture in rows.pictures]
        if cache.acts:
            run.masses += cache.masses(prompt.batch)
            dealt = cache.dealt()
            for layer, entry in cache.entries.items():
                held = cache.rows[layer]
                shown = held.groups(entry.scope)
                self._visit(run, entry, held, shown, cache.lengths[layer], dealt.get(layer))
            run.events += cache.forgotten(prompt.batch)
        return run

    def _visit(
        self,
        run: StageRun,
        entry: Entry,
        rows: PlannedRows,
        shown: list[PlannedGroup],
        before: int,
        dealt: Sequence[int | None] | None = None,
    ) -> list[tuple[PlannedGroup, int]]:
        """Asks a method for each of its view rows, cuts what it cuts, and books it.

        Args:
            run: the call.
            entry: the method at its site.
            rows: the rows there; what a layer's cache holds of them, at ``cache``.
            shown: their view rows.
            before: tokens of a row before.
            dealt: slots of each view row, where its method only knows what all layers keep together.

        Returns:
            The view rows, each with what was left of it.
        """
        groups, cut, ragged = [], False, False
        for group, known in zip(shown, dealt or [None] * len(shown)):
            of = (group.n, group.entered, group.grid, (group.frames, group.cells))
            slots, kind = self._slots(run, entry, *of, dealt=known)
            ragged = ragged or self._counts(entry, *of) is None
            groups.append((group, slots))
            cut = cut or kind == "cut"
        rows.cut(groups)
        booked = tuple(replace(group.counted(run.rows), slots=slots) for group, slots in groups)
        site, kind = entry.site, "cut" if cut else "observe"
        event = Event(site.stage, site.layer, site.point, entry.index, kind, before, rows.length, booked, ragged)
        run.events.append(self._known(event))
        return groups

    def _skip(self, run: StageRun, rows: PlannedRows, layer: int) -> None:
        """A layer that leaves work out for the visual tokens that are there."""
        tokens = run.rows * sum(picture.n for picture in rows.pictures)
        for module in self.attachment.skips[layer]:
            if tokens and module != MIXER:
                run.skips.append(Skip(layer, module, tokens))

    def _hand_over(self, run: StageRun, rows: PlannedRows, seen: StageRun, tower: TowerShape) -> None:
        """Placeholders that the tower's cuts emptied leave."""
        after = tower_profiles(seen, tower.depth, tower.protected)[1]
        entered, slots = feature_tokens(seen, after, tower.protected)
        recorded = self.past.events.get("decoder", {}).get(("features", None, "end", -1))
        before, ragged = rows.length, recorded is not None and recorded.ragged
        if recorded is not None and ragged:
            gone = recorded.before - recorded.after
            groups = [(group, group.n - gone) for group in rows.groups("sample")]
        elif slots != entered:
            crops = 1 if self.prompt.seen else self.prompt.crops
            groups = [(group, slots * crops) for group in rows.groups("picture")]
        else:
            return
        rows.cut(groups)
        booked = tuple(replace(group.counted(run.rows), slots=left) for group, left in groups)
        event = Event("features", None, "end", -1, "cut", before, rows.length, booked, ragged)
        run.events.append(self._known(event))

    def _drop_separators(self, run: StageRun, rows: PlannedRows, groups: list[PlannedGroup]) -> None:
        """What stands between rows of patches leaves with a picture that was cut."""
        before = rows.length
        booked = rows.drop_separators(groups, run.rows)
        if booked:
            run.events.append(Event("projected", None, "end", -1, "cut", before, rows.length, booked))

    def _known(self, event: Event) -> Event:
        """With the tokens that left, where a run of equally many tokens has told."""
        key = (event.stage, event.layer, event.point, event.method)
        recorded = self.past.events.get("decoder", {}).get(key)
        if recorded is None or not event.ragged or arrived(recorded) != arrived(event):
            return event
        return replace(event, gone=recorded.gone)

    # ------------------------------------------------------------------ counts
    def _told(self, entry: Entry, n: int, entered: int, grid: Grid | None, clip: Clip) -> int | None:
        stage = self.attachment.layout.stages[entry.site.stage]
        return entry.method.count(Counts(entry.asked, n, entered, stage.num_prefix, stage.depth, grid, *clip))

    def _slots(
        self,
        run: StageRun,
        entry: Entry,
        n: int,
        entered: int,
        grid: Grid | None = None,
        clip: Clip = NO_CLIP,
        dealt: int | None = None,
    ) -> tuple[int, str]:
        """Slots of a view row, and the kind of the visit; `dealt` is its part of what all layers keep together."""
        site = entry.site
        fixed = self.past.fixed.get(str(site))
        count = fixed if fixed is not None else self._counts(entry, n, entered, grid, clip)
        if count is None:
            recorded = self.past.events.get(run.stage, {}).get((site.stage, site.layer, site.point, entry.index))
            stretches = site.stage == "vision" and self.shape.packed is not None
            apart = site.stage == "cache" and recorded is not None and not recorded.ragged
            known = left_of(recorded, n, entered, stretches or apart)
            if known is not None and recorded is not None:
                return known, recorded.kind
            if dealt is not None:
                self.past.evenly.add(type(entry.method).__name__)
                return dealt, "observe" if dealt == n else "cut"
            self.past.met.append((type(entry.method).__name__, site))
            # A language model can go on without pictures.
            least = 0 if site.stage in ("decoder", "cache") else min(n, 1)
            count = n if self.past.nothing else least
        return count, "observe" if count == n else "cut"


def _grid(tower: TowerShape, n: int) -> Grid | None:
    """Rows and columns of the n patches that enter a tower, where they are as many as its configuration says."""
    return tower.grid if tower.grid is not None and tower.grid[0] * tower.grid[1] == n else None
