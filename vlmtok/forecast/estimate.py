"""`estimate()`: the report of a run that does not take place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..compression import Compression
from ..core.attachment import Attachment
from ..core.method import Method
from ..core.model_shape import ModelShape
from ..core.settings import check_choice, check_range
from ..core.spec import as_methods
from ..core.view import TokenView
from ..cost.plan import Past, check_counts, plan
from ..cost.planned_rows import Prompt
from ..cost.report import Report
from ..errors import ParameterError, SiteError
from ..guard import guarded
from ..loading.models import configured, skeleton
from ..loading.names import EMBEDDED
from .presets import PRESETS, preset

if TYPE_CHECKING:
    from torch import nn

TEXT = 64
"""Text tokens of a prompt unless given."""


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
        model: a preset (see `vlmtok.forecast.presets`), a loaded model, a configuration of transformers or
            its dict, or a name as `vlmtok.load` takes it (a folder, a hub id, ``"timm:NAME"``,
            ``"open_clip:NAME"``), of which the configuration alone is read.
        method: a method, a spec string, or several, as for `compress`.
        text_tokens: of a prompt, all behind the pictures; or a sequence with the tokens before the first picture,
            between pictures, and behind the last. For a dual encoder, tokens of a text row (by default all).
        pictures: pictures of a prompt.
        batch: prompts, all alike; pictures for a lone tower.
        visual_tokens: of one picture in the language model, or patches for a lone tower; by default what the model
            makes of a picture of its configured size.
        crops: rows of the tower that make one picture, or frames of a clip.
        parts: how the visual tokens of a picture fall into parts: their number, or the tokens of each. By default as
            the model's crops.
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
        LoadError: the name's configuration cannot be had.
        UnsupportedModel, SiteError, MissingSignal: as `compress`.
    """
    check_choice(logits, "estimate", "logits", ("last", "all"))
    shape = shape_of(model)
    attachment = attach(shape, method, counts, signals)
    prompt = _prompt(shape, text_tokens, pictures, batch, visual_tokens, crops, parts, logits == "all")
    past = _past(counts, attachment)
    past.nothing = True
    most = plan(attachment, shape, prompt, past)
    met, plans, notes = list(dict.fromkeys(past.met)), [most], []
    if met:
        past.nothing = False
        plans.insert(0, plan(attachment, shape, prompt, past))
        notes.append(
            f"{', '.join(met)} depends on content: figures go from everything dropped there to nothing; "
            "counts= takes what a run kept"
        )
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
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, torch.nn.Module):
        return _account(model)
    if isinstance(model, str):
        if model in PRESETS or not (":" in model or "/" in model or model == EMBEDDED or os.path.isdir(model)):
            return preset(model)
        return _account(skeleton(model).model)
    if isinstance(model, Mapping) or hasattr(model, "model_type"):
        return _account(configured(model))
    raise ParameterError(
        f"estimate() takes a preset, a model, a transformers configuration or its dict, got {type(model).__name__}; "
        f"presets: {', '.join(PRESETS)}"
    )


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
    attachment = Attachment(as_methods(method), shape.layout, dict.fromkeys(signals, _absent))
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


def _absent(view: TokenView) -> Tensor:
    """The user's signal in an estimate: nobody calls it."""
    raise ParameterError("an estimate has no data")


def _prompt(
    shape: ModelShape,
    text_tokens: int | Sequence[int] | None,
    pictures: int,
    batch: int,
    visual_tokens: int | None,
    crops: int | None,
    parts: int | Sequence[int] | None,
    every: bool,
) -> Prompt:
    """Arguments as counts.

    Raises:
        ParameterError: one is not possible, or does not fit the others.
    """
    by = "estimate"
    for name, value in (("pictures", pictures), ("batch", batch), ("visual_tokens", visual_tokens), ("crops", crops)):
        if value is not None:
            check_range(value, by, name, 1, kind=int)
    patches = 0 if shape.vision is None else shape.vision.tokens - shape.vision.protected
    if shape.language is None and "projected" not in shape.layout.stages:
        if crops is not None or parts is not None:
            raise ParameterError(f"{by}: crops and parts are for vision-language models; {shape.name} is a tower")
        words = 0
        if shape.text is not None:
            words = shape.text.tokens if text_tokens is None else _one(text_tokens)
        return Prompt(batch, pictures, (), 0, (), 1, visual_tokens or patches, words)
    rows = crops or shape.crops
    visual = visual_tokens or shape.visual * rows // shape.crops
    if not visual:
        raise ParameterError(f"{by}: {shape.name} does not say how many tokens a picture has; pass visual_tokens=")
    text = _texts(text_tokens, pictures)
    falls = _parts(shape, parts, rows, visual)
    if shape.packed is not None and visual % rows:
        raise ParameterError(f"{by}: visual_tokens={visual} cannot be shared by {rows} crops")
    if "features" in shape.layout.stages:  # every patch is a token of the language model
        if visual % rows:
            raise ParameterError(f"{by}: visual_tokens={visual} cannot be shared by {rows} crops")
        patches = visual // rows
    return Prompt(batch, pictures, text, visual, falls, rows, patches, 0, every)


def _texts(text_tokens: int | Sequence[int] | None, pictures: int) -> tuple[int, ...]:
    given = TEXT if text_tokens is None else text_tokens
    if not isinstance(given, (int, Iterable)):
        raise ParameterError(f"estimate: text_tokens={given!r} must be an integer, or several")
    texts = (*[0] * pictures, given) if isinstance(given, int) else tuple(given)
    if len(texts) != pictures + 1:
        raise ParameterError(
            f"estimate: text_tokens={given!r} must be one number, or {pictures + 1}: before the first picture, between "
            "pictures, behind the last"
        )
    for count in texts:
        check_range(count, "estimate", "text_tokens", 0, kind=int)
    return texts


def _one(text_tokens: int | Sequence[int]) -> int:
    check_range(text_tokens, "estimate", "text_tokens", 2, kind=int)
    assert isinstance(text_tokens, int)
    return text_tokens


def _parts(shape: ModelShape, parts: int | Sequence[int] | None, crops: int, visual: int) -> tuple[int, ...]:
    if parts is None:
        if crops == shape.crops and sum(shape.parts) == visual:
            return shape.parts
        parts = crops
    if isinstance(parts, int):
        check_range(parts, "estimate", "parts", 1, kind=int)
        if visual % parts:
            raise ParameterError(f"estimate: visual_tokens={visual} cannot be shared by {parts} equal parts")
        return () if parts == 1 else (visual // parts,) * parts
    if sum(parts) != visual:
        raise ParameterError(f"estimate: parts={tuple(parts)!r} must sum to the picture's {visual} tokens")
    return tuple(parts)


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


def _account(model: nn.Module) -> ModelShape:
    from ..adapters import adapter_for

    adapter = adapter_for(model)
    try:
        found: ModelShape = adapter.account()
    except NotImplementedError:
        raise ParameterError(f"adapter {adapter.name!r} does not say what its models cost") from None
    return found
