"""What a self-test says: facts of a row, rows, and how a failure becomes a fact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InternalError, VlmtokError

OK, REFUSED, BROKEN = "ok", "refused", "broken"
NAMES = ("bare", "neutral", "tower", "input", "layer", "text", "generate")
"""Facts in the order of the table: the host alone, a compression that does nothing, a cut at each stage, decoding."""
CLOSE = 2e-5
"""How far outputs of the same maths may be apart, as a share of the largest one, in fp32."""
COARSE = 8.0
"""The same in half precision, in steps of the dtype."""
TELLING = 20.0
"""A cut must move the output by so many times what outputs of the same maths may be apart; else it proves nothing."""


class Refused(Exception):
    """The fact does not apply; the message says why."""


class Broken(Exception):
    """The fact does not hold; the message says what was found.

    Attributes:
        difference: by how much, where that is a number.
    """

    def __init__(self, why: str, difference: float | None = None) -> None:
        super().__init__(why)
        self.difference = difference


@dataclass(frozen=True)
class Fact:
    """One fact of a row.

    Attributes:
        name: one of `NAMES`.
        status: ``ok``, ``refused`` or ``broken``.
        why: what was found, or why it does not apply; empty where it holds.
        difference: the largest difference from what it should be, where that is a number.
    """

    name: str
    status: str
    why: str = ""
    difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"fact": self.name, "status": self.status, "why": self.why, "difference": self.difference}


@dataclass(frozen=True)
class Row:
    """One model and what was found.

    Attributes:
        name: of the family or tower.
        library: that it comes from.
        facts: in the order of `NAMES`; facts that a model cannot have are left out.
        model: its class; empty where it could not be built.
        adapter: name of the adapter that carries it; empty where none was asked for.
        refused: why nothing was run, or empty.
        seconds: that it took.
    """

    name: str
    library: str
    facts: tuple[Fact, ...] = ()
    model: str = ""
    adapter: str = ""
    refused: str = ""
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """The worst of its facts; a row that was not run, or of which nothing could run, is refused."""
        found = {fact.status for fact in self.facts}
        if BROKEN in found:
            return BROKEN
        return OK if OK in found and not self.refused else REFUSED

    @property
    def why(self) -> str:
        """What broke first, or why it was refused."""
        if self.refused:
            return self.refused
        for status in (BROKEN, REFUSED):
            if self.status == status:
                return next((f"{fact.name}: {fact.why}" for fact in self.facts if fact.status == status), "")
        return ""

    def fact(self, name: str) -> Fact:
        """The fact of a name.

        Raises:
            KeyError: the row has none.
        """
        for fact in self.facts:
            if fact.name == name:
                return fact
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "library": self.library,
            "model": self.model,
            "adapter": self.adapter,
            "status": self.status,
            "why": self.why,
            "seconds": round(self.seconds, 2),
            "facts": [fact.to_dict() for fact in self.facts],
        }


def first_line(problem: BaseException) -> str:
    """An exception as its type and the first line of its message."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__


def place_of(problem: BaseException) -> str:
    """File and line where an exception was raised, as far as a report needs them."""
    trace = problem.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    parts = trace.tb_frame.f_code.co_filename.replace("\\", "/").split("/")
    return f" ({'/'.join(parts[-3:])}:{trace.tb_lineno})"


def unforeseen(problem: BaseException) -> BaseException:
    """What stands behind a fault of ours, which says more here than that it is one; other exceptions as they are."""
    cause = problem.__cause__ if isinstance(problem, InternalError) else None
    return problem if cause is None else cause


@contextmanager
def told(where: str) -> Iterator[None]:
    """Context in which an exception that nobody foresaw says where it was; errors of ours say enough.

    Raises:
        Broken: something was raised.
    """
    try:
        yield
    except (Refused, Broken):
        raise
    except Exception as problem:
        if isinstance(problem, VlmtokError) and not isinstance(problem, InternalError):
            raise
        cause = unforeseen(problem)
        raise Broken(f"{where}: {first_line(cause)}{place_of(cause)}") from problem


def settle(name: str, check: Callable[[], float | None]) -> Fact:
    """Runs a check; whatever it raises becomes the fact.

    Args:
        name: of the fact.
        check: returns the largest difference that it saw; raises `Broken` or `Refused`.
    """
    try:
        return Fact(name, OK, difference=check())
    except Refused as reason:
        return Fact(name, REFUSED, str(reason))
    except Broken as found:
        return Fact(name, BROKEN, str(found), found.difference)
    except Exception as problem:  # of host, library or ours: that is what is looked for
        cause = unforeseen(problem)
        if isinstance(cause, VlmtokError):  # the row is one that an adapter says it carries
            return Fact(name, BROKEN, f"vlmtok refuses what it should carry: {first_line(cause)}")
        return Fact(name, BROKEN, first_line(cause) + place_of(cause))


# ---------------------------------------------------------------------- comparing
def allowed(wanted: Tensor) -> float:
    """How far an output may be from `wanted` and still be the same maths."""
    scale = max(1.0, float(wanted.abs().max()))
    return CLOSE * scale if wanted.dtype is torch.float32 else COARSE * torch.finfo(wanted.dtype).eps * scale


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite where one of them is no number.

    Raises:
        Broken: the shapes differ.
    """
    if found.shape != wanted.shape:
        raise Broken(f"the output is {list(found.shape)} and should be {list(wanted.shape)}")
    apart = (found.double() - wanted.double()).abs().max()
    return float(apart.nan_to_num(nan=float("inf")))


def check_equal(found: Tensor, wanted: Tensor, what: str) -> float:
    """Bit for bit.

    Raises:
        Broken: they differ.
    """
    apart = difference(found, wanted)
    if not torch.equal(found, wanted):
        raise Broken(f"{what} differ by {apart:.2g} from the bare model's", apart)
    return apart


def check_close(found: Tensor, wanted: Tensor, what: str, wanted_is: str) -> float:
    """As far as rounding lets them.

    Raises:
        Broken: they differ by more.
    """
    apart = difference(found, wanted)
    if apart > allowed(wanted):
        raise Broken(f"{what} differ by {apart:.2g} from {wanted_is} ({allowed(wanted):.1g} is rounding)", apart)
    return apart


def check_cut(found: Tensor, wanted: Tensor, bare: Tensor, what: str) -> float:
    """An output of a cut, held against its oracle.

    Args:
        found: with the cut.
        wanted: by the oracle.
        bare: without any cut.
        what: it is.

    Raises:
        Refused: the cut changes so little that nothing would be proved.
        Broken: it is not what the oracle says.
    """
    moved, most = difference(wanted, bare), allowed(wanted)
    if difference(found, wanted) > most and torch.equal(found, bare):
        raise Broken(f"nothing was cut: {what} are the bare model's, {moved:.2g} off the oracle", moved)
    apart = check_close(found, wanted, what, "the oracle's")
    if moved < TELLING * most:
        raise Refused(f"it proves nothing: the cut moves {what} by {moved:.1g}, of which {most:.1g} may be rounding")
    return apart
