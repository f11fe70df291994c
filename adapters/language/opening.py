"""How a call of the text model begins: where its positions start, what forbids cuts, its page in the books."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.ledger import Ledger, StageRun
from ...core.rows import Picture
from ...core.stream import Segment, Stream
from .. import host_objects, hosts
from ..hosts import Arguments
from .call import Incoming
from .checks import check_turn, packed, unknown_argument
from .intake_checks import check_positions
from .spec import VLMSpec


def positions_of(
    incoming: Incoming, given: Tensor | None, stream: Stream | None, batch: int, columns: int, held: int, x: Tensor
) -> Tensor:
    """Positions of a call's columns, int64 `[..., B, S]`, as the host counts.

    Args:
        incoming: what the inner model was called with.
        given: positions that the text model got, or None.
        stream: the past, or None.
        batch: B.
        columns: S.
        held: columns that the cache holds.
        x: `[B, S, C]`, embeddings.

    Raises:
        ParameterError: positions have another form.
        CacheError: the call does not go on where the past ends.
    """
    positions = given if stream is None or incoming.placed else None
    check_positions(hosts.POSITIONS, positions, columns)
    if positions is not None and positions.shape[-2] != batch:
        positions = positions.expand(*positions.shape[:-2], batch, -1)
    if stream is not None:
        check_turn(stream, columns, incoming.mask, positions)
    if positions is None:
        begin = torch.full((batch,), held, device=x.device) if stream is None else stream.next
        assert begin is not None
        positions = begin[:, None] + torch.arange(columns, device=x.device)
    return positions


def uncut_past(owner: int, batch: int, held: int, mask: Tensor | None) -> Stream:
    """The past of a cache in which nothing was cut.

    Args:
        owner: number of the attachment.
        batch: B.
        held: columns that the cache holds.
        mask: `[B, past + S]`, or None.
    """
    stream = Stream(owner, batch, seen=held, segments={0: Segment(0, held)})
    if mask is not None:
        stream.segments[0].valid = mask[:, :held].bool()
    return stream


def refusal_of(
    spec: VLMSpec,
    core: Any,
    module: Any,
    text: Arguments,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    incoming: Incoming,
    held: int,
    cache: Any,
) -> str | None:
    """Why the rows of a call cannot be cut, or None; a call in which nothing is cut may go on.

    Args:
        spec: the family.
        core: the inner model.
        module: the text model.
        text: its arguments.
        args: of the call.
        kwargs: of the call.
        incoming: what the inner model was called with.
        held: columns that the cache holds.
        cache: of the call, or None.
    """
    batch, columns = text.get(hosts.EMBEDDINGS, args, kwargs).shape[:2]
    unknown = unknown_argument(text.called(args, kwargs), text.names, spec, core, batch, columns, held)
    positions = text.get(hosts.POSITIONS, args, kwargs)
    if unknown is not None or not incoming.placed or positions is None:
        return unknown
    caching = text.get(hosts.CACHING, args, kwargs)
    caching = getattr(module.config, "use_cache", True) if caching is None else caching
    return packed(positions, incoming.mask, cache, bool(caching))


def book(
    ledger: Ledger,
    batch: int,
    columns: int,
    held: int,
    cache: Any,
    stream: Stream | None,
    pictures: list[Picture],
    probe: int,
) -> StageRun | None:
    """Opens the books of a prefill, or counts a decode step.

    Args:
        ledger: the books.
        batch: B.
        columns: S.
        held: columns that the cache holds.
        cache: of the call, or None.
        stream: the past, or None.
        pictures: of the call.
        probe: layer by which the cache says how much it holds.

    Returns:
        The page of a prefill; None for a step.
    """
    if columns == 1 and held and not pictures:
        ledger.step(batch, held, probe, host_objects.records_past(cache))
        return None
    lengths = () if stream is None else tuple((first, s.length) for first, s in sorted(stream.segments.items()))
    return ledger.begin(
        StageRun(
            "decoder",
            batch,
            columns,
            held,
            len(pictures),
            cache is not None,
            visual=sum(len(picture.columns) for picture in pictures),
            seen=held if stream is None else stream.seen,
            held=lengths,
            mixed=len({picture.video for picture in pictures}) > 1,
        )
    )
