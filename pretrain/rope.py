"""Rotary position embedding over (time, height, width) in fine-grid coordinates (Su et al. 2021, RoFormer).

A pooled token sits at the centre of what it covers, so that scales share one coordinate system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotation of tokens at `frames × rows × columns`; cos and sin `[T, H, W, 1, pairs]`."""

    cos: Tensor
    sin: Tensor

    @property
    def frames(self) -> int:
        return self.cos.shape[0]

    def last(self, frames: int) -> Rope:
        return Rope(self.cos[-frames:], self.sin[-frames:])

    def rotate(self, x_BTHWhd: Tensor) -> Tensor:
        """Rotate the first `2·pairs` channels of every head; the rest carry no position."""
        pairs = self.cos.shape[-1]
        a, b, rest = x_BTHWhd.split([pairs, pairs, x_BTHWhd.shape[-1] - 2 * pairs], -1)
        # In bf16 the angle's cosine would lose what tells distant frames apart: rotate in the table's type.
        rotated = (a * self.cos - b * self.sin, b * self.cos + a * self.sin)
        return torch.cat((*(part.to(x_BTHWhd.dtype) for part in rotated), rest), -1)


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
