"""`attend` by torch's scaled_dot_product_attention: unmasked rectangles of units and the blocks that they see.

Also in parts that are merged, as a ring needs (parallel/ring.py): `attend_part`, `differentiate_part`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rectangle
from .blocks import KeyBlocks

CPU_UNITS = 16  # units that are joined to a call on a CPU, see _calls
Lists = list[tuple[int, ...]]  # of blocks


def attend(q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: KeyBlocks) -> Tensor:
    """See dispatch.attend."""
    return _Rectangles.apply(q_BUnhd, k_BRnhd, v_BRnhd, blocks)


class _Rectangles(torch.autograd.Function):
    """A hand-written backward, because autograd's for overlapping slices materialises one full-size
    gradient per slice: quadratic memory traffic in the number of units.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: KeyBlocks) -> Tensor:
        out, statistics = torch.empty_like(q), []
        for units, seen in _calls(blocks, q.device):
            part, log_sum = rectangle.forward(_fold(q, units), _gather(k, seen), _gather(v, seen))
            units.of(out).copy_(_unfold(part, units, q.shape[2]))
            statistics.append(log_sum)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, *statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *statistics = ctx.saved_tensors
        into = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        calls = _calls(ctx.blocks, q.device)
        _differentiate_calls(grads[0], q, k, v, out, statistics, calls, rectangle.backward, into)
        return *into, None


def attend_part(
    q_BUnhd: Tensor, k_BRnhd: Tensor, v_BRnhd: Tensor, blocks: KeyBlocks, out_BUnhd: Tensor, log_sum_BUnh1: Tensor
) -> None:
    """Merge attention to part of the keys into that to the parts before, in place.

    q, k, v and blocks as in `attend`, but units may see nothing. `out` and the log-sum-exp of the logits, at least
    fp32, are 0 and -inf before the first part. No gradient: see `differentiate_part`.
    """
    for units, seen in _calls(blocks, q_BUnhd.device):
        k, v = _gather(k_BRnhd, seen), _gather(v_BRnhd, seen)
        results = rectangle.forward_with_sum(_fold(q_BUnhd, units), k, v)
        part, part_sum = (_unfold(x, units, q_BUnhd.shape[2]) for x in (results[0], results[1].unsqueeze(-1)))
        out, log_sum = units.of(out_BUnhd), units.of(log_sum_BUnh1)
        total = torch.logaddexp(log_sum, part_sum)
        out.mul_((log_sum - total).exp()).addcmul_(part, (part_sum - total).exp())
        log_sum.copy_(total)


def differentiate_part(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, blocks: KeyBlocks,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Add what part of the keys gives to the gradients of q, k and v, of their type or a wider one: `grads`, in place.

    `out` and its log-sum-exp are those of all parts together; shapes as in `attend_part`.
    """
    calls = _calls(blocks, q.device)
    sums = [_fold(log_sum, units).squeeze(-1) for units, _ in calls]
    _differentiate_calls(grad_out, q, k, v, out, sums, calls, rectangle.backward_with_sum, grads)


class Runs(NamedTuple):
    """Runs of `length` neighbours, the first from `first` on, the next `step` further."""

    first: int
    step: int
    number: int
    length: int

    def of(self, x_BU: Tensor) -> Tensor:
        """A view of these: `[B, U, ...] -> [B, number, length, ...]`."""
        x = x_BU[:, self.first : self.first + (self.number - 1) * self.step + self.length]
        if self.number == 1 or self.step == self.length:
            return x.unflatten(1, (self.number, self.length))
        return x.unfold(1, self.length, self.step).movedim(-1, 2)


Calls = list[tuple[Runs, Lists]]  # runs of units, and the blocks that each run sees


def _calls(blocks: KeyBlocks, device: torch.device) -> Calls:
    """Calls of one unmasked rectangle each; units that see nothing are left out.

    Neighbours that see the same blocks are a run, with more queries: in a ring they see the same of another rank's
    keys, a copy of which for each unit would be many times the keys. Runs share a call where they are equally long,
    equally far apart and see equally many blocks. On a GPU all of them do, for fewer launches. On a CPU a few at a
    time: copies of their keys then stay small enough for the allocator to use the same memory again, where fresh memory
    costs a page fault every 4 KB.
    """
    most = CPU_UNITS if device.type == "cpu" else len(blocks)
    runs: list[tuple[int, int]] = []  # first, end
    for unit, seen in enumerate(blocks):
        if runs and runs[-1][1] == unit and blocks[unit - 1] == seen:
            runs[-1] = (runs[-1][0], unit + 1)
        elif seen:
            runs.append((unit, unit + 1))
    calls: Calls = []
    for first, end in runs:
        length, seen = end - first, blocks[first]
        if calls:
            last, lists = calls[-1]
            step = first - last.first if last.number == 1 else last.step
            follows = first == last.first + last.number * step and (last.number + 1) * length <= most
            if follows and _can_be_one_view(length, step) and (length, len(seen)) == (last.length, len(lists[0])):
                calls[-1] = (Runs(last.first, step, last.number + 1, length), [*lists, seen])
                continue
        calls.append((Runs(first, length, 1, length), [seen]))
    return calls


def _can_be_one_view(length: int, step: int) -> bool:
    """Compiled, a write to a view with gaps makes 0 of what lies in them (pytorch issue 198102)."""
    return step == length or (step > length and not torch.compiler.is_compiling())


def _differentiate_calls(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: list[Tensor], calls: Calls,
    backward: Callable[..., tuple[Tensor, ...]], grads: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    for (units, seen), log_sum in zip(calls, statistics, strict=True):
        queries, keys = _fold(q, units), _gather(k, seen)
        operands = _fold(grad_out, units), queries, keys, _gather(v, seen), _fold(out, units), log_sum
        for heads in rectangle.head_slices(queries, keys):
            dq, dk, dv = backward(*(operands if heads is None else [x[:, heads] for x in operands]))
            grad_q, grad_k, grad_v = grads if heads is None else [x[..., heads, :] for x in grads]
            units.of(grad_q).add_(_unfold(dq, units, q.shape[2]))
            _scatter_add(grad_k, dk, seen)
            _scatter_add(grad_v, dv, seen)


def _fold(x_BUnhd: Tensor, units: Runs) -> Tensor:
    """Runs join the batch, their units are more queries: `[B, U, n, h, d] -> [B·number, h, length·n, d]`."""
    return units.of(x_BUnhd).flatten(2, 3).flatten(0, 1).transpose(1, 2)


def _unfold(x_Bhnd: Tensor, units: Runs, tokens: int) -> Tensor:
    """Back to `[B, number, length, n, h, d]`."""
    return x_Bhnd.transpose(1, 2).unflatten(0, (-1, units.number)).unflatten(2, (units.length, tokens))


def _as_runs(seen: Lists) -> Runs | None:
    """Lists of blocks as evenly spaced runs, where they are such and have no block twice."""
    first, length = seen[0][0], len(seen[0])
    step = seen[1][0] - first if len(seen) > 1 else length
    starts = range(first, first + len(seen) * step, step) if _can_be_one_view(length, step) else ()
    even = [tuple(range(start, start + length)) for start in starts] == seen
    return Runs(first, step, len(seen), length) if even else None


def _stretches(indices: tuple[int, ...]) -> list[tuple[int, slice]]:
    """Where indices count on: position in the list, and the indices as a slice."""
    runs: list[tuple[int, slice]] = []
    for position, index in enumerate(indices):
        if runs and index == runs[-1][1].stop:
            runs[-1] = (runs[-1][0], slice(runs[-1][1].start, index + 1))
        else:
            runs.append((position, slice(index, index + 1)))
    return runs


def _select(x_BR: Tensor, indices: tuple[int, ...]) -> Tensor:
    parts = [x_BR[:, part] for _, part in _stretches(indices)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _gather(x_BRnhd: Tensor, seen: Lists) -> Tensor:
    """Keys of a call: `[B, R, n, h, d] -> [B·U, h, len(seen[0])·n, d]`, a view where the blocks allow it."""
    if (runs := _as_runs(seen)) is not None:
        return _fold(x_BRnhd, runs)
    if len(seen) == 1:
        return _select(x_BRnhd, seen[0]).flatten(1, 2).transpose(1, 2)
    return torch.cat([_select(x_BRnhd, column) for column in zip(*seen, strict=True)], 2).flatten(0, 1).transpose(1, 2)


def _scatter_add(grad_BRnhd: Tensor, part: Tensor, seen: Lists) -> None:
    """Add the gradients of gathered keys to their blocks, in a fixed order."""
    batch, _, tokens, heads, width = grad_BRnhd.shape
    if (runs := _as_runs(seen)) is not None:
        runs.of(grad_BRnhd).add_(_unfold(part, runs, tokens))
        return
    part = part.transpose(1, 2).reshape(batch, len(seen), -1, tokens, heads, width)
    if len(seen) == 1:
        columns = [(part[:, 0], seen[0])]
    else:
        columns = [(part[:, :, j], column) for j, column in enumerate(zip(*seen, strict=True))]
    for grads, indices in columns:
        for position, blocks in _stretches(indices):
            grad_BRnhd[:, blocks] += grads[:, position : position + blocks.stop - blocks.start]
