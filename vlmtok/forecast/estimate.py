"""`estimate()`: the report of a run that does not take place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compression import Compression
from ..core.attachment import Attachment
from ..core.method import Method
from ..core.model_shape import ModelShape
from ..core.settings import check_choice
from ..core.spec import as_methods
from ..core.view import TokenView
from ..cost.past import Past, check_counts
from ..cost.plan import plan
from ..cost.report import Report
from ..errors import ParameterError, SiteError
from ..guard import guarded
from .prompt import Asked, prompt_of
from .subject import subject_of


@guarded
def estimate(
    model: Any,
    method: Method | str | Sequence[Method | str],
    *,
    text_tokens: int | Sequence[int] | None = None,
    pictures: int = 1,
    batch: int = 1,
    visual_tokens: int | None = None,
    crops: int | None = None,
    parts: int | Sequence[int] | None = None,
    image_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    frames: int | None = None,
    processor: Any = None,
    logits: str = "last",
    counts: Compression | Report | Mapping[str, int] | None = None,
    convention: str | None = None,
    signals: Iterable[str] = (),
    deciding: bool = True,
) -> Report:
    """What a method would save, without running anything; no weights are needed.

    Counts come from the methods' own `count`, the cost of signals and of the methods from running them on tensors
    without data. A report of a run on the same shapes gives the same numbers.

    Args:
        model: a preset (see `vlmtok.forecast.presets`), a model, loaded by `vlmtok.load` or not, a configuration of
            transformers or its dict, or a name as `vlmtok.load` takes it (a folder, a hub id, ``"timm:NAME"``,
            ``"open_clip:NAME"``), of which the configuration alone is read.
        method: a method, a spec string, or several, as for `compress`.
        text_tokens: of a prompt, all behind the pictures; or a sequence with the tokens before the first picture,
            between pictures, and behind the last. Marks that a processor puts inside a picture are not among them. For
            a dual encoder, tokens of a text row (by default all).
        pictures: pictures of a prompt.
        batch: prompts, all alike; pictures for a lone tower.
        visual_tokens: of one picture in the language model, or patches for a lone tower; by default what the model
            makes of a picture of its configured size.
        crops: rows of the tower that make one picture, or frames of a clip. Where pictures are several rows, it follows
            from `visual_tokens` if that is possible, and is asked for if not.
        parts: how the visual tokens of a picture fall into parts: their number, or the tokens of each. By default as
            the model's crops.
        image_size: width and height of a picture in pixels, or those of each picture of a prompt. Visual tokens, crops,
            parts and grids are what the model's own processor makes of blank pictures of that size.
        frames: of a clip, of which `image_size` is the size; all are shown to the model. With `visual_tokens` in its
            place, frames as the language model gets them, which share these tokens.
        processor: of the model, where it is given without one (a module, a configuration).
        logits: ``"last"`` (the head sees one token of a prompt, as in `generate`) or ``"all"`` (a plain forward).
        counts: what stays at sites whose count depends on content: a compression that has run, its report, or slots of
            a view row by site (``{"decoder layer 2 end": 300}``), which win over the methods' counts.
        convention: also count as a paper does, see `vlmtok.cost.conventions`.
        signals: names of signals that `compress` would be given.
        deciding: count signals and the methods' own cost.

    Returns:
        The report. Where a count depends on content and `counts` does not tell, figures are ranges, from everything
        dropped to nothing dropped.

    Raises:
        ParameterError: an argument is not possible, or the model does not say what is needed.
        LoadError: the name's configuration cannot be had, or its processor takes no such pictures.
        UnsupportedModel, SiteError, MissingSignal: as `compress`.
    """
    check_choice(logits, "estimate", "logits", ("last", "all"))
    subject = subject_of(model, processor)
    shape = subject.shape
    attachment = attach(shape, method, counts, signals)
    asked = Asked(text_tokens, pictures, batch, visual_tokens, crops, parts, image_size, frames, logits == "all")
    prompt, said = prompt_of(subject, asked)
    past = _past(counts, attachment)
    past.nothing = True
    most = plan(attachment, shape, prompt, past)
    met, plans, notes = list(dict.fromkeys(f"{name} at {site}" for name, site in past.met)), [most], said
    if met:
        past.nothing = False
        plans.insert(0, plan(attachment, shape, prompt, past))
        notes.append(
            f"{past.met_at()} depends on content: figures go from everything dropped there to nothing; "
            "counts= takes what a run kept"
        )
    notes += [
        f"{name}: what caches keep together is known, how much each of its layers does depends on content and is taken "
        "for even; counts= takes what a run kept"
        for name in sorted(past.evenly)
    ]
    if shape.packed is not None and shape.packed.pads:
        notes.append("rows of the vision tower count without the padding that a processor may add")
    report = Report.planned(attachment, shape, plans, notes, deciding)
    report.open = met
    if convention is not None:
        report.figure = report.by(convention)
    return report


def shape_of(model: Any) -> ModelShape:
    """A model as counts and widths; see `estimate` for what can be given.

    Raises:
        ParameterError: nothing that can be counted.
        UnsupportedModel: no adapter carries it.
    """
    return subject_of(model).shape


def attach(shape: ModelShape, method: Any, counts: Any = None, signals: Iterable[str] = ()) -> Attachment:
    """Methods at their sites on a model that is not there.

    Args:
        shape: the model.
        method: as in `compress`.
        signals: names of signals that the user would give.
        counts: where it is a compression, its methods' modules are taken over, with what they have learned.

    Raises:
        SiteError: no site is left.
    """
    methods = as_methods(method)
    given = [*signals, *(name for one in methods for name in one.wants)]
    attachment = Attachment(methods, shape.layout, dict.fromkeys(given, absent))
    if not attachment.entries:
        names = " + ".join(map(str, attachment.methods))
        raise SiteError(f"{names} has nothing to do on {shape.layout.family}: no site is left")
    with torch.device("meta"):
        for index, one in enumerate(attachment.methods):
            module = one.build(shape.layout)
            if module is not None:
                attachment.memory[index] = module
    if isinstance(counts, Compression):
        attachment.memory.update({int(index): module for index, module in counts._member.memory.items()})
    return attachment


def absent(view: TokenView) -> Tensor:
    """The user's signal in an estimate: nobody calls it."""
    raise ParameterError("an estimate has no data")


def _past(counts: Any, attachment: Attachment) -> Past:
    if counts is None:
        return Past()
    if isinstance(counts, Compression):
        return Past.of(counts._attachment.ledger.last.values(), counts._member.first)
    if isinstance(counts, Report):
        return Past.of(counts._runs)
    if isinstance(counts, Mapping):
        check_counts(counts, attachment)
        return Past(fixed=dict(counts))
    raise ParameterError(f"estimate: counts={counts!r} must be a Compression, a Report or a dict of counts by site")
