"""The noise gate: how much of a frame is still recoverable at a scale, from its noise level.

A frame at noise level t is `x_t = (1-t) x + t ε`. Averaging `s·s·m` unit-variance latents divides the
noise by that count but the signal only by the share R(s, m) of its variance that is smooth, so

    log SNR_{s,m}(t) = λ(t) + b,   λ(t) = 2 log((1-t)/t),   b = 2 log s + log m + log R(s, m)

and the recoverable share of variance is `g = sigmoid(λ + b + δ)`. The finest heads use the detail band
`b = log D_s`, `D_s = (4/3) s² (R(s) - R(2s))`: at full resolution the SNR of a pixel is dominated by
low frequencies that the coarse heads carry anyway. The formulas are ours; docs/attention.md derives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from .scales import Scale

# t = 0 and t = 1 become an SNR of 1e±60: beyond what any float can tell from clean and from pure noise.
_SMALLEST = 1e-30


class SpatialStatistics(Protocol):
    """What the gate needs of the data's measured statistics (datasets/statistics.py)."""

    def ratio(self, space: int, time: int) -> float: ...

    def detail(self, space: int) -> float: ...


def log_snr(t: Tensor) -> Tensor:
    """λ(t) = 2 log((1-t)/t) of unit-variance latents; any shape, finite at t = 0 and t = 1."""
    return 2 * ((1 - t).clamp_min(_SMALLEST).log() - t.clamp_min(_SMALLEST).log())


def pooled_log_snr(t: Tensor, time: int) -> Tensor:
    """log SNR of the mean of `time` consecutive frames with mixed noise: `[..., T] -> [..., T / time]`.

    For the mean with weights 1/m the signal of a slowly changing scene adds up as `mean(1-t)`, the
    independent noises as `mean(t²)/m`: `log SNR = log m + 2 log mean(1-t) - log mean(t²)`. With equal
    t it is `λ(t) + log m`, so that the constant b of a group is that of its spatial pooling and R alone.
    """
    groups = t.unflatten(-1, (-1, time))
    signal = (1 - groups).mean(-1).clamp_min(_SMALLEST)
    noise = groups.square().mean(-1).clamp_min(_SMALLEST**2)
    return math.log(time) + 2 * signal.log() - noise.log()


def gate_constants(
    scales: Sequence[Scale], patch: int, statistics: SpatialStatistics
) -> tuple[tuple[float, float], ...]:
    """b of every scale from measured statistics: (of an unpooled unit, of a group pooled in time).

    `patch` is the side in latents of one token, so a token of a scale covers `patch · space` latents.
    The factor m of a pooled group is left out here; `pooled_log_snr` carries it. Where the detail band of the
    finest scale lies beyond the sides measured, its pooled band stands in.
    """
    finest = min(scale.space for scale in scales)
    constants = []
    for scale in scales:
        side = patch * scale.space
        if scale.space == finest and len(scales) > 1 and statistics.ratio(2 * side, 1) < statistics.ratio(side, 1):
            unpooled = math.log(statistics.detail(side))
        else:
            unpooled = 2 * math.log(side) + math.log(statistics.ratio(side, 1))
        pooled = 2 * math.log(side) + math.log(statistics.ratio(side, scale.time))
        constants.append((unpooled, pooled))
    return tuple(constants)


def log_gate(log_snr_BF: Tensor, delta_h: Tensor) -> Tensor:
    """log g = log sigmoid(log SNR + δ): `[B, ..., F]` and `[h]` -> `[B, ..., F, h]`, never above 0."""
    return F.logsigmoid(log_snr_BF.unsqueeze(-1) + delta_h)
