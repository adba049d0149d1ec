"""Noise gate: the share of a frame's signal that is still recoverable at a scale, from the frame's noise level.

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
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from torch.nn import functional as F

from .scales import Scale

# "logits" adds log g to the logits of past keys, so that g → 0 falls back to image diffusion. A unit's own keys are
# never gated.
Gate = Literal["none", "logits"]

# t = 0 and t = 1 become an SNR of 1e±60: beyond what any float can tell from clean and from pure noise.
_SMALLEST = 1e-30


class GateConstants(NamedTuple):
    """b of one scale, measured on the data: of unpooled units, and of groups pooled in time (without log m)."""

    b: float
    b_pooled: float


UNMEASURED = GateConstants(0.0, 0.0)


class PooledVariance(Protocol):
    """The data's measured variance after pooling by `space × space` latents and `time` frames."""

    def ratio(self, space: int, time: int) -> float: ...

    def detail(self, space: int) -> float: ...


def without_correlations(constants: Any) -> Any:
    """Gate constants from a file, as plain lists: earlier versions wrote two more numbers of each scale."""
    if not isinstance(constants, list | tuple):
        return constants
    return [row[:2] if isinstance(row, list | tuple) and len(row) == 4 else row for row in constants]


def gate_constants(scales: Sequence[Scale], patch: int, statistics: PooledVariance) -> tuple[GateConstants, ...]:
    """The gate's constants of every scale, from measured statistics.

    `patch` is the side in latents of one token, so a token of a scale covers `patch · space` latents.
    The factor m of a pooled group is left out here; `pooled_log_snr` carries it. Where the detail band of the
    finest scale lies beyond the sides measured, its pooled band is used.
    """
    finest = min(scale.space for scale in scales)
    constants = []
    for scale in scales:
        side = patch * scale.space
        b = 2 * math.log(side) + math.log(statistics.ratio(side, 1))
        if scale.space == finest and len(scales) > 1 and statistics.ratio(2 * side, 1) < statistics.ratio(side, 1):
            b = math.log(statistics.detail(side))
        constants.append(GateConstants(b, 2 * math.log(side) + math.log(statistics.ratio(side, scale.time))))
    return tuple(constants)


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
    noise = groups.square().mean(-1).sqrt().clamp_min(_SMALLEST)
    return math.log(time) + 2 * (signal.log() - noise.log())


def log_gate(log_snr_BT: Tensor, delta_h: Tensor) -> Tensor:
    """log g = log sigmoid(log SNR + δ): `[B, ..., T]` and `[h]` -> `[B, ..., T, h]`, never above 0."""
    return F.logsigmoid(log_snr_BT.unsqueeze(-1) + delta_h.to(log_snr_BT.dtype))
