"""Context parallelism along causal time: which rank holds which units of a video, and the exchange of past context.

A rank holds a contiguous run of units. What its queries need of earlier units (a window, an incomplete group, pooled
groups) is sent by the ranks that hold it while both compute; gradients travel back the same way. A windowed scale so
moves a constant amount, whatever the video's length and the number of ranks. Scales that see all of the past may be
computed by Ulysses or a ring instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import AllToAll, redistribute_no_grad, start_with_grad, wait_with_grad
from .ring import Ring
from .ulysses import Ulysses

Before = Callable[[int], int]
Transfer = tuple[int, int, int, int]


def shard_bounds(units: int, ranks: int) -> tuple[int, ...]:
    """First unit of every rank, and the end: contiguous runs, as even as can be, none empty."""
    if units < ranks:
        raise ValueError(f"{units} units cannot be shared along time by parallel.sp = {ranks} ranks; each needs one")
    return tuple(rank * units // ranks for rank in range(ranks + 1))


def required_transfers(bounds: tuple[int, ...], before: Before, every: int = 1) -> list[Transfer]:
    """(source, target, first item, end) of all messages that bring each rank the earlier items it needs.

    An item covers `every` units and belongs to the rank that holds the last of them; a rank that starts
    at unit u needs the `before(u)` items up to item `u // every`.
    """
    starts = [unit // every for unit in bounds]
    transfers = []
    for target in range(len(bounds) - 1):
        need_start = starts[target] - before(bounds[target])
        for source in range(target):
            first, end = max(starts[source], need_start), min(starts[source + 1], starts[target])
            if first < end:
                transfers.append((source, target, first, end))
    return transfers


class ShardedPastContext:
    """This rank's run of units of a video that its context-parallel group shares.

    placements: the scales, by index, that Ulysses or a ring computes.
    """

    grows = False

    def __init__(
        self, group: dist.ProcessGroup, bounds: tuple[int, ...], placements: Mapping[int, Ulysses | Ring] | None = None
    ):
        self.group, self.bounds, self.placements = group.group_name, bounds, placements or {}
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.first = bounds[self.rank]

    def placement(self, scale: int) -> Ulysses | Ring | None:
        return self.placements.get(scale)

    def noise_levels(self, t_BUF: Tensor, kept: int | None) -> tuple[Tensor, int]:
        """Noise levels of the whole video."""
        shape = torch.Size((t_BUF.shape[0], self.bounds[-1], *t_BUF.shape[2:]))
        places = [(slice(None), slice(a, b)) for a, b in pairwise(self.bounds)]
        return redistribute_no_grad(t_BUF, shape, [(slice(None),)] * self.ranks, places, self.group, "noise levels"), 0

    def exchange(
        self, key: tuple[object, ...], x_BU: Tensor, before: Before, kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        """Send own items at once; the result waits for the earlier items. Differentiable."""
        transfers = required_transfers(self.bounds, before, every)
        if not transfers:
            return lambda: None
        B, _, *inner = x_BU.shape
        start, size = self.bounds[self.rank] // every, prod((B, *inner))
        send_items, receive_items, parts = [0] * self.ranks, [0] * self.ranks, []
        for source, target, a, b in transfers:  # by source, then by target
            if source == self.rank:
                send_items[target] = b - a
                parts.append(x_BU[:, a - start : b - start].flatten())
            elif target == self.rank:
                receive_items[source] = b - a
        # A compiler would compile a block again for every layer's name.
        what = "" if torch.compiler.is_compiling() else "{0} of scale {2} in layer {1}".format(*key)
        plan = AllToAll(self.group, tuple(n * size for n in send_items), tuple(n * size for n in receive_items), what)
        # A copy, which does not change while it is sent; empty where this rank sends nothing, but part of the graph all
        # the same: all ranks must go through it alike.
        started = start_with_grad(torch.cat(parts) if parts else x_BU[:, :0].flatten(), plan)

        def earlier() -> Tensor:
            counts = [n for n in receive_items if n] or [0]
            received = wait_with_grad(started, plan).split([n * size for n in counts])
            items = [part.view(B, n, *inner) for n, part in zip(counts, received, strict=True)]
            return items[0] if len(items) == 1 else torch.cat(items, 1)

        return earlier
