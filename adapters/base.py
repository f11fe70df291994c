"""`Adapter`: one model family's hook points, and nothing of any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.sight import Sight
from ..core.site import Layout
from ..errors import UnsupportedModel
from .hosts import Host, Role, library_of

if TYPE_CHECKING:
    from ..core.attachment import Attachment

Projection = Callable[[Host, Tensor, str, dict[str, Tensor]], Tensor]
"""q or k, `[B, H, L, d]`, from the attention, its input, ``"q"`` or ``"k"``, and what was made of that input before: a
projection that gives both is called once. Modules are called, never their weights read, so that adapters and quantised
weights count."""


@dataclass(frozen=True)
class BlockSpec:
    """Where a pre-norm block can be hooked; a tower family is a row of these.

    The merge between attention and MLP takes three hooks: a pre-hook on the module whose input is the residual after
    attention, a hook on the last module of the MLP branch (not shared with the attention branch), and one on the block.

    Attributes:
        norm: path, in the block, of the norm before attention.
        attn: path of the attention.
        mid: path of the module that reads the residual after attention.
        branch_end: path of the last module of the MLP branch.
        mlp: path of the MLP.
        forms: attention classes that the row was written for, ``module:name`` (see `forms`).
        q: path, in the attention, of a module whose output is q, `[B, H, L, d]` or `[B, L, H d]`; None where there
            is none and q and k are computed again from the attention's input.
        k: the same for k.
        split: q or k, `[B, H, L, d]`, out of what the module at `q` or `k` gave, where it gives q, k and v together.
        project: q or k from the attention's input, as the block would compute it.
        bias: the attention's argument that takes a float bias on the keys, or None where there is none.
        bias_rank: 2 for `[B, L]`, 4 for `[B, 1, 1, L]`.
        heads: attribute of the attention with the number of heads; dots lead into what it holds.
        scale: factor of the logits, from the attention.
        rope: the block's argument with a rotary table, or None.
        rotate: from the attention and a table, what rotates `[B, H, L, d]`.
        through: whether the block changes the MLP branch behind `branch_end`, so that a merge must go through it.
        bounds: the block's argument with the boundaries of the rows that see each other, int `[segments + 1]`, or None.
        longest: its argument with the length of the longest of them, or None.
        by_name: whether its attention has no argument for a bias, but looks its function up by the name in its
            configuration, where one can be brought in (see `towers.sized_attention`).
        functions: names that the host must define beside the attention's class, since `rotate` calls them.
    """

    norm: str
    attn: str
    mid: str
    branch_end: str
    mlp: str
    project: Projection
    scale: Callable[[Host], float]
    heads: str
    bias: Role | None
    forms: tuple[str, ...] = ()
    bias_rank: int = 4
    q: str | None = None
    k: str | None = None
    split: Callable[[Host, Tensor, str], Tensor] | None = None
    rope: Role | None = None
    rotate: Callable[[Host, Any], Callable[[Tensor], Tensor]] | None = None
    through: bool = False
    bounds: Role | None = None
    longest: Role | None = None
    by_name: bool = False
    functions: tuple[str, ...] = ()

    @property
    def takes_bias(self) -> bool:
        """Whether something can be added to the logits of its keys."""
        return self.bias is not None or self.by_name


@dataclass(frozen=True)
class MeanPool:
    """A mean over a tower's tokens that a module reads, where a merged token counts by its size.

    Attributes:
        whole: module whose forward runs the tower, the pool and what is behind it.
        tokens: module whose output is what the pool reads.
        reader: module behind the pool, which reads its vector `[B, D]`.
        make: that vector from the pooled tokens `[B, L, C]` and their sizes, fp32 `[B, L]`; None are ones, and the
            vector the host's own.
        loose: whether the pool may be called behind another pass than the last, so that a vector must be recognised.
        same: whether the host still pools as it did when hooks were placed, from `whole`.
    """

    whole: nn.Module
    tokens: nn.Module
    reader: nn.Module
    make: Callable[[Tensor, Tensor | None], Tensor]
    loose: bool = False
    same: Callable[[Host], bool] = lambda whole: True


@dataclass(frozen=True)
class AttentionPool:
    """An attention with queries of its own over a tower's tokens, which can take log(size) on its keys.

    Attributes:
        whole: module whose forward runs the tower and the pool.
        reader: the attention.
        bias: its argument that takes a float bias on the keys.
        bias_rank: 2 for `[B, L]`, 4 for `[B, 1, 1, L]`.
        skip: protected tokens that it leaves out.
        tokens: where calls outside `whole` are to be recognised, module whose output it reads, as its first argument.
    """

    whole: nn.Module
    reader: nn.Module
    bias: Role
    bias_rank: int = 2
    skip: int = 0
    tokens: nn.Module | None = None


@dataclass(frozen=True)
class PackedForm:
    """How pictures of any size lie in the rows of a tower.

    Attributes:
        told: module that is told their sizes, and
        sizes: its argument with them, or None where all pictures have the size of its pixels.
        grids: frames, rows and columns of patches of each picture, from the value of that argument.
        spans: what a patch of each block sees: ``window``, ``frame``, or ``row`` (its picture; see `PackedTowerShape`).
        merge: patches along a side of the square that makes one visual token.
        shared: whether all pictures of a call lie in one row; else each is a row, padded at its end.
        windows: from the sizes, the order in which units of ``merge ** 2`` patches lie in the row, int64 `[units]`, and
            the boundaries of windows in it; None where units lie picture by picture.
        readers: modules that read the whole row of patches between blocks.
        lacks: why its rows cannot be told apart, or its features not be those of one block; empty where they can.
        masked: whether the host gives its blocks a mask that hides padding.
        by_token: from the sizes and the grids, the patches of each picture in the order of their tokens, int64
            `[patches]` each; None where the rule of the family tells it.
    """

    told: nn.Module
    sizes: Role | None
    grids: Callable[[Tensor], list[tuple[int, int, int]]]
    spans: tuple[str, ...]
    merge: int
    shared: bool = True
    windows: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    readers: tuple[nn.Module, ...] = ()
    masked: bool = False
    by_token: Callable[[Tensor, list[tuple[int, int, int]]], list[Tensor]] | None = None
    lacks: str = ""

    @property
    def windowed(self) -> frozenset[int]:
        """Blocks in which a patch sees its window alone."""
        return frozenset(layer for layer, span in enumerate(self.spans) if span == "window")


@dataclass(frozen=True)
class TowerSpec:
    """A tower as data.

    Attributes:
        block: hook points of each block.
        blocks: the blocks, in order.
        num_prefix: protected tokens in front; in a padded row they stand behind its patches.
        width: channels.
        heads: attention heads.
        grid: rows and columns of patches for an input of the configured size, or None.
        stem: the patch embedding's module that gives a map `[B, C, rows, columns]`, from which the grid of a picture is
            read; None where there is none, and the grid is the configured one where the count of tokens agrees.
        last: the last block whose output is used.
        stage: ``vision`` or ``text``.
        returns_grid: whether every patch gets its slot's features behind the last block that is used (zeros where it
            was dropped), for readers that want the whole grid.
        carries: whether its signals reach the language model's boundary, or which do.
        has_class_token: whether the first protected token is a class token; registers alone say nothing of the picture.
        masked: whether the host makes a mask of its own that hides nothing, as transformers does while it is traced.
        padded: whether the host itself hides patches of padding from the attention of a picture's others.
        maps: methods of the host that collect the outputs of blocks, and can lay them out as maps `[B, C, H, W]`.
        pools: where its tokens become one vector a picture and sizes can count.
        unpooled: why sizes cannot count in its pool; empty where they can, or where there is none.
        packed: how pictures of any size lie in its rows, or None where every row is a picture.
        whole: why no token can leave inside it; empty where one can.
    """

    block: BlockSpec
    blocks: tuple[nn.Module, ...]
    num_prefix: int
    width: int
    heads: int
    grid: tuple[int, int] | None = None
    stem: nn.Module | None = None
    last: int = -1
    stage: str = "vision"
    returns_grid: bool = False
    carries: bool | frozenset[str] = True
    has_class_token: bool = True
    masked: bool = False
    padded: bool = False
    maps: tuple[Callable[..., Any], ...] = ()
    pools: tuple[MeanPool | AttentionPool, ...] = ()
    unpooled: str = ""
    packed: PackedForm | None = None
    whole: str = ""


@dataclass(frozen=True)
class TextSpec:
    """A text tower of a dual encoder as data.

    Attributes:
        block: hook points of each block.
        blocks: the blocks, in order.
        ids: module whose call brings the token ids, and
        norm: the norm behind the last block; rows get their original length back before it.
        width: channels.
        heads: attention heads.
        mask: the attention's argument with the causal mask.
        end: column of the token that the head reads, int64 `[B]`, from ids `[B, L]`.
        causal: whether a token sees only what stands before it.
    """

    block: BlockSpec
    blocks: tuple[nn.Module, ...]
    ids: nn.Module
    norm: nn.Module
    width: int
    heads: int
    mask: Role
    end: Callable[[Tensor], Tensor]
    causal: bool = True


class Adapter:
    """Carries one family of models.

    Subclasses name their classes in `targets` as (module, qualified name), so that a model is recognised without
    importing its library.
    """

    name: ClassVar[str] = ""
    targets: ClassVar[tuple[tuple[str, str], ...]] = ()
    is_part: ClassVar[bool] = False
    """Whether vision-language models have such models as their towers."""

    def __init__(self, model: Host) -> None:
        """Reads the model; raises `UnsupportedModel` with the reason where it cannot be carried."""
        self.model: Any = model  # type checkers know nothing of a host's attributes

    def layout(self) -> Layout:
        """What the model offers to methods."""
        raise NotImplementedError

    def install(self, attachment: Attachment) -> None:
        """Places the hooks that the attachment's entries need."""
        raise NotImplementedError

    def account(self) -> Any:
        """The model's shape as counts and widths (see `vlmtok.core.model_shape`)."""
        raise NotImplementedError

    def preview(self, inputs: Mapping[str, Any], between: int | None = None) -> Sight:
        """What a processor's output will be in the model, as counts.

        Args:
            inputs: of one prompt, by the host's names.
            between: id of a token that stands between its pictures.
        """
        raise NotImplementedError

    def refuse(self, why: str) -> UnsupportedModel:
        """The error for a model of this family that cannot be carried."""
        return UnsupportedModel(f"{type(self.model).__name__} is not supported by adapter {self.name!r}: {why}")


def child(module: Host, path: str) -> Any:
    """The submodule at a dotted path; an empty path is the module itself. Any, since hosts' attributes are untyped.

    Raises:
        UnsupportedModel: there is none.
    """
    try:
        return module.get_submodule(path) if path else module
    except AttributeError:
        there = ", ".join(name for name, _ in module.named_children()) or "none"
        raise UnsupportedModel(
            f"{type(module).__name__} of {library_of(module)} has no module {path!r}; it has {there}. Use a version of "
            "constraints.txt, or a newer vlmtok"
        ) from None
