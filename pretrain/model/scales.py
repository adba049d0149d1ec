"""Scales: what a group of heads pools, and which part of the past its queries see.

Pure integer arithmetic, shared by the attention, its cost formulas and the memory plan of a roll-out.
The definition (ours; arXiv 2412.09828 gives the idea, no equations) is section 3.1 of docs/attention.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ..kernels.blocks import Candidates, KeyBlocks


@dataclass(frozen=True)
class Scale:
    """A group of heads and the resolution at which it attends.

    heads: number of heads in the group.
    space: `space × space` tokens of a frame become one (queries, keys and values).
    time: `time` consecutive past units become one (keys and values only).
    window: how many such past groups a query sees; None means all of them.
    patch_window: side, in tokens of this scale, of the local spatial windows; shifted by half on odd
        layers. None means the whole frame.
    top: makes the group a routed one: instead of all that `window` reaches, a query block (its unit, or the unit's
        local window) sees its own unit, the previous one, and of the earlier ones the `top` blocks that suit it best
        (kernels/routed.py). Its windows are equal and not shifted: the largest that divide the frame.
    """

    heads: int
    space: int = 1
    time: int = 1
    window: int | None = None
    patch_window: int | None = None
    top: int | None = None

    def __post_init__(self):
        for name in ("heads", "space", "time"):
            if getattr(self, name) < 1:
                raise ValueError(f"scale {name} is {getattr(self, name)}; it must be at least 1")
        if self.window is not None and self.window < 0:
            raise ValueError(f"scale window is {self.window}; it must be 0 or more, or null for all of the past")
        if self.patch_window is not None and self.patch_window < 2:
            raise ValueError(f"scale patch_window is {self.patch_window}; it must be at least 2, or null")
        if self.top is None:
            return
        if self.top < 1:
            raise ValueError(f"scale top is {self.top}; it must be at least 1, or null for a scale that is not routed")
        if self.time > 1:
            raise ValueError(f"scale top is {self.top} with time {self.time}; a routed scale does not pool in time")

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of a frame at this scale; `grid` is the full token grid (H, W), here and below."""
        return (grid[0] // self.space) * (grid[1] // self.space)

    def spatial_windows(self, side: int, shifted: bool) -> list[tuple[int, int, int]]:
        """Local windows along a side of the full token grid, in tokens of this scale: see the function below."""
        if self.top is not None:
            size = self.tile_side(side)
            return [(0, side // self.space // size, size)]
        return spatial_windows(side // self.space, self.patch_window, shifted)

    def tile_side(self, side: int) -> int:
        """Side of a routed scale's blocks, in tokens of this scale, along a side of the full token grid."""
        side //= self.space
        most = min(side, self.patch_window or side)
        return next(size for size in range(most, 0, -1) if side % size == 0)

    def tiles(self, grid: tuple[int, int]) -> int:
        """Blocks that a routed scale makes of a unit."""
        return prod(side // self.space // self.tile_side(side) for side in grid)

    def token_pairs(self, grid: tuple[int, int], shifted: bool = False) -> int:
        """Pairs of a query's and a key's token that two frames have inside the local windows."""
        rows, columns = (
            sum(count * size**2 for _, count, size in self.spatial_windows(side, shifted)) for side in grid
        )
        return rows * columns

    def fresh_before(self, first: int) -> int:
        """Units before `first` that are needed unpooled: the window, or the incomplete group."""
        if self.time > 1:
            return first % self.time
        return first if self.window is None else min(self.window, first)

    def pooled_before(self, first: int) -> int:
        """Pooled groups before `first` that are needed (none where units are not pooled in time)."""
        if self.time == 1:
            return 0
        groups = first // self.time
        return groups if self.window is None else min(self.window, groups)

    def blocks_seen(self, unit: int, grid: tuple[int, int]) -> int:
        """Blocks of keys that a query in `unit` sees, its own included."""
        past = self.fresh_before(unit)
        if self.top is not None:
            return 1 + min(past, 1) + min(self.top, max(past - 1, 0) * self.tiles(grid))
        return 1 + past + self.pooled_before(unit)

    @property
    def fresh_kept(self) -> int | None:
        """Most unpooled past units that any later query can need (None: all)."""
        return self.window if self.time == 1 else self.time - 1

    def finished(self, first: int, units: int) -> int:
        """Groups pooled in time that a run of units completes."""
        return (first + units) // self.time - first // self.time if self.time > 1 else 0

    def key_blocks(self, first: int, units: int, separate_own: bool) -> KeyBlocks:
        """Which blocks of keys each of `units` own units, starting at unit `first`, attends to.

        The key blocks lie in one row: the pooled groups, then the unpooled units (past ones and own
        ones), then, if `separate_own`, the own units once more (ungated). A block holds the tokens
        of one unit at this scale. The own unit always comes last and is always there. Of a routed scale these are the
        blocks that are seen whatever the data; `candidates` has the others.
        """
        past, before = self.fresh_before(first), self.pooled_before(first)
        groups = before + self.finished(first, units)
        own_at = groups + past + units if separate_own else groups + past
        rows = []
        for i in range(units):
            unit = first + i
            group_0 = first // self.time - before  # absolute index of the first pooled group in the row
            seen_to = unit // self.time - group_0 if self.time > 1 else 0
            pooled = range(seen_to - self.pooled_before(unit), seen_to)
            seen = self.fresh_before(unit) if self.top is None else min(self.fresh_before(unit), 1)
            fresh = range(groups + past + i - seen, groups + past + i)
            rows.append((*pooled, *fresh, own_at + i))
        return tuple(rows)

    def candidates(self, first: int, units: int) -> tuple[Candidates, ...]:
        """Rows of `key_blocks` among which the units of a routed scale choose: all that they reach but the previous."""
        if self.top is None:
            return ()
        rows = []
        for i in range(units):
            previous = self.fresh_before(first) + i - 1
            earlier = max(self.fresh_before(first + i) - 1, 0)
            rows.append(Candidates(previous - earlier, previous))
        return tuple(rows)


def check_scales(scales: Sequence[Scale], heads: int, grid: tuple[int, int] | None = None) -> None:
    """Raise ValueError if the scales do not share out `heads` heads or do not divide the token grid."""
    total = sum(scale.heads for scale in scales)
    if total != heads:
        raise ValueError(f"the scales share out {total} heads but the model has {heads}")
    if grid is None:
        return
    for scale in scales:
        for name, side in zip(("height", "width"), grid, strict=True):
            if side % scale.space:
                raise ValueError(
                    f"the {name} of {side} tokens does not divide by the scale with space {scale.space}; "
                    f"choose a frame size whose token grid is a multiple of {math.lcm(*(s.space for s in scales))}"
                )
            if scale.top is not None and 2 * scale.tile_side(side) < min(side // scale.space, scale.patch_window or 0):
                raise ValueError(
                    f"the {name} of {side} tokens cannot be cut into equal blocks of half to all of the routed scale's "
                    f"patch_window {scale.patch_window}; choose another patch_window, or null for whole frames"
                )


def spatial_windows(side: int, window: int | None, shifted: bool) -> list[tuple[int, int, int]]:
    """Cut `side` tokens into local windows: runs of (start, number of windows, tokens per window).

    Shifted windows start half a window early, so that the first and the last are smaller; nothing
    is padded and nothing wraps around, so that every window is an unmasked rectangle.
    """
    if window is None or window >= side:
        return [(0, 1, side)]
    runs = []
    start = window // 2 if shifted else 0
    if start:
        runs.append((0, 1, start))
    whole = (side - start) // window
    if whole:
        runs.append((start, whole, window))
    rest = side - start - whole * window
    if rest:
        runs.append((start + whole * window, 1, rest))
    return runs


def default_scales(heads: int, patch_window: int | None = 16) -> tuple[Scale, ...]:
    """Fine sees near, coarse sees far: half, a quarter and a quarter of the heads."""
    if heads % 4:
        raise ValueError(f"the default scales share out quarters of the heads; {heads} does not divide by 4")
    return (
        Scale(heads // 2, space=1, time=1, window=2, patch_window=patch_window),
        Scale(heads // 4, space=2, time=1, window=8),
        Scale(heads // 4, space=4, time=4, window=None),
    )
