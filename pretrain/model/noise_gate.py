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
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .scales import Scale

# Where the gate acts; MultiScaleAttention says what each place means.
GatePlace = Literal["none", "mix", "values", "logits", "pair"]
# The gates that act on past keys, so that the own unit's keys, never gated, need a row of their own.
ON_KEYS: tuple[GatePlace, ...] = ("values", "logits", "pair")

# t = 0 and t = 1 become an SNR of 1e±60: beyond what any float can tell from clean and from pure noise.
_SMALLEST = 1e-30


class GateConstants(NamedTuple):
    """What is measured of the data at one scale: b and lag correlation ρ, unpooled and pooled in time."""

    b: float
    b_pooled: float
    rho: float
    rho_pooled: float


UNMEASURED = GateConstants(0.0, 0.0, 0.9, 0.9)


class SpatialStatistics(Protocol):
    """What the gate needs of the data's measured statistics (datasets/prepare/statistics.py)."""

    def ratio(self, space: int, time: int) -> float: ...

    def detail(self, space: int) -> float: ...

    def correlation(self, space: int, lag: float) -> float: ...

    def detail_correlation(self, space: int, lag: float) -> float: ...


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


def gate_constants(
    scales: Sequence[Scale], patch: int, frames_per_unit: int, statistics: SpatialStatistics
) -> tuple[GateConstants, ...]:
    """The gate's constants of every scale, from measured statistics.

    `patch` is the side in latents of one token, so a token of a scale covers `patch · space` latents.
    The factor m of a pooled group is left out here; `pooled_log_snr` carries it. Where the detail band of the
    finest scale lies beyond the sides measured, its pooled band stands in. ρ is taken at the middle of what
    the scale sees (two groups back where it sees all of the past).
    """
    finest = min(scale.space for scale in scales)
    constants = []
    for scale in scales:
        side = patch * scale.space
        units = scale.fresh_kept if scale.fresh_kept is not None else 2
        lag = frames_per_unit * (max(units, 1) + 1) / 2
        groups = 2 if scale.window is None else max(scale.window, 1)
        pooled_lag = frames_per_unit * scale.time * (groups + 1) / 2
        pooled = 2 * math.log(side) + math.log(statistics.ratio(side, scale.time))
        if scale.space == finest and len(scales) > 1 and statistics.ratio(2 * side, 1) < statistics.ratio(side, 1):
            unpooled, rho = math.log(statistics.detail(side)), statistics.detail_correlation(side, lag)
        else:
            unpooled = 2 * math.log(side) + math.log(statistics.ratio(side, 1))
            rho = statistics.correlation(side, lag)
        constants.append(GateConstants(unpooled, pooled, rho, statistics.correlation(side, pooled_lag)))
    return tuple(constants)


def log_gate(log_snr_BF: Tensor, delta_h: Tensor) -> Tensor:
    """log g = log sigmoid(log SNR + δ): `[B, ..., F]` and `[h]` -> `[B, ..., F, h]`, never above 0."""
    return F.logsigmoid(log_snr_BF.unsqueeze(-1) + delta_h)


# Two observations ---------------------------------------------------------------------------------------
#
# A query that is itself a noisy observation needs the past only for what it does not know. With SNR_q of its
# own and a past frame that correlates with it by ρ,
#     SNR_eff = ρ² SNR_k / (1 + (1-ρ²) SNR_k),   g = SNR_eff / (1 + SNR_q + SNR_eff)
# so that log g = log sigmoid(e - A) with e = log SNR_eff of the key and A = log(1 + SNR_q) of the query. In a
# kernel without biases a logit can only add what is bilinear in channels of query and key: A is interpolated
# linearly between a few nodes, the query holding the two weights, the key log g at every node.

NODES = (0.0, 1.0, 2.0, 4.0, 7.0, 12.0)  # the interpolated log g lies within 0.25 of the formula


def effective_log_snr(log_snr: Tensor, rho: float) -> Tensor:
    """log SNR that a past frame gives about the present one, which it resembles by ρ; same shape."""
    rho_2 = min(rho**2, 1 - 1e-6)
    return math.log(rho_2) + log_snr - F.softplus(log_snr + math.log(1 - rho_2))


def node_weights(log_snr_q: Tensor) -> Tensor:
    """Weights of the query's A = log(1 + SNR_q) between NODES: `[...] -> [..., nodes]`, two of them not 0."""
    a = F.softplus(log_snr_q).clamp_max(NODES[-1])
    # how far a has come through each gap between nodes; before the first and behind the last lies nothing
    come = [torch.ones_like(a)]
    come += [((a - low) / (high - low)).clamp(0, 1) for low, high in pairwise(NODES)]
    come.append(torch.zeros_like(a))
    return torch.stack([reached - passed for reached, passed in pairwise(come)], -1)


def log_gate_at_nodes(log_snr_eff: Tensor, delta_h: Tensor) -> Tensor:
    """log g of a key for queries at every node: `[B, ..., F]` and `[h]` -> `[B, ..., F, h, nodes]`."""
    z = log_snr_eff.unsqueeze(-1) + delta_h
    return torch.stack([F.logsigmoid(z - node) for node in NODES], -1)
