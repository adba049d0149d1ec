"""Messages between the ranks that share a video: posted at once, waited for later, differentiable.

Everything that travels along time goes through `post` and `wait`: all ranks of a group post the same exchanges in the
same order, whether they have anything to give or not, so that nothing can wait for what is never sent. Both are torch's
functional collectives: to a compiler they are operations like others, and a block that exchanges stays one graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Index = tuple[Any, ...]


@dataclass(frozen=True)
class AllToAll:
    """How many numbers each rank of a group gets from this one, and send_counts it; `what` names them to the user."""

    group: str
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    what: str

    def back(self) -> AllToAll:
        return AllToAll(self.group, self.receive_counts, self.send_counts, f"gradient of {self.what}")


def start_all_to_all(x: Tensor, route: AllToAll) -> Tensor:
    """Send a flat tensor off, what is for the first rank first. What is returned may be read only after `wait`."""
    arguments = x.contiguous(), route.receive_counts, route.send_counts, route.group
    return _named(lambda: torch.ops._c10d_functional.all_to_all_single(*arguments), route)


def wait_all_to_all(x: Tensor, route: AllToAll) -> Tensor:
    """What was posted, arrived. ConnectionError where a rank is gone or too late; of compiled blocks torch's own."""
    return _named(lambda: torch.ops._c10d_functional.wait_tensor(x), route)


def _named(action: Any, route: AllToAll) -> Tensor:
    if torch.compiler.is_compiling():
        return action()
    try:
        return action()
    except torch.OutOfMemoryError:  # of what is to be received: a RuntimeError, too
        raise
    except RuntimeError as error:  # any rank of the group may be the one that is missed
        raise ConnectionError(
            f"{route.what}, exchanged by {len(route.send_counts)} sp ranks: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """An error in a few words, without the place in gloo's sources and its advice."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"\[/[^]]*] ", "", line).partition(" This is typically")[0][:300]


# Departure and arrival are two nodes of the graph. What is computed between them overlaps with the transfer; in
# compiled blocks the compiler orders it. So it does in the backward pass, which goes through them the other way:
# gradients of what arrived are sent off before those of what was computed meanwhile are worked out. As a gradient has
# the size of what was sent, not of what came, a tensor of that size ties the nodes, which has no memory of its own.


def start_with_grad(x: Tensor, route: AllToAll) -> tuple[Tensor, Tensor]:
    """`post`, with a gradient: what `arrive` wants."""
    return _Send.apply(x, route)


def wait_with_grad(sent: tuple[Tensor, Tensor], route: AllToAll) -> Tensor:
    """`wait` for what was sent, with a gradient."""
    return _Arrive.apply(*sent, route)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: AllToAll) -> tuple[Tensor, Tensor]:
        ctx.route = route
        ctx.set_materialize_grads(False)
        on_the_way = start_all_to_all(x, route)
        ctx.mark_non_differentiable(on_the_way)
        return on_the_way, x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return wait_all_to_all(grads[1], ctx.route.back()), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, on_the_way: Tensor, tie: Tensor, route: AllToAll) -> Tensor:
        ctx.route = route
        return wait_all_to_all(on_the_way, route)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, start_all_to_all(grads[0], ctx.route.back()), None


def redistribute(
    x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
) -> Tensor:
    """Deal `x` out to the ranks of a group and put together what they deal out: a tensor of `shape`.

    `sends[r]` is the part of x that rank r gets, `receives[r]` where its part goes in the result. Every element
    of x is sent once and every one of the result received once, so that the gradient makes the same way back.
    """
    return _Move.apply(x, shape, sends, receives, group, what)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
    ) -> Tensor:
        ctx.arguments = x.shape, sends, receives, group, what
        return redistribute_no_grad(x, shape, sends, receives, group, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape, sends, receives, group, what = ctx.arguments
        grad = redistribute_no_grad(grads[0], shape, receives, sends, group, f"gradient of {what}")
        return grad, None, None, None, None, None


def redistribute_no_grad(
    x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
) -> Tensor:
    """`move` without a gradient; here ranks may be sent the same part."""
    out, parts = x.new_empty(shape), [x[index] for index in sends]
    shapes = [out[index].shape for index in receives]
    route = AllToAll(group, tuple(part.numel() for part in parts), tuple(part.numel() for part in shapes), what)
    packed = x.new_empty(sum(route.send_counts))
    for place, part in zip(packed.split(route.send_counts), parts, strict=True):
        place.view(part.shape).copy_(part)
    arrived = wait_all_to_all(start_all_to_all(packed, route), route)
    for index, part, like in zip(receives, arrived.split(route.receive_counts), shapes, strict=True):
        out[index] = part.view(like)
    return out
