"""MACs of vision towers that take pictures of any size, by the grids that a pass saw, and passes as planned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..core.ledger import StageRun
from ..core.model_shape import PackedTowerShape, Part, Tokens
from ..errors import NotCounted
from .flops import Account, Profile
from .packed_stretches import Block, Stretches, blocks_of, tokens_of
from .planned_rows import Prompt

Grids = Sequence[Sequence[int]]
"""Frames, rows and columns of patches of each picture."""


def pairs(shape: PackedTowerShape, span: str, run: StageRun) -> int:
    """Pairs of a query and a key in one block, all rows of a pass in which no token leaves.

    Args:
        shape: the tower.
        span: of the block, see `PackedTowerShape.spans`.
        run: the pass, with grids where the span asks for them.
    """
    if span == "row":
        return run.rows * run.entered * run.entered
    return Stretches(shape, run.grids).pairs(span)


def problem_of(shape: PackedTowerShape, run: StageRun) -> str | None:
    """Why a pass cannot be counted, or None: what the tower was told must be what went through it."""
    if all(span == "row" for span in shape.spans):
        return None
    told = sum(frames * rows * columns for frames, rows, columns in run.grids)
    went = run.rows * (run.entered - shape.extra)
    if told == went:
        return None
    return f"the vision tower is not counted (its grids tell of {told} patches, and {went} went through its blocks)"


def count_packed(
    account: Account, run: StageRun, shape: PackedTowerShape, projector: Iterable[Part], times: int = 1
) -> None:
    """Adds a pass: patch embedding, blocks, what stands behind them, projector.

    Args:
        account: takes the lines, or what is missing.
        run: the pass.
        shape: the tower.
        projector: behind it.
        times: how often such a pass ran.
    """
    problem = problem_of(shape, run)
    if problem is not None:
        account.missing.append(problem)
        return
    tokens = run.rows * run.entered
    by_span = {span: pairs(shape, span, run) for span in dict.fromkeys(shape.spans)}
    bare = [Block(tokens, by_span[span], tokens) for span in shape.spans]
    try:
        blocks = blocks_of(shape, run) or bare
    except NotCounted as unknown:
        account.missing.append(f"the vision tower is not counted ({unknown})")
        return
    beside = sum(part.macs(run.parts.get(part.name, 0), run.entered) for part in (shape.stem, *shape.parts))
    account.add("vision", beside + _macs(shape, bare), beside + _macs(shape, blocks), times)
    for part in projector:
        spent = part.macs(run.parts.get(part.name, 0))
        if spent:
            account.add("projector", spent, spent, times)
    n = run.entered
    whole = Profile(run.rows, (Tokens(n, n, n, n - shape.extra),) * len(shape.blocks), n, n)
    left = whole if blocks is bare else Profile(run.rows, tuple(tokens_of(block) for block in blocks), n, n)
    account.profiles["vision"] = (whole, left)


def _macs(shape: PackedTowerShape, blocks: Iterable[Block]) -> int:
    """MACs of the blocks."""
    return sum(
        seen.queries * block.attn + seen.mlp * block.mlp + block.products(1, seen.pairs)
        for block, seen in zip(shape.blocks, blocks)
    )


def planned(shape: PackedTowerShape, projector: Iterable[Part], prompt: Prompt) -> StageRun:
    """The pass of a prompt's pictures, as the ledger would book it.

    Args:
        shape: the tower.
        projector: behind it.
        prompt: with grids, or with counts from which they follow.
    """
    if prompt.seen and not prompt.grids:  # every row is as long as the processor made it
        run = StageRun("vision", prompt.batch * prompt.rows, shape.extra + prompt.patches)
        return _with_parts(shape, projector, run, run.rows * prompt.patches)
    grids = [tuple(grid) for grid in prompt.grids] or [grid_of(prompt, shape.merge)] * prompt.pictures
    grids *= prompt.batch
    frames = sum(grid[0] for grid in grids)
    patches = sum(f * rows * columns for f, rows, columns in grids)
    longest = max((rows * columns for _, rows, columns in grids), default=0)
    if shape.shared:
        run = StageRun("vision", 1, patches, grids=tuple(grids))
    else:  # a processor may have padded the rows
        run = StageRun("vision", frames, shape.extra + max(longest, prompt.patches), grids=tuple(grids))
    sides = [max((grid[axis] for grid in grids), default=0) for axis in (1, 2)]
    return _with_parts(shape, projector, run, patches, frames * sides[0] * sides[1])


def _with_parts(
    shape: PackedTowerShape, projector: Iterable[Part], run: StageRun, patches: int, canvas: int = 0
) -> StageRun:
    """The pass with what its modules outside the blocks see: of so many real patches, and of the canvas around them."""
    inside = run.rows * (run.entered - shape.extra)
    run.parts[shape.stem.name] = canvas if shape.canvas else inside
    for part in shape.parts:
        run.parts[part.name] = run.rows if part.pools else inside // part.joins
    for part in projector:
        run.parts[part.name] = (inside if shape.slots else patches) // shape.merge**2
    return run


def grid_of(prompt: Prompt, merge: int) -> tuple[int, int, int]:
    """The grid of a picture of so many visual tokens: a square, or what comes nearest to it.

    Args:
        prompt: with visual tokens of a picture, `crops` of them frames or tiles.
        merge: patches along a side that make one visual token.

    Returns:
        Frames, rows and columns of patches.
    """
    count = prompt.visual // prompt.crops
    side = next(side for side in range(int(count**0.5), 0, -1) if count % side == 0)
    return prompt.crops, merge * side, merge * (count // side)
