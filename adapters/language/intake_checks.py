"""Forms of what a model is called with and hooks read: what the host could not take either is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ..hosts import Role


def check_tokens(
    ids: tuple[Role, Any], embeds: tuple[Role, Any], types: tuple[Role, Any] | None, mask: tuple[Role, Any]
) -> None:
    """Checks token ids, or embeddings, and what has an entry for each of them.

    Args:
        ids: the role, and int `[B, S]` or None.
        embeds: the role, and `[B, S, C]` or None.
        types: the role, and `[B, ...]` or None; None where the host takes none.
        mask: the role, and the attention mask, or None; one that is not 2-D is refused where something is cut.

    Raises:
        ParameterError: one is no tensor, has another form or lies on another device.
    """
    lead, columns = ids if ids[1] is not None else embeds
    if columns is None:
        return
    axes = 2 if columns is ids[1] else 3
    fits = isinstance(columns, Tensor) and columns.dim() == axes and columns.is_floating_point() == (axes == 3)
    if not fits or not columns.shape[1]:
        wanted = "integers [B, S >= 1]" if axes == 2 else "a float tensor [B, S >= 1, C]"
        raise ParameterError(f"{_named(lead)} must be {wanted}, got {_form(columns)}")
    for part in (types, mask):
        if part is None or part[1] is None or (part is mask and not _flat(part[1])):
            continue
        role, value = part
        if not _flat(value) or value.is_complex() or value.shape[0] != columns.shape[0]:
            raise ParameterError(
                f"{_named(role)} must be a tensor [B = {columns.shape[0]}, S] beside {_named(lead)} of "
                f"{list(columns.shape[:2])}, got {_form(value)}"
            )
        if value.device != columns.device:
            raise ParameterError(
                f"{_named(role)} is on {value.device} and {_named(lead)} on {columns.device}; move one to the other"
            )
        if part is mask and value.shape[1] < columns.shape[1]:
            raise ParameterError(
                f"{_named(role)} must cover the {columns.shape[1]} columns of {_named(lead)}, got {_form(value)}"
            )


def check_positions(role: Role, value: Any, columns: int) -> None:
    """Checks position ids of a call.

    Args:
        role: of the argument.
        value: int `[..., B, S]`, or None.
        columns: S.

    Raises:
        ParameterError: another form.
    """
    if value is None or (isinstance(value, Tensor) and value.dim() >= 2 and value.shape[-1] == columns):
        return
    raise ParameterError(f"{_named(role)} must be integers [..., B, S = {columns}], got {_form(value)}")


def check_encoded(role: Role, value: Any) -> Mapping[str, Any]:
    """Checks what the tower gave earlier.

    Args:
        role: of the argument.
        value: features by kind, or None.

    Raises:
        ParameterError: it is no mapping.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ParameterError(f"{_named(role)} must be features by kind, got {_form(value)}")
    return value


def check_shapes(role: Role, value: Any, last: int, axes: int = 2) -> Tensor:
    """Checks an argument that tells rows and columns of pictures.

    Args:
        role: of the argument.
        value: of it; lists count as tensors.
        last: length of its last axis.
        axes: how many axes it has at least.

    Returns:
        The tensor.

    Raises:
        ParameterError: it is none, tells no integers, or has another form.
    """
    wanted = f"integers [{', '.join(['pictures', *['...'] * (axes - 2), str(last)])}]"
    shapes = _readable(role, value, wanted)
    if shapes.dim() < axes or shapes.shape[-1] != last or not len(shapes):
        raise ParameterError(f"{_named(role)} must be {wanted}, got {_form(value)}")
    return shapes


def check_counts(role: Role, value: Any, total: int) -> list[int]:
    """Checks an argument that tells how many pictures each prompt has.

    Args:
        role: of the argument.
        value: of it; lists count as tensors.
        total: pictures of the call.

    Returns:
        The counts.

    Raises:
        ParameterError: they are no counts of these pictures.
    """
    counts = _readable(role, value, f"integers [prompts] of sum {total}")
    if counts.dim() != 1 or (counts < 0).any() or int(counts.sum()) != total:
        raise ParameterError(f"{_named(role)} must be integers [prompts] of sum {total}, got {counts.tolist()}")
    return [int(count) for count in counts.tolist()]


def _readable(role: Role, value: Any, wanted: str) -> Tensor:
    """A tensor of integers.

    Raises:
        ParameterError: it is none.
    """
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise ParameterError(f"{_named(role)} must be {wanted}, got {_form(value)}") from problem
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.is_meta:
        raise ParameterError(f"{_named(role)} must be {wanted} that can be read, got {_form(value)}")
    return found


def _flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _named(role: Role) -> str:
    return f"{role.what} ({role.names[0]})"


def _form(value: Any) -> str:
    """What was found, for a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
