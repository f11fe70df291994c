"""What a loaded model consists of, for people: family, tower, language model, visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..adapters import adapter_for
from ..errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn


def parts_of(model: nn.Module) -> tuple[list[list[str]], list[str]]:
    """A model's parts as its adapter counts them.

    Args:
        model: any module.

    Returns:
        Rows of what and how much, and notes; a model that no adapter carries has a note alone.
    """
    try:
        carrier = adapter_for(model)
        layout = carrier.layout()
        shape = carrier.account()
    except UnsupportedModel as problem:
        return [], [f"cannot be compressed: {problem}"]
    except NotImplementedError:
        return [["family", carrier.name]], ["the adapter does not count layers and tokens"]
    rows = [["family", layout.family]]
    if shape.vision is not None:
        tower = shape.vision
        said = f"{tower.depth} layers, {tower.blocks[0].width} channels, {tower.tokens} tokens"
        if tower.protected:
            said += f" ({tower.protected} of them no patches)"
        if tower.first:
            path = tower.first.rpartition(".")[0]
            said += f", {path} of {type(carrier.model.get_submodule(tower.first)).__name__}"
        rows.append(["vision tower", said])
    if shape.text is not None:
        rows.append(["text tower", f"{shape.text.depth} layers, {shape.text.blocks[0].width} channels"])
    if shape.language is not None:
        first = shape.language.blocks[0]
        heads = f"{first.heads} heads" + (f" ({first.kv_heads} of keys)" if first.kv_heads != first.heads else "")
        rows.append(["language model", f"{shape.language.depth} layers, {first.width} channels, {heads}"])
    visual = shape.visual
    if not visual and shape.language is None and shape.vision is not None:
        visual = shape.vision.tokens - shape.vision.protected
    rows.append(["visual tokens of a picture", str(visual) if visual else "depend on its size"])
    rows.append(["tokens can leave at", ", ".join(layout.stages) or "no stage"])
    return rows, [*(f"not at {stage}: {why}" for stage, why in layout.without.items()), *shape.notes]
