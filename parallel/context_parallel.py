"""One video shared among ranks along causal time: who holds which units, and how the past travels.

A rank holds a contiguous run of units. What its queries need of earlier units (a window, an incomplete
group, pooled groups) is sent by whoever holds it, straight to whoever needs it, while both compute; gradients
travel back the same way. A windowed scale so moves a constant amount, however long the video and however many
the ranks. Scales that see all of the past may be computed elsewhere instead: see ulysses.py and ring.py.
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
Message = tuple[int, int, int, int]


def shard_bounds(units: int, ranks: int) -> tuple[int, ...]:
    """First unit of every rank, and the end: contiguous runs, as even as can be, none empty."""
    if units < ranks:
        raise ValueError(f"{units} units cannot be shared along time by parallel.sp = {ranks} ranks; each needs one")
    return tuple(rank * units // ranks for rank in range(ranks + 1))


def required_transfers(bounds: tuple[int, ...], before: Before, every: int = 1) -> list[Message]:
    """All messages that bring each rank the earlier items it needs: (source, target, first item, end).

    An item covers `every` units and belongs to the rank that holds the last of them; a rank that starts
    at unit u needs the `before(u)` items up to item `u // every`.
    """
    starts = [unit // every for unit in bounds]
    messages = []
    for target in range(len(bounds) - 1):
        need_end = starts[target]
        need_start = need_end - before(bounds[target])
        for source in range(target):
            first, end = max(starts[source], need_start), min(starts[source + 1], need_end)
            if first < end:
                messages.append((source, target, first, end))
    return messages


class ShardedPastContext:
    """This rank's run of units of a video that its sequence-parallel group shares.

    `placements` names the scales (by their index) whose attention is computed elsewhere.
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
        """Of the whole video: a number a frame."""
        shape = torch.Size((t_BUF.shape[0], self.bounds[-1], *t_BUF.shape[2:]))
        places = [(slice(None), slice(a, b)) for a, b in pairwise(self.bounds)]
        return redistribute_no_grad(t_BUF, shape, [(slice(None),)] * self.ranks, places, self.group, "noise levels"), 0

    def exchange(
        self, key: tuple[object, ...], x_BU: Tensor, before: Before, kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        """Post the messages at once; the result waits for the earlier items. Differentiable."""
        messages = required_transfers(self.bounds, before, every)
        if not messages:
            return lambda: None
        B, _, *inner = x_BU.shape
        start, size = self.bounds[self.rank] // every, prod((B, *inner))
        given, taken = [0] * self.ranks, [0] * self.ranks  # items
        parts = []
        for source, target, a, b in messages:  # by source, then by target
            if source == self.rank:
                given[target] = b - a
                parts.append(x_BU[:, a - start : b - start].flatten())
            elif target == self.rank:
                taken[source] = b - a
        # A compiler would make a block anew for every layer's name
        what = "" if torch.compiler.is_compiling() else _words(key)
        route = AllToAll(self.group, tuple(n * size for n in given), tuple(n * size for n in taken), what)
        # A copy, which nobody changes while it is sent. Who has nothing to give sends nothing, as a part of the graph:
        # all ranks must go through it alike.
        sent = start_with_grad(torch.cat(parts) if parts else x_BU[:, :0].flatten(), route)

        def earlier() -> Tensor:
            counts = [n for n in taken if n] or [0]
            arrived = wait_with_grad(sent, route).split([n * size for n in counts])
            items = [part.view(B, n, *inner) for n, part in zip(counts, arrived, strict=True)]
            return items[0] if len(items) == 1 else torch.cat(items, 1)

        return earlier


def _words(key: tuple[object, ...]) -> str:
    what, layer, scale = key
    return f"{what} of scale {scale} in layer {layer}"
