"""What deciding costs: signals and selection, counted by running them on meta tensors.

A pass in the ledger says which method saw views of which shapes. Here the same views are built without data, with the
same signal functions and the methods' own `reduce` and `insert`, so that no formula has to be kept beside the code.
Signals are everything that a method asks a view for (attention rows, and the projections of a block that has not run or
does not show its q and k); the rest is the method's own cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.attachment import Attachment
from ..core.ledger import StageRun
from ..core.model_shape import ModelShape
from .cache_rehearsal import ask_caches
from .packed_rehearsal import PackedRehearsal
from .rehearsal import Rehearsal, rehearsal


@dataclass
class Overhead:
    """MACs of deciding.

    Attributes:
        signals: of what methods look at.
        own: of the methods themselves.
        notes: what could not be counted, and why.
    """

    signals: int = 0
    own: int = 0
    notes: tuple[str, ...] = ()


def overhead(attachment: Attachment, shape: ModelShape, run: StageRun) -> Overhead:
    """What the methods of a pass cost beside the model.

    Args:
        attachment: whose methods acted.
        shape: the model.
        run: the pass; of a tower (visits at ``features`` included) or of a language model.

    Returns:
        The MACs of this pass.
    """
    if all(event.method < 0 for event in run.events) and not run.masses and not attachment.tapped(run.stage):
        return Overhead()
    with rehearsal() as counted:
        kind = Rehearsal if shape.packed is None else PackedRehearsal
        again = kind(attachment, shape, run, counted)
        if run.stage == "decoder":
            again.decoder()
            ask_caches(again)
        else:
            again.tower()
        own = counted() - again.signals - again.elsewhere
    return Overhead(again.signals, own, tuple(dict.fromkeys(again.said())))
