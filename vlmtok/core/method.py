"""`Method`: the base class of every method, what it is asked, and how it is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ParameterError
from .aliases import Alias
from .settings import check_range, format_value, plain_numbers, scaled
from .site import Counts, Layout, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .reduction import Reduction
    from .view import TokenView


@dataclasses.dataclass(eq=False, kw_only=True)
class CommonSettings:
    """Settings that every method has; `Method` sees to them, a subclass does nothing for it."""

    min_tokens: int = 0


class Method(CommonSettings):
    """Base class of every token-reduction method: settings and tensor maths, no model.

    A subclass is a dataclass (``eq=False``) decorated with `register_method`. It names its sites and answers
    each view with a `Reduction`. `docs/howto/own-method.md` has a worked example.

    Args:
        min_tokens: a picture (or what else a view row is) of no more than this many tokens, as it entered the stage,
            is left whole; by keyword alone.
    """

    name: ClassVar[str] = ""
    """Name in the registry and in spec strings; the class name in lower case unless given."""
    paper: ClassVar[str] = ""
    """Title of the paper and where it appeared."""
    arxiv: ClassVar[str] = ""
    """arXiv number."""
    code: ClassVar[str] = ""
    """Official code, or empty."""
    training_free: ClassVar[bool] = True
    """Whether the method works on a released checkpoint as it is."""
    parity: ClassVar[str] = ""
    """What our implementation has been compared with."""
    deviations: ClassVar[tuple[str, ...]] = ()
    """Where it differs from the released code, one sentence each."""
    caveats: ClassVar[tuple[str, ...]] = ()
    """Where it does badly by its nature, with the measurement and the reason."""
    aliases: ClassVar[tuple[Alias, ...]] = ()
    """Names that the paper and its code have for parameters; read in spec strings, never written."""
    scope: ClassVar[str] = "picture"
    """What one view row is (`site.SCOPES`): ``picture``, ``part`` (crop or frame), ``clip``, ``head`` (of a cache); a
    site may say another."""
    wants: ClassVar[tuple[str, ...]] = ()
    """Signals that only a user can give, and without which it does not run: `compress(..., signals={name: ...})`.
    Estimates and what is told of a method take them for given."""
    joins_cuts: ClassVar[bool] = False
    """Whether cuts of a schedule that fall on one layer, since layers before it have no attention rows, are one: the
    last of them. They are refused otherwise."""
    proportional: bool = False
    """Whether attention logits get + log(size) after a merge, in towers and on merged entries of a cache."""
    merge_keys: ClassVar[str] = "kept"
    """What becomes of keys where entries of a cache merge: ``kept``, the key of the entry that represents the slot, or
    ``weighted``, the same mean as of values (turned by different positions, keys of one token are not alike)."""
    pooling: str | None = None
    """What a merged token counts in a head that pools a tower's tokens, of `POOLINGS`; None leaves it: ``"size"``."""
    budget_parameter: ClassVar[str] = ""
    """The parameter that `vlmtok.budget` moves; empty where there is none."""
    version: ClassVar[int] = 1
    """Number of the selection: raised when the same settings on the same tokens choose, order or join differently.
    It is part of a serving engine's cache key."""
    counted: ClassVar[str] = ""
    """Settings, as in a spec string, under which the count is known from host ints and every site lies in front of the
    language model: what a serving engine tells who asks for others. Empty where the defaults are such, and where no
    setting is."""
    budget: Any = None
    """What `vlmtok.budget` was asked and reached, on the methods that it returns."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, whole in _WHOLE.items():
            if name in cls.__dict__:
                setattr(cls, name, _sparing(cls.__dict__[name], whole))

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings from a sweep may be NumPy's numbers; they become Python's, as specs and checks know them."""
        value = plain_numbers(value)
        if name == "min_tokens":
            check_range(value, type(self).__name__, name, 0, kind=int)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------ what a method says
    def sites(self, layout: Layout) -> list[Site]:
        """Where the method wants to act on a model.

        Args:
            layout: what the model offers.

        Returns:
            Sites in any order; they are visited in the order of the forward.
        """
        raise NotImplementedError

    def reduce(self, view: TokenView) -> Reduction | None:
        """Decides what stays. Runs under no_grad, in prefill only; no ``.item()``; works on meta tensors.

        Args:
            view: the tokens and their signals.

        Returns:
            The reduction, or None to leave the tokens as they are.
        """
        raise NotImplementedError

    def count(self, counts: Counts) -> int | None:
        """How many slots `reduce` returns. Serving engines ask it alone, before any tensor exists.

        Args:
            counts: the view as host ints.

        Returns:
            The number (`counts.n` where nothing is cut), or None where it depends on content.

        Raises:
            ParameterError: these ints do not suit the settings. Wherever `reduce` refuses for such a reason, this does
                too; a grid that is None may be one that is not known yet.
        """
        return counts.n

    def remarks(self, layout: Layout) -> list[str]:
        """What a reader of reports must know about how the method acts on a model: choices that it made by itself.

        Args:
            layout: what the model offers.

        Returns:
            Sentences; none by default.
        """
        return []

    def skip(self, layout: Layout) -> dict[int, str]:
        """Work of decoder layers to leave out for visual tokens, in prefill only; the tokens stay.

        A branch that is left out adds nothing: what enters it goes on as it is. Keys and values are made of every
        token. The visual tokens are those that are still there, without one that ends its row.

        Args:
            layout: what the model offers.

        Returns:
            0-based layer to ``"ffn"``, ``"attn"`` or ``"block"`` (both); nothing by default.
        """
        return {}

    def plan(self, views: Sequence[TokenView]) -> None:
        """Looks at all layers of the cache at once, before `reduce` is asked of any: a budget over layers.

        Args:
            views: of the same view rows at all ``cache`` sites of the method, in the order of the layers. Their tokens
                have no data (they are on the meta device): a plan goes by signals and counts. All of them share one
                `row`, which the views of `reduce` show again; what the plan decides is written there.
        """

    def together(self, counts: Sequence[Counts]) -> int | None:
        """Entries that stay in all layers of the cache together, where `count` cannot say how many each keeps.

        Args:
            counts: of the same view row at all ``cache`` sites of the method, in the order of the layers.

        Returns:
            How many, so that bytes are known beforehand; None where content decides that, too.
        """
        return None

    def insert(self, view: TokenView) -> Tensor | None:
        """Tokens to put at the end of the row for one block; asked at ``start`` sites.

        Args:
            view: the tokens; the signal ``inserted`` holds the outputs of this method's previous insert.

        Returns:
            `[B, E, C]`, or None.
        """
        return None

    def build(self, layout: Layout) -> nn.Module | None:
        """Parameters and buffers that live across forwards; owned by the attachment.

        Args:
            layout: what the model offers.

        Returns:
            A module, or None.
        """
        return None

    def finish(self, logits: Tensor, row: MutableMapping[str, Any], memory: nn.Module | None) -> Tensor:
        """Corrects class logits after a forward; called by `vlmtok.zero_shot`, never by a hook.

        Args:
            logits: `[B, classes]`.
            row: this method's row dict of the last forward.
            memory: what `build` made.

        Returns:
            `[B, classes]`.
        """
        return logits

    def at_level(self, level: float, layout: Layout, tokens: int) -> Method:
        """The same method at another strength; what `vlmtok.budget` searches over.

        Args:
            level: from 0 (as much as the method can) to 1 (as little); a higher level never leaves fewer tokens.
            layout: what the model offers.
            tokens: visual tokens of a picture.

        Returns:
            A new method.

        Raises:
            ParameterError: the method has no such parameter, or it is None.
        """
        name = self.budget_parameter
        if not name or getattr(self, name) is None:
            why = f"{name}=None leaves the number to the method" if name else "it has no parameter for it"
            raise ParameterError(f"{self}: a budget cannot be set, {why}; parameters: {', '.join(self.settings())}")
        value = scaled(getattr(self, name), level, tokens)
        return dataclasses.replace(self, **{name: value})

    def fitted(self, layout: Layout) -> Method | None:
        """The same method with a schedule of its own spread over the layers where a model lets tokens leave.

        Asked where some layers of a model let none leave; errors name it.

        Args:
            layout: what the model offers.

        Returns:
            A new method, or None where its schedule is the user's or has no such form.
        """
        return None

    # ------------------------------------------------------------------ text form
    @classmethod
    def spec_name(cls) -> str:
        """Name in the registry and in spec strings."""
        return cls.__dict__.get("name") or cls.__name__.lower()

    def settings(self) -> dict[str, Any]:
        """The parameters, by name."""
        return {item.name: getattr(self, item.name) for item in setting_fields(type(self))}

    def __str__(self) -> str:
        changed = []
        for item in setting_fields(type(self)):
            value = getattr(self, item.name)
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            if value != default or type(value) is not type(default):
                changed.append(f":{item.name}={format_value(value)}")
        return self.spec_name() + "".join(changed)


def setting_fields(cls: type[Method]) -> list[dataclasses.Field[Any]]:
    """The settings of a class of methods as fields: its own, then those that it shares with others."""
    found = [item for item in dataclasses.fields(cls) if item.init] if dataclasses.is_dataclass(cls) else []
    common = {item.name for item in dataclasses.fields(CommonSettings)}
    return sorted(found, key=lambda item: (item.kw_only, item.name in common))


_WHOLE: dict[str, Callable[[Any], Any]] = {
    "reduce": lambda view: None,
    "insert": lambda view: None,
    "count": lambda counts: counts.n,
}
"""What a method answers of a view row, or its counts, that is too small to be cut."""


def _sparing(answer: Callable[[Any, Any], Any], whole: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """An answer of a method that leaves small view rows whole."""

    @functools.wraps(answer)
    def spared(self: Method, of: Any) -> Any:
        return whole(of) if of.entered <= self.min_tokens else answer(self, of)

    return spared
