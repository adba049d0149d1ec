"""Named starting points. Sizes differ in width, depth, heads and patch; everything else says why it differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from msc.datasets.loading.mixture import DataConfig

from .config import Config, TrainConfig
from .diffusion.rectified_flow import DiffusionConfig
from .model.config import ModelConfig
from .model.scales import default_scales
from .optimizer import OptimizerConfig
from .parallelize import ParallelConfig, ZeroConfig

# fmt: off
#                     width depth heads patch      lr  stage recompute
_SIZES = {
    "pilot":         (  768,   12,   12,    2,   3e-4,     2, False),  # about 100 M parameters
    "base":          ( 1024,   32,   16,    2,   2e-4,     2, True),   # about 400 M
    "2b":            ( 2048,   40,   16,    2,   1e-4,     2, True),
    "14b":           ( 5120,   44,   40,    2,   5e-5,     3, True),
}
# fmt: on


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


def _size(name: str) -> Config:
    width, depth, heads, patch, lr, stage, recompute = _SIZES[name]
    return Config(
        model=ModelConfig(width=width, depth=depth, scales=default_scales(heads), patch=patch),
        optimizer=OptimizerConfig(lr=lr),
        parallel=ParallelConfig(recompute=recompute, zero=ZeroConfig(stage=cast(Literal[2, 3], stage))),
        train=replace(TrainConfig(), clips=10_000_000, batch=256),
    )


def pilot() -> Config:
    return _size("pilot")


def base() -> Config:
    return _size("base")


def two_b() -> Config:
    return _size("2b")


def fourteen_b() -> Config:
    return _size("14b")


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


PRESETS = {"demo": demo, "pilot": pilot, "base": base, "2b": two_b, "14b": fourteen_b}
