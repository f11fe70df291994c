"""What a release was asked, and which answers were no."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from .classes import HostClass, Signature
from .needs import ROLES, Role


@dataclass(frozen=True, order=True)
class Broken:
    """A fact that does not hold.

    Attributes:
        sentence: what is found instead.
        own: whether the host does not fit itself, so that the family does not run there without us either.
    """

    sentence: str
    own: bool = False


@dataclass
class Family:
    """Facts of one family in one release.

    Attributes:
        asked: how many facts were looked at.
        broken: those that do not hold, each once, with the classes that they are of.
    """

    asked: int = 0
    broken: dict[Broken, dict[str, None]] = field(default_factory=dict)


@dataclass
class Findings:
    """Everything that was found in one release.

    Attributes:
        package: name on the index.
        version: of the release.
        families: by name.
        notes: what holds now and will not for long.
        called: by role, the names that are in use.
    """

    package: str
    version: str
    families: dict[str, Family] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    called: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def asked(self) -> int:
        """How many facts were looked at."""
        return sum(family.asked for family in self.families.values())

    def about(self, family: str) -> Questions:
        """Where to put the facts of a family."""
        return Questions(self, self.families.setdefault(family, Family()))


def either(names: Role | tuple[str, ...]) -> str:
    """Names as text."""
    return " or ".join(f"`{name}`" for name in (names.names if isinstance(names, Role) else names))


class Questions:
    """Facts of a family, as they are asked.

    Args:
        findings: of the release.
        family: the family.
    """

    def __init__(self, findings: Findings, family: Family) -> None:
        self.findings = findings
        self.family = family

    def check(self, holds: object, sentence: str, where: HostClass | str = "", own: bool = False) -> bool:
        """Notes a fact.

        Args:
            holds: whether it does.
            sentence: what is the case where it does not, without names that differ from family to family.
            where: the class that it is of.
            own: whether it is the host's own business.

        Returns:
            Whether it holds.
        """
        self.family.asked += 1
        if not holds:
            classes = self.family.broken.setdefault(Broken(sentence, own), {})
            name = where if isinstance(where, str) else where.name
            classes.update({name: None} if name else {})
        return bool(holds)

    def takes(self, cls: HostClass, what: str, *roles: Role, method: str = "forward", swallows: bool = False) -> None:
        """Checks that a method has arguments.

        Args:
            cls: of the method.
            what: the class is, for sentences.
            roles: of the arguments.
            method: its name.
            swallows: whether ``**kwargs`` is as good.
        """
        signature = cls.signature(method)
        if not self.check(signature is not None, f"{what} has no method `{method}`", cls):
            return
        assert signature is not None
        for role in roles:
            kept = self.use(role, signature) or (swallows and signature.kwargs)
            self.check(kept, f"`{method}` of {what} has no argument {either(role)}", cls)
        self.deprecated(signature)

    def use(self, role: Role, signature: Signature) -> bool:
        """Notes which of the names of a role is in use; tells whether any is."""
        found = [name for name in role.names if name in signature.names]
        self.findings.called[next(name for name, known in ROLES.items() if known is role)].update(found[:1])
        return bool(found)

    def deprecated(self, signature: Signature) -> None:
        """Notes names of ours that a decorator takes for some time yet."""
        ours = {name for role in ROLES.values() for name in role.names}
        for old, new, until in signature.renamed:
            if old in ours:
                self.findings.notes[f"`{old}` is renamed `{new}` by a decorator until {until}"] = None
