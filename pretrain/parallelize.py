"""Parallelize: a model built part by part, then prepared to train on a mesh: fp8, compilation, ZeRO, in this order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import nn

from msc.parallel import fp8
from msc.parallel.context_parallel import ShardedPastContext, shard_bounds
from msc.parallel.deepspeed_zero import Precision, check_zero, make_engine, shard_parameters
from msc.parallel.deepspeed_zero import ZeroConfig as ZeroConfig
from msc.parallel.mesh import Mesh, data_parallel_size
from msc.parallel.ring import Ring
from msc.parallel.ulysses import Ulysses

from . import cost
from .kernels.compile_helpers import limit_kept_activations
from .kernels.dispatch import Kernel, check_kernel
from .kernels.sdpa import attend_part, differentiate_part
from .layout_planner import ClipShape, LayoutChoice, ParallelLayout, Rates, check_layout, choose_layouts
from .model.config import ModelConfig
from .model.layers import Block
from .model.past_context import PastContext, WholeVideo
from .model.recomputation import Recompute
from .model.transformer import MSCTransformer, OnPartBuilt
from .optimizer import OptimizerConfig, make_optimizer

# Of what compiled blocks would keep, with "cheap" recomputation: torch's activation memory budget. On an H200 1.61 GB
# of 2.95 a layer of `base` with 65,536 tokens.
KEPT_SHARE = 0.5


@dataclass(frozen=True)
class ParallelConfig:
    """sp: ranks of a context-parallel group, which share one video along time; the rest of the world is data parallel.
    recompute: what a block computes again for its backward pass ("none", "cheap": all but products and attention,
    "full"; see recomputation.py); for "cheap" a compiled block does what saves half of the memory at the least work, by
    torch's activation memory budget. compile: torch.compile per block. timeout: seconds in which all ranks end when one
    is lost or stalled. stall: seconds in one phase, such as a pass or a checkpoint, after which the whole run counts as
    hung and is ended (0: never). attention: kernel ("auto", "sdpa", "flex", "flash"; see dispatch.py). layout: the
    parallel layout of scales ("auto", "halo", "ulysses", "ring"; see layout_planner.py); "auto" takes for each scale
    the cheapest between ranks that compute flops_per_s, send bytes_per_s, and wait wait_s for each other in a
    collective."""

    sp: int = 1
    precision: Precision = "bf16"
    attention: Kernel = "auto"
    layout: LayoutChoice = "auto"
    bytes_per_s: float = 5e10
    flops_per_s: float = 3e14
    wait_s: float = 8e-5  # four H100, Ulysses of a scale of `base`: 6e-5 with all kept, 1e-4 recomputed
    recompute: Recompute = "none"
    compile: bool = False
    timeout: float = 600.0
    stall: float = 7200.0
    zero: ZeroConfig = field(default_factory=ZeroConfig)

    def __post_init__(self):
        if self.sp < 1:
            raise ValueError(f"parallel.sp is {self.sp}; it must be at least 1")
        for name in ("timeout", "bytes_per_s", "flops_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be positive and finite")
        if self.recompute not in get_args(Recompute):
            raise ValueError(
                f"parallel.recompute is {self.recompute!r}; it must be one of {', '.join(get_args(Recompute))}"
            )
        if not self.wait_s >= 0:
            raise ValueError(f"parallel.wait_s is {self.wait_s}; it must not be negative")
        if not self.stall >= 0:
            raise ValueError(f"parallel.stall is {self.stall}; it must be positive, or 0 for no limit")
        check_zero(self.zero, self.precision)
        if not can_recompute(self.recompute, self.zero.stage, self.compile):
            raise ValueError(
                "parallel.recompute=cheap at ZeRO stage 3 needs parallel.compile=true, as gathering parameters again "
                "confuses torch's selective checkpointing; use full, or stage 2"
            )

    @staticmethod
    def from_earlier_version(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The plain values of a file as this version writes them."""
        if isinstance(values.get("recompute"), bool):
            return {**values, "recompute": "full" if values["recompute"] else "none"}
        return values

    @property
    def block_recompute(self) -> Recompute:
        """What blocks do themselves: compiled ones leave what is cheap to the compiler."""
        return "none" if self.compile and self.recompute == "cheap" else self.recompute

    @property
    def kept_share(self) -> float:
        """Of what blocks would keep, where the compiler recomputes the rest."""
        return KEPT_SHARE if self.compile and self.recompute == "cheap" else 1.0

    @property
    def rates(self) -> Rates:
        return Rates(self.bytes_per_s, self.flops_per_s, self.wait_s)


def can_recompute(recompute: Recompute, stage: int, compiled: bool) -> bool:
    return recompute != "cheap" or compiled or stage < 3


def check_parallel(config: ParallelConfig, model: ModelConfig, world: int, units: int) -> int:
    """Data-parallel ranks; ValueError if the world, the clip or the heads cannot be divided so."""
    shard_bounds(units, config.sp)
    if config.sp > 1:
        check_layout(model.scales, config.sp, config.layout)
    return data_parallel_size(world, config.sp)


def check_fp8(config: ParallelConfig, tokens: int) -> None:
    """ValueError where the linear layers cannot run in fp8. tokens: of a unit."""
    fp8.check_fp8(config.zero.stage, config.recompute != "none", tokens)


def clip_shape(model: ModelConfig, config: ParallelConfig, frames: int, height: int, width: int) -> ClipShape:
    """What the parallel layouts depend on, for clips of `frames × height × width` latents."""
    grid = (height // model.patch, width // model.patch)
    value_bytes = 4 if config.precision == "fp32" else 2
    return ClipShape(frames // model.frames_per_unit, model.frames_per_unit, grid, model.head_width, value_bytes)


def peak_activation_bytes(model: ModelConfig, config: ParallelConfig, clip: ClipShape, micro: int) -> int:
    """Most bytes of activations on the rank that has most of them, with `micro` clips."""
    edges = shard_bounds(clip.units, config.sp)
    runs = [cost.Run(end - first, first, config.sp > 1) for first, end in zip(edges, edges[1:], strict=False)]
    return max(
        cost.activation_bytes(
            model, run, *clip.grid, micro, clip.value_bytes, config.block_recompute, config.kept_share
        )
        for run in runs
    )


def own_past_context(
    mesh: Mesh, model: ModelConfig, config: ParallelConfig, clip: ClipShape
) -> tuple[PastContext, range]:
    """Where this rank's units lie in a clip and where its scales are computed; and which units they are."""
    if mesh.sp == 1:
        return WholeVideo(), range(clip.units)
    edges = shard_bounds(clip.units, mesh.sp)
    layouts = choose_layouts(model.scales, clip, mesh.sp, config.layout, config.rates)
    own = range(edges[mesh.sp_rank], edges[mesh.sp_rank + 1])
    return sharded_past_context(mesh.sp_group, edges, model, layouts), own


def sharded_past_context(
    group: dist.ProcessGroup, edges: tuple[int, ...], model: ModelConfig, layouts: Sequence[ParallelLayout]
) -> ShardedPastContext:
    """The past context of a rank of `group`, its scales laid out as named."""
    placements: dict[int, Ulysses | Ring] = {}
    for index, (scale, layout) in enumerate(zip(model.scales, layouts, strict=True)):
        if layout == "ulysses":
            placements[index] = Ulysses(group, edges, scale.heads)
        elif layout == "ring":
            placements[index] = Ring(group, edges, attend_part, differentiate_part)
    return ShardedPastContext(group, edges, placements)


def build_model(
    model: ModelConfig, config: ParallelConfig, device: torch.device, on_part_built: OnPartBuilt | None = None
) -> MSCTransformer:
    """A new model on `device`, the same on every rank. A part at a time is built on the CPU, where seeds give the same
    numbers everywhere, and at ZeRO-3 sharded at once. on_part_built: called with every part while it is still whole."""

    def place_part(name: str, part: nn.Module) -> None:
        if on_part_built is not None:
            on_part_built(name, part)
        shard_parameters(part.to(device), config.zero, config.precision)

    return MSCTransformer(model, config.attention, config.block_recompute, place_part)


def parallelize(model: MSCTransformer, config: ParallelConfig, optimizer: OptimizerConfig, accumulate: int) -> Any:
    """The DeepSpeed engine that trains `model`, as `build_model` built it on every rank."""
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    check_kernel(config.attention, model.config.head_width, dtype)
    limit_kept_activations(config.kept_share)
    for block in model.blocks:
        assert isinstance(block, Block)
        if config.precision == "fp8":
            fp8.convert_linear_layers(block, skip=["cross_attention.kv"])  # acts on text, of any length
        if config.compile:
            block.compile()
    engine = make_engine(
        model, make_optimizer(model, optimizer), config.zero, config.precision, accumulate, optimizer.clip
    )
    if config.compile:
        check_alignment(model.blocks)
    return engine


def check_alignment(blocks: nn.Module) -> None:
    """ValueError if a block's parameter does not begin at a multiple of 16 bytes. All blocks share their compiled
    kernels, which take parameters to lie as the first block's did; DeepSpeed lays them end to end in one buffer."""
    for name, parameter in blocks.named_parameters():
        if parameter.data_ptr() % 16:
            raise ValueError(
                f"the parameter blocks.{name} does not begin at a multiple of 16 bytes, as compiled blocks need it: "
                "make model.width, and model.width times model.mlp_ratio, multiples of 8, or set parallel.compile=false"
            )
