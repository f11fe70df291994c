"""What a model says of a picture, and how far another stays with it: no right answers are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..lab.prompts import encode_prompt
from ..lab.runners import Answer, Looker, Loyalty, divergence, outputs_loyalty
from ..loading.models import Loaded


@dataclass(frozen=True)
class Witness:
    """What a model said of one picture.

    Attributes:
        answer: its text and tokens; of a tower its output.
        logits: of each token's place, `[T, V]` in the model's dtype on the CPU; empty for towers.
        features: what enters the head at each place, `[T, C]`; empty for towers, and where there is no head.
        choices: the tokens that it would have said at each place, of itself.
    """

    answer: Answer
    logits: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    features: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    choices: tuple[int, ...] = ()


def hear(loaded: Loaded, image: Image.Image, prompt: str | None, tokens: int, along: Witness | None = None) -> Witness:
    """Asks a model about a picture.

    Args:
        loaded: from `load`; compressed or not.
        image: RGB.
        prompt: as for `vlmtok.compare`; None for towers.
        tokens: of the answer at most.
        along: what the uncompressed model said: its tokens are put in the model's mouth, one a step, so that places
            stay comparable behind the first difference. The prefill sees the prompt alone, as in an answer of its own.
    """
    if not loaded.language:
        with torch.no_grad():
            return Witness(Looker(loaded, image, prompt).answer())
    assert prompt is not None
    model: Any = loaded.model
    steps = _Steps(None if along is None else along.answer.ids)
    head = model.get_output_embeddings()
    places: list[Tensor] = []
    hook = None if head is None else head.register_forward_pre_hook(lambda _, given: places.append(_last(given[0])))
    try:
        found = model.generate(
            **encode_prompt(loaded, image, prompt),
            max_new_tokens=tokens if along is None else len(along.answer.ids),
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=[steps],
        )
    finally:
        if hook is not None:
            hook.remove()
    ids = found.sequences[0][-len(found.logits) :]
    logits = torch.stack([one[0] for one in found.logits]).to(loaded.dtype).cpu()
    text = loaded.processor.batch_decode([ids], skip_special_tokens=True)[0].strip()
    features = torch.stack(places).cpu() if len(places) == len(ids) else torch.empty(0)
    return Witness(Answer(text, tuple(ids.tolist())), logits, features, tuple(steps.choices))


def _last(hidden: Tensor) -> Tensor:
    """The last place of the first row, `[C]`."""
    return hidden.reshape(-1, hidden.shape[-1])[-1].float()


class _Steps:
    """Stands behind the host's own processors of logits: notes what the model would say, and may say another.

    Args:
        ids: tokens to say, or None.
    """

    def __init__(self, ids: Sequence[int] | None) -> None:
        self.ids = ids
        self.choices: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[1, V]` of the next token."""
        step = len(self.choices)
        self.choices.append(int(scores[0].argmax()))
        if self.ids is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[step]] = 0
        return forced


def loyalty(loaded: Loaded, bare: Witness, short: Witness) -> Loyalty:
    """How far a model stays with the uncompressed one on a picture.

    Args:
        loaded: either of them.
        bare: what the uncompressed model said.
        short: what the other said along it.

    Returns:
        Whether it would have given the same answer (greedy, token by token) or, of towers, names the same class or
        gives an embedding of at least cosine 0.99; the share of places with the same token; the mean over places of
        the KL divergence of the next token's distribution, or that of the classes, in nats; the mean cosine of what
        enters the head, or that of the towers' outputs.
    """
    if not loaded.language:
        return outputs_loyalty(bare.answer, short.answer)
    ids = bare.answer.ids
    same = sum(a == b for a, b in zip(ids, short.choices))
    kept = [divergence(a.float(), b.float()) for a, b in zip(bare.logits, short.logits)]
    cosine = None
    if bare.features.numel() and bare.features.shape == short.features.shape:
        cosine = float(F.cosine_similarity(bare.features, short.features, dim=-1).mean())
    return Loyalty(same == len(ids), same / len(ids), sum(kept) / len(kept), cosine)
