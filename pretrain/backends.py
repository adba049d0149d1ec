"""Attention over blocks of keys: one signature, several kernels.

`attend(q, k, v, blocks)`: every query unit attends, unmasked, to the blocks of keys listed for it. That
list is all a kernel needs to know of causality, windows and pooling, so no N×N mask is ever built.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Blocks = tuple[tuple[int, ...], ...]
Backend = Literal["auto", "sdpa", "flex"]


def attend(q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: Blocks, backend: Backend = "auto") -> Tensor:
    """Softmax attention of each query unit to its own list of key blocks.

    q `[B, U, n, h, d]` holds U units of n tokens; k and v `[B, R, n, h, d]` hold R blocks of n keys;
    `blocks[u]` names the blocks unit u sees, never none. Logits are scaled by `d**-0.5`. Returns
    `[B, U, n, h, d]`.
    """
    assert len(blocks) == q_BUnhd.shape[1] and all(blocks), "every query unit needs at least its own keys"
    if backend == "auto":
        backend = choose_backend(q_BUnhd.device.type, q_BUnhd.shape[-1])
    if backend == "flex":
        from . import flex  # its import costs seconds that the other kernels need not pay

        return flex.attend(q_BUnhd, k_BRnhd, v_BRnhd, blocks)
    return _Rectangles.apply(q_BUnhd, k_BRnhd, v_BRnhd, blocks)


def choose_backend(device_type: str, head_width: int = 64) -> Backend:
    """The kernel that "auto" means on a device ("cpu", "cuda").

    FlexAttention has no backward pass on a CPU and needs heads of 16 channels; on a GPU it is several times
    faster, as one launch covers all units (docs/benchmarks.md). It compiles once per shape, minutes in all.
    """
    return "flex" if device_type == "cuda" and head_width >= 16 else "sdpa"


class _Rectangles(torch.autograd.Function):
    """Units that see equally many blocks run as one batched call; each call is an unmasked rectangle.

    A hand-written backward, because autograd's for overlapping slices materialises one full-size
    gradient per slice: quadratic memory traffic in the number of units.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        out = torch.empty_like(q)
        statistics = []
        for units, seen in _calls(blocks):
            q_call = _fold(q, units)
            out_call, log_sum = _forward(q_call, _gather(k, seen), _gather(v, seen))
            out[:, units] = _unfold(out_call, q.shape[0], q.shape[2])
            statistics.append(log_sum)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, *statistics = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        batch, tokens = q.shape[0], q.shape[2]
        for (units, seen), log_sum in zip(_calls(ctx.blocks), statistics, strict=True):
            dq, dk, dv = _backward(
                _fold(grad_out, units),
                _fold(q, units),
                _gather(k, seen),
                _gather(v, seen),
                _fold(out, units),
                log_sum,
            )
            grad_q[:, units] = _unfold(dq, batch, tokens)
            _scatter_add(grad_k, dk, seen)
            _scatter_add(grad_v, dv, seen)
        return grad_q, grad_k, grad_v, None


def _calls(blocks: Blocks) -> list[tuple[slice, list[tuple[int, ...]]]]:
    """Group neighbouring units that see the same number of blocks."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    run = 0
    for unit, seen in enumerate(blocks):
        if unit and len(seen) != len(blocks[unit - 1]):
            run += 1
        groups[run, len(seen)].append(unit)
    return [(slice(units[0], units[-1] + 1), [blocks[u] for u in units]) for units in groups.values()]


def _fold(x_BUnhd: Tensor, units: slice) -> Tensor:
    """Units of a call join the batch: `[B, U, n, h, d] -> [B·U, h, n, d]`."""
    return x_BUnhd[:, units].flatten(0, 1).transpose(1, 2)


def _unfold(x_Bhnd: Tensor, batch: int, tokens: int) -> Tensor:
    return x_Bhnd.transpose(1, 2).reshape(batch, -1, tokens, x_Bhnd.shape[1], x_Bhnd.shape[3])


def _runs(indices: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive runs in a list of indices: (position in the list, first index, length)."""
    runs: list[tuple[int, int, int]] = []
    for position, index in enumerate(indices):
        if runs and index == runs[-1][1] + runs[-1][2]:
            at, first, length = runs[-1]
            runs[-1] = (at, first, length + 1)
        else:
            runs.append((position, index, 1))
    return runs


def _gather(x_BRnhd: Tensor, seen: list[tuple[int, ...]]) -> Tensor:
    """Keys of a call: `[B, R, n, h, d] -> [B·U, h, len(seen[0])·n, d]`, a view where the blocks allow it."""
    batch, _, _, heads, width = x_BRnhd.shape
    if len(seen) == 1:
        parts = [x_BRnhd[:, first : first + length] for _, first, length in _runs(list(seen[0]))]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return rows.reshape(batch, -1, heads, width).transpose(1, 2)
    columns = []
    for column in zip(*seen, strict=True):
        parts = [x_BRnhd[:, first : first + length] for _, first, length in _runs(list(column))]
        columns.append(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return torch.cat(columns, 2).flatten(0, 1).transpose(1, 2)


def _scatter_add(grad_BRnhd: Tensor, part: Tensor, seen: list[tuple[int, ...]]) -> None:
    """Add the gradients of gathered keys to their blocks, in a fixed order."""
    batch, _, tokens, heads, width = grad_BRnhd.shape
    part = part.transpose(1, 2).reshape(batch, len(seen), -1, tokens, heads, width)
    if len(seen) == 1:
        for position, first, length in _runs(list(seen[0])):
            grad_BRnhd[:, first : first + length] += part[:, 0, position : position + length]
        return
    for j, column in enumerate(zip(*seen, strict=True)):
        for position, first, length in _runs(list(column)):
            grad_BRnhd[:, first : first + length] += part[:, position : position + length, j]


# One rectangle --------------------------------------------------------------------------------------


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return F.scaled_dot_product_attention(q, k, v), q.new_empty(0)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(grad, q, k, v, out, log_sum, 0.0, False)
    with torch.enable_grad():  # elsewhere the kernel's statistics are private: run it again
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2]), inputs, grad)
