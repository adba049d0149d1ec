"""Routed attention: every query block attends to near blocks of keys and to the `top` past ones that suit it best.

A block is a spatial tile of one unit. Blocks are compared by their means, head by head; attention to the chosen blocks
is full softmax attention at full resolution, so that detail of what was seen long ago comes back at a cost that is
linear in the video (blocks of experts for keys, as in Lu et al. 2025, MoBA, arXiv 2502.13189). One way for all devices:
the chosen keys are copied side by side and every query block is an unmasked rectangle (rectangle.py). The copies are
made again in the backward pass, so that none of them is kept.

Shapes: q `[B, U, P, n, h, d]` of U units of P tiles of n tokens, k and v `[B, R, P, n, h, d]` of R rows of key blocks.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rectangle
from .blocks import Candidates, KeyBlocks


class Call(NamedTuple):
    """Units, first to end, that see equally many blocks.

    near_Qs: the s blocks that each of their Q query blocks sees whatever the data, counted through all rows and tiles.
    chosen: how many more each sees.
    """

    first: int
    end: int
    near_Qs: Tensor
    chosen: int


class Routes(NamedTuple):
    """What follows from where the units lie: the tiles `[U, R·P]` that each unit may choose, and the calls."""

    eligible: Tensor
    top: int
    calls: tuple[Call, ...]


@lru_cache(maxsize=64)  # while a CUDA graph is captured nothing can be copied to its device
def prepare(
    blocks: KeyBlocks, candidates: tuple[Candidates, ...], tiles: int, top: int, device: torch.device
) -> Routes:
    """For `attend`: query blocks of unit u see their own tile of the rows `blocks[u]`, and choose among all tiles of
    the rows `candidates[u]`. Not to be compiled."""
    rows = blocks[-1][-1] + 1
    eligible = torch.zeros(len(blocks), rows, tiles, dtype=torch.bool)
    for unit, (first, end) in enumerate(candidates):
        eligible[unit, first:end] = True
    calls, tile = [], torch.arange(tiles)[:, None]

    def sizes(unit: int) -> tuple[int, int]:
        first, end = candidates[unit]
        return len(blocks[unit]), min(top, (end - first) * tiles)

    for (_, chosen), units in groupby(range(len(blocks)), sizes):
        run = list(units)
        near = (torch.tensor([blocks[unit] for unit in run])[:, None] * tiles + tile).flatten(0, 1)
        calls.append(Call(run[0], run[-1] + 1, near.to(device), chosen))
    return Routes(eligible.flatten(1).to(device), top, tuple(calls))


def attend(q_BUPnhd: Tensor, k_BRPnhd: Tensor, v_BRPnhd: Tensor, routes: Routes) -> Tensor:
    """Attention of each query block to its near and its best blocks, all candidates where there are fewer than `top`;
    `[B, U, P, n, h, d]`."""
    chosen = choose_blocks(q_BUPnhd, k_BRPnhd, routes)
    out = _Routed.apply(q_BUPnhd, k_BRPnhd, v_BRPnhd, chosen, routes.calls)
    assert isinstance(out, Tensor)
    return out


@torch.no_grad()
def choose_blocks(q_BUPnhd: Tensor, k_BRPnhd: Tensor, routes: Routes) -> Tensor:
    """The best tiles, counted through all rows, for every head's query blocks: `[B, h, U·P, top]`, best first.

    The score is the product of the blocks' mean query and mean key. Of equal scores the earlier block is the better.
    Where a unit has fewer candidates than `top`, the last columns mean nothing.
    """
    wide = torch.promote_types(q_BUPnhd.dtype, torch.float32)
    q, k = (x.mean(3, dtype=wide).flatten(1, 2).transpose(1, 2) for x in (q_BUPnhd, k_BRPnhd))
    scores = (q @ k.mT).float()  # B h U·P R·P
    # A float's bits, read as an integer, are in the float's order but for negative ones, which are reversed. With the
    # block's number below them no two scores are equal.
    eligible = routes.eligible.repeat_interleave(q_BUPnhd.shape[2], 0)
    bits = scores.masked_fill(~eligible, -torch.inf).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    unique = (ordered.long() << 32) - torch.arange(k.shape[2], device=k.device)
    return unique.topk(min(routes.top, k.shape[2])).indices


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, calls: tuple[Call, ...]) -> Tensor:
        out, statistics = torch.empty_like(q), []
        keys, values = _by_heads(k), _by_heads(v)
        for call in calls:
            seen = _rows(call, chosen, k)
            part, log_sum = rectangle.forward(_queries(q, call), _gather(keys, seen), _gather(values, seen))
            _write_units(out, part, call)
            statistics.append(log_sum)
        ctx.calls = calls
        ctx.save_for_backward(q, k, v, chosen, out, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, chosen, out, *statistics = ctx.saved_tensors
        keys, values, grad_q = _by_heads(k), _by_heads(v), torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)
        for call, log_sum in zip(ctx.calls, statistics, strict=True):
            seen = _rows(call, chosen, k)
            dq, dk, dv = rectangle.backward(
                _queries(grads[0], call), _queries(q, call), _gather(keys, seen), _gather(values, seen),
                _queries(out, call), log_sum,
            )  # fmt: skip
            _write_units(grad_q, dq, call)
            for total, part in ((grad_k, dk), (grad_v, dv)):  # in a fixed order, also on a GPU
                total.index_put_((seen.flatten(),), part.reshape(-1, *total.shape[1:]), accumulate=True)
        return grad_q, _from_heads(grad_k, k), _from_heads(grad_v, v), None, None


def _rows(call: Call, chosen_BhQm: Tensor, k_BRPnhd: Tensor) -> Tensor:
    """The blocks that the query blocks of a call see, as rows of `_by_heads`: `[B, h, Q, blocks]`."""
    B, R, P, _, h, _ = k_BRPnhd.shape
    head = torch.arange(B * h, device=k_BRPnhd.device).view(B, h, 1, 1) * (R * P)
    far = chosen_BhQm[:, :, call.first * P : call.end * P, : call.chosen]
    return torch.cat((far, call.near_Qs.expand(B, h, -1, -1)), -1) + head


def _by_heads(x_BRPnhd: Tensor) -> Tensor:
    """Blocks of keys as rows of one matrix: `[B·h·R·P, n, d]`."""
    return x_BRPnhd.permute(0, 4, 1, 2, 3, 5).flatten(0, 3)


def _from_heads(rows: Tensor, like_BRPnhd: Tensor) -> Tensor:
    B, R, P, n, h, d = like_BRPnhd.shape
    return rows.view(B, h, R, P, n, d).permute(0, 2, 3, 4, 1, 5)


def _gather(rows: Tensor, seen_BhQm: Tensor) -> Tensor:
    """The blocks that every query block sees, side by side: `[B·h, Q, m·n, d]`."""
    B, h, Q, m = seen_BhQm.shape
    return rows.index_select(0, seen_BhQm.flatten()).view(B * h, Q, m * rows.shape[1], rows.shape[2])


def _queries(x_BUPnhd: Tensor, call: Call) -> Tensor:
    """Query blocks as the heads of a rectangle: `[B·h, Q, n, d]`."""
    return x_BUPnhd[:, call.first : call.end].permute(0, 4, 1, 2, 3, 5).flatten(2, 3).flatten(0, 1)


def _write_units(x_BUPnhd: Tensor, part: Tensor, call: Call) -> None:
    """Write what `_queries` took, in place."""
    units = x_BUPnhd[:, call.first : call.end]
    B, U, P, n, h, d = units.shape
    units.copy_(part.reshape(B, h, U, P, n, d).permute(0, 2, 3, 4, 1, 5))
