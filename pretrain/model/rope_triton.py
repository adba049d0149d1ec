# mypy: disable-error-code=no-untyped-def
"""`rope.normalise_and_rotate` on a GPU: one Triton kernel for each pass, which reads and writes every value once.

All queries and keys pass through here. What torch's compiler made of the plain operations moved four times as much
(docs/benchmarks.md). A row is one head of one token, its channels in two halves; all is computed in fp32. Sums over
rows are made in a fixed order, so that a run repeats bit by bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable

# Heads of tokens that a program takes at once, and how often one of the backward pass does so: it adds up the gain's
# gradient of its rows. Arguments of the operators, because torch's caches of compiled graphs know kernels and
# arguments, but not what else is in this file.
ROWS, TIMES = 64, 8


@triton.jit
def _read(x, at, seen, HALF: tl.constexpr):
    """Both halves of rows, in fp32."""
    return tl.load(x + at, seen, 0.0).to(tl.float32), tl.load(x + at + HALF, seen, 0.0).to(tl.float32)


@triton.jit
def _per_channel(gain, HALF: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    a, b = _read(gain, channel, channel < HALF, HALF)
    return a[None, None], b[None, None]


@triton.jit
def _angles(cos, sin, token, channel, count, positions, HALF: tl.constexpr):
    at, seen = (token % positions).to(tl.int64) * HALF + channel, (token < count) & (channel < HALF)
    return tl.load(cos + at, seen, 0.0), tl.load(sin + at, seen, 0.0)


# From x of `count` tokens and `heads`, by its strides, to out `[count, heads, 2 HALF]`. Tables are `[positions, HALF]`;
# tail has a row for every `frame` tokens. Tiles are `[TOKENS, HEADS, CHANNELS]`, padded to powers of two.
@triton.jit
def _forward(
    x, gain, cos, sin, tail, out, count, heads, positions, frame, x_token, x_head, tail_frame, tail_head,
    EPS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    channel, head = tl.arange(0, CHANNELS)[None, None], tl.arange(0, HEADS)[None, :, None]
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    seen = (token < count) & (head < heads) & (channel < HALF)
    a, b = _read(x, token.to(tl.int64) * x_token + head.to(tl.int64) * x_head + channel, seen, HALF)
    c, s = _angles(cos, sin, token, channel, count, positions, HALF)
    gain_a, gain_b = _per_channel(gain, HALF, CHANNELS)
    inverse = tl.rsqrt(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * HALF) + EPS)
    a, b = a * inverse * gain_a, b * inverse * gain_b
    first, second = a * c - b * s, a * s + b * c
    if STILL > 0:
        last = seen & (channel >= HALF - STILL)
        at = (token // frame) * tail_frame + head * tail_head + channel - (HALF - STILL)
        first = tl.where(last, tl.load(tail + at, last, 0.0).to(tl.float32), first)
        second = tl.where(last, tl.load(tail + at + STILL, last, 0.0).to(tl.float32), second)
    at = (token.to(tl.int64) * heads + head) * (2 * HALF) + channel
    tl.store(out + at, first.to(out.dtype.element_ty), seen)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), seen)


# grad_x is `[count, heads, 2 HALF]`. The caller adds up grad_gain `[programs, 2 HALF]` and, if WANTED, grad_tail
# `[count, heads, 2 STILL]`, in fp32: added up here, by programs that run in any order, no run would repeat another.
@triton.jit
def _backward(
    grad, x, gain, cos, sin, grad_x, grad_gain, grad_tail, count, heads, positions, g_token, g_head, x_token, x_head,
    EPS: tl.constexpr, HALF: tl.constexpr, STILL: tl.constexpr, WANTED: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    channel, head = tl.arange(0, CHANNELS)[None, None], tl.arange(0, HEADS)[None, :, None]
    gain_a, gain_b = _per_channel(gain, HALF, CHANNELS)
    sum_a, sum_b = tl.zeros((HEADS, CHANNELS), tl.float32), tl.zeros((HEADS, CHANNELS), tl.float32)
    for step in range(STEPS):
        token = ((tl.program_id(0) * STEPS + step) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
        seen = (token < count) & (head < heads) & (channel < HALF)
        far, wide = token.to(tl.int64), head.to(tl.int64)
        p, q = _read(grad, far * g_token + wide * g_head + channel, seen, HALF)
        a, b = _read(x, far * x_token + wide * x_head + channel, seen, HALF)
        c, s = _angles(cos, sin, token, channel, count, positions, HALF)
        row = far * heads + head
        if STILL > 0:
            last = seen & (channel >= HALF - STILL)
            if WANTED:
                at = row * (2 * STILL) + channel - (HALF - STILL)
                tl.store(grad_tail + at, p, last)
                tl.store(grad_tail + at + STILL, q, last)
            p, q = tl.where(last, 0.0, p), tl.where(last, 0.0, q)
        p, q = p * c + q * s, q * c - p * s
        inverse = tl.rsqrt(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * HALF) + EPS)
        a, b = a * inverse, b * inverse
        sum_a += tl.sum(p * a, 0)
        sum_b += tl.sum(q * b, 0)
        p, q = p * gain_a, q * gain_b
        along = tl.sum(p * a + q * b, 2, keep_dims=True) / (2 * HALF)
        at = row * (2 * HALF) + channel
        tl.store(grad_x + at, ((p - a * along) * inverse).to(grad_x.dtype.element_ty), seen)
        tl.store(grad_x + at + HALF, ((q - b * along) * inverse).to(grad_x.dtype.element_ty), seen)
    across = tl.arange(0, CHANNELS)
    at = grad_gain + tl.program_id(0) * (2 * HALF) + across
    tl.store(at, tl.sum(sum_a, 0), across < HALF)
    tl.store(at + HALF, tl.sum(sum_b, 0), across < HALF)


def _rows(x_BTHWhd: Tensor) -> tuple[Tensor, int, int]:
    """The tensor, or a copy of it, and its strides from token to token and head to head; channels lie side by side."""
    axes = [i for i in range(4) if x_BTHWhd.shape[i] > 1]
    even = all(x_BTHWhd.stride(i) == x_BTHWhd.stride(j) * x_BTHWhd.shape[j] for i, j in pairwise(axes))
    if x_BTHWhd.stride(-1) != 1 or not even:
        x_BTHWhd = x_BTHWhd.contiguous()
    return x_BTHWhd, x_BTHWhd.stride(axes[-1]) if axes else 0, x_BTHWhd.stride(4)


def _sizes(x: Tensor, tail: Tensor | None, eps: float, rows: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    half, heads = x.shape[-1] // 2, triton.next_power_of_2(x.shape[-2])
    return {
        "EPS": eps,
        "HALF": half,
        "STILL": 0 if tail is None else tail.shape[-1] // 2,
        "CHANNELS": triton.next_power_of_2(half),
        "HEADS": heads,
        "TOKENS": max(1, rows // heads),
    }


def _run_forward(
    kernel: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, eps: float, rows: int
) -> Tensor:
    B, T, H, W, h, d = x.shape
    assert tail is None or (tail.shape[:2] in ((B, T), (1, 1)) and tail.shape[4] in (1, h)), tail.shape
    assert cos.shape == sin.shape == (T, H, W, 1, d // 2) and gain.shape == (d,), (cos.shape, gain.shape)
    assert cos.is_contiguous() and sin.is_contiguous() and gain.is_contiguous()
    x, x_token, x_head = _rows(x)
    out = torch.empty((B, T, H, W, h, d), dtype=x.dtype, device=x.device)
    ends = x if tail is None else tail.contiguous()
    tail_head = 0 if tail is None or tail.shape[-2] == 1 else tail.shape[-1]
    tail_frame = 0 if tail is None or tail.shape[:2].numel() == 1 else tail.shape[-1] * tail.shape[-2]
    count, sizes = B * T * H * W, _sizes(x, tail, eps, rows)
    if count:
        kernel[(triton.cdiv(count, sizes["TOKENS"]),)](
            x, gain, cos, sin, ends, out, count, h, T * H * W, H * W, x_token, x_head, tail_frame, tail_head, **sizes
        )
    return out


def _run_backward(
    kernel: Any, grad: Tensor, x: Tensor, gain: Tensor, tables: tuple[Tensor, Tensor], tail: Tensor | None,
    wanted: bool, eps: float, rows: int, times: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, W, h, d = x.shape
    x, x_token, x_head = _rows(x)
    grad, g_token, g_head = _rows(grad)
    count, sizes = B * T * H * W, _sizes(x, tail, eps, rows)
    programs = triton.cdiv(count, times * sizes["TOKENS"])
    grad_x = torch.empty((B, T, H, W, h, d), dtype=x.dtype, device=x.device)
    grad_gain = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    channels = 2 * sizes["STILL"] if wanted else 0
    grad_tail = torch.empty((B, T, H * W, h, channels), dtype=torch.float32, device=x.device)
    if count:
        kernel[(programs,)](
            grad, x, gain, *tables, grad_x, grad_gain, grad_tail, count, h, T * H * W, g_token, g_head, x_token,
            x_head, WANTED=wanted, STEPS=times, **sizes,
        )  # fmt: skip
    return grad_x, grad_gain.sum(0).to(gain.dtype), grad_tail.sum(2)


def _gradients(ctx: Any, backward: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, gain and tail, by `backward` of (x, gain, cos, sin, tail, whether tail's is wanted)."""
    x, gain, cos, sin, tail = ctx.saved_tensors
    wanted = tail is not None and ctx.needs_input_grad[4]
    grad_x, grad_gain, grad_tail = backward(x, gain, cos, sin, tail, wanted)
    ends = grad_tail[:, :, None, None].sum_to_size(tail.shape).to(tail.dtype) if wanted else None
    return grad_x, grad_gain, ends


def normalise_and_rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, eps: float) -> Tensor:
    """See rope.normalise_and_rotate: x `[B, T, H, W, h, d]`, tail `[B, T, 1, 1, h or 1, channels]`."""
    if torch.compiler.is_compiling():
        return forward(x, gain, cos, sin, tail, eps, ROWS)
    return _Direct.apply(x, gain, cos, sin, tail, eps)


class _Direct(torch.autograd.Function):
    """Without the dispatcher, by which a call takes the CPU a quarter of a millisecond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, gain, cos, sin, tail)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device; a backward pass is there already
            return _run_forward(_forward, x, gain, cos, sin, tail, eps, ROWS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def run(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, wanted: bool) -> Any:
            return _run_backward(_backward, grads[0], x, gain, (cos, sin), tail, wanted, ctx.eps, ROWS, TIMES)

        grad_x, grad_gain, grad_tail = _gradients(ctx, run)
        return grad_x, grad_gain, None, None, grad_tail, None


# The same for a compiler, as operators.

wrap_triton = library.wrap_triton  # by its bare name torch finds an operator's kernels, in its source


@library.triton_op("msc::normalise_and_rotate_backward", mutates_args={})
def backward(
    grad: Tensor, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, wanted: bool, eps: float,
    rows: int = ROWS, times: int = TIMES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of gain, and of tail `[B, T, h, channels]` in fp32 (of no size unless `wanted`)."""
    return _run_backward(wrap_triton(_backward), grad, x, gain, (cos, sin), tail, wanted, eps, rows, times)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_gain, grad_tail = _gradients(ctx, lambda *inputs: backward(grad, *inputs, ctx.eps, ctx.rows, TIMES))
    return grad_x, grad_gain, None, None, grad_tail, None, None


def _differentiable(operator: Any) -> Any:
    operator.register_autograd(_differentiate, setup_context=_keep)
    return operator


@_differentiable
@library.triton_op("msc::normalise_and_rotate", mutates_args={})
def forward(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None, eps: float, rows: int = ROWS
) -> Tensor:
    return _run_forward(wrap_triton(_forward), x, gain, cos, sin, tail, eps, rows)
