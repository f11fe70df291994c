"""`plan()`: a spec on a model that an engine serves, checked as a whole before any picture is seen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from ..core.attachment import Attachment, Entry
from ..core.method import Method
from ..core.placing import sample_count
from ..core.reduction import Reduction
from ..core.sequence import padded
from ..core.signals import TOWER_SIGNALS, Need
from ..core.site import Counts, Layout, Site
from ..core.spec import as_methods, counted_form
from ..core.view import Signal, TokenView
from ..errors import ParameterError, SiteError, VlmtokError
from ..guard import guarded
from .dry_run import Dry
from .layout import BEFORE, ENGINE, served_layout

SAMPLE = (24, 24)
"""A grid of patches; whether a count depends on content beside their rows and columns shows with any."""


@guarded
def plan(spec: str | Method | Sequence[Method | str], layout: Layout, *, engine: str = ENGINE) -> ServingPlan:
    """Says what a spec does to the pictures of a model that an engine serves.

    An engine lays out a prompt, keys its caches and sizes its batches before any pixel is encoded. So the number of
    tokens that a picture leaves must follow from host ints, pictures must not depend on each other, and tokens must
    leave before the language model. What does not fit is refused here, not in the engine.

    Args:
        spec: as for `vlmtok.compress`.
        layout: what the model offers, as its adapter says or by hand (see `vlmtok.Layout`).
        engine: what runs it, for messages.

    Returns:
        The plan.

    Raises:
        SiteError: a method acts where an engine cannot, on several pictures together, or nowhere.
        ParameterError: a number of tokens depends on content, or kept positions cannot be kept.
        MissingSignal: a method needs what the model cannot give.
        UnknownMethod, SpecError: of spec strings.
    """
    methods = as_methods(spec)
    served = served_layout(layout, engine)
    try:
        return ServingPlan(methods, served)
    except VlmtokError as problem:
        cure = _cure(methods, served)
        if cure is None:
            raise
        raise type(problem)(f"{problem}; {cure} is served") from None


class ServingPlan:
    """A spec on a served model; see `plan`.

    Attributes:
        methods: in list order.
        layout: what the model offers in front of its language model.
        attachment: the methods at their sites; no hook is placed by it.
    """

    def __init__(self, methods: list[Method], layout: Layout) -> None:
        self.methods = methods
        self.layout = layout
        self.attachment = Attachment(methods, layout)
        if not self.attachment.entries:
            raise SiteError(f"{self.spec} has nothing to do on {layout.family}: no site is left")
        for entry in self.attachment.entries:
            self._check(entry)

    # ------------------------------------------------------------------ what it is
    @property
    def spec(self) -> str:
        """The spec in its canonical form: ``keep=016`` and ``keep=16`` are one."""
        return "+".join(map(str, self.methods))

    @property
    def key(self) -> str:
        """What an engine's caches must hold apart: the canonical spec and the version of each method's selection."""
        return json.dumps([[str(method), method.version] for method in self.methods], separators=(",", ":"))

    @property
    def sites(self) -> list[Site]:
        """Where methods act, in the order of the forward."""
        return [entry.site for entry in self.attachment.entries]

    @property
    def needs(self) -> list[Need]:
        """Signals that methods ask for, each once."""
        return list(dict.fromkeys(need for entry in self.attachment.entries for need in entry.needs))

    @property
    def reads_text(self) -> bool:
        """Whether what stays depends on the text behind a picture; such pictures cannot be shared by prompts."""
        return any(need.name == "text" for need in self.needs)

    # ------------------------------------------------------------------ how much stays
    @guarded
    def count(
        self, tokens: int, patches: int | None = None, grid: tuple[int, int] | None = None, frames: int = 0
    ) -> int:
        """How many tokens of a picture in one part, or of a clip, stay.

        Args:
            tokens: of the picture in the language model's input, before any method.
            patches: of it in the tower; None where each is a token.
            grid: rows and columns of the tokens (of a frame), or None where there is no single grid.
            frames: of a clip, as the language model gets them, which share the tokens; 0 for a picture.

        Raises:
            ParameterError: a method cannot act on so many tokens, or on tokens without a grid.
        """
        return self._walk(tokens, patches, grid, frames)[0]

    def slots(
        self,
        entry: Entry,
        n: int,
        entered: int,
        grid: tuple[int, int] | None,
        clip: tuple[int, int] = (0, 0),
    ) -> int:
        """How many slots a method leaves of a view row.

        Args:
            entry: the method at its site, one of the attachment's.
            n: tokens that arrive.
            entered: tokens when the row entered the stage.
            grid: rows and columns of the tokens as they entered, or None where there is no single grid.
            clip: frames of the clip that it is, and tokens of each; zeros where it is none.

        Raises:
            ParameterError: it cannot act on them.
        """
        there = self.layout.stages[entry.site.stage]
        made = entry.method.count(Counts(entry.asked, n, entered, there.num_prefix, there.depth, grid, *clip))
        if grid is None:  # a count lets pass what may have a grid; here it is known that there is none
            found = Dry(self.layout, None, clip).ask(entry, n, entered)
            made = found if made is None else made
        if made is None:
            raise self._depends(entry.method)
        return made

    def _walk(
        self, tokens: int, patches: int | None, grid: tuple[int, int] | None, frames: int
    ) -> tuple[int, list[tuple[Entry, int, int, int, tuple[int, int] | None, tuple[int, int]]]]:
        """Tokens in the end, and (entry, arrived, entered, left, grid, frames and cells) of each visit."""
        if frames and tokens % frames:
            raise ParameterError(f"{self.spec}: {tokens} tokens are no {frames} frames of equal size")
        slots = "features" in self.layout.stages  # what leaves the tower leaves its placeholder
        left, visits = tokens, []
        inside = entered = tokens if slots or patches is None else patches
        for stage in BEFORE:
            late = stage == "projected"
            if late:
                inside = entered = left
            for entry in self.attachment.at(stage):
                seen = grid if late or patches in (None, tokens) else None
                clip = (frames, tokens // frames if late and inside == tokens else 0) if frames else (0, 0)
                made = self.slots(entry, inside, entered, seen, clip)
                visits.append((entry, inside, entered, made, seen, clip))
                inside = made
            if slots or late:
                left = inside
        return left, visits

    @guarded
    def dry_run(
        self, tokens: int, patches: int | None = None, grid: tuple[int, int] | None = None, frames: int = 0
    ) -> int:
        """Asks every method on tensors without data, and checks that it leaves as many tokens as it counted.

        Args:
            tokens: as in `count`.
            patches: as in `count`.
            grid: as in `count`.
            frames: as in `count`.

        Returns:
            What `count` does.

        Raises:
            ParameterError: a method cannot act on so many tokens, or leaves another number than it says.
        """
        left, visits = self._walk(tokens, patches, grid, frames)
        for entry, n, entered, made, seen, clip in visits:
            found = Dry(self.layout, seen, clip).ask(entry, n, entered)
            if found != made:
                raise ParameterError(f"{entry.method} at {entry.site} counts {made} of {n} tokens and leaves {found}")
        return left

    # ------------------------------------------------------------------ what stays
    @guarded
    def at(
        self,
        stage: str,
        tokens: Tensor,
        *,
        size: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        entered: int | None = None,
        signals: Mapping[str, Signal] | None = None,
        protected: Tensor | None = None,
        frames: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Shortens the tokens of pictures at ``features`` or ``projected``, for engines with modules of their own.

        Args:
            stage: ``features`` or ``projected``; inside a tower, `Encoder` or an adapter of the tower does it.
            tokens: `[B, N, C]`, a picture a row.
            size: fp32 `[B, N]`, patches that each token stands for; None means ones.
            grid: rows and columns of the tokens as they entered, or None.
            entered: tokens when they entered the stage (at ``features``: the tower); None means N.
            signals: by the key of each `Need`: a tensor over the tokens that are given here, or a function that makes
                it; what a method drops leaves them too.
            protected: `[B, P, C]`, at ``features``: the tower's protected tokens there.
            frames: where a row is a clip: its frames, which share the tokens one behind the other.

        Returns:
            `[B, K, C]` in their order, and their sizes, fp32 `[B, K]`, or None where nothing was merged.

        Raises:
            SiteError: another stage.
            MissingSignal: a method needs one that is not given.
        """
        if stage not in ("features", "projected"):
            raise SiteError(f"at() takes 'features' or 'projected', got {stage!r}")
        if not self.attachment.at(stage):
            return tokens, size
        there = self.layout.stages[stage]
        start = tokens.shape[1] if entered is None else entered
        whole = tokens.shape[1]
        cuts: list[tuple[Reduction, int]] = []
        for entry in self.attachment.at(stage):
            given = {
                need.key: partial(_behind, need.name, (signals or {}).get(need.key), tuple(cuts))
                for need in entry.needs
            }
            view = TokenView(
                tokens, entry.asked, size, there.num_prefix, there.depth, grid, entered=start, signals=given,
                frames=frames, cells=None if tokens.shape[1] == whole else 0,
            )  # fmt: skip
            reduction = self.attachment.decide(entry, view)
            if reduction is not None:
                beside = protected if stage == "features" else None
                tokens, sizes = reduction.apply(tokens, size, beside)
                size = sizes if size is not None or reduction.merges else None
                cuts.append((reduction, 0 if beside is None else beside.shape[1]))
        return tokens, size

    # ------------------------------------------------------------------ refusals
    def _check(self, entry: Entry) -> None:
        """Refuses what an engine cannot do.

        Raises:
            SiteError: view rows of several pictures.
            ParameterError: positions, or a number of tokens that depends on content.
        """
        method, site, family = entry.method, entry.site, self.layout.family
        if entry.scope == "sample":
            raise SiteError(
                f"{method} chooses among all pictures of a prompt together (scope=sample), but {family} keeps what a "
                "picture became for other prompts; scope=picture"
            )
        stage = self.layout.stages[site.stage]
        if site.stage == "projected" and self.layout.positions_at(site) == "keep" and stage.renumbers:
            raise ParameterError(
                f"{method} keeps position ids with gaps, but {family} numbers the tokens of a prompt one by one; "
                "positions=renumber"
            )
        if sample_count(method, entry.asked, self.layout, SAMPLE) is None:
            raise self._depends(method)

    def _depends(self, method: Method) -> ParameterError:
        """The error for a number of tokens that depends on content."""
        return ParameterError(
            f"{method}: how many tokens it leaves depends on the picture, but {self.layout.family} lays out a prompt "
            "before it sees one"
        )


def _behind(name: str, given: Signal, cuts: tuple[tuple[Reduction, int], ...]) -> Tensor | None:
    """A signal of the tokens that are left behind some cuts, which may name so many protected tokens."""
    value = given() if callable(given) else given
    axis = TOWER_SIGNALS[name].axis if name in TOWER_SIGNALS else None
    if value is not None and axis is not None:
        for reduction, spare in cuts:
            value = reduction.gather(padded(value, axis, spare), axis)
    return value


def _cure(methods: list[Method], layout: Layout) -> str | None:
    """The same methods in settings of their own that an engine can serve, or None."""
    try:
        return ServingPlan([counted_form(method) for method in methods], layout).spec
    except VlmtokError:
        return None
