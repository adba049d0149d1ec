"""One video shared among ranks along causal time: who holds which units, and how the past travels.

A rank holds a contiguous run of units. What its queries need of earlier units (a window, an incomplete
group, pooled groups) is sent by whoever holds it, straight to whoever needs it; gradients travel back the
same way. A windowed scale so moves a constant amount, however long the video and however many the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Before = Callable[[int], int]


def bounds(units: int, ranks: int) -> tuple[int, ...]:
    """First unit of every rank, and the end: contiguous runs, as even as can be, none empty."""
    if units < ranks:
        raise ValueError(f"{units} units cannot be shared along time by parallel.sp = {ranks} ranks; each needs one")
    return tuple(rank * units // ranks for rank in range(ranks + 1))


def transfers(bounds: tuple[int, ...], before: Before, every: int = 1) -> list[tuple[int, int, int, int]]:
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


class ShardedTimeline:
    """This rank's run of units of a video that its sequence-parallel group shares."""

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...]):
        self.group, self.bounds = group, bounds
        self.rank = dist.get_rank(group)
        self.first = bounds[self.rank]

    def extend(self, key: Hashable, x_BU: Tensor, before: Before, kept: int | None, every: int = 1) -> Tensor:
        """Put the earlier items this rank needs in front of its own (dimension 1); differentiable."""
        messages = transfers(self.bounds, before, every)
        if not any(self.rank in message[:2] for message in messages):
            return x_BU
        return _Extend.apply(x_BU, messages, self.bounds[self.rank] // every, self.rank, self.group)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        messages: list[tuple[int, int, int, int]],
        start: int,
        rank: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.arguments = messages, start, rank, group
        sends = [(target, x[:, a - start : b - start]) for source, target, a, b in messages if source == rank]
        sizes = [(source, b - a) for source, target, a, b in messages if target == rank]
        past = [(source, x.new_empty(x.shape[0], size, *x.shape[2:])) for source, size in sizes]
        _exchange(sends, past, group)
        return torch.cat([*(part for _, part in past), x], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        messages, start, rank, group = ctx.arguments
        received = [(source, b - a) for source, target, a, b in messages if target == rank]
        sends, at = [], 0
        for source, size in received:
            sends.append((source, grad[:, at : at + size]))
            at += size
        own = grad[:, at:].clone()
        returns = [
            (target, a - start, own.new_empty(own.shape[0], b - a, *own.shape[2:]))
            for source, target, a, b in messages
            if source == rank
        ]
        _exchange(sends, [(target, part) for target, _, part in returns], group)
        for _, first, part in returns:  # in the fixed order of the messages
            own[:, first : first + part.shape[1]] += part
        return own, None, None, None, None


def _exchange(sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], group: dist.ProcessGroup) -> None:
    """Send and receive between ranks of the group, all at once."""
    operations = [
        dist.P2POp(dist.isend, tensor.contiguous(), dist.get_global_rank(group, peer), group) for peer, tensor in sends
    ] + [dist.P2POp(dist.irecv, tensor, dist.get_global_rank(group, peer), group) for peer, tensor in receives]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
