"""Zero-shot classification with a compressed dual encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.method import Method
from ..errors import ParameterError, UnsupportedModel
from ..guard import guarded

if TYPE_CHECKING:
    from ..compression import Compression


@guarded
def zero_shot(
    model: nn.Module, run: Compression | None, text_features: Tensor, *, logit_scale: float | None = None
) -> Callable[[Tensor], Tensor]:
    """Makes a classifier of a dual encoder, a compression and the embeddings of class names.

    Methods that correct predictions (TCA) do so here: they see the logits behind each forward, in list order. A method
    with ``batch_mode="sequential"`` gets its pictures one by one.

    Args:
        model: an open_clip or transformers dual encoder (``encode_image`` or ``get_image_features``).
        run: its compression, or None for the bare model.
        text_features: `[classes, E]`, any length; they are normalised.
        logit_scale: factor of the cosines; the model's own by default.

    Returns:
        From pictures `[B, 3, H, W]` to logits `[B, classes]`, in fp32.

    Raises:
        UnsupportedModel: the model encodes no pictures.
        ParameterError: `text_features` are no matrix.
    """
    encode = _encoder(model)
    if not isinstance(text_features, Tensor) or text_features.dim() != 2:
        found = list(text_features.shape) if isinstance(text_features, Tensor) else type(text_features).__name__
        raise ParameterError(f"text_features must be a tensor [classes, E], got {found}")
    classes = F.normalize(text_features.float(), dim=-1)
    scale, bias = _scale(model, logit_scale)

    def classify(images: Tensor) -> Tensor:
        finishing = [] if run is None or not run.active else _finishing(run)
        single = any(getattr(method, "batch_mode", "") == "sequential" for _, method in finishing)
        parts = images.split(1) if single else [images]
        return torch.cat([_one(part, finishing) for part in parts])

    def _one(images: Tensor, finishing: list[tuple[int, Method]]) -> Tensor:
        features = F.normalize(encode(images).float(), dim=-1)
        if features.shape[1] != classes.shape[1]:
            raise ParameterError(
                f"text_features must be [classes, E = {features.shape[1]}] as the model's pictures, got "
                f"{list(classes.shape)}"
            )
        logits = scale * features @ classes.to(features.device).T + bias
        for index, method in finishing:
            assert run is not None
            row = run.row(index)
            row["features"], row["text_features"] = features, classes
            logits = method.finish(logits, row, run.memory(index))
        return logits

    return classify


def _finishing(run: Compression) -> list[tuple[int, Method]]:
    """Methods that correct logits."""
    return [(i, method) for i, method in enumerate(run.methods) if type(method).finish is not Method.finish]


def _encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    if hasattr(model, "encode_image"):
        return model.encode_image  # type: ignore[return-value]
    if hasattr(model, "get_image_features"):

        def encode(images: Tensor) -> Tensor:
            found = model.get_image_features(pixel_values=images)  # type: ignore[operator]
            return found if isinstance(found, Tensor) else found.pooler_output

        return encode
    raise UnsupportedModel(
        f"{type(model).__name__} has neither encode_image nor get_image_features; zero_shot() needs a dual encoder"
    )


def _scale(model: nn.Module, given: float | None) -> tuple[float | Tensor, float | Tensor]:
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    if given is not None:
        return given, 0.0
    found = 100.0 if scale is None else scale.detach().float().exp()
    return found, 0.0 if bias is None else bias.detach().float()
