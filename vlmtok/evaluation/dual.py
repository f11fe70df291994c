"""Asking dual encoders: pictures and sentences as embeddings, pictures as one of several sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..compression import carried
from ..core.registry import method_class
from ..errors import ParameterError, UnsupportedModel
from ..lab.zero_shot import zero_shot
from ..loading import DATA, SHIPPED
from ..loading.models import Loaded

CROSS_TOKENS = "cross_tokens.safetensors"
"""File of a checkpoint's folder that holds CrossGET's trained cross tokens."""
_CHUNK = 50


def check_dual(loaded: Loaded, task: str) -> None:
    """Refuses whatever does not embed both pictures and sentences.

    Raises:
        UnsupportedModel: it does not.
    """
    if loaded.language or loaded.pixels is None or loaded.words is None:
        raise UnsupportedModel(
            f"{task} needs a dual encoder with its tokenizer (CLIP, SigLIP, of transformers or open_clip); "
            f"{loaded.name} is a {type(loaded.model).__name__}"
        )


def read(loaded: Loaded, sentences: Sequence[str]) -> Tensor:
    """Normalised embeddings of sentences, fp32 `[T, E]`."""
    assert loaded.words is not None
    model, ids = loaded.model, loaded.words(sentences).to(loaded.device)
    if hasattr(model, "encode_text"):
        found = model.encode_text(ids)  # type: ignore[operator]
    else:
        found = model.get_text_features(input_ids=ids)  # type: ignore[operator]
    embedded: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(embedded.float(), dim=-1)


def see(loaded: Loaded, pictures: Sequence[Image.Image]) -> Tensor:
    """Normalised embeddings of pictures, fp32 `[B, E]`."""
    assert loaded.encode is not None
    parts = [loaded.encode(_pixels(loaded, part)) for part in _parts(pictures)]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def classify(loaded: Loaded, pictures: Sequence[Image.Image], sentences: Sequence[str]) -> list[int]:
    """Which of the sentences each picture is, by `vlmtok.zero_shot`: methods that correct predictions do so.

    Args:
        loaded: under whatever compression it carries.
        pictures: a stream, in this order.
        sentences: of the classes.
    """
    runs = carried(loaded.model)
    tell = zero_shot(loaded.model, runs[0] if runs else None, read(loaded, sentences))
    return [i for part in _parts(pictures) for i in tell(_pixels(loaded, part)).argmax(1).tolist()]


def _parts(pictures: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    return [pictures[first : first + _CHUNK] for first in range(0, len(pictures), _CHUNK)]


def _pixels(loaded: Loaded, pictures: Sequence[Image.Image]) -> Tensor:
    assert loaded.pixels is not None
    return torch.cat([loaded.pixels(one) for one in pictures]).to(loaded.device, loaded.dtype)


# ---------------------------------------------------------------------- trained cross tokens
def give_cross_tokens(loaded: Loaded) -> bool:
    """Hands CrossGET the cross tokens that were trained on this checkpoint, where it inserts some.

    Args:
        loaded: under whatever compression it carries.

    Returns:
        Whether it did: a method inserts cross tokens, and the checkpoint's folder holds trained ones.

    Raises:
        ParameterError: the folder's are those of another model.
    """
    path = cross_tokens_of(loaded)
    given = False
    for run in carried(loaded.model) if path is not None else []:
        for index, method in enumerate(run.methods):
            memory = run.memory(index)
            if isinstance(method, method_class("crossget")) and memory is not None:
                _fill(memory, path)
                given = True
    return given


def cross_tokens_of(loaded: Loaded) -> Path | None:
    """The file of a checkpoint's trained cross tokens, or None where it has none."""
    place = loaded.name.removeprefix("open_clip:").removeprefix("local-dir:")
    folder = DATA / place if place in SHIPPED else Path(place)
    path = folder / CROSS_TOKENS
    return path if path.is_file() else None


def _fill(memory: nn.Module, path: Path | None) -> None:
    from safetensors.torch import load_file

    assert path is not None
    held = {name.rpartition(".")[2]: value for name, value in load_file(path).items()}
    for name, parameter in memory.named_parameters():
        if name not in held or held[name].shape != parameter.shape:
            found = list(held[name].shape) if name in held else "none"
            raise ParameterError(f"{path}: {name} must be {list(parameter.shape)} for this model, got {found}")
        with torch.no_grad():
            parameter.copy_(held[name])
