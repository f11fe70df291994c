"""Features of the tower that hosts add behind the first decoder layers: hooks of ours add them, to follow cuts.

The host would add them at the columns of the pictures, which a cut moves; it is told of none, and rows carry them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...core.attachment import Attachment
from ...core.hooks import replaying
from ...core.threads import PerThread
from .. import host_objects, hosts
from ..hosts import Arguments
from .call import DecoderRun, deepstack


class Stacker:
    """Adds the tower's features behind layers.

    Args:
        attachment: takes the hooks.
        running: what each thread runs.
        layers: arguments of the layers.
    """

    def __init__(self, attachment: Attachment, running: PerThread[DecoderRun], layers: Mapping[int, Arguments]) -> None:
        self.attachment = attachment
        self.running = running
        self.layers = layers

    def install(self, lm: Any) -> None:
        """Places the hooks on the layers of a text model."""
        depth = len(lm.layers)
        for layer in range(1, depth):
            self.attachment.hook(lm.layers[layer], "pre", self.add_before, layer)
        self.attachment.hook(lm.layers[-1], "post", self.add_behind, depth)

    def add_before(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer pre-hook: adds the tower's features of the layer before, as the host would between the two."""
        feature = self._feature(layer - 1)
        if feature is None:
            return None
        arguments = self.layers[layer]
        return arguments.put(args, kwargs, {hosts.HIDDEN: arguments.get(hosts.HIDDEN, args, kwargs) + feature})

    def add_behind(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The same behind the last layer, which no other follows."""
        feature = self._feature(layer - 1)
        if feature is None:
            return None
        return host_objects.with_hidden(output, host_objects.hidden_of(module, output) + feature)

    def _feature(self, layer: int) -> Tensor | None:
        """The tower's features behind a layer, `[B, L, C]`, while a prefill with pictures runs."""
        running = self.running.mine()
        if running.call is None or running.call.rows is None or running.muted or replaying():
            return None
        return running.call.rows.states.get(deepstack(layer))
