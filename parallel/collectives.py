"""Collectives along time: asynchronous, differentiable all-to-all between the ranks that share a video.

All ranks of a group start the same all-to-alls in the same order, also where they have nothing to send or receive, so
none can wait for data that is never sent. These are torch's functional collectives: a compiler sees ordinary
operations, and a block that communicates stays one graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Index = tuple[Any, ...]


@dataclass(frozen=True)
class AllToAll:
    """Numbers of elements that this rank sends to and receives from each rank of a group. what: for messages."""

    group: str
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    what: str

    def reverse(self) -> AllToAll:
        return AllToAll(self.group, self.receive_counts, self.send_counts, f"gradient of {self.what}")


def start_all_to_all(x: Tensor, plan: AllToAll) -> Tensor:
    """Start sending a flat tensor, in order of ranks. The result may be read only after `wait_all_to_all`."""
    arguments = x.contiguous(), plan.receive_counts, plan.send_counts, plan.group
    return _with_clear_errors(lambda: torch.ops._c10d_functional.all_to_all_single(*arguments), plan)


def wait_all_to_all(x: Tensor, plan: AllToAll) -> Tensor:
    """Wait for received data. ConnectionError where a rank is lost or late; in compiled blocks torch's own error."""
    return _with_clear_errors(lambda: torch.ops._c10d_functional.wait_tensor(x), plan)


def _with_clear_errors(action: Callable[[], Tensor], plan: AllToAll) -> Tensor:
    if torch.compiler.is_compiling():
        return action()
    try:
        return action()
    except torch.OutOfMemoryError:  # is a RuntimeError as well
        raise
    except RuntimeError as error:  # any rank of the group may be the missing one
        ranks = len(plan.send_counts)
        raise ConnectionError(f"{plan.what}, exchanged by {ranks} sp ranks: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error, without the place in gloo's sources and its advice."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"\[/[^]]*] ", "", line).partition(" This is typically")[0][:300]


# Start and wait are two nodes of the autograd graph, and what is computed between them overlaps with the transfer. The
# backward pass goes through them in reverse: gradients of received data are sent before those of what was computed
# meanwhile are worked out. A gradient has the shape of what was sent, not of what was received, so an expanded scalar
# of that shape, which takes no memory, connects the two nodes.


def start_with_grad(x: Tensor, plan: AllToAll) -> tuple[Tensor, Tensor]:
    """Differentiable `start_all_to_all`; its result is for `wait_with_grad`."""
    return _Start.apply(x, plan)


def wait_with_grad(started: tuple[Tensor, Tensor], plan: AllToAll) -> Tensor:
    return _Wait.apply(*started, plan)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: AllToAll) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        pending = start_all_to_all(x, plan)
        ctx.mark_non_differentiable(pending)
        return pending, x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return wait_all_to_all(grads[1], ctx.plan.reverse()), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, connection: Tensor, plan: AllToAll) -> Tensor:
        ctx.plan = plan
        return wait_all_to_all(pending, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, start_all_to_all(grads[0], ctx.plan.reverse()), None


def redistribute(
    x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
) -> Tensor:
    """Exchange parts of `x` with all ranks of a group; returns a tensor of `shape`.

    `sends[r]` indexes the part of x for rank r, `receives[r]` the place in the result of the part from rank r. Every
    element of x is sent once and every one of the result received once, so gradients take the reverse way.
    """
    return _Redistribute.apply(x, shape, sends, receives, group, what)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
    ) -> Tensor:
        ctx.reverse = x.shape, receives, sends, group, f"gradient of {what}"
        return redistribute_no_grad(x, shape, sends, receives, group, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return redistribute_no_grad(grads[0], *ctx.reverse), None, None, None, None, None


def redistribute_no_grad(
    x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: str, what: str
) -> Tensor:
    """`redistribute` without gradients; several ranks may be sent the same part."""
    out, parts = x.new_empty(shape), [x[index] for index in sends]
    shapes = [out[index].shape for index in receives]
    plan = AllToAll(group, tuple(part.numel() for part in parts), tuple(part.numel() for part in shapes), what)
    packed = x.new_empty(sum(plan.send_counts))
    for place, part in zip(packed.split(plan.send_counts), parts, strict=True):
        place.view(part.shape).copy_(part)
    received = wait_all_to_all(start_all_to_all(packed, plan), plan)
    for index, part, part_shape in zip(receives, received.split(plan.receive_counts), shapes, strict=True):
        out[index] = part.view(part_shape)
    return out
