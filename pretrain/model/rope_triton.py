# mypy: disable-error-code=no-untyped-def
"""Triton kernels of `rope.normalise_and_rotate`, one for each pass, which read and write every value once.

All queries and keys pass through here; torch's compiler moved four times as much for the plain operations
(docs/benchmarks.md). A row is one head of one token, its channels in two halves; all is computed in fp32. Sums over
rows are in a fixed order, so that a run repeats bit by bit.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch.autograd.function import once_differentiable

# Rows that a program takes at once, and how often one of the backward pass does so, which adds up the gain's gradient
# of its rows. Arguments of the operators, because torch's caches of compiled graphs know kernels and arguments, but not
# this file's other values.
ROWS, TIMES = 64, 8


@triton.jit
def _read(x, at, mask, HALF: tl.constexpr):
    """Both halves of rows, in fp32."""
    return tl.load(x + at, mask, 0.0).to(tl.float32), tl.load(x + at + HALF, mask, 0.0).to(tl.float32)


@triton.jit
def _per_channel(gain, HALF: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    a, b = _read(gain, channel, channel < HALF, HALF)
    return a[None, None], b[None, None]


@triton.jit
def _angles(cos, sin, token, channel, count, positions, HALF: tl.constexpr):
    at, mask = (token % positions).to(tl.int64) * HALF + channel, (token < count) & (channel < HALF)
    return tl.load(cos + at, mask, 0.0), tl.load(sin + at, mask, 0.0)


# From x of `count` tokens and `heads`, by its strides, to out `[count, heads, 2 HALF]`. Tables are `[positions, HALF]`;
# bias has a row, of the unrotated PAIRS of channels, for every `frame` tokens. Tiles are `[TOKENS, HEADS, CHANNELS]`,
# padded to powers of two.
@triton.jit
def _forward(
    x, gain, cos, sin, bias, out, count, heads, positions, frame, x_token, x_head, bias_frame, bias_head,
    EPS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    channel, head = tl.arange(0, CHANNELS)[None, None], tl.arange(0, HEADS)[None, :, None]
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    mask = (token < count) & (head < heads) & (channel < HALF)
    a, b = _read(x, token.to(tl.int64) * x_token + head.to(tl.int64) * x_head + channel, mask, HALF)
    c, s = _angles(cos, sin, token, channel, count, positions, HALF)
    gain_a, gain_b = _per_channel(gain, HALF, CHANNELS)
    inverse = tl.rsqrt(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * HALF) + EPS)
    a, b = a * inverse * gain_a, b * inverse * gain_b
    first, second = a * c - b * s, a * s + b * c
    if PAIRS > 0:
        last = mask & (channel >= HALF - PAIRS)
        at = (token // frame) * bias_frame + head * bias_head + channel - (HALF - PAIRS)
        first = tl.where(last, tl.load(bias + at, last, 0.0).to(tl.float32), first)
        second = tl.where(last, tl.load(bias + at + PAIRS, last, 0.0).to(tl.float32), second)
    at = (token.to(tl.int64) * heads + head) * (2 * HALF) + channel
    tl.store(out + at, first.to(out.dtype.element_ty), mask)
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask)


# grad_x is `[count, heads, 2 HALF]`. The caller adds up grad_gain `[programs, 2 HALF]` and, if BIAS_GRADIENT, grad_bias
# `[count, heads, 2 PAIRS]`, in fp32: added up here, by programs that run in any order, no run would repeat another.
@triton.jit
def _backward(
    grad, x, gain, cos, sin, grad_x, grad_gain, grad_bias, count, heads, positions, g_token, g_head, x_token, x_head,
    EPS: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    channel, head = tl.arange(0, CHANNELS)[None, None], tl.arange(0, HEADS)[None, :, None]
    gain_a, gain_b = _per_channel(gain, HALF, CHANNELS)
    sum_a, sum_b = tl.zeros((HEADS, CHANNELS), tl.float32), tl.zeros((HEADS, CHANNELS), tl.float32)
    for step in range(STEPS):
        token = ((tl.program_id(0) * STEPS + step) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
        mask = (token < count) & (head < heads) & (channel < HALF)
        far, wide = token.to(tl.int64), head.to(tl.int64)
        p, q = _read(grad, far * g_token + wide * g_head + channel, mask, HALF)
        a, b = _read(x, far * x_token + wide * x_head + channel, mask, HALF)
        c, s = _angles(cos, sin, token, channel, count, positions, HALF)
        row = far * heads + head
        if PAIRS > 0:
            last = mask & (channel >= HALF - PAIRS)
            if BIAS_GRADIENT:
                at = row * (2 * PAIRS) + channel - (HALF - PAIRS)
                tl.store(grad_bias + at, p, last)
                tl.store(grad_bias + at + PAIRS, q, last)
            p, q = tl.where(last, 0.0, p), tl.where(last, 0.0, q)
        p, q = p * c + q * s, q * c - p * s
        inverse = tl.rsqrt(tl.sum(a * a + b * b, 2, keep_dims=True) / (2 * HALF) + EPS)
        a, b = a * inverse, b * inverse
        sum_a += tl.sum(p * a, 0)
        sum_b += tl.sum(q * b, 0)
        p, q = p * gain_a, q * gain_b
        along = tl.sum(p * a + q * b, 2, keep_dims=True) / (2 * HALF)
        at = row * (2 * HALF) + channel
        tl.store(grad_x + at, ((p - a * along) * inverse).to(grad_x.dtype.element_ty), mask)
        tl.store(grad_x + at + HALF, ((q - b * along) * inverse).to(grad_x.dtype.element_ty), mask)
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


def _sizes(x: Tensor, bias: Tensor | None, eps: float, rows: int) -> dict[str, Any]:
    """What both kernels are compiled for."""
    half, heads = x.shape[-1] // 2, triton.next_power_of_2(x.shape[-2])
    return {
        "EPS": eps,
        "HALF": half,
        "PAIRS": 0 if bias is None else bias.shape[-1] // 2,
        "CHANNELS": triton.next_power_of_2(half),
        "HEADS": heads,
        "TOKENS": max(1, rows // heads),
    }


def _run_forward(
    kernel: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float, rows: int
) -> Tensor:
    B, T, H, W, h, d = x.shape
    assert bias is None or (bias.shape[:2] in ((B, T), (1, 1)) and bias.shape[4] in (1, h)), bias.shape
    assert cos.shape == sin.shape == (T, H, W, 1, d // 2) and gain.shape == (d,), (cos.shape, gain.shape)
    assert cos.is_contiguous() and sin.is_contiguous() and gain.is_contiguous()
    x, x_token, x_head = _rows(x)
    out = torch.empty((B, T, H, W, h, d), dtype=x.dtype, device=x.device)
    ends = x if bias is None else bias.contiguous()
    bias_head = 0 if bias is None or bias.shape[-2] == 1 else bias.shape[-1]
    bias_frame = 0 if bias is None or bias.shape[:2].numel() == 1 else bias.shape[-1] * bias.shape[-2]
    count, sizes = B * T * H * W, _sizes(x, bias, eps, rows)
    if count:
        kernel[(triton.cdiv(count, sizes["TOKENS"]),)](
            x, gain, cos, sin, ends, out, count, h, T * H * W, H * W, x_token, x_head, bias_frame, bias_head, **sizes
        )
    return out


def _run_backward(
    kernel: Any, grad: Tensor, x: Tensor, gain: Tensor, tables: tuple[Tensor, Tensor], bias: Tensor | None,
    bias_gradient: bool, eps: float, rows: int, times: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, W, h, d = x.shape
    x, x_token, x_head = _rows(x)
    grad, g_token, g_head = _rows(grad)
    count, sizes = B * T * H * W, _sizes(x, bias, eps, rows)
    programs = triton.cdiv(count, times * sizes["TOKENS"])
    grad_x = torch.empty((B, T, H, W, h, d), dtype=x.dtype, device=x.device)
    grad_gain = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    channels = 2 * sizes["PAIRS"] if bias_gradient else 0
    grad_bias = torch.empty((B, T, H * W, h, channels), dtype=torch.float32, device=x.device)
    if count:
        kernel[(programs,)](
            grad, x, gain, *tables, grad_x, grad_gain, grad_bias, count, h, T * H * W, g_token, g_head, x_token,
            x_head, BIAS_GRADIENT=bias_gradient, STEPS=times, **sizes,
        )  # fmt: skip
    return grad_x, grad_gain.sum(0).to(gain.dtype), grad_bias.sum(2)


def _gradients(ctx: Any, backward: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of x, gain and bias, by `backward` of (x, gain, cos, sin, bias, whether its gradient is needed)."""
    x, gain, cos, sin, bias = ctx.saved_tensors
    bias_gradient = bias is not None and ctx.needs_input_grad[4]
    grad_x, grad_gain, grad_bias = backward(x, gain, cos, sin, bias, bias_gradient)
    ends = grad_bias[:, :, None, None].sum_to_size(bias.shape).to(bias.dtype) if bias_gradient else None
    return grad_x, grad_gain, ends


def normalise_and_rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """See rope.normalise_and_rotate: x `[B, T, H, W, h, d]`, bias `[B, T, 1, 1, h or 1, channels]`."""
    if torch.compiler.is_compiling():
        return forward(x, gain, cos, sin, bias, eps, ROWS)
    return _Direct.apply(x, gain, cos, sin, bias, eps)


class _Direct(torch.autograd.Function):
    """Not through torch's dispatcher, which costs the CPU a quarter of a millisecond a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, gain, cos, sin, bias)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device; a backward pass is there already
            return _run_forward(_forward, x, gain, cos, sin, bias, eps, ROWS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def run(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, bias_gradient: bool) -> Any:
            return _run_backward(_backward, grads[0], x, gain, (cos, sin), bias, bias_gradient, ctx.eps, ROWS, TIMES)

        grad_x, grad_gain, grad_bias = _gradients(ctx, run)
        return grad_x, grad_gain, None, None, grad_bias, None


# For a compiler the same as operators. By its bare name torch finds an operator's kernels, in its source.
wrap_triton = library.wrap_triton


@library.triton_op("msc::normalise_and_rotate_backward", mutates_args={})
def backward(
    grad: Tensor, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, bias_gradient: bool,
    eps: float, rows: int = ROWS, times: int = TIMES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of gain, and of bias `[B, T, h, channels]` in fp32 (of no size unless `bias_gradient`)."""
    return _run_backward(wrap_triton(_backward), grad, x, gain, (cos, sin), bias, bias_gradient, eps, rows, times)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_gain, grad_bias = _gradients(ctx, lambda *inputs: backward(grad, *inputs, ctx.eps, ctx.rows, TIMES))
    return grad_x, grad_gain, None, None, grad_bias, None, None


@library.triton_op("msc::normalise_and_rotate", mutates_args={})
def forward(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, eps: float, rows: int = ROWS
) -> Tensor:
    return _run_forward(wrap_triton(_forward), x, gain, cos, sin, bias, eps, rows)


library.register_autograd("msc::normalise_and_rotate", _differentiate, setup_context=_keep)
