"""The self-test on a model of the user's: a loaded one with its inputs, or a checkpoint by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import ParameterError
from ...guard import guarded
from .facts import Row
from .language import Language
from .rows import Case, Subject, hushed, one_thread
from .towers import Vision

if TYPE_CHECKING:
    from ...loading.models import Loaded

SHORTER = 2
"""Words that the second row of a batch lacks, so that it is padded."""


def two_rows(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A prompt with a picture as a batch of two: itself, and itself with fewer words behind the picture.

    Args:
        model: a vision-language model of transformers.
        inputs: arguments of `generate` for one prompt, as a processor makes them.

    Returns:
        The batch, padded on the left, and both rows without padding.

    Raises:
        ParameterError: it is no single prompt, or has too few words behind its picture.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        raise ParameterError("the self-test takes input_ids [1, L] of one prompt with a picture")
    config = model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    visual = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    text = ~torch.isin(ids[0], torch.tensor(visual, device=ids.device))
    if text.all() or int(text.flip(0).long().cumprod(0).sum()) <= SHORTER + 1:
        raise ParameterError(
            f"the self-test takes a prompt with a picture and more than {SHORTER + 1} tokens behind it"
        )
    length = ids.shape[1]
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    longest = length
    while {longest, longest - SHORTER} & sizes:  # axes are told apart by their lengths: see `replay`
        longest += 1
    rows = []
    for count in (longest, longest - SHORTER):
        place = torch.arange(count, device=ids.device).clamp(max=length - 2)
        place[-1] = length - 1  # the last token stays the last: it asks for the answer
        rows.append({name: _by_token(value, ids.shape, place) for name, value in inputs.items()})
    for row in rows:
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        second = rows[1][name]
        if not isinstance(first, Tensor):
            batch[name] = first
            continue
        if first.shape == rows[0]["input_ids"].shape:
            second = nn.functional.pad(second, (SHORTER, 0))
        batch[name] = torch.cat([first, second])
    return batch, rows


def _by_token(value: Any, shape: torch.Size, place: Tensor) -> Any:
    """An argument with one entry for each token at other places; any other as it is."""
    return value[:, place] if isinstance(value, Tensor) and value.shape == shape else value


@guarded
def examine_model(
    model: nn.Module, inputs: Mapping[str, Any] | Tensor, *, adapter: str | None = None, name: str | None = None
) -> Row:
    """Runs the self-test on a model.

    Args:
        model: bare, in eval mode; a tower that is called with pixels, or a vision-language model of transformers.
        inputs: pixels `[B, 3, H, W]` of a tower, B at least 2; or what `generate` takes for one prompt with a picture.
        adapter: as for `vlmtok.compress`.
        name: what to call it; by default its class.

    Returns:
        What was found; the model is left as it was.

    Raises:
        ParameterError: the inputs do not fit.
    """
    with hushed(), one_thread(model):
        return _examine(model, inputs, adapter, name or type(model).__name__)


def _examine(model: nn.Module, inputs: Mapping[str, Any] | Tensor, adapter: str | None, name: str) -> Row:
    """The same, where warnings and threads are taken care of."""
    if isinstance(inputs, Tensor):
        if inputs.dim() != 4 or len(inputs) < 2:
            raise ParameterError(
                f"the self-test of a tower takes pixels [B, 3, H, W], B >= 2: got {list(inputs.shape)}"
            )
        subject: Subject = Vision(model, lambda m, x: _output(m(x)), inputs, adapter)
    else:
        subject = Language(model, *two_rows(model, inputs), adapter)
    return _case(name, subject).run(next(model.parameters()).device)


@guarded
def examine_loaded(loaded: Loaded, adapter: str | None = None) -> Row:
    """Runs the self-test on a checkpoint, with the first sample picture of the package.

    Args:
        loaded: from `vlmtok.load`.
        adapter: as for `vlmtok.compress`.
    """
    from ... import loading
    from .. import prompts

    sample = loading.samples()[0]
    picture = loading.open_picture(sample.path)
    model: Any = loaded.model
    if loaded.language:
        inputs = prompts.encode_prompt(loaded, picture, sample.question)
        return examine_model(model, inputs, adapter=adapter, name=loaded.name)
    assert loaded.pixels is not None and loaded.encode is not None
    encode, pixels = loaded.encode, loaded.pixels(picture).to(loaded.device, loaded.dtype)
    both = torch.cat([pixels, pixels.flip(-1)])
    subject = Vision(model, lambda m, x: encode(x), both, adapter)
    with hushed(), one_thread(model):
        return _case(loaded.name, subject).run(loaded.device)


def _case(name: str, subject: Subject) -> Case:
    """The row of a model that exists already."""
    kind = getattr(getattr(subject.model, "config", None), "model_type", "")
    return Case(name, type(subject.model).__module__.split(".")[0], lambda device: subject, family=str(kind))


def _output(output: Any) -> Tensor:
    """The tensor that a model is called for."""
    if isinstance(output, Tensor):
        return output
    for field in ("logits", "pooler_output", "image_embeds", "last_hidden_state"):
        if isinstance(getattr(output, field, None), Tensor):
            return getattr(output, field)
    if isinstance(output, (tuple, list)):
        return output[0]
    raise ParameterError(f"the self-test finds no tensor in what the model returns, a {type(output).__name__}")
