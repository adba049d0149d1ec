"""Presets: named starting points. Sizes differ in width, depth, heads and patch; other differences are explained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msc.datasets.loading.mixture import DataConfig

from .config import Config, TrainConfig
from .diffusion.rectified_flow import DiffusionConfig
from .model.config import ModelConfig
from .model.recomputation import Recompute
from .model.scales import default_scales
from .optimizer import OptimizerConfig
from .parallelize import ParallelConfig, ZeroConfig


def demo() -> Config:
    """Learns something visible from a minute of small video on two CPU cores."""
    return Config(
        model=ModelConfig(width=128, depth=6, scales=default_scales(4, patch_window=8), patch=4),
        # much noise: with little training, what the past tells must be learned before fine denoising
        diffusion=DiffusionConfig(std=2.0, shift=4.0, clean=0.5),
        data=DataConfig(workers=1),
        optimizer=OptimizerConfig(lr=4e-3, warmup=60, final=0.02, ema_halflife=200),
        parallel=ParallelConfig(precision="fp32", zero=ZeroConfig(stage=2)),
        train=TrainConfig(clips=1600, batch=2, micro=2, report=20, evaluate=400, held_out=8),
    )


def sized(width: int, depth: int, heads: int, patch: int, lr: float, zero: ZeroConfig, recompute: Recompute) -> Config:
    return Config(
        model=ModelConfig(width=width, depth=depth, scales=default_scales(heads), patch=patch),
        optimizer=OptimizerConfig(lr=lr),
        parallel=ParallelConfig(recompute=recompute, compile=True, zero=zero),
        train=TrainConfig(clips=10_000_000, batch=256),
    )


# fmt: off
PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    #                       width depth heads patch    lr  zero                 recompute
    "pilot": partial(sized,   768,   12,   12,    2, 3e-4, ZeroConfig(stage=2), "none"),  # about 100 M parameters
    "base":  partial(sized,  1024,   32,   16,    2, 2e-4, ZeroConfig(stage=2), "cheap"),  # about 400 M
    "2b":    partial(sized,  2048,   40,   16,    2, 1e-4, ZeroConfig(stage=2), "cheap"),
    "14b":   partial(sized,  5120,   44,   40,    2, 5e-5, ZeroConfig(stage=3), "full"),
}
# fmt: on


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; valid are {', '.join(PRESETS)}")
    return PRESETS[name]()
