"""IMA: leave FFN, attention or whole blocks of every n-th decoder layer out for visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.settings import check_choice, check_range
from ..core.site import SKIPS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import SiteError


def skipped_layers(depth: int, interval: int, start: int | None = None, end: int | None = None) -> list[int]:
    """Layers that skip (arXiv 2405.16700): those of a multiple of `interval` between two bounds.

    Args:
        depth: layers of the language model.
        interval: every so many layers.
        start: the layer behind which skipping begins, exclusive; None is 0.
        end: the layer before which it ends, exclusive; None is the depth.

    Returns:
        0-based layers i with ``start < i < end`` and ``i mod interval == 0``.
    """
    low, high = 0 if start is None else start, depth if end is None else end
    return [layer for layer in range(depth) if low < layer < high and layer % interval == 0]


@register_method
@dataclass(eq=False)
class IMA(Method):
    """Keeps every token, and leaves the FFN, the attention or the whole block of every n-th layer out for visual ones.

    What is left out adds nothing to a visual token: its residual connection alone is left. Its keys and values are made
    all the same, so that text looks at it and caches are as long as those of the bare model. The prompt alone skips:
    generated tokens run through everything.

    Algorithm:
        1. Layers i with ``start < i < end`` and ``i mod interval == 0`` skip.
        2. There, of a visual token x: ``x' = x + attn(x)`` without the FFN, ``x' = x + ffn(x)`` without attention,
           ``x' = x`` without the block. Text tokens run as they always do.
        3. Skipped FFNs, queries and output projections are not computed; products of queries and keys are, for all.

    Args:
        part: ``"ffn"``, ``"attn"`` or ``"block"``, what is left out.
        interval: every so many layers.
        start: layer behind which it begins (0-based, exclusive; -1 lets layer 0 skip); None is 0.
        end: layer before which it ends (exclusive); None is the number of layers.
    """

    paper = "Implicit Multimodal Alignment: On the Generalization of Frozen LLMs to Multimodal Inputs (NeurIPS 2024)"
    arxiv = "2405.16700"
    code = "https://github.com/mshukor/ima-lmms"
    parity = (
        "what a skipped layer does is ours, an identity; layers that skip equal the release's schedule (ima_schedule.*)"
    )
    deviations = (
        "Visual tokens alone skip, in prefill alone; the release skips for text too, and its modes choose between "
        "prefill, decode steps and both.",
        "Every skipped part is an identity. The release adds the norm of the input where attention or a prompt's FFN "
        "is skipped, and caches that norm itself as keys and values of a skipped attention.",
        "A skipped block has keys and values of its own in the cache; the release repeats those of the layer before.",
        "parallel_attn and parallel_block are left out: they skip nothing.",
        "A visual token that ends its row is not skipped, since the answer is read from it.",
    )
    caveats = (
        "FFNs are free to skip where it was measured, attention is not: on scenes-llava every second layer without its "
        "FFN answers 300 questions as the whole model does, for 11 % fewer MACs in all; without the block 92 % (99 %), "
        "and counting to nine falls from 23 to 10 of 25.",
    )
    scope = "sample"

    part: str = "ffn"
    interval: int = 2
    start: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.part, "IMA", "part", SKIPS)
        check_range(self.interval, "IMA", "interval", 1, kind=int)
        for name, least in (("start", -1), ("end", 0)):
            if getattr(self, name) is not None:
                check_range(getattr(self, name), "IMA", name, least, kind=int)

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input, where it looks on: nothing leaves."""
        layout.stage("decoder", "IMA")
        return [Site("projected")]

    def reduce(self, view: TokenView) -> Reduction | None:
        """Nothing leaves."""
        return None

    def count(self, counts: Counts) -> int:
        """All of them."""
        return counts.n

    def skip(self, layout: Layout) -> dict[int, str]:
        """The schedule.

        Raises:
            SiteError: no layer is left in it.
        """
        depth = layout.stage("decoder", "IMA").depth
        layers = skipped_layers(depth, self.interval, self.start, self.end)
        if not layers:
            raise SiteError(
                f"{self}: no layer i of the {depth} of {layout.family} has start < i < end and i mod "
                f"{self.interval} == 0; the first multiple behind 0 is {self.interval}"
            )
        return dict.fromkeys(layers, self.part)

    def remarks(self, layout: Layout) -> list[str]:
        """What is left out, where, and what of it is saved."""
        layers = list(self.skip(layout))
        where = f"decoder layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        said = [f"ima leaves {self.part} of {where} out for visual tokens of the prompt; no token leaves"]
        if self.part != "ffn":
            said.append(
                "ima: of a skipped attention, queries and output projections of visual tokens are saved; keys, values "
                "and the products of all queries run"
            )
            blind = [str(layer) for layer in layers if layer in layout.stages["decoder"].blind]
            if blind:
                said.append(
                    f"ima: what stands in the place of attention in decoder layers {', '.join(blind)} runs for all "
                    "tokens; nothing of it is saved"
                )
        return said
