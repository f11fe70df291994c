"""What a text model gives back: rows of the length that the caller expects."""

from __future__ import annotations

from typing import Any

from .. import host_objects
from .call import Call


def restore_recorded(call: Call, output: Any) -> None:
    """Hidden states that the host recorded get the columns of the prompt, each from those of its layer.

    Args:
        call: the call, which ran.
        output: of the text model; it is changed.
    """
    recorded = host_objects.recorded_states(output)
    if recorded is None:
        return
    made = []
    for index, states in enumerate(recorded):  # the input of layer 0, then what each layer gave
        shot = [shot for first, shot in call.places if first <= max(index - 1, 0)][-1]
        if index == len(recorded) - 1:  # the last one stands behind the final norm
            shot = call.places[-1][1]
        if states is not None and states.shape[1] == shot.length:
            states = shot.restore(states, call.columns)
        made.append(states)
    host_objects.set_recorded_states(output, tuple(made))
