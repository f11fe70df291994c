"""A second module over the same weights that takes pictures of another size: positions are interpolated in it alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatcher import dispatcher_of
from ..errors import ParameterError, UnsupportedModel

OPTION = "interpolate_pos_encoding"
"""What transformers calls the method of a patch embedding, and the argument of its forward, that fit its positions."""


def twin(model: nn.Module) -> Any:
    """A copy that shares every parameter and buffer with the model; its configuration is its own.

    Args:
        model: without a compression.

    Raises:
        ParameterError: it carries one.
    """
    if dispatcher_of(model) is not None:
        raise ParameterError(
            f"downsample: this {type(model).__name__} carries a compression; vlmtok.remove(model) first"
        )
    shared = {id(one): one for one in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


# ---------------------------------------------------------------------- transformers
def embeddings_of(model: nn.Module) -> list[Any]:
    """Its patch embeddings that can interpolate their positions."""
    return [part for part in model.modules() if callable(getattr(part, OPTION, None))]


def let_interpolate(model: nn.Module) -> None:
    """Makes patch embeddings of a twin fit their positions to each picture; those that always do are left alone."""
    for part in embeddings_of(model):
        if OPTION in inspect.signature(part.forward).parameters:
            part.register_forward_pre_hook(_interpolating, with_kwargs=True)


def _interpolating(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same call with the option, which hosts hand on with or without its name."""
    names = list(inspect.signature(module.forward).parameters)
    return args[:1], {**dict(zip(names[1:], args[1:])), **kwargs, OPTION: True}


# ---------------------------------------------------------------------- towers alone
def tower_twin(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A twin of a vision tower for pictures of another size.

    Args:
        model: of timm, open_clip or transformers.
        size: height and width, in pixels; whole patches.

    Raises:
        UnsupportedModel: its positions cannot be interpolated.
        ParameterError: it carries a compression.
    """
    why, fit = why_one_size(model), _way(model)
    if fit is None:
        raise UnsupportedModel(f"downsample: {why}")
    made: nn.Module = twin(model)
    fit(made, size)
    return made


def why_one_size(model: nn.Module) -> str:
    """Why a tower takes pictures of one size, or nothing."""
    if _way(model) is not None:
        return ""
    return (
        f"nothing is known that interpolates positions of a {type(model).__name__}; possible are towers with "
        "set_input_size (timm), with interpolate_pos_encoding (transformers), and open_clip's ViT"
    )


def patch_of(model: Any) -> tuple[int, int]:
    """Height and width of a tower's patch, in pixels.

    Raises:
        UnsupportedModel: it does not say.
    """
    trunk, config = _trunk(model), getattr(model, "config", None)
    owners = (getattr(trunk, "patch_embed", None), getattr(trunk, "embeds", None), trunk)
    for owner in (*owners, getattr(config, "vision_config", None), config):
        found = getattr(owner, "patch_size", None)
        if found is not None:
            return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))
    raise UnsupportedModel(f"downsample: a {type(model).__name__} does not say how large its patches are")


def _trunk(model: Any) -> Any:
    """The tower inside wrappers of open_clip."""
    visual = getattr(model, "visual", model)
    return getattr(visual, "trunk", visual)


def _way(model: nn.Module) -> Callable[[Any, tuple[int, int]], None] | None:
    """How a tower's positions are fitted."""
    trunk = _trunk(model)
    if callable(getattr(trunk, "set_input_size", None)):
        return lambda made, size: _trunk(made).set_input_size(img_size=size)
    if hasattr(trunk, "positional_embedding") and hasattr(trunk, "grid_size"):
        return _by_table
    if type(trunk).__name__ == "NaFlexVit":  # fits its positions to every picture by itself
        return lambda made, size: None
    if embeddings_of(model):
        return lambda made, size: let_interpolate(made)
    return None


def _by_table(made: Any, size: tuple[int, int]) -> None:
    """open_clip: positions are a table, which its loader fits to another size in the same way."""
    trunk, patch = _trunk(made), patch_of(made)
    new = (size[0] // patch[0], size[1] // patch[1])
    table = trunk.positional_embedding
    trunk.positional_embedding = nn.Parameter(resampled(table, trunk.grid_size, new), table.requires_grad)
    trunk.grid_size, trunk.image_size = new, size


def resampled(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of positions for another grid, bicubic with antialiasing.

    Args:
        table: `[prefix + H W, C]`; rows in front of the grid's belong to no patch and stay.
        old: H and W.
        new: rows and columns that are wanted.

    Returns:
        `[prefix + rows columns, C]`.
    """
    prefix = table.shape[0] - old[0] * old[1]
    grid = table[prefix:].detach().reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    fitted = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    rows = fitted.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).to(table.dtype)
    return torch.cat([table[:prefix].detach(), rows])
