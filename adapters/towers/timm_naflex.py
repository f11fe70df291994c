"""timm: NaFlexVit, on pictures of one size, and on rows of patches with coordinates where no patch is padding.

Called with rows of patches (NaFlex), the host pools by ``patch_valid``, which tells padding. It has to follow the
tokens: the model gets a tensor of ours, which takes the form of the shortened row in front of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.model_shape import ModelShape
from ...core.threads import PerThread
from ...errors import PassError
from .. import forms, host_objects, hosts
from ..base import BlockSpec, Host, TowerSpec
from ..hosts import Arguments
from . import tower_account
from .timm_vit import EVA_BLOCK, VIT_BLOCK, TimmViT
from .tower import Tower


class TimmNaFlex(TimmViT):
    """timm's NaFlexVit: blocks of ViT or Eva behind an embedding that takes patches."""

    name = "timm-naflex"
    targets = (("timm.models.naflexvit", "NaFlexVit"),)
    blocks = ("timm.models.vision_transformer:Block", "timm.models.eva:EvaBlock")

    def __init__(self, model: Host) -> None:
        super().__init__(model)
        if len({forms.form(block) for block in map(forms.inner, model.blocks)}) > 1:
            raise self.refuse("its blocks are of several classes")

    def block_spec(self) -> BlockSpec:
        """Hook points of its blocks."""
        return EVA_BLOCK if forms.form(forms.inner(self.model.blocks[0])) == self.blocks[1] else VIT_BLOCK

    def embedding(self) -> nn.Module:
        """The module that makes tokens of pictures."""
        made: nn.Module = self.model.embeds
        return made

    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of patches that its position embeddings were made for; None where it has none."""
        size = self.model.embeds.pos_embed_grid_size
        return None if size is None else (int(size[0]), int(size[1]))

    def stem(self) -> nn.Module | None:
        """The embedding itself, which says which grid it made."""
        return self.embedding()

    def tower(self) -> TowerSpec:
        """The tower as data; the host makes a mask of its own for rows of patches, which hides padding alone."""
        return self._spec(masked=True)

    def install(self, attachment: Attachment) -> None:
        """Hooks on the blocks, and on what tells which patches are real."""
        spec = self.tower()
        if attachment.at("vision"):
            FollowingPatches(attachment, self.model, spec.num_prefix)
        attachment.drivers["vision"] = Tower(attachment, spec)

    def account(self) -> ModelShape:
        """The model's shape as counts and widths."""
        return tower_account.of_timm(self)


@dataclass
class Call:
    """A call of the whole model that runs in a thread.

    Attributes:
        inside: whether one runs.
        valid: what tells its pool which tokens are real, int or bool `[B, N]`; None where it got pictures.
    """

    inside: bool = False
    valid: Tensor | None = None


class FollowingPatches:
    """Has ``patch_valid`` follow the rows of a model that is called with rows of patches.

    Args:
        attachment: takes the hooks.
        model: the whole model.
        num_prefix: protected tokens in front.
    """

    def __init__(self, attachment: Attachment, model: Host, num_prefix: int) -> None:
        self.num_prefix = num_prefix
        self.calls = PerThread(Call)
        self.arguments = Arguments(model, [hosts.HIDDEN, hosts.PATCH_PLACES, hosts.PATCH_REAL])
        self.embedding = Arguments(model.embeds, [hosts.HIDDEN, hosts.PATCH_PLACES])
        attachment.hook(model, "pre", self.open)
        attachment.hook(model.embeds, "pre", self.embed)
        attachment.hook(model.norm, "post", self.follow)
        attachment.hook(model, "close", self.close)

    def open(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook on the whole model: puts a tensor of ours in the place of ``patch_valid``.

        Raises:
            PassError: some patches are padding, or the call is compiled.
        """
        call = self.calls.mine()
        call.inside, call.valid = True, None
        x = self.arguments.get(hosts.HIDDEN, args, kwargs)
        name = hosts.PATCH_REAL.names[0]
        valid = self.arguments.get(hosts.PATCH_REAL, args, kwargs)
        if isinstance(x, dict):
            valid = x.get(name, valid)
        if not isinstance(valid, Tensor):
            return None
        if torch.compiler.is_compiling():
            raise PassError(
                "compiled code cannot have patch_valid follow the rows of a compressed NaFlexVit; compile it for "
                "pictures [B, 3, H, W], or run rows of patches without torch.compile"
            )
        check_padding(valid)
        call.valid = valid.clone()
        changes = {hosts.HIDDEN: {**x, name: call.valid}} if isinstance(x, dict) else {hosts.PATCH_REAL: call.valid}
        return self.arguments.put(args, kwargs, changes)

    def embed(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook on the embedding.

        Raises:
            PassError: it gets rows of patches from a call that is not the model's own.
        """
        if self.calls.mine().inside or replaying():
            return
        if self.embedding.get(hosts.PATCH_PLACES, args, kwargs) is not None:
            raise PassError(
                "forward_features and forward_intermediates of a compressed NaFlexVit cannot take rows of patches, "
                "since the patch_valid that they give back would tell of patches that have left; call the model "
                "itself, or give pictures [B, 3, H, W]"
            )

    def follow(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the last norm: as many are real as are left."""
        call = self.calls.mine()
        left = host_objects.hidden_of(module, output).shape[1] - self.num_prefix
        valid: Any = call.valid
        if call.inside and valid is not None and valid.shape[1] != left:
            valid.set_(valid.new_ones(valid.shape[0], left))

    def close(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the whole model, behind an exception too."""
        call = self.calls.mine()
        call.inside, call.valid = False, None


def check_padding(valid: Tensor) -> None:
    """Refuses rows of patches with padding.

    Args:
        valid: `[B, N]`, which patches are real.

    Raises:
        PassError: some are not.
    """
    counts = valid.bool().sum(1)
    if valid.is_meta or int(counts.min()) == valid.shape[1]:
        return
    raise PassError(
        f"a NaFlexVit was called with rows of {valid.shape[1]} patches of which "
        f"{', '.join(map(str, counts.tolist()[:8]))} are real; a method keeps as many of each row and would choose "
        "among padding. Give pictures of one number of patches per call, cut to it (patches[:, :n], "
        "patch_coord[:, :n], patch_valid[:, :n]); their grids may differ"
    )
