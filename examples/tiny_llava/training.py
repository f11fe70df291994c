"""What both training phases share: a fast attention for CPU, the optimiser, the schedule, resumable progress."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

logger = logging.getLogger("tiny_llava")


def matmul_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Plain attention: on a CPU in bfloat16 its backward is several times faster than the fused kernel's.

    On a GPU it is plain only where somebody watches.

    Args:
        module: The attention module; where `watch_attention` watches it, its weights are handed on.
        query: `[B, H, S, d]`.
        key: `[B, H, S, d]`.
        value: `[B, H, S, d]`.
        attention_mask: `[B, 1, S, S]`, added to the logits, or None.
        **kwargs: `scaling` is used.

    Returns:
        The output `[B, S, H, d]`, and None in place of the weights.
    """
    seen = getattr(module, "seen_weights", None)
    if seen is None and query.is_cuda:
        mask = None if attention_mask is None else attention_mask.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, scale=kwargs["scaling"])
        return mixed.transpose(1, 2).contiguous(), None
    logits = (query * kwargs["scaling"]) @ key.transpose(-1, -2)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1)
    if seen is not None:
        seen.append(weights)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("matmul", matmul_attention)


@contextmanager
def watch_attention(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the attention weights `[B, H, S, S]` of modules with `matmul_attention`, in the order of their calls."""
    modules = list(modules)
    seen: list[Tensor] = []
    for module in modules:
        setattr(module, "seen_weights", seen)  # noqa: B010 - no declared attribute of a module
    try:
        yield seen
    finally:
        for module in modules:
            del module.seen_weights


def mixed_precision(device: torch.device) -> AbstractContextManager:
    """Autocast to bfloat16."""
    return torch.autocast(device.type, torch.bfloat16)


class Optimizer:
    """Muon for the matrices inside the blocks, AdamW for all else; linear warm-up, a plateau, a linear way to zero.

    Args:
        modules: What is trained.
        steps: Steps of the whole schedule.
        muon_rate: Highest rate of the block matrices, of which `modules` may have none.
        adam_rate: Highest rate of embeddings, norms, biases, projector and heads.
        warmup: Steps of warm-up.
        decay: Share of the steps, at the end, in which the rates fall to zero.
        gentle: Those of the modules, or parts of them, whose AdamW rate is lower: what they know is to be kept.
        gentle_share: How much lower.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        steps: int,
        muon_rate: float = 0.0,
        adam_rate: float = 1e-3,
        warmup: int = 100,
        decay: float = 0.0,
        gentle: Iterable[nn.Module] = (),
        gentle_share: float = 0.1,
    ) -> None:
        self.steps, self.warmup, self.decay = steps, warmup, decay
        named = [item for module in modules for item in module.named_parameters()]
        self.parameters = [p for _, p in named]
        spared = {id(p) for module in gentle for p in module.parameters()}
        matrices = [p for name, p in named if "layers." in name and p.ndim == 2]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [([p for p in rest if id(p) not in spared], adam_rate)]
        groups.append(([p for p in rest if id(p) in spared], adam_rate * gentle_share))
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
            )
        self.optimizers.append(
            torch.optim.AdamW(
                [{"params": params, "lr": rate} for params, rate in groups if params],
                betas=(0.9, 0.98),
                weight_decay=0.01,
            )
        )
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, loss: Tensor, step: int) -> None:
        """Goes step number `step` down the gradient of `loss`."""
        share = min(1.0, (step + 1) / self.warmup)
        if self.decay:
            share = min(share, (self.steps - step) / (self.decay * self.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rates in zip(self.optimizers, self._rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of both optimisers."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, states):
            optimizer.load_state_dict(state)


class Progress:
    """One phase's state on disk: what is trained, the optimiser, the step, and the time spent so far.

    Data and noise are functions of the step, so a resumed phase goes on as if it had never stopped.

    Args:
        path: The file of the phase.
        modules: What is trained, by name.
        optimizer: Its optimiser.
    """

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizer: Optimizer) -> None:
        self.path, self.modules, self.optimizer = path, modules, optimizer
        self.step = 0
        self._spent = {"wall": 0.0, "cpu": 0.0}
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self._spent = state["step"], state["spent"]
            logger.info("%s: goes on at step %d", path.stem, self.step)
        self._started = {"wall": time.time(), "cpu": time.process_time()}

    @property
    def spent(self) -> dict[str, float]:
        """Seconds on the clock and of processor time since the phase began, interruptions left out."""
        now = {"wall": time.time(), "cpu": time.process_time()}
        return {name: self._spent[name] + now[name] - self._started[name] for name in now}

    def save(self) -> None:
        """Writes the state, in one move."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": self.spent,
        }
        draft = self.path.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.path)
