"""Ulysses: a scale distributed by heads instead of units (Jacobs et al. 2023, DeepSpeed-Ulysses).

One all-to-all takes queries, keys and values from [own units, all heads] to [all units, own heads], where the scale
is computed as one whole video; a second one takes the output back. Works for any scale, with equal work on every
rank, but what travels grows with the video.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import redistribute


class Ulysses:
    """This rank's share of a scale of `heads` heads: all units, an even share of the heads."""

    attend = None  # any kernel

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...], heads: int):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        assert heads % ranks == 0, f"{heads} heads do not divide by {ranks} ranks"
        self.group, self.own_units, self.all_heads = group.group_name, bounds[rank + 1] - bounds[rank], heads
        self.units = range(bounds[-1])
        shares = [slice(r * heads // ranks, (r + 1) * heads // ranks) for r in range(ranks)]
        self.heads = shares[rank]
        self.by_heads = [(..., share, slice(None)) for share in shares]
        self.by_units = [(slice(None), slice(a, b)) for a, b in pairwise(bounds)]

    def enter(self, x_BUhd: Tensor) -> Tensor:
        """`[B, own units, ..., heads, d] -> [B, all units, ..., own heads, d]`."""
        B, _, *inner, _, d = x_BUhd.shape
        shape = torch.Size((B, len(self.units), *inner, self.heads.stop - self.heads.start, d))
        return redistribute(x_BUhd, shape, self.by_heads, self.by_units, self.group, "queries, keys, values (Ulysses)")

    def leave(self, x_BUhd: Tensor) -> Tensor:
        """The inverse of `enter`."""
        B, _, *inner, _, d = x_BUhd.shape
        shape = torch.Size((B, self.own_units, *inner, self.all_heads, d))
        return redistribute(x_BUhd, shape, self.by_units, self.by_heads, self.group, "attention output (Ulysses)")
