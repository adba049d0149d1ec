"""Messages between the ranks that share a video: posted together, waited for later, differentiable.

Everything that travels along time goes through `Posted`: ranks post the same exchanges in the same order, so
that messages between two ranks match by order and nothing can wait for what is never sent.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Index = tuple[Any, ...]


class Posted:
    """Tensors on their way between ranks of `group`: `sends` are (target, tensor), `receives` (source, buffer).

    `what` names the exchange to the user should it fail.
    """

    def __init__(
        self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], group: dist.ProcessGroup, what: str
    ):
        self.what = what
        self.received = [buffer for _, buffer in receives]
        self._sent = [(target, tensor.contiguous()) for target, tensor in sends]  # kept until it has arrived
        operations = [
            dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group)
            for operation, messages in ((dist.isend, self._sent), (dist.irecv, receives))
            for peer, tensor in messages
            if tensor.numel()
        ]
        self._peers = sorted({peer for peer, _ in self._sent + receives})
        self._works = self._named(lambda: dist.batch_isend_irecv(operations)) if operations else []

    def wait(self) -> list[Tensor]:
        """What was received, in the order of `receives`. ConnectionError where a rank is gone or too late."""
        for work in self._works:
            self._named(work.wait)
        self._works, self._sent = [], []
        return self.received

    def _named(self, action: Any) -> Any:
        try:
            return action()
        except RuntimeError as error:
            ranks = ", ".join(map(str, self._peers))
            raise ConnectionError(f"{self.what}, exchanged with sp rank {ranks}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """An error in a few words, without the place in gloo's sources and its advice."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"\[/[^]]*] ", "", line).partition(" This is typically")[0][:300]


def move(
    x: Tensor,
    shape: torch.Size,
    sends: list[Index],
    receives: list[Index],
    group: dist.ProcessGroup,
    what: str,
) -> Tensor:
    """Deal `x` out to the ranks of a group and put together what they deal out: a tensor of `shape`.

    `sends[r]` is the part of x that rank r gets, `receives[r]` where its part goes in the result. Every element
    of x is sent once and every one of the result received once, so that the gradient makes the same way back.
    """
    return _Move.apply(x, shape, sends, receives, group, what)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: Any, what: str
    ) -> Tensor:
        ctx.arguments = x.shape, sends, receives, group, what
        return deal(x, shape, sends, receives, group, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shape, sends, receives, group, what = ctx.arguments
        grad = deal(grads[0], shape, receives, sends, group, f"gradient of {what}")
        return grad, None, None, None, None, None


def deal(
    x: Tensor, shape: torch.Size, sends: list[Index], receives: list[Index], group: dist.ProcessGroup, what: str
) -> Tensor:
    """`move` without a gradient; here ranks may be sent the same part."""
    out, me = x.new_empty(shape), dist.get_rank(group)
    others = [rank for rank in range(len(sends)) if rank != me]
    buffers = [(rank, x.new_empty(out[receives[rank]].shape)) for rank in others]
    posted = Posted([(rank, x[sends[rank]]) for rank in others], buffers, group, what)
    out[receives[me]] = x[sends[me]]
    for rank, part in zip(others, posted.wait(), strict=True):
        out[receives[rank]] = part
    return out
