"""Ring attention for dense causal scales (Liu et al. 2023), with zig-zag load balancing.

Of 2P runs of units rank p computes runs p and 2P-1-p, an early and a late one, so that a causal mask leaves all
ranks equal work. Keys and values travel around the ring, one rank further per step, while each rank attends to those
it holds; results are merged by their log-sum-exp in at least fp32. The backward pass is a second round with the final
output and log-sum-exp, in which the gradients of keys and values travel along.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives
from .collectives import AllToAll, redistribute

Blocks = tuple[tuple[int, ...], ...]
# (q, k, v, blocks, out [B, U, n, h, d], log-sum-exp [B, U, n, h, 1]): merged into the last two, in place
Forward = Callable[[Tensor, Tensor, Tensor, Blocks, Tensor, Tensor], None]
Grads = tuple[Tensor, Tensor, Tensor]
# (gradient of out, q, k, v, out, log-sum-exp, blocks, gradients of q, k, v): added to the last, in place
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Blocks, Grads], None]


def zigzag_units(units: int, ranks: int) -> list[tuple[int, ...]]:
    """Units that each rank computes, ascending: an early and a late run. None is empty where units ≥ ranks."""
    runs = 2 * ranks
    edges = [min(i, units) if units < runs else i * units // runs for i in range(runs + 1)]
    return [
        (*range(edges[rank], edges[rank + 1]), *range(edges[runs - 1 - rank], edges[runs - rank]))
        for rank in range(ranks)
    ]


@lru_cache(maxsize=64)
def causal_parts(units: int) -> list[Blocks]:
    """`blocks[u] = (0, ..., u-1)` split into log2(units) parts, each of which kernels compute in one or two calls.

    Part i holds bit i of u: every other run of 2^i units sees the whole run before it.
    """
    parts = []
    for size in (2**i for i in range((units - 1).bit_length())):
        runs = [tuple(range(start - size, start)) if start // size % 2 else () for start in range(0, units, size)]
        parts.append(tuple(runs[unit // size] for unit in range(units)))
    return parts


class Ring:
    """This rank's share of a dense causal scale: its zig-zag units, all heads; `attend` goes around the ring.

    `forward` and `backward` compute attention to some blocks of keys (pretrain/kernels/sdpa.py).
    """

    heads = slice(None)

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...], forward: Forward, backward: Backward):
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.group, self.kernels = group.group_name, (forward, backward)
        self.units_of = zigzag_units(bounds[-1], self.ranks)
        self.units = self.units_of[self.rank]
        first, end = bounds[self.rank], bounds[self.rank + 1]
        self.own_units = end - first
        self.sends = [_run([u - first for u in units if first <= u < end]) for units in self.units_of]
        self.receives = [_run([i for i, u in enumerate(self.units) if a <= u < b]) for a, b in pairwise(bounds)]
        # Of each rank's units, those that every own unit sees: the earlier ones
        self.seen = [_first_blocks([bisect_left(units, unit) for unit in self.units]) for units in self.units_of]
        # Compiled, torch 2.11 loses its gradients, and any version takes both rounds for one and keeps the keys of all
        # ranks. (Not as a decorator, which would import the compiler at every start.)
        self.attend = torch.compiler.disable(self._attend)

    def enter(self, x_BU: Tensor) -> Tensor:
        """`[B, own units, ...] -> [B, zig-zag units, ...]`."""
        shape = torch.Size((x_BU.shape[0], len(self.units), *x_BU.shape[2:]))
        return redistribute(x_BU, shape, self.sends, self.receives, self.group, "queries, keys, values (ring)")

    def leave(self, x_BU: Tensor) -> Tensor:
        """The inverse of `enter`."""
        shape = torch.Size((x_BU.shape[0], self.own_units, *x_BU.shape[2:]))
        return redistribute(x_BU, shape, self.receives, self.sends, self.group, "attention output (ring)")

    def _attend(self, q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: Blocks) -> Tensor:
        """Units see all earlier own ones, `blocks[u] == (0, ..., u-1, own)`: the first blocks of keys are the own units
        as others see them, the last one of u is u as it sees itself."""
        assert blocks[-1][:-1] == tuple(range(len(blocks) - 1)), "a ring serves dense causal scales"
        return _RingAttention.apply(q_BUnhd, k_BRnhd, v_BRnhd, blocks, self)

    def source(self, step: int) -> int:
        """The rank whose keys are here at a step."""
        return (self.rank - step) % self.ranks

    def pass_on(self, x: Tensor, source: int, what: str) -> Callable[[], Tensor]:
        """Send `x` to the next rank; the result waits for what the previous rank sends about rank `source`'s units."""
        shape = torch.Size((*x.shape[:2], len(self.units_of[source]), *x.shape[3:]))
        sends, receives = [0] * self.ranks, [0] * self.ranks
        sends[(self.rank + 1) % self.ranks], receives[self.source(1)] = x.numel(), shape.numel()
        plan = AllToAll(self.group, tuple(sends), tuple(receives), what)
        pending = collectives.start_all_to_all(x.flatten(), plan)
        return lambda: collectives.wait_all_to_all(pending, plan).view(shape)

    def rotate(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Send keys and values around the ring as one tensor `[2, B, units, n, h, d]`; yields (rank, its tensor) for
        every other rank. The transfer of the next one overlaps with the work on this one, the first starts at once."""
        what = "keys and values (ring)"
        arriving = self.pass_on(torch.stack((k, v)), self.source(1), what)

        def steps(arriving: Callable[[], Tensor]) -> Iterator[tuple[int, Tensor]]:
            for step in range(1, self.ranks):
                kv = arriving()
                if step + 1 < self.ranks:
                    arriving = self.pass_on(kv, self.source(step + 1), what)
                yield self.source(step), kv

        return steps(arriving)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, ring: Ring) -> Tensor:
        attend, _ = ring.kernels
        own = q.shape[1]
        k_past, v_past = k[:, :own], v[:, :own]
        others = ring.rotate(k_past, v_past)
        out = torch.zeros_like(q, dtype=_sum_type(q))
        log_sum = out.new_full((*q.shape[:-1], 1), -torch.inf)
        attend(q, k, v, _last_blocks(blocks), out, log_sum)
        for seen in causal_parts(own):
            attend(q, k_past, v_past, seen, out, log_sum)
        for source, kv in others:
            attend(q, kv[0], kv[1], ring.seen[source], out, log_sum)
        out = out.to(q.dtype)
        ctx.blocks, ctx.ring = blocks, ring
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, log_sum = ctx.saved_tensors
        ring: Ring = ctx.ring
        _, differentiate = ring.kernels
        own = q.shape[1]
        k_past, v_past = k[:, :own], v[:, :own]
        others = ring.rotate(k_past, v_past)
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=_sum_type(x)) for x in (q, k, v))
        differentiate(grad_out, q, k, v, out, log_sum, _last_blocks(ctx.blocks), (grad_q, grad_k, grad_v))
        grads_past = grad_q, grad_k[:, :own], grad_v[:, :own]
        for seen in causal_parts(own):
            differentiate(grad_out, q, k_past, v_past, out, log_sum, seen, grads_past)
        arriving: Callable[[], Tensor] | None = None
        for source, kv in others:
            grad_kv = torch.zeros_like(kv, dtype=_sum_type(kv))
            grads_kv = grad_q, grad_kv[0], grad_kv[1]
            differentiate(grad_out, q, kv[0], kv[1], out, log_sum, ring.seen[source], grads_kv)
            if arriving is not None:
                grad_kv += arriving()
            # The gradient summed so far follows its keys to the next rank, and from the last one home.
            arriving = ring.pass_on(grad_kv, (source - 1) % ring.ranks, "gradient of keys and values (ring)")
        assert arriving is not None
        for total, received in zip(grads_past[1:], arriving(), strict=True):
            total += received
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _last_blocks(blocks: Blocks) -> Blocks:
    """Each unit's own block."""
    return tuple(seen[-1:] for seen in blocks)


def _first_blocks(counts: list[int]) -> Blocks:
    """The first `counts[u]` blocks for each unit u; units share equal tuples, which compare quickly."""
    prefixes = {count: tuple(range(count)) for count in counts}
    return tuple(prefixes[count] for count in counts)


def _run(units: list[int]) -> tuple[slice, slice]:
    """Index of contiguous units as a slice: a list would be copied to the GPU, and the CPU would wait for it."""
    first = units[0] if units else 0
    assert units == list(range(first, first + len(units))), f"{units} are not contiguous"
    return slice(None), slice(first, first + len(units))


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
