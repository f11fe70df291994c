"""ToMe and PiToMe written out in plain loops, and the reference files of the published ones."""

from __future__ import annotations

import numpy as np
import torch

from .places import GOLDEN


def golden(name):
    with np.load(GOLDEN / name) as data:
        return {key: data[key].item() if data[key].ndim == 0 else torch.from_numpy(data[key]) for key in data.files}


def golden_names(pattern, count):
    names = sorted(path.name for path in GOLDEN.glob(pattern))
    assert len(names) == count, f"{pattern}: {names}"
    return names


def groups(owner):
    found = {}
    for token, slot in enumerate(owner.tolist()):
        found.setdefault(slot, []).append(token)
    return found.values()


def pitome_by_hand(metric, r, margin, alpha):
    """pitome.md 1.1 for one row, in plain loops: (protected by falling energy, [(a, b)], b by falling energy)."""
    x = metric.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    similar = x @ x.T
    above = similar - margin
    energy = np.where(above > 0, above, alpha * (np.exp(np.minimum(above, 0)) - 1)).mean(1)
    order = sorted(range(len(x)), key=lambda i: (-energy[i], i))
    top, protected = order[: 2 * r], order[2 * r :]
    a, b = top[0::2], top[1::2]
    return protected, [(i, max(b, key=lambda j: (similar[i, j], -b.index(j)))) for i in a], b


def tome_by_hand(metric, r, prefix):
    """ToMe for one row, in plain loops: (kept even ones, [(a, b)], odd ones), places among the view's tokens."""
    x = metric.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    n = len(x)
    even = [i for i in range(n) if (i + prefix) % 2 == 0]
    odd = [i for i in range(n) if (i + prefix) % 2 == 1]
    r = min(r, (n + prefix - (prefix > 0)) // 2, len(even), len(odd))
    best = {i: max(odd, key=lambda j: (x[i] @ x[j], -j)) for i in even}
    order = sorted(even, key=lambda i: (-(x[i] @ x[best[i]]), i))
    stay = order[r:]
    return sorted(stay) if prefix else stay, [(i, best[i]) for i in order[:r]], odd
