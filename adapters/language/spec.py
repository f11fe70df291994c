"""A family of vision-language models as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..hosts import Role


@dataclass(frozen=True)
class BlockRule:
    """Where a language model lets picture tokens look at each other in both directions.

    Attributes:
        types: type ids whose columns form blocks.
        runs: whether each run of such columns is a block of its own; else all are one.
        full: whether full-attention layers have blocks.
        sliding: in sliding layers, ``and`` is window AND (causal OR block), ``or`` is (window AND causal) OR block;
            None has no blocks there.
        when: field of the text config and the value with which the rule holds, or None for always.
        first_only: only the call that fills an empty cache has blocks.
    """

    types: tuple[int, ...] = (1,)
    runs: bool = True
    full: bool = True
    sliding: str | None = "and"
    when: tuple[str, str] | None = None
    first_only: bool = False


@dataclass(frozen=True)
class VLMSpec:
    """A family of vision-language models as data; paths start at the inner model (`core`).

    Attributes:
        core: path of the inner model from the top one; empty where the model is its own core.
        lm: path of the text model, whose `layers` hold the decoder.
        tower: path of the vision tower.
        projector: path of the module that maps tower features to the text width.
        ids: config fields that hold placeholder ids: image first, video second.
        mask: what masks the text model gets: ``2d`` (it builds its own), ``4d`` or ``dict`` (built outside).
        types: argument of the core with type ids, or None.
        block: bidirectional blocks, or None.
        positions: ``1d`` or ``mrope``.
        gather: arguments of the text model with one entry for each token, `[B, S, ...]`, that a cut must follow.
        layer_args: arguments of a layer with such entries.
        deepstack: arguments of the text model with (mask of visual columns, features added behind the first layers).
        feature: config field with the index of the hidden state that the projector reads; None means the last.
        last_cut: from the text config, the last layer at whose start a cut is possible, or None for any.
        tower_cut: whether tokens may leave inside the tower: ``slots`` (the picture's first placeholders take what is
            left), ``spread`` (every patch gets its slot's features behind the last block), ``free`` (whatever reads
            the tower takes any number), or None.
        lengths_of: whose lengths the encoder's outputs tell: ``picture``, ``crop`` (several of them one picture),
            ``sample`` (all pictures of a prompt together) or ``crops`` (a prompt's crops, each a run of its own).
        parts: how a picture's tokens fall into parts (see `parts`).
        thumbnail: which part shows the whole picture where there are several: ``first``, ``last`` or None.
        grid_arguments: arguments of the core that tell rows and columns of pictures, and of clips (see `shapes`); they
            come along with pixels.
        tower_size_argument: argument of the tower that tells the same, where nothing else does, or None.
        projects_late: whether `generate` may hand over what the tower gave, so that the projector runs in the inner
            model.
        boundary: None, or why tokens cannot leave before the language model.
        whole: why tokens cannot leave inside the tower, where they cannot.
        patches: how a row's patches become the tokens that the projector gives (see `patches`), where each patch has
            no token of its own and signals of the tower are to reach the language model; or None.
        joins: from the configuration of the whole model, patches that make one token of the language model, and one row
            of what the projector multiplies, where pictures may be several rows of the tower; None where each does.
        slots: of the inner model, whether its projector multiplies padding of the tower's rows; None where none does.
        varies: whether rows of the tower make different numbers of tokens: crops are cut off, pooled or padded.
        latents: whether its cache holds a latent of each token, and no keys and values of heads (MLA).
        attends: whether its decoder's attention is of a form of which rows can be derived (see `attention`).
        packing_methods: methods of the core that reassemble a picture's crops and pool a clip's frames behind the
            projector (empty where there are no clips), or None where it does neither.
    """

    core: str = "model"
    lm: str = "language_model"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    ids: tuple[str, ...] = ("image_token_id",)
    mask: str = "2d"
    types: Role | None = None
    block: BlockRule | None = None
    positions: str = "1d"
    gather: tuple[Role, ...] = ()
    layer_args: tuple[Role, ...] = ()
    deepstack: tuple[Role, Role] | None = None
    feature: str | None = "vision_feature_layer"
    last_cut: Callable[[Any], int] | None = None
    tower_cut: str | None = None
    lengths_of: str = "picture"
    parts: str = "one"
    thumbnail: str | None = None
    grid_arguments: tuple[Role, ...] = ()
    tower_size_argument: Role | None = None
    projects_late: bool = False
    boundary: str | None = None
    whole: str | None = None
    patches: str | None = None
    joins: Callable[[Any], int] | None = None
    packing_methods: tuple[str, str] | None = None
    varies: bool = False
    latents: bool = False
    attends: bool = True
    slots: Callable[[Any], bool] | None = None
