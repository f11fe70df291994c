"""A learned scorer: visual tokens by a small network that reads the first layer's attention of the instruction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.method import Method
from ..core.reduction import Reduction
from ..core.registry import register_method
from ..core.selection import keep_top
from ..core.settings import check_choice, check_keep, keep_count
from ..core.site import POSITIONS, Counts, Layout, Site
from ..core.view import TokenView
from ..errors import ParameterError

CHANNELS = (32, 64, 128, 256, 512)


class ConvScorer(nn.Module):
    """Five depthwise-separable 1-D convolutions over the tokens of a picture, and one number for each.

    It takes pictures of any number of tokens. Its input is divided by its mean, so that prompts of any length look
    alike.

    Args:
        channels: behind each convolution.
        kernel: tokens that a convolution sees, an odd number.
    """

    def __init__(self, channels: tuple[int, ...] = CHANNELS, kernel: int = 9) -> None:
        super().__init__()
        widths = (1, *channels)
        self.depthwise = nn.ModuleList(nn.Conv1d(c, c, kernel, padding=kernel // 2, groups=c) for c in widths[:-1])
        self.pointwise = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(widths, channels))
        self.head = nn.Conv1d(channels[-1], 1, 1)

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> ConvScorer:
        """The network whose weights these are.

        Raises:
            RuntimeError, KeyError, IndexError: they are those of another one.
        """
        depth = sum(name.startswith("pointwise.") and name.endswith(".weight") for name in state)
        made = cls(
            tuple(state[f"pointwise.{i}.weight"].shape[0] for i in range(depth)), state["depthwise.0.weight"].shape[-1]
        )
        made.load_state_dict(state, assign=True)
        return made

    def forward(self, attention: Tensor) -> Tensor:
        """Scores of tokens.

        Args:
            attention: `[B, 1, N]`, what the instruction attends to.

        Returns:
            `[B, N]`, before a softmax over the tokens.
        """
        x = attention / attention.mean(-1, keepdim=True).clamp(min=1e-12)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise):
            x = F.gelu(pointwise(depthwise(x)))
        scores: Tensor = self.head(x)[:, 0]
        return scores


def load_scorer(path: str) -> ConvScorer:
    """A trained `ConvScorer` out of a safetensors file.

    Raises:
        ParameterError: there is none, or it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ParameterError(f"Learned: scorer={path!r} is no file; a path to weights of a ConvScorer, or a module")
    try:
        return ConvScorer.of_state(load_file(path))
    except (SafetensorError, RuntimeError, KeyError, IndexError) as problem:
        raise ParameterError(
            f"Learned: scorer={path!r} does not hold the weights of a ConvScorer ({problem}); examples/train_scorer.py "
            "writes such files"
        ) from problem


def instruction_score(attention: Tensor) -> Tensor:
    """Attention of the instruction on each visual token.

    Args:
        attention: `[B, H, T, N]` or `[B, H, N]`, softmax over the whole row, cut to the visual tokens.

    Returns:
        fp32 `[B, N]`, the mean over heads and rows.
    """
    return attention.float().flatten(1, -2).mean(1)


@register_method
@dataclass(eq=False)
class Learned(Method):
    """Keeps the visual tokens that a small trained network picks by the first decoder layer's attention of the text.

    The network stands for what gradients through all layers would say of a token. Bring your own, or train ours with
    ``examples/train_scorer.py``: one network a model. Without one the first layer's attention itself is the score.

    Algorithm:
        1. In front of decoder layer 0 its own norm, queries and keys give the attention of the text behind the picture;
           ``a_n`` is its mean over heads and text rows.
        2. ``s = scorer(a)``, or ``s = a`` without a scorer.
        3. The k tokens of highest s_n stay, in their order.

    Args:
        keep: share (float) or count (int) of a picture's tokens.
        scorer: a module from `[B, 1, N]` to `[B, N]`, a path to the safetensors file of a `ConvScorer`, or None.
        positions: ``"renumber"`` or ``"keep"`` the position ids; None is the model's default.
    """

    paper = "an explainability-guided compressor (ICLR 2026), as far as its abstract and reviews tell"
    arxiv = "2506.01097"
    training_free = False
    parity = "ours: there is no public code; kernel sizes, learning rate and details of the labels are not known"
    deviations = (
        "Without text behind the picture the row of the prompt's last token stands in for the instruction.",
        "Text behind the picture includes the prompt's template.",
        "The network's input is divided by its mean; kernels see 9 tokens.",
        "One network scores each picture by itself; the paper trains one for pictures and one for clips.",
    )
    caveats = (
        "On tiny-llava attention of the first layer says little of what is asked: with 16 of 144 tokens it answers "
        "47.5 % as it is and 60.0 % through a network of 600 questions and 10 epochs; Random 73.3 %, DivPrune 96.7 %, "
        "and the labels themselves 99.2 % (120 held-out questions, benchmarks/results/learned_scorer.csv).",
    )
    budget_parameter = "keep"

    keep: float | int = 0.5
    scorer: Any = None
    positions: str | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep, "Learned")
        check_choice(self.positions, "Learned", "positions", (None, *POSITIONS))
        path = isinstance(self.scorer, str) and self.scorer.endswith(".safetensors")
        if not (self.scorer is None or path or isinstance(self.scorer, nn.Module)):
            raise ParameterError(
                f"Learned: scorer={self.scorer!r} is not possible; a module from [B, 1, N] to [B, N], a path to "
                "weights (.safetensors), or None"
            )

    def sites(self, layout: Layout) -> list[Site]:
        """The language model's input."""
        layout.stage("projected", "Learned")
        return [Site("projected", needs=("text_attention", "last_attention"), positions=self.positions)]

    def build(self, layout: Layout) -> nn.Module | None:
        """The network."""
        return load_scorer(self.scorer) if isinstance(self.scorer, str) else self.scorer

    def reduce(self, view: TokenView) -> Reduction | None:
        """The best tokens by the network, or by attention itself."""
        k = self.count(view.counts)
        if k == view.counts.n:
            return None
        attention = view.maybe("text_attention")
        score = instruction_score(view.signal("last_attention") if attention is None else attention)
        if view.memory is not None:
            score = self._scored(view.memory, score)
        return Reduction(keep_top(score, k))

    @staticmethod
    def _scored(scorer: nn.Module, attention: Tensor) -> Tensor:
        """What a network makes of the attention, `[B, N]`, in the dtype of its weights.

        Raises:
            ParameterError: it gives something of another shape.
        """
        lost = attention.isnan()  # a network spreads over others what is missing of one token
        weight = next(scorer.parameters(), attention)
        given = torch.where(lost, 0.0, attention).to(weight.dtype)
        scores = scorer(given[:, None])
        if not isinstance(scores, Tensor) or scores.shape != attention.shape:
            found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ParameterError(
                f"Learned: the scorer made {found} of [B, 1, N] = {[len(given), 1, given.shape[1]]}, not [B, N]"
            )
        return torch.where(lost, float("nan"), scores.float())

    def count(self, counts: Counts) -> int:
        """As `keep` says."""
        return keep_count(self.keep, counts.n)

    def remarks(self, layout: Layout) -> list[str]:
        """Whether anything was trained."""
        if self.scorer is not None:
            return []
        return ["learned has no scorer: the first layer's attention of the text is the score, nothing of it is trained"]

    def settings(self) -> dict[str, Any]:
        """The parameters by name; of a module its class."""
        scorer = type(self.scorer).__name__ if isinstance(self.scorer, nn.Module) else self.scorer
        return {**super().settings(), "scorer": scorer}

    def __str__(self) -> str:
        if isinstance(self.scorer, nn.Module):
            return f"{dataclasses.replace(self, scorer=None)}:scorer={type(self.scorer).__name__}"
        return super().__str__()
