"""AdamW that carries an exponential moving average of the weights in its own state.

The average is stored beside Adam's moments of the fp32 master weights, so whatever shards, offloads or saves the
optimizer does the same to it. Schedules are functions of the sample clock (clips seen).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """lr: peak learning rate; warmup: clips until it is reached (None: a twentieth of the run, at most 10,000); decay:
    its shape to the end of the run, where `final` times the peak is left. weight_decay applies to matrices only. clip:
    largest gradient norm (0: no clipping). ema_halflife: clips until a weight's share in the average has halved (0: no
    average)."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int | None = None
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final: float = 0.1
    clip: float = 1.0
    ema_halflife: int = 100_000

    def __post_init__(self):
        if not 0 < self.lr < math.inf or not 0 <= self.final <= 1:
            raise ValueError(
                f"optimizer.lr ({self.lr}) must be positive and finite, optimizer.final ({self.final}) in [0, 1]"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 < self.eps < math.inf:
            raise ValueError(
                f"optimizer.betas ({self.betas}) must lie in [0, 1), optimizer.eps ({self.eps}) be positive and finite"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; it must be finite and not negative")
        if (self.warmup or 0) < 0 or self.ema_halflife < 0 or not self.clip >= 0:
            raise ValueError(
                f"optimizer.warmup ({self.warmup}), ema_halflife ({self.ema_halflife}) and clip ({self.clip}) "
                "must not be negative"
            )


def learning_rate(config: OptimizerConfig, clock: int, clips: int) -> float:
    """Learning rate when `clock` of `clips` clips have been seen."""
    warmup = min(10_000, clips // 20) if config.warmup is None else config.warmup
    if clock < warmup:
        return config.lr * (clock + 1) / (warmup + 1)
    done = min(1.0, (clock - warmup) / max(1, clips - warmup))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.lr * (config.final + (1 - config.final) * shape)


def ema_decay(config: OptimizerConfig, clock: int, batch: int) -> float:
    """Factor of the old average in a step of `batch` clips; early on it averages over the last tenth only."""
    if not config.ema_halflife:
        return 0.0
    halflife = min(config.ema_halflife, max(clock, 1) / 10)
    return 0.5 ** (batch / halflife)


class AdamWEMA(torch.optim.AdamW):
    """AdamW whose state also holds `ema`, updated with the group's `ema_decay` after every step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        # The average begins with the weights before the first step, whether or not they were evaluated by then.
        updated = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        initial = {p: p.detach().clone() for group in updated for p in group if "ema" not in self.state[p]}
        loss = super().step(closure)
        for p, weight in initial.items():
            self.state[p]["ema"] = weight
        for group, weights in zip(self.param_groups, updated, strict=True):
            if weights:
                averages = [self.state[p]["ema"] for p in weights]
                torch._foreach_lerp_(averages, [p.detach() for p in weights], 1 - group["ema_decay"])
        return loss


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamWEMA:
    """Matrices with weight decay, everything else without."""

    def is_matrix(parameter: nn.Parameter) -> bool:
        return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # ZeRO-3 leaves an empty tensor behind

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": config.weight_decay, "ema_decay": 0.0},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0, "ema_decay": 0.0},
    ]
    # fused: one pass over the weights, and no copies of them on the way
    groups = [group for group in groups if group["params"]]
    return AdamWEMA(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_schedule(groups: list[dict], config: OptimizerConfig, clock: int, clips: int, batch: int) -> float:
    """Write learning rate and average's decay for the step that starts at `clock`; returns the rate."""
    rate, decay = learning_rate(config, clock, clips), ema_decay(config, clock + batch, batch)
    for group in groups:
        group["lr"], group["ema_decay"] = rate, decay
    return rate
