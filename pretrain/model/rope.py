"""Rotary position embedding over (time, height, width) in fine-grid coordinates (Su et al. 2021, RoFormer).

A pooled token sits at the centre of what it covers, so that scales share one coordinate system.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TRITON = importlib.util.find_spec("triton") is not None
EPS = 1e-6  # of the mean square
LTX_WHOLE = 20.0, 2048.0, 2048.0  # seconds and pixels that LTX-Video counts as one unit of position
UNROTATED = (
    2  # channels of a head that carry no position, half of them at the end of each half: there is the gate's bias
)


@dataclass(frozen=True)
class Rope:
    """Rotation of tokens at `frames × rows × columns`; cos and sin `[T, H, W, 1, d/2]`, one pair of channels each.

    The last pair does not rotate (cosine 1, sine 0).
    """

    cos: Tensor
    sin: Tensor

    @property
    def frames(self) -> int:
        return self.cos.shape[0]


@dataclass(frozen=True)
class RopeLayout:
    """Which channels of a head turn with which position, and how fast: "msc" and "wan" by `rope_angles`, "ltx" by
    `rope_angles_of_all_heads`, which needs to know which `heads` of a model of `width` channels these are, and the
    `steps` from a frame, row and column to the next."""

    kind: str
    head_width: int
    theta: float
    heads: range = range(0)
    width: int = 0
    steps: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def tables(self, positions: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype = torch.float32) -> Rope:
        """For tokens at the product of three axes' positions (in frames, rows and columns)."""
        if self.kind == "ltx":
            frames, rows, columns = (
                at.to(dtype) * step / whole for at, step, whole in zip(positions, self.steps, LTX_WHOLE, strict=True)
            )
            return rope_angles_of_all_heads(
                (frames, rows, columns), self.heads, self.width, self.head_width, self.theta
            )
        return rope_angles(positions, self.head_width, self.theta, dtype, self.kind == "wan")


def rope_angles(
    positions: tuple[Tensor, Tensor, Tensor],
    head_width: int,
    theta: float,
    dtype: torch.dtype = torch.float32,
    last_pair_rotates: bool = False,
) -> Rope:
    """Tables for tokens at the product of three axes' positions (in frames, rows and columns).

    The pairs of channels that rotate are divided evenly among time, height and width, time first; what is left over
    goes to the first axes. With `last_pair_rotates` all of it goes to time, also the last pair, which becomes the
    slowest of time (Wan): what a gate takes is then what changes least.
    """
    pairs = (head_width - UNROTATED) // 2
    shares = [pairs // 3 + (axis < pairs % 3) for axis in range(3)]
    if last_pair_rotates:
        share = head_width // 6
        shares = [head_width // 2 - 2 * share, share, share]
    sizes = [len(position) for position in positions]
    cos, sin = [], []
    for axis, (position, share) in enumerate(zip(positions, shares, strict=True)):
        # float64 before the product: a frame number of a long video times a frequency needs the digits
        speeds = theta ** (-torch.arange(share, dtype=torch.float64, device=position.device) / max(share, 1))
        shape = [1, 1, 1, 1, share]
        shape[axis] = len(position)
        angles = (position.double()[:, None] * speeds).reshape(shape)
        cos.append(angles.cos().to(dtype).expand(*sizes, 1, share))
        sin.append(angles.sin().to(dtype).expand(*sizes, 1, share))
    if last_pair_rotates:
        for tables in (cos, sin):
            tables[0], last = tables[0].split((shares[0] - 1, 1), -1)
            tables.append(last)
        return Rope(torch.cat(cos, -1), torch.cat(sin, -1))
    cos.append(cos[0].new_ones(()).expand(*sizes, 1, UNROTATED // 2))
    sin.append(sin[0].new_zeros(()).expand(*sizes, 1, UNROTATED // 2))
    return Rope(torch.cat(cos, -1), torch.cat(sin, -1))


def rope_angles_of_all_heads(
    positions: tuple[Tensor, Tensor, Tensor],
    heads: range,
    width: int,
    head_width: int,
    theta: float,
) -> Rope:
    """Tables `[T, H, W, heads, d/2]` whose frequencies run through all heads of a model, from `π` to `π · theta` a unit
    of position, three axes taking turns (LTX-Video). The first pairs, which do not divide by three, do not rotate.

    All in the positions' type: of the fast ones fp32 loses digits, but the published weights were trained so.
    """
    pairs, count = width // 2, width // 6
    like = positions[0]
    speeds = theta ** torch.linspace(0, 1, count, dtype=like.dtype, device=like.device) * math.pi / 2
    sizes, angles = [len(position) for position in positions], []
    for axis, position in enumerate(positions):
        shape = [1, 1, 1, count]
        shape[axis] = len(position)
        angles.append(((2 * position - 1)[:, None] * speeds).reshape(shape).expand(*sizes, count))
    still = like.new_zeros(*sizes, pairs - 3 * count)
    of_heads = torch.cat((still, torch.stack(angles, -1).flatten(-2)), -1).unflatten(-1, (-1, head_width // 2))
    of_heads = of_heads[..., heads.start : heads.stop, :]
    return Rope(of_heads.cos(), of_heads.sin())


def rotate(x_BTHWhd: Tensor, rope: Rope, bias_BThc: Tensor | None = None) -> Tensor:
    """`normalise_and_rotate` of what is normalised already; keeps nothing but the tables for the way back."""
    bias, x = None if bias_BThc is None else bias_BThc[:, :, None, None], x_BTHWhd.flatten(1, -5)
    if torch.compiler.is_compiling():
        out = plain(x, None, rope.cos, rope.sin, bias)
    else:
        out = _Rotate.apply(x, rope.cos, rope.sin, bias)
    return out.unflatten(1, x_BTHWhd.shape[1:-4])


def normalise_and_rotate(x_BTHWhd: Tensor, gain_d: Tensor, rope: Rope, bias_BThc: Tensor | None = None) -> Tensor:
    """Every head's root mean square becomes 1, times a gain per channel; then channels i and d/2 + i rotate together.

    T may be several dimensions, such as units and frames. `bias`, if given (its dimensions B, T and h may be 1), takes
    the place of the unrotated channels: its first half ends the head's first half, its second half the second. In bf16
    an angle's cosine would lose what tells distant frames apart, so all of it is computed in the tables' type.

    A function with a backward pass of its own, as it acts on all queries and keys: autograd's would keep and move
    several times as much. On a GPU it is a Triton kernel (rope_triton.py). Elsewhere a compiler gets the plain
    operations: torch 2.11's lost this function's gradient without a word (q and k got none, outputs were right; torch
    2.13's does not).
    """
    frames = x_BTHWhd.shape[1:-4]
    x = x_BTHWhd.flatten(1, -5)
    bias = None if bias_BThc is None else bias_BThc[:, :, None, None]
    if TRITON and x.is_cuda and rope.cos.dtype == torch.float32 and x.dtype != torch.float64:
        from . import rope_triton

        out = rope_triton.normalise_and_rotate(x, gain_d, rope.cos, rope.sin, bias, EPS)
    elif torch.compiler.is_compiling():
        out = plain(x, gain_d, rope.cos, rope.sin, bias)
    else:
        out = _NormaliseAndRotate.apply(x, gain_d, rope.cos, rope.sin, bias)
    return out.unflatten(1, frames)


def plain(x: Tensor, gain: Tensor | None, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
    """The same by autograd's operations; bias `[B, T, 1, 1, h, channels]`. Without a gain nothing is normalised."""
    exact = x.to(cos.dtype)
    if gain is not None:
        exact = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * gain
    a, b = exact.chunk(2, -1)
    halves = torch.stack((a * cos - b * sin, a * sin + b * cos), -2)
    if bias is not None:
        ends = bias.to(cos.dtype).unflatten(-1, (2, -1))
        pairs = cos.shape[-1] - ends.shape[-1]
        halves = torch.cat((halves[..., :pairs], ends.expand(*halves.shape[:-1], -1)), -1)
    return halves.flatten(-2).to(x.dtype)


class _NormaliseAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        inverse = x.to(cos.dtype).square().mean(-1, keepdim=True).add_(EPS).rsqrt_()
        out = _rotate((x * inverse).mul_(gain), cos, sin)
        if bias is not None:
            unrotated_channels(out).copy_(bias.unflatten(-1, (2, -1)))
        ctx.save_for_backward(x, gain, cos, sin, inverse)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin, inverse = ctx.saved_tensors
        grad, grad_bias = grads[0].to(cos.dtype, copy=True), None
        if ctx.bias is not None:
            grad_bias = _take_bias_gradient(grad, *ctx.bias)
        grad = _rotate(grad, cos, -sin)
        unit = x * inverse
        product = grad * unit
        grad_gain = product.flatten(0, -2).sum(0)
        along = (product @ gain.to(product.dtype)).unsqueeze(-1).mul_(inverse).div_(-x.shape[-1])
        grad_x = grad.mul_(gain).mul_(inverse).addcmul_(unit, along)
        return grad_x.to(x.dtype), grad_gain.to(gain.dtype), None, None, grad_bias


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        out = _rotate(x.to(cos.dtype, copy=True), cos, sin)
        if bias is not None:
            unrotated_channels(out).copy_(bias.unflatten(-1, (2, -1)))
        ctx.save_for_backward(cos, sin)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad, grad_bias = grads[0].to(cos.dtype, copy=True), None
        if ctx.bias is not None:
            grad_bias = _take_bias_gradient(grad, *ctx.bias)
        return _rotate(grad, cos, -sin).to(grads[0].dtype), None, None, grad_bias


def _take_bias_gradient(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias of this shape, whose channels of `grad` become zero."""
    ends = unrotated_channels(grad)
    grad_bias = ends.sum_to_size(*shape[:-1], 2, shape[-1] // 2).flatten(-2).to(dtype, copy=True)
    ends.zero_()
    return grad_bias


def unrotated_channels(x_d: Tensor) -> Tensor:
    """The channels of heads of d that carry no position: a view `[..., 2, UNROTATED/2]`."""
    return x_d.unflatten(-1, (2, -1))[..., -(UNROTATED // 2) :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate in place the pairs that channels i and d/2 + i make."""
    a, b = x.chunk(2, -1)
    rest = a * sin
    a.mul_(cos).addcmul_(b, sin, value=-1)
    b.mul_(cos).add_(rest)
    return x
