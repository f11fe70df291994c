"""TCA's memory: class tokens of the most reliable pictures of each class, and what they say of a new one."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import ParameterError

POLICIES = ("diversity", "similarity", "entropy", "fifo")


def evict(entropy: Tensor, vectors: Tensor, ids: Tensor, policy: str) -> int:
    """Which of a class's items leaves when it holds one too many.

    Args:
        entropy: fp32 `[m]`, of the predictions, in nats.
        vectors: `[m, E]`, what items are compared by.
        ids: int64 `[m]`, rising with the time at which an item came.
        policy: ``"diversity"`` the greatest entropy plus mean cosine to the others (released default),
            ``"similarity"`` the greatest entropy plus w (1 - mean cosine), w the ratio of their ranges rounded down
            (released, `div` off), ``"entropy"`` the greatest entropy (paper), ``"fifo"`` the oldest.

    Returns:
        Its index; the lowest wins a tie.
    """
    if policy == "fifo":
        return int(ids.argmin())
    if policy == "entropy":
        return int(entropy.argmax())
    unit = kernels.unit_rows(vectors)
    with kernels.exact(vectors.device):
        half = (unit @ unit.T).triu(1)
    # Made symmetric: two items are as alike as the other way round, to the last bit.
    alike = (half + half.T).sum(1) / max(1, len(entropy) - 1)
    if policy == "diversity":
        return int((entropy + alike).argmax())
    alone = 1.0 - alike
    spread = float(alone.max() - alone.min())
    scale = int(float(entropy.max() - entropy.min()) / spread) if spread > 0 else 0
    return int((entropy + scale * alone).argmax())


def layer_weights(layers: int, scale: float) -> Tensor:
    """Weights of a tower's layers in the correction: the softmax of 0 to 1 over `scale`.

    Args:
        layers: how many.
        scale: small looks at the last layer alone, large at all alike.

    Returns:
        float64 `[layers]` (in fp32 the exponentials overflow), a sum of 1.
    """
    return torch.softmax(torch.linspace(0.0, 1.0, layers, dtype=torch.float64) / scale, 0)


class Reservoir(nn.Module):
    """Class tokens of the most reliable pictures of each class; the state of one stream of pictures.

    It is not made for several threads: one stream, one compression. Buffers take their sizes with the first picture.

    Attributes:
        tokens: `[classes, capacity, layers, C]`, class token behind every layer.
        features: `[classes, capacity, E]`, picture features, where items are compared by them (else E = 0).
        entropy: fp32 `[classes, capacity]`, ascending, +inf where empty.
        ids: int64 `[classes, capacity]`, number of the picture in the stream, -1 where empty.
        seen: int64, pictures so far.
        vocabulary: uint8 `[32]`, digest of the class embeddings, zeros while unknown.
        anchors: `[classes, layers, C]`, mean of a class's items.
        anchored: bool `[classes]`, which of them may be used.
        active: whether any may; a host flag, so that a forward asks no tensor.
        frozen: whether updates are off.
    """

    tokens: Tensor
    features: Tensor
    entropy: Tensor
    ids: Tensor
    seen: Tensor
    vocabulary: Tensor
    anchors: Tensor
    anchored: Tensor

    def __init__(self, capacity: int, gate: str = "all_classes", frozen: bool = False) -> None:
        """An empty reservoir.

        Args:
            capacity: items of a class.
            gate: ``"all_classes"`` or ``"per_class"``, see `TCA`.
            frozen: updates off.
        """
        super().__init__()
        self.capacity = capacity
        self.gate = gate
        self.frozen = frozen
        self.reset()

    def reset(self) -> None:
        """Forgets everything, the classes too."""
        device = self.seen.device if hasattr(self, "seen") else None
        self._known: weakref.ref[Tensor] | None = None
        self.active = False
        for name, shape, dtype in (
            ("tokens", (0, self.capacity, 0, 0), torch.float32),
            ("features", (0, self.capacity, 0), torch.float32),
            ("entropy", (0, self.capacity), torch.float32),
            ("ids", (0, self.capacity), torch.int64),
            ("seen", (), torch.int64),
            ("vocabulary", (32,), torch.uint8),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        for name, shape, dtype in (("anchors", (0, 0, 0), torch.float32), ("anchored", (0,), torch.bool)):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    @property
    def classes(self) -> int:
        """How many classes there are; 0 before the first picture."""
        return self.ids.shape[0]

    def check_vocabulary(self, classes: int, text_features: Tensor | None) -> None:
        """Binds the reservoir to a list of classes, or checks that it is still the same.

        Args:
            classes: number of logits.
            text_features: `[classes, E]`, embeddings of the class names, where they are known.

        Raises:
            ParameterError: another list of classes.
        """
        if self.classes and self.classes != classes:
            raise ParameterError(
                f"the reservoir holds {self.classes} classes, these logits have {classes}; call run.reset() first"
            )
        if text_features is None or (self._known is not None and self._known() is text_features):
            return
        plain = text_features.detach().float().cpu().contiguous()
        digest = hashlib.sha256(plain.numpy().tobytes()).digest()
        now = torch.tensor(list(digest), dtype=torch.uint8, device=self.vocabulary.device)
        if bool(self.vocabulary.any()) and not torch.equal(now, self.vocabulary):
            raise ParameterError(
                "the class embeddings are not those that the reservoir was filled with; call run.reset() first"
            )
        self.vocabulary = now
        self._known = weakref.ref(text_features)

    def add(
        self, label: int, tokens: Tensor, entropy: Tensor, feature: Tensor | None, policy: str, classes: int
    ) -> int | None:
        """Takes a picture in, and lets one of its class go where there are too many.

        Args:
            label: predicted class.
            tokens: `[layers, C]`, its class token behind every layer.
            entropy: fp32 scalar.
            feature: `[E]`, compare items by it; None compares them by the mean of `tokens` over layers.
            policy: as in `evict`.
            classes: how many there are.

        Returns:
            Its place in its class, or None where it was let go itself.
        """
        if not self.classes:
            self._allocate(classes, tokens, feature)
        held = int((self.ids[label] >= 0).sum())
        number = int(self.seen)
        self.seen = self.seen + 1
        width = self.features.shape[2]
        own = feature if feature is not None and width else tokens.new_zeros(width)
        items = torch.cat([self.tokens[label, :held], tokens.to(self.tokens).unsqueeze(0)])
        features = torch.cat([self.features[label, :held], own.to(self.features).unsqueeze(0)])
        entropies = torch.cat([self.entropy[label, :held], entropy.to(self.entropy).reshape(1)])
        ids = torch.cat([self.ids[label, :held], self.ids.new_tensor([number])])
        if held == self.capacity:
            gone = evict(entropies, features if width else items.float().mean(1), ids, policy)
            stay = torch.arange(held + 1, device=ids.device) != gone
            items, features, entropies, ids = items[stay], features[stay], entropies[stay], ids[stay]
        order = entropies.argsort(stable=True)
        count = len(order)
        self.tokens[label, :count] = items[order]
        self.features[label, :count] = features[order]
        self.entropy[label, :count] = entropies[order]
        self.ids[label, :count] = ids[order]
        self._refresh(label)
        place = (self.ids[label] == number).nonzero()
        return int(place[0]) if len(place) else None

    def anchor(self, token: Tensor, layer: int) -> Tensor:
        """The class anchor most similar to each row's class token.

        Args:
            token: `[B, C]`, class token at the start of a block.
            layer: the layer before that block.

        Returns:
            `[B, C]`.
        """
        table = self.anchors[:, layer]
        with kernels.exact(token.device):
            similarity = kernels.unit_rows(token) @ kernels.unit_rows(table).T
            similarity = torch.where(self.anchored & ~similarity.isnan(), similarity, float("-inf"))
            return table[similarity.argmax(1)]

    def affinity(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How similar a picture is to every item, over layers.

        Args:
            tokens: `[layers, C]`.
            weights: `[layers]`.

        Returns:
            Mean cosine of each item, fp32 `[items]`, and (class, place) of each, int64 `[items, 2]`.
        """
        where = (self.ids >= 0).nonzero()
        items = kernels.unit_rows(self.tokens[where[:, 0], where[:, 1]])
        cosine = (items * kernels.unit_rows(tokens.to(items.device))).sum(-1)
        return (cosine * weights.to(cosine)).sum(-1), where

    # ------------------------------------------------------------------ bookkeeping
    def _allocate(self, classes: int, tokens: Tensor, feature: Tensor | None) -> None:
        layers, width = tokens.shape
        make = tokens.new_zeros
        self.tokens = make(classes, self.capacity, layers, width)
        self.features = make(classes, self.capacity, 0 if feature is None else feature.shape[-1], dtype=torch.float32)
        self.entropy = make(classes, self.capacity, dtype=torch.float32).fill_(float("inf"))
        self.ids = make(classes, self.capacity, dtype=torch.int64).fill_(-1)
        self.seen, self.vocabulary = self.seen.to(tokens.device), self.vocabulary.to(tokens.device)
        self.anchors = make(classes, layers, width)
        self.anchored = make(classes, dtype=torch.bool)

    def _refresh(self, label: int) -> None:
        """Makes the anchor of a class anew, and says which anchors may be used: it takes two items of a class."""
        held = (self.ids >= 0).sum(1)
        count = int(held[label])
        self.anchors[label] = self.tokens[label, :count].float().mean(0).to(self.anchors.dtype)
        enough = held >= 2
        self.anchored = enough & enough.all() if self.gate == "all_classes" else enough
        self.active = bool(self.anchored.any())

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("tokens", "features", "entropy", "ids"):
            saved = state.get(prefix + name)
            if saved is not None:
                if saved.shape[1] != self.capacity:
                    raise ParameterError(
                        f"the saved reservoir holds {saved.shape[1]} items a class, this one {self.capacity}"
                    )
                setattr(self, name, torch.empty_like(saved, device=self.seen.device))
        super()._load_from_state_dict(state, prefix, *rest)
        self._known = None
        self.anchors = self.tokens.new_zeros(self.classes, *self.tokens.shape[2:])
        self.anchored = torch.zeros(self.classes, dtype=torch.bool, device=self.ids.device)
        self.active = False
        for label in (self.ids >= 0).any(1).nonzero().flatten().tolist():
            self._refresh(label)
