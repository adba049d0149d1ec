"""Rotary position embedding over (time, height, width) in fine-grid coordinates (Su et al. 2021, RoFormer).

A pooled token sits at the centre of what it covers, so that scales share one coordinate system.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Rope:
    """Rotation of tokens at `frames × rows × columns`; cos and sin `[T, H, W, 1, pairs]`."""

    cos: Tensor
    sin: Tensor

    @property
    def frames(self) -> int:
        return self.cos.shape[0]


def rope_angles(
    positions: tuple[Tensor, Tensor, Tensor], rotated: int, theta: float, dtype: torch.dtype = torch.float32
) -> Rope:
    """Tables for tokens at the product of three axes' positions (in frames, rows and columns).

    The `rotated / 2` pairs are divided evenly among time, height and width, time first.
    """
    pairs = rotated // 2
    shares = [pairs // 3 + (axis < pairs % 3) for axis in range(3)]
    angles = []
    for axis, (position, share) in enumerate(zip(positions, shares, strict=True)):
        # float64 before the product: a frame number of a long video times a frequency needs the digits
        speeds = theta ** (-torch.arange(share, dtype=torch.float64, device=position.device) / max(share, 1))
        shape = [1, 1, 1, 1, share]
        shape[axis] = len(position)
        angles.append((position.double()[:, None] * speeds).reshape(shape))
    sizes = [len(position) for position in positions]
    full = torch.cat([angle.expand(*sizes, 1, angle.shape[-1]) for angle in angles], -1)
    return Rope(full.cos().to(dtype), full.sin().to(dtype))


def normalise_and_rotate(x_BTHWhd: Tensor, gain_d: Tensor, rope: Rope, tail: Tensor | None = None) -> Tensor:
    """Every head's root mean square becomes 1, times a gain per channel; then its first `2·pairs` channels rotate.

    The channels after them carry no position; `tail`, broadcast to them, takes their place if given. One function
    with its own backward pass, as it acts on all queries and keys: autograd's would keep and move several times
    as much. In bf16 an angle's cosine would lose what tells distant frames apart, so all of it is done in
    the tables' type.

    A compiler fuses and recomputes by itself, and gets the plain operations: torch 2.11's lost this function's
    gradient without a word (q and k got none, outputs were right; torch 2.13's does not).
    """
    if torch.compiler.is_compiling():
        return _plain(x_BTHWhd, gain_d, rope.cos, rope.sin, tail)
    return _NormaliseAndRotate.apply(x_BTHWhd, gain_d, rope.cos, rope.sin, tail)


def _plain(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None) -> Tensor:
    pairs = cos.shape[-1]
    exact = x.to(cos.dtype)
    scaled = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain
    a, b, rest = scaled.split((pairs, pairs, x.shape[-1] - 2 * pairs), -1)
    if tail is not None:
        rest = tail.to(cos.dtype).expand(rest.shape)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1).to(x.dtype)


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, tail: Tensor | None) -> Tensor:
        inverse = x.to(cos.dtype).square().mean(-1, keepdim=True).add_(1e-6).rsqrt_()
        out = _rotate((x * inverse).mul_(gain), cos, sin)
        if tail is not None:
            out[..., 2 * cos.shape[-1] :] = tail
        ctx.save_for_backward(x, gain, cos, sin, inverse)
        ctx.tail_shape = None if tail is None else tail.shape
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin, inverse = ctx.saved_tensors
        grad, grad_tail = grads[0].to(cos.dtype, copy=True), None
        if ctx.tail_shape is not None:
            grad_tail = grads[0][..., 2 * cos.shape[-1] :].sum_to_size(ctx.tail_shape)
            grad[..., 2 * cos.shape[-1] :] = 0
        grad = _rotate(grad, cos, -sin)
        unit = x * inverse
        product = grad * unit
        grad_gain = product.flatten(0, -2).sum(0)
        along = (product @ gain.to(product.dtype)).unsqueeze(-1).mul_(inverse).div_(-x.shape[-1])
        grad_x = grad.mul_(gain).mul_(inverse).addcmul_(unit, along)
        return grad_x.to(x.dtype), grad_gain.to(gain.dtype), None, None, grad_tail


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in place the pairs that channels i and i + pairs make."""
    pairs = cos.shape[-1]
    a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
    rest = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(rest)
    return x
