"""Which entries of a cache leave, worked out by plain loops from what the host's eager attention gives back.

`Rule` says it in words; `support.cache_methods` has the same as methods of the library. Nothing here imports that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .cache_by_mask import attention_rows, storing_layers
from .hosts_of import cache_of

GAP = 1e-5
"""How far apart the scores must be that a choice hangs on, as a share: closer ones would prove nothing."""


@dataclass(frozen=True)
class Rule:
    """What stays of the entries of each unit.

    Attributes:
        by: ``stride`` (places, moved on from layer to layer and from head to head), a signal whose best stay
            (``attention_mass``, ``text_mass``, ``recent_mass``, ``mean_mass``: mass over the rows that could see an
            entry, ``key_sum`` and ``value_norm`` of what is cached), or ``above``: every entry whose mass is above its
            unit's mean.
        keep: share; rounds half up.
        scope: what one unit is.
        layers: where; None for every full-attention layer that keeps keys.
        spared: layers at which the method answers None.
        window: rows of ``recent_mass``.
        every: decode steps after which it is asked again, of what is left; 0 for never.
    """

    by: str = "stride"
    keep: float = 0.5
    scope: str = "picture"
    layers: tuple[int, ...] | None = None
    spared: tuple[int, ...] = ()
    window: int = 0
    every: int = 0

    def count(self, n: int) -> int:
        return int(self.keep * n + 0.5)

    def places(self, n: int, layer: int, head: int) -> list[int]:
        """What ``stride`` keeps of n entries."""
        count = self.count(n)
        return sorted((i * n // count + layer + 2 * head) % n for i in range(count))


@dataclass
class Heard:
    """What a bare prefill shows of each full-attention layer that keeps keys.

    Attributes:
        rows: by layer `[B, H, S, S]`, attention weights.
        keys: by layer `[B, Hkv, S, d]`, as cached.
        values: the same of values.
        real: bool `[B, S]`, columns that are no padding.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    real: Tensor = field(default_factory=lambda: torch.empty(0))

    def signal(self, by: str, layer: int, row: int, columns: Tensor, visual: Tensor, window: int = 0) -> Tensor:
        """A score of entries of a row, `[Hkv, N]`.

        Args:
            by: see `Rule`.
            layer: of the cache.
            row: of the batch.
            columns: int64 `[N]`, padded.
            visual: int64, all visual columns of the row: the others are text.
            window: see `Rule`.
        """
        keys = self.keys[layer][row]
        if by == "key_sum":
            return keys[:, columns].sum(-1)
        if by == "value_norm":
            return self.values[layer][row][:, columns].norm(dim=-1)
        weights, length = self.rows[layer][row].float(), self.rows[layer].shape[-1]
        asking = self.real[row].clone()
        if by == "text_mass":
            asking[visual] = False
        if by == "recent_mass":
            asking[: length - window] = False
        mass = (weights * asking[None, :, None]).sum(1)[:, columns]
        mass = mass.unflatten(0, (len(keys), -1)).mean(1)
        if by == "mean_mass":
            return mass / torch.tensor([float(asking[c:].sum()) for c in columns.tolist()])
        return mass


@torch.no_grad()
def heard(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Heard:
    """What a prefill of the bare model shows, with eager attention; `generate` sets the positions of padded rows."""
    with attention_rows(model) as rows:
        out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **options)
    held = cache_of(out).layers
    found = Heard(rows=rows)
    for layer in storing_layers(model):
        found.keys[layer], found.values[layer] = held[layer].keys, held[layer].values
    shape = inputs["input_ids"].shape
    found.real = inputs.get("attention_mask", torch.ones(shape)).bool()
    return found


def units_of(prompt: Any, scope: str, by_run: bool = False) -> list[Tensor]:
    """Columns of each unit of a prompt of `tests.families`, unpadded; separators of parts and clips belong to none.

    Args:
        prompt: of a row.
        scope: what one unit is.
        by_run: whether nothing tells the runs of a picture from pictures of their own.
    """
    found: list[Tensor] = []
    if scope == "sample":
        return [torch.cat([p.columns for p in prompt.pictures])] if prompt.pictures else []
    for picture in prompt.pictures:
        shot, columns = picture.shot, picture.columns
        if by_run and not shot.video:
            found += picture.runs()
            continue
        parts = torch.tensor(shot.parts or shot.crops or (0,) * len(columns))
        if scope in ("picture", "head"):
            found.append(columns)
        elif scope == "clip" or (scope == "frame" and not shot.video):
            found.append(columns[parts >= 0])
        elif scope == "frame" and shot.grids:
            sizes = [rows * width for frames, rows, width in shot.grids for _ in range(frames)]
            found += list(columns.split(sizes))
        else:
            found += [columns[parts == part] for part in sorted(set(parts[parts >= 0].tolist()))]
    return [unit for unit in found if len(unit)]


def kept_of(rule: Rule, layer: int, n: int, score: Tensor | None, heads: int) -> list[list[int]]:
    """What stays of a unit's n entries: places, for each head where the rule's scope is ``head``, else once.

    Args:
        rule: what stays.
        layer: of the cache.
        n: entries.
        score: `[Hkv, N]`, where the rule asks for one.
        heads: key-value heads.
    """
    if rule.by == "stride":
        return [rule.places(n, layer, head) for head in range(heads if rule.scope == "head" else 1)]
    assert score is not None
    found = []
    for one in score if rule.scope == "head" else score.mean(0, keepdim=True):
        if rule.by == "above":
            mean = float(one.mean())
            assert min(abs(v - mean) for v in one.tolist()) > GAP * abs(mean), "change a seed"
            found.append([i for i in range(n) if float(one[i]) > mean])
            continue
        count = rule.count(n)
        order = sorted(range(n), key=lambda i: (-float(one[i]), i))
        if 0 < count < n:
            last, next_one = float(one[order[count - 1]]), float(one[order[count]])
            nobody = last == next_one == 0.0  # no text asks: the first ones stay
            assert nobody or last - next_one > GAP * abs(last), f"it hangs on {last - next_one:.1e}: change a seed"
        found.append(sorted(order[:count]))
    return found


def gone_of(
    rule: Rule, found: Heard, rows: Sequence[Sequence[Tensor]], visual: Sequence[Tensor], layers: Sequence[int]
) -> dict[int, Tensor]:
    """What left: by layer, bool `[B, 1 or Hkv, S]`.

    Args:
        rule: what stays.
        found: what the prefill showed.
        rows: padded columns of each unit of each row.
        visual: padded columns of all visual tokens of each row.
        layers: full-attention layers that keep keys.
    """
    batch, length = found.real.shape
    table = {}
    for layer in layers if rule.layers is None else rule.layers:
        heads = found.keys[layer].shape[1]
        gone = torch.zeros(batch, heads if rule.scope == "head" else 1, length, dtype=torch.bool)
        if layer not in rule.spared:
            for row, units in enumerate(rows):
                for columns in units:
                    by = "attention_mass" if rule.by == "above" else rule.by
                    score = None
                    if by != "stride":
                        score = found.signal(by, layer, row, columns, visual[row], rule.window)
                    for head, kept in enumerate(kept_of(rule, layer, len(columns), score, heads)):
                        gone[row, head, columns] = True
                        gone[row, head, columns[kept]] = False
        table[layer] = gone
    return table


def gone_in(
    rule: Rule, model: nn.Module, batch: Any, inputs: Mapping[str, Tensor], by_run: bool = False
) -> dict[int, Tensor]:
    """What left the caches of a batch of `tests.families`.

    Args:
        rule: what stays.
        model: with eager attention.
        batch: the prompts.
        inputs: the same, as the host takes them.
        by_run: see `units_of`.
    """
    length = inputs["input_ids"].shape[1]
    units, visual = [], []
    for prompt in batch.prompts:
        moved = length - len(prompt.ids)
        units.append([columns + moved for columns in units_of(prompt, rule.scope, by_run)])
        visual.append((prompt.owner >= 0).nonzero()[:, 0] + moved)
    return gone_of(rule, heard(model, inputs), units, visual, list(storing_layers(model)))
