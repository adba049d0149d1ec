"""From a plain model to one that trains on a mesh: in this order, recompute, compile, shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from msc.parallel.mesh import Mesh, make_mesh, rows
from msc.parallel.temporal import ShardedTimeline, bounds
from msc.parallel.zero import Precision, ZeroConfig, check_zero, make_engine

from .backends import Backend
from .layers import Block
from .model import MSCTransformer
from .optimizer import OptimizerConfig, make_optimizer
from .timeline import Timeline, WholeVideo

__all__ = [
    "Mesh",
    "ParallelConfig",
    "ZeroConfig",
    "check_parallel",
    "make_mesh",
    "parallelize",
    "own_timeline",
]


@dataclass(frozen=True)
class ParallelConfig:
    """sp: ranks that share one video along time; the rest of the world is data parallel. recompute: activation
    checkpointing per block. compile: torch.compile per block. timeout: seconds until a collective that some rank
    did not join fails. attention: the kernel ("auto", "sdpa", "flex"; see backends.py)."""

    sp: int = 1
    precision: Precision = "bf16"
    attention: Backend = "auto"
    recompute: bool = False
    compile: bool = False
    timeout: float = 600.0
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    def __post_init__(self):
        if self.sp < 1:
            raise ValueError(f"parallel.sp is {self.sp}; it must be at least 1")
        check_zero(self.zero, self.precision)


def check_parallel(config: ParallelConfig, world: int, units: int) -> int:
    """Data-parallel rows; ValueError if the world or the clip cannot be shared out so."""
    bounds(units, config.sp)
    return rows(world, config.sp)


def own_timeline(mesh: Mesh, units: int) -> tuple[Timeline, range]:
    """Where this rank's units lie in a clip of `units` units, and which they are."""
    if mesh.sp == 1:
        return WholeVideo(), range(units)
    edges = bounds(units, mesh.sp)
    return ShardedTimeline(mesh.sp_group, edges), range(edges[mesh.sp_rank], edges[mesh.sp_rank + 1])


def parallelize(
    model: MSCTransformer,
    config: ParallelConfig,
    optimizer: OptimizerConfig,
    accumulate: int,
    device: torch.device,
) -> Any:
    """The DeepSpeed engine that trains `model`; every rank must hold the same weights."""
    model.to(device)
    model.recompute = config.recompute
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attention.backend = config.attention
        if config.compile:
            block.compile()
    return make_engine(
        model, make_optimizer(model, optimizer), config.zero, config.precision, accumulate, optimizer.clip
    )
