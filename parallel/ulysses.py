"""A scale shared out by heads instead of units (Jacobs et al. 2023, DeepSpeed-Ulysses).

One exchange takes queries, keys and values from [own units, all heads] to [all units, heads / ranks]; there the
scale is computed as one whole video, and a second exchange takes its output back. Works for any scale, and every
rank has equal work, but what travels grows with the video.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import redistribute


class Ulysses:
    """Where a rank computes a scale of `heads` heads: all units, its even share of the heads."""

    attend = None  # any kernel will do

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...], heads: int):
        ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        assert heads % ranks == 0, f"{heads} heads do not divide by {ranks} ranks"
        self.group, self.own = group.group_name, bounds[self.rank + 1] - bounds[self.rank]
        self.units = range(bounds[-1])
        share = heads // ranks
        self.shares = [slice(rank * share, (rank + 1) * share) for rank in range(ranks)]
        self.heads = self.shares[self.rank]
        # the same parts, seen from where units are together and from where heads are together
        self.by_heads = [(..., shared, slice(None)) for shared in self.shares]
        self.by_units = [(slice(None), slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]

    def enter(self, x_BUhd: Tensor) -> Tensor:
        """`[B, own units, ..., heads, d] -> [B, all units, ..., own heads, d]`."""
        B, _, *inner, _, d = x_BUhd.shape
        shape = torch.Size((B, len(self.units), *inner, self.heads.stop - self.heads.start, d))
        return redistribute(
            x_BUhd, shape, self.by_heads, self.by_units, self.group, "queries, keys and values (Ulysses)"
        )

    def leave(self, x_BUhd: Tensor) -> Tensor:
        """The way back of `enter`."""
        B, _, *inner, _, d = x_BUhd.shape
        shape = torch.Size((B, self.own, *inner, self.shares[-1].stop, d))
        return redistribute(x_BUhd, shape, self.by_units, self.by_heads, self.group, "attention output (Ulysses)")
