"""Pools behind a tower: a merged token counts there as often as it stands for patches.

A pool is a function of the host, where no hook stands: the module behind it gets the weighted vector in place of the
host's. Inside one forward of the whole model that vector is the running pass's; a head that is called by itself is told
the pass by its vector, which is compared with the plain ones of the passes that are still at hand.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.settings import POOLINGS, check_choice
from ...core.threads import PerThread
from ...errors import ParameterError, PassError, UnsupportedModel, VlmtokWarning
from .. import host_objects, hosts
from ..base import AttentionPool, Host, MeanPool, TowerSpec
from ..hosts import Arguments
from .checks import hides_nothing
from .pool_notes import Noted, PoolState, nearest
from .running import RunningPasses


def mean_of(tokens: Tensor, size: Tensor | None) -> Tensor:
    """The mean of tokens, each as often as it stands for patches; without a matrix product, so that no MAC is added.

    Args:
        tokens: `[B, N, C]`.
        size: fp32 `[B, N]`, or None for the plain mean.

    Returns:
        `[B, C]`, in the tokens' dtype, summed in fp32 at least.
    """
    if size is None:
        return tokens.mean(1)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    share = size.to(wide) / size.to(wide).sum(1, keepdim=True)
    return (tokens.to(wide) * share.unsqueeze(-1)).sum(1).to(tokens.dtype)


def wished_pooling(attachment: Attachment, spec: TowerSpec) -> str | None:
    """What merged tokens count in the pools of a tower; None where no method acts in it.

    Args:
        attachment: whose methods.
        spec: the tower as data.

    Raises:
        ParameterError: methods wish different things.
        UnsupportedModel: a method wants sizes in an attention pool, and there is none that takes them.
    """
    entries = attachment.at("vision") if spec.stage == "vision" else []
    if not entries:
        return None
    wishes = {entry.method.pooling: entry.method for entry in entries if entry.method.pooling is not None}
    if len(wishes) > 1:
        raise ParameterError(
            f"{' and '.join(map(str, wishes.values()))} wish pooling={' and '.join(map(repr, wishes))} of one model; "
            "give them the same"
        )
    wish = next(iter(wishes), "size")
    check_choice(wish, str(wishes.get(wish)), "pooling", POOLINGS)
    if wish == "attention" and not any(isinstance(pool, AttentionPool) for pool in spec.pools):
        raise UnsupportedModel(
            f"{wishes[wish]} wants sizes in an attention pool, but {spec.unpooled or 'this tower is read by none'}; "
            "pooling='size' weights means, pooling='plain' nothing"
        )
    return wish


def install_pools(attachment: Attachment, spec: TowerSpec, running: RunningPasses) -> None:
    """Hooks on the pools of a tower, as its methods wish.

    Args:
        attachment: whose methods and hooks.
        spec: the tower as data.
        running: its passes.

    Raises:
        ParameterError, UnsupportedModel: as `wished_pooling`.
    """
    wish = wished_pooling(attachment, spec)
    if wish in (None, "plain"):
        return
    for pool in spec.pools:
        if isinstance(pool, MeanPool):
            MeanHooks(attachment, running, pool)
        elif wish == "attention":
            AttentionHooks(attachment, running, pool)
    if spec.unpooled:
        attachment.said.append(f"merged tokens count once each in the head: {spec.unpooled}")


class PoolHooks:
    """Hooks on one pool.

    Args:
        attachment: takes the hooks.
        running: the passes through the tower.
        pool: as data.
        loose: whether calls outside of the whole model are to be recognised.
        same: whether the host still pools as it did.
    """

    def __init__(
        self,
        attachment: Attachment,
        running: RunningPasses,
        pool: MeanPool | AttentionPool,
        loose: bool,
        same: Callable[[Host], bool],
    ) -> None:
        self.running = running
        self.loose = loose
        self.same = same
        self.states = PerThread(PoolState)
        attachment.hook(pool.whole, "pre", self.open)
        attachment.hook(pool.reader, "pre", self.give)
        attachment.hook(pool.whole, "close", self.close)

    def open(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook on the whole model.

        Raises:
            PassError: its pooling was changed since hooks were placed.
        """
        if not self.same(module):
            raise PassError(
                f"the pooling of this {type(module).__name__} was changed while a compression is on it; end the "
                "compression (vlmtok.remove(model)) and compress again"
            )
        state = self.states.mine()
        state.inside, state.ready = True, None
        if not torch.compiler.is_compiling():
            state.known = [noted for noted in state.known if noted.lives]

    def close(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the whole model, behind an exception too: nothing of the pass is kept."""
        state = self.states.mine()
        state.inside, state.ready = False, None

    def give(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook on the reader."""
        raise NotImplementedError

    def take(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Hook on the module whose output is pooled."""
        self.note(host_objects.hidden_of(module, output))

    def note(self, tokens: Tensor) -> None:
        """Notes what a pass leaves for the pool; tokens that are not those of the running pass are let by."""
        run = self.running.trained if replaying() else self.running.mine
        if run is None or tokens.shape[1] != run.sequence.row.length:
            return
        state = self.states.mine()
        noted = self.made(tokens, run.sequence.size)
        if state.inside:
            state.ready = noted
        elif self.loose:
            noted.plain = self.vector(tokens).detach()
            if torch.compiler.is_compiling():
                state.ready = noted
            else:
                noted.tokens = weakref.ref(tokens)
                state.known = [*(other for other in state.known if other.lives), noted]

    def made(self, tokens: Tensor, size: Tensor | None) -> Noted:
        """What a pass leaves."""
        return Noted(size)

    def vector(self, tokens: Tensor) -> Tensor:
        """What the host makes of the tokens, `[B, D]`."""
        raise NotImplementedError

    def recognise(self, vector: Tensor) -> Noted | None:
        """The pass whose tokens the host has made a vector of, outside of the whole model.

        Args:
            vector: `[B, D]`.
        """
        if torch.compiler.is_compiling():
            return self.states.mine().ready
        state, traced = self.states.mine(), self.states.traced.ready
        known = [*state.known, *([] if traced is None else [traced])]
        known = [noted for noted in known if noted.plain is not None and noted.plain.shape == vector.shape]
        if vector.is_meta or (vector.is_cuda and torch.cuda.is_current_stream_capturing()):
            return known[-1] if known else None  # nothing can be looked at here
        found = nearest(vector.detach(), known)
        state.known = [noted for noted in state.known if noted.lives]
        if found is None:
            warnings.warn(
                "the head was called with tokens that no pass of this compression left in this thread, so that it is "
                "not known how many patches each stands for: they are pooled as they are",
                VlmtokWarning,
                stacklevel=2,
            )
        return found


class MeanHooks(PoolHooks):
    """Hooks on a mean; see `PoolHooks`."""

    def __init__(self, attachment: Attachment, running: RunningPasses, pool: MeanPool) -> None:
        super().__init__(attachment, running, pool, pool.loose, pool.same)
        self.make = pool.make
        self.arguments = Arguments(pool.reader, [hosts.HIDDEN])
        attachment.hook(pool.tokens, "post", self.take)

    def made(self, tokens: Tensor, size: Tensor | None) -> Noted:
        """The weighted vector, made here: whoever calls the head by itself may hold the tokens no longer."""
        return Noted(size, None if size is None else self.make(tokens, size))

    def vector(self, tokens: Tensor) -> Tensor:
        """The host's own mean."""
        return self.make(tokens, None)

    def give(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook on the module behind the pool: hands it the weighted vector."""
        plain = self.arguments.get(hosts.HIDDEN, args, kwargs)
        state = self.states.mine()
        if not isinstance(plain, Tensor) or plain.dim() != 2 or not (state.inside or self.loose):
            return None
        noted = state.ready if state.inside else self.recognise(plain)
        state.ready = None
        if noted is None or noted.pooled is None:
            return None
        return self.arguments.put(args, kwargs, {hosts.HIDDEN: noted.pooled.to(plain.dtype)})


class AttentionHooks(PoolHooks):
    """Hooks on an attention pool: log(size) on its keys, as proportional attention has it; see `PoolHooks`."""

    def __init__(self, attachment: Attachment, running: RunningPasses, pool: AttentionPool) -> None:
        super().__init__(attachment, running, pool, pool.tokens is not None, lambda whole: True)
        self.bias, self.rank, self.skip = pool.bias, pool.bias_rank, pool.skip
        self.arguments = Arguments(pool.reader, [hosts.HIDDEN, pool.bias])
        if pool.tokens is not None:
            attachment.hook(pool.tokens, "post", self.take)

    def vector(self, tokens: Tensor) -> Tensor:
        """The mean of what the pool reads."""
        return tokens[:, self.skip :].mean(1)

    def give(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook on the attention."""
        x = self.arguments.get(hosts.HIDDEN, args, kwargs)
        if self.states.mine().inside:
            size = self.running.of(replaying()).sequence.size
        else:
            noted = self.recognise(x.mean(1))
            size = None if noted is None else noted.size
        if size is None:
            return None
        mask = self.arguments.get(self.bias, args, kwargs)
        if mask is not None and not hides_nothing(mask):
            raise hosts.changed(module, "a pool comes with an attention mask of the host's own")
        bias = size[:, self.skip :].log().to(x.dtype)
        bias = bias[:, None, None] if self.rank == 4 else bias
        return self.arguments.put(args, kwargs, {self.bias: bias})
