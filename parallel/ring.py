"""Dense causal attention around a ring of ranks (Liu et al. 2023, Ring Attention), placed zig-zag.

Of 2P runs of units rank p computes runs p and 2P-1-p, an early and a late one, so that a causal mask leaves all
ranks equal work. Keys and values travel around the ring, one rank further per step, while each rank attends to
those it has, to its own in a few rectangles (`causal_parts`); what they give is merged by their log-sum-exp in at least
fp32. The backward pass is a second round with the final output and log-sum-exp, in which the gradients of keys and
values travel along.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
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
    """Units that each rank computes, in order: an early and a late run. None is empty where units ≥ ranks."""
    runs = 2 * ranks
    edges = [min(i, units) if units < runs else i * units // runs for i in range(runs + 1)]
    return [
        (*range(edges[rank], edges[rank + 1]), *range(edges[runs - 1 - rank], edges[runs - rank]))
        for rank in range(ranks)
    ]


@lru_cache(maxsize=64)
def causal_parts(units: int) -> list[Blocks]:
    """`blocks[u] = (0, ..., u-1)` in parts that kernels compute in a call or two each, where those need one a unit.

    Part i holds what bit i of u adds up to: every other run of 2^i units sees the whole run before it.
    """
    parts = []
    for size in (2**i for i in range((units - 1).bit_length())):
        runs = [tuple(range(start - size, start)) if start // size % 2 else () for start in range(0, units, size)]
        parts.append(tuple(runs[unit // size] for unit in range(units)))
    return parts


class Ring:
    """Where a rank computes a dense causal scale: its zig-zag units, all heads; `attend` goes around the ring.

    `forward` and `backward` compute attention to some blocks of keys (pretrain/kernels/sdpa.py).
    """

    heads = slice(None)

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...], forward: Forward, backward: Backward):
        ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.group, self.ranks, self.kernels = group.group_name, ranks, (forward, backward)
        self.held = zigzag_units(bounds[-1], ranks)
        self.units = self.held[self.rank]
        first, end = bounds[self.rank], bounds[self.rank + 1]
        self.own = end - first
        self.sends = [_neighbours([u - first for u in held if first <= u < end]) for held in self.held]
        self.receives = [
            _neighbours([i for i, u in enumerate(self.units) if a <= u < b])
            for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        # Which units of every rank each own unit sees: the earlier ones.
        self.seen = [_first([bisect_left(held, unit) for unit in self.units]) for held in self.held]
        # Compiled, torch 2.11 loses its gradients, and any torch takes both rounds for one and keeps the keys of all
        # ranks. (Said here and not above the function, where it would import the compiler at every start.)
        self.attend = torch.compiler.disable(self._attend)

    def enter(self, x_BU: Tensor) -> Tensor:
        """`[B, own units, ...] -> [B, zig-zag units, ...]`."""
        shape = torch.Size((x_BU.shape[0], len(self.units), *x_BU.shape[2:]))
        return redistribute(x_BU, shape, self.sends, self.receives, self.group, "queries, keys and values (ring)")

    def leave(self, x_BU: Tensor) -> Tensor:
        """The way back of `enter`."""
        shape = torch.Size((x_BU.shape[0], self.own, *x_BU.shape[2:]))
        return redistribute(x_BU, shape, self.receives, self.sends, self.group, "attention output (ring)")

    def _attend(self, q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: Blocks) -> Tensor:
        """As backends.attend. Units see all earlier own ones, `blocks[u] == (0, ..., u-1, own)`: the first blocks of
        keys are the own units as others see them, the last of u is u as it sees itself."""
        assert blocks[-1][:-1] == tuple(range(len(blocks) - 1)), "a ring serves dense causal scales"
        return _Ring.apply(q_BUnhd, k_BRnhd, v_BRnhd, blocks, self)

    def pass_on(self, x: Tensor, source: int, what: str) -> Callable[[], Tensor]:
        """Send `x` to the next rank; the result waits for what the one before has of the units of rank `source`."""
        shape = torch.Size((*x.shape[:2], len(self.held[source]), *x.shape[3:]))
        gives, takes = [0] * self.ranks, [0] * self.ranks
        gives[(self.rank + 1) % self.ranks], takes[(self.rank - 1) % self.ranks] = x.numel(), shape.numel()
        route = AllToAll(self.group, tuple(gives), tuple(takes), what)
        on_the_way = collectives.start_all_to_all(x.flatten(), route)
        return lambda: collectives.wait_all_to_all(on_the_way, route).view(shape)


class _Ring(torch.autograd.Function):
    """Keys and values travel as one tensor `[2, B, units, n, h, d]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, ring: Ring) -> Tensor:
        attend, _ = ring.kernels
        own = q.shape[1]
        k_past, v_past = k[:, :own], v[:, :own]
        arriving = ring.pass_on(torch.stack((k_past, v_past)), _source(ring, 1), "keys and values (ring)")
        out = torch.zeros_like(q, dtype=_sum_type(q))
        log_sum = out.new_full((*q.shape[:-1], 1), -torch.inf)
        attend(q, k, v, _last(blocks), out, log_sum)
        for seen in causal_parts(own):
            attend(q, k_past, v_past, seen, out, log_sum)
        for step in range(1, ring.ranks):
            kv = arriving()
            if step + 1 < ring.ranks:
                arriving = ring.pass_on(kv, _source(ring, step + 1), "keys and values (ring)")
            attend(q, kv[0], kv[1], ring.seen[_source(ring, step)], out, log_sum)
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
        arriving = ring.pass_on(torch.stack((k_past, v_past)), _source(ring, 1), "keys and values (ring)")
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=_sum_type(x)) for x in (q, k, v))
        differentiate(grad_out, q, k, v, out, log_sum, _last(ctx.blocks), (grad_q, grad_k, grad_v))
        grads_past = grad_q, grad_k[:, :own], grad_v[:, :own]
        for seen in causal_parts(own):
            differentiate(grad_out, q, k_past, v_past, out, log_sum, seen, grads_past)
        home: Callable[[], Tensor] | None = None
        for step in range(1, ring.ranks):
            kv = arriving()
            if step + 1 < ring.ranks:
                arriving = ring.pass_on(kv, _source(ring, step + 1), "keys and values (ring)")
            grad_kv = torch.zeros_like(kv, dtype=_sum_type(kv))
            seen = ring.seen[_source(ring, step)]
            differentiate(grad_out, q, kv[0], kv[1], out, log_sum, seen, (grad_q, grad_kv[0], grad_kv[1]))
            if home is not None:
                grad_kv += home()
            # What the ranks so far have gathered for this part goes on with it, and from the last one home.
            home = ring.pass_on(grad_kv, _source(ring, step + 1), "gradient of keys and values (ring)")
        assert home is not None
        for total, gathered in zip(grads_past[1:], home(), strict=True):
            total += gathered
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _source(ring: Ring, step: int) -> int:
    """Whose keys a rank holds at a step."""
    return (ring.rank - step) % ring.ranks


def _last(blocks: Blocks) -> Blocks:
    """Each unit's own block."""
    return tuple(seen[-1:] for seen in blocks)


def _first(counts: list[int]) -> Blocks:
    """So many blocks for each unit, the first ones; neighbours share a tuple, which is quickly compared."""
    prefixes = {count: tuple(range(count)) for count in counts}
    return tuple(prefixes[count] for count in counts)


def _neighbours(units: list[int]) -> tuple[slice, slice]:
    """An index of units that follow each other. Lists would be copied to the GPU, and the CPU wait for it."""
    first = units[0] if units else 0
    assert units == list(range(first, first + len(units))), f"{units} do not follow each other"
    return slice(None), slice(first, first + len(units))


def _sum_type(x: Tensor) -> torch.dtype:
    """The type in which parts add up."""
    return torch.promote_types(x.dtype, torch.float32)
