"""One video shared among ranks along causal time: who holds which units, and how the past travels.

A rank holds a contiguous run of units. What its queries need of earlier units (a window, an incomplete
group, pooled groups) is sent by whoever holds it, straight to whoever needs it, while both compute; gradients
travel back the same way. A windowed scale so moves a constant amount, however long the video and however many
the ranks. Scales that see all of the past may be computed elsewhere instead: see ulysses.py and ring.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import Posted
from .ring import Ring
from .ulysses import Ulysses

Before = Callable[[int], int]
Message = tuple[int, int, int, int]


def bounds(units: int, ranks: int) -> tuple[int, ...]:
    """First unit of every rank, and the end: contiguous runs, as even as can be, none empty."""
    if units < ranks:
        raise ValueError(f"{units} units cannot be shared along time by parallel.sp = {ranks} ranks; each needs one")
    return tuple(rank * units // ranks for rank in range(ranks + 1))


def transfers(bounds: tuple[int, ...], before: Before, every: int = 1) -> list[Message]:
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
    """This rank's run of units of a video that its sequence-parallel group shares.

    `placements` names the scales (by their index) whose attention is computed elsewhere.
    """

    travels = True
    grows = False

    def __init__(
        self, group: dist.ProcessGroup, bounds: tuple[int, ...], placements: Mapping[int, Ulysses | Ring] | None = None
    ):
        self.group, self.bounds, self.placements = group, bounds, placements or {}
        self.rank = dist.get_rank(group)
        self.first = bounds[self.rank]

    def placement(self, scale: int) -> Ulysses | Ring | None:
        return self.placements.get(scale)

    def ask(
        self, key: tuple[object, ...], x_BU: Tensor, before: Before, kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        """Post the messages at once; the result waits for the earlier items. Differentiable."""
        messages = transfers(self.bounds, before, every)
        if not any(self.rank in message[:2] for message in messages):
            return lambda: None
        trip = _Trip(messages, self.bounds[self.rank] // every, self.rank, self.group, _words(key))
        ticket = _Depart.apply(x_BU, trip)
        return lambda: _Arrive.apply(ticket, trip)


def _words(key: tuple[object, ...]) -> str:
    what, *layer, scale = key
    return f"{what} of scale {scale}" + (f" in layer {layer[0]}" if layer else "")


# Departure and arrival are two nodes of the graph, tied by an empty tensor. What is computed between them
# overlaps with the transfer. So it does in the backward pass, which goes through the nodes in the opposite order:
# the gradient of what arrived is sent off before that of what was computed meanwhile is worked out.


class _Trip:
    """One exchange of past items, out and, in the backward pass, home again."""

    def __init__(self, messages: list[Message], start: int, rank: int, group: dist.ProcessGroup, what: str):
        self.group, self.what = group, what
        # Own items that others need, and how many of the past come from whom, in the fixed order of the messages
        self.given = [(to, slice(a - start, b - start)) for source, to, a, b in messages if source == rank]
        self.taken = [(source, b - a) for source, to, a, b in messages if to == rank]

    def depart(self, x: Tensor) -> None:
        self.shape = x.shape
        buffers = [(source, x.new_empty(x.shape[0], size, *x.shape[2:])) for source, size in self.taken]
        self.posted = Posted([(to, x[:, items]) for to, items in self.given], buffers, self.group, self.what)
        self.nothing = _nothing(x)

    def arrive(self) -> Tensor:
        return torch.cat([self.nothing, *self._received()], 1)

    def depart_home(self, grad: Tensor) -> None:
        parts = grad.split([size for _, size in self.taken], 1)
        sends = [(source, part) for (source, _), part in zip(self.taken, parts, strict=True)]
        buffers = [(to, grad.new_empty(grad.shape[0], s.stop - s.start, *grad.shape[2:])) for to, s in self.given]
        self.nothing = _nothing(grad)
        self.posted = Posted(sends, buffers, self.group, f"gradient of {self.what}")

    def arrive_home(self) -> Tensor:
        grad = self.nothing.new_zeros(self.shape)
        for (_, items), part in zip(self.given, self._received(), strict=True):
            grad[:, items] += part
        return grad

    def _received(self) -> list[Tensor]:
        received = self.posted.wait()
        del self.posted  # the trip lives as long as the graph; its buffers need not
        return received


def _nothing(like: Tensor) -> Tensor:
    """No items like these: not a slice, which the trip would keep all of `like` with, also past recomputation."""
    return like.new_empty(like.shape[0], 0, *like.shape[2:])


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.depart(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.arrive_home(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.trip.depart_home(grads[0])
        return grads[0].new_empty(0), None
