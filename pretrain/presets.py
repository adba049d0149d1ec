"""Presets: named starting points. Sizes differ in width, depth, heads and patch; other differences are explained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from msc.datasets.loading.mixture import DataConfig

from .checkpoints.pretrained import LTX_LAYERS, WAN_LAYERS
from .config import Config, TrainConfig
from .diffusion.rectified_flow import DiffusionConfig
from .model.config import LayerConfig, ModelConfig
from .model.recomputation import Recompute
from .model.scales import Scale, default_scales
from .optimizer import OptimizerConfig
from .parallelize import ParallelConfig, ZeroConfig


def demo() -> Config:
    """Learns a small world of small pictures in minutes, on two CPU cores."""
    scales = (Scale(2, window=2), Scale(1, space=2, window=8), Scale(1))
    return Config(
        # x: a picture also where little is learned yet; other predictions leave noise (docs/benchmarks.md)
        model=ModelConfig(width=128, depth=4, scales=scales, patch=4, prediction="x"),
        # much noise: with little training, what the past tells must be learned before fine denoising
        diffusion=DiffusionConfig(std=2.0, shift=4.0, clean=0.5),
        data=DataConfig(workers=1),
        optimizer=OptimizerConfig(lr=2e-3, warmup=60, final=0.02, ema_halflife=200),
        parallel=ParallelConfig(precision="fp32", zero=ZeroConfig(stage=2)),
        train=TrainConfig(clips=6400, batch=4, micro=4, report=20, evaluate=800, held_out=8),
    )


def sized(width: int, depth: int, heads: int, patch: int, lr: float, zero: ZeroConfig, recompute: Recompute) -> Config:
    return Config(
        model=ModelConfig(width=width, depth=depth, scales=default_scales(heads), patch=patch),
        optimizer=OptimizerConfig(lr=lr),
        parallel=ParallelConfig(recompute=recompute, compile=True, zero=zero),
        train=TrainConfig(clips=10_000_000, batch=256),
    )


def adapted(
    width: int, hidden: int, depth: int, heads: int, patch: int, channels: int, layers: LayerConfig, zero: ZeroConfig
) -> Config:
    """The first stage from a published model: dense and causal (docs/pretrained.md)."""
    return Config(
        model=ModelConfig(
            width=width, depth=depth, scales=(Scale(heads),), patch=patch, mlp_ratio=hidden / width, gate="none",
            prediction="velocity", text_width=4096, layers=layers, channels=channels,
        ),
        diffusion=DiffusionConfig(shift=5.0, clean=0.0, prefix=0.5),
        optimizer=OptimizerConfig(lr=1e-5, warmup=1_000, decay="constant", ema_halflife=2_000),
        parallel=ParallelConfig(recompute="full", compile=True, zero=zero),
        train=TrainConfig(clips=320_000, batch=64),
    )  # fmt: skip


# fmt: off
PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    #                       width depth heads patch    lr  zero                 recompute
    "pilot": partial(sized,   768,   12,   12,    2, 3e-4, ZeroConfig(stage=2), "none"),  # about 100 M parameters
    "base":  partial(sized,  1024,   32,   16,    2, 2e-4, ZeroConfig(stage=2), "cheap"),  # about 400 M
    "2b":    partial(sized,  2048,   40,   16,    2, 1e-4, ZeroConfig(stage=2), "cheap"),
    "14b":   partial(sized,  5120,   44,   40,    2, 5e-5, ZeroConfig(stage=3), "full"),
    # published models, for train.init_from   width hidden depth heads patch channels
    "wan-1.3b":    partial(adapted, 1536,  8960,   30,   12,    2,      16, WAN_LAYERS, ZeroConfig(stage=2)),
    "wan-14b":     partial(adapted, 5120, 13824,   40,   40,    2,      16, WAN_LAYERS, ZeroConfig(stage=3)),
    "wan-ti2v-5b": partial(adapted, 3072, 14336,   30,   24,    2,      48, WAN_LAYERS, ZeroConfig(stage=3)),
    "ltx-2b":      partial(adapted, 2048,  8192,   28,   32,    1,     128, LTX_LAYERS, ZeroConfig(stage=2)),
}
# fmt: on


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; valid are {', '.join(PRESETS)}")
    return PRESETS[name]()
