"""Hooks inside decoder layers that catch what signals are derived from: q, k, the mask, changes, active neurons."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.signals import BY_ATTENTION, DECODER_SIGNALS, NEURONS
from ...core.threads import PerThread
from ...errors import UnsupportedModel
from .. import host_objects, hosts
from ..hosts import Arguments
from .attention import attention_form, branches
from .call import DecoderRun
from .layer_parts import last_map


class Catcher:
    """Catches, while a prefill with pictures runs, what its layers compute.

    Args:
        attachment: takes the hooks.
        running: what each thread runs.

    Attributes:
        compared: layers of which inputs and outputs of branches are compared.
    """

    def __init__(self, attachment: Attachment, running: PerThread[DecoderRun]) -> None:
        self.attachment = attachment
        self.running = running
        self.attentions: dict[int, Arguments] = {}
        self.branches: dict[type, Arguments] = {}
        self.compared: set[int] = set()

    def install(self, layer: int, block: nn.Module, needs: Collection[str]) -> None:
        """Places the hooks that signals of one layer need.

        Args:
            layer: its number.
            block: the layer.
            needs: names of signals; others than of a decoder are left out.
        """
        wanted = {name for name in needs if name in DECODER_SIGNALS}
        if not wanted:
            return
        put = self.attachment.hook
        if wanted & BY_ATTENTION:
            form = attention_form(block)
            assert form is not None  # the layout offers no signals elsewhere
            self.attentions[layer] = Arguments(form.attn, [hosts.ROTARY, hosts.MASK])
            put(form.attn, "pre", self.tap_attention, layer)
            put(form.projection("q"), "post", self.tap_q, layer)
            put(form.projection("k"), "post", self.tap_k, layer)
        if "transition" in wanted:
            found = branches(block)
            if found is None:
                raise UnsupportedModel(
                    f"decoder layer {layer}, a {type(block).__name__} of {hosts.library_of(block)}, is not known to be "
                    "a mixer and an MLP, whose inputs and outputs 'transition' compares"
                )
            self.compared.add(layer)
            for branch in found:
                self.branches[type(branch)] = Arguments(branch, [hosts.HIDDEN])
                put(branch, "post", self.tap_transition, layer)
        if NEURONS in wanted:
            reader = last_map(block)
            assert not isinstance(reader, str)  # the layout offers the signal at layers with one only
            put(reader, "pre", self.tap_active, layer)

    def tap_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention pre-hook: the rotary embeddings and the mask of the layer, and the keys that it held before."""
        caught = self._caught(layer)
        if caught is not None:
            arguments, call = self.attentions[layer], self.running.mine().call
            assert call is not None
            if call.cache is not None and call.stream is not None and call.stream.segment(layer).length:
                caught["past"] = host_objects.keys_in(module, call.cache, layer)  # a window forgets them behind it
            caught["rotary"] = arguments.get(hosts.ROTARY, args, kwargs)
            caught["mask"] = arguments.get(hosts.MASK, args, kwargs)

    def tap_q(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches what q is made from."""
        caught = self._caught(layer)
        if caught is not None:
            caught["q"] = output

    def tap_k(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """Catches what k is made from."""
        caught = self._caught(layer)
        if caught is not None:
            caught["k"] = output

    def tap_transition(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Catches how attention and MLP change their input, as two numbers a token."""
        caught = self._caught(layer)
        if caught is None:
            return
        call = self.running.mine().call
        given = None if call is None else call.whole.pop(layer, None)  # the module may have run on some tokens alone
        x = self.branches[type(module)].get(hosts.HIDDEN, args, kwargs) if given is None else given
        y = host_objects.branch_of(module, output, x)
        ratio, cosine = kernels.transition_stats(x.detach(), y.detach())
        caught.setdefault("transition", []).append(torch.stack([ratio, cosine], 1))

    def tap_active(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook on the MLP's last projection: which neurons are on."""
        caught = self._caught(layer)
        if caught is not None:
            caught["active"] = hosts.first_tensor(module, args, kwargs).detach() > 0

    def _caught(self, layer: int) -> dict[str, Any] | None:
        """Where taps of this layer go, while a prefill with pictures runs, or a call behind one that caches watch."""
        running = self.running.mine()
        call = running.call
        if call is None or running.muted or replaying() or (call.rows is None and not call.tracked):
            return None
        return call.taps.setdefault(layer, {})
