"""Greedy choices of visual tokens as tight torch loops: what a selection of the library is measured against.

Each holds one table of cosines and does the least that its rule needs in a round; none looks after NaN, ties or rows
that may not be chosen. They return int64 `[B, k]` in the order chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loop = Callable[[], Tensor]


def cosines(x: Tensor) -> Tensor:
    """`[B, N, N]`, of rows `[B, N, C]`."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.transpose(1, 2)


def farthest_first(table: Tensor, k: int, pick: Tensor, summed: bool = False) -> Tensor:
    """K-center, or the choice of least summed similarity, from a first token on."""
    lanes = torch.arange(len(table))
    state, order = table[lanes, pick], [pick]
    for _ in range(k - 1):
        state.scatter_(1, pick.unsqueeze(1), float("inf"))
        pick = state.argmin(1)
        order.append(pick)
        row = table[lanes, pick]
        state = state.add_(row) if summed else torch.maximum(state, row, out=state)
    return torch.stack(order, 1)


def k_center(x: Tensor, k: int) -> Tensor:
    """Farthest-first from token 0."""
    return farthest_first(cosines(x), k, torch.zeros(len(x), dtype=torch.int64))


def dispersed(x: Tensor, k: int, first: Tensor) -> Tensor:
    """ToDRE: least summed similarity."""
    return farthest_first(cosines(x), k, first, summed=True)


def isolated_first(x: Tensor, k: int) -> Tensor:
    """DivPrune: k-center from the token whose nearest one is the farthest away."""
    table = cosines(x)
    table.diagonal(dim1=1, dim2=2).fill_(-2.0)
    return farthest_first(table, k, table.amax(2).argmin(1))


def determinantal(x: Tensor, k: int, relevance: Tensor) -> Tensor:
    """CDPruner: the greedy choice of a determinantal process, one column of a Cholesky factor a round."""
    table = cosines(x) * relevance.unsqueeze(1) * relevance.unsqueeze(2)
    lanes, factors = torch.arange(len(x)), x.new_zeros(len(x), k, x.shape[1])
    left, order = table.diagonal(dim1=1, dim2=2).clone(), []
    for t in range(k):
        pick = left.argmax(1)
        order.append(pick)
        past = factors[:, :t]
        row = table[lanes, pick] - (past[lanes, :, pick].unsqueeze(1) @ past).squeeze(1)
        factors[:, t] = row / left[lanes, pick].sqrt().unsqueeze(1)
        left = (left - factors[:, t].square()).scatter_(1, pick.unsqueeze(1), float("-inf"))
    return torch.stack(order, 1)


def covering(table: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """SCOPE and MMTok: the token that adds most to what is covered of all columns."""
    lanes, cover, order = torch.arange(len(table)), table.new_zeros(len(table), 1, table.shape[2]), []
    taken = table.new_zeros(table.shape[:2])
    for _ in range(k):
        gain = (table - cover).clamp_(min=0).sum(2)
        pick = (gain * weight + taken if weight is not None else gain + taken).argmax(1)
        order.append(pick)
        taken.scatter_(1, pick.unsqueeze(1), float("-inf"))
        cover = torch.maximum(cover, table[lanes, pick].unsqueeze(1))
    return torch.stack(order, 1)


def looks(x: Tensor, features: Tensor, words: Tensor) -> Tensor:
    """MMTok's table: what each token gets of the looks of words and, by the tower's features, of tokens."""
    unit, text = (rows / rows.norm(dim=-1, keepdim=True) for rows in (x, words))
    by_words = (unit @ text.transpose(1, 2) / 0.02).softmax(1) / text.shape[1]
    by_tokens = (cosines(features) / 0.2).softmax(1) / x.shape[1]
    return torch.cat([by_words, 0.5 * by_tokens], 2)


def without_near(x: Tensor, k: int, score: Tensor) -> Tensor:
    """VisPruner: half by score; of the rest those with a near duplicate leave, eight a round."""
    order = score.argsort(dim=1, descending=True)
    important, order = order[:, : k // 2], order[:, k // 2 :]
    unit = x / x.norm(dim=-1, keepdim=True)
    lanes = torch.arange(len(x)).unsqueeze(1)
    while order.shape[1] > k - k // 2:
        first, second = order[:, 0::2], order[:, 1::2]
        nearest = (unit[lanes, first] @ unit[lanes, second].transpose(1, 2)).amax(2)
        leave = min(8, order.shape[1] - (k - k // 2))
        stays = nearest.argsort(dim=1, descending=True)[:, leave:]
        order = torch.cat([first.gather(1, stays), second], 1)
    return torch.cat([important, order], 1)
