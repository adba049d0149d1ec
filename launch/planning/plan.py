"""Plan of a training run or a rollout on given GPUs: memory, traffic, time and the limiting part. Pure functions.

A step is `accumulate` micro-batches and an update. Of the slowest rank,

    micro = products / (peak · e_p) + attention / (peak · e_a) + passes · kept / bandwidth + exchanges not hidden
    step  = accumulate · max(micro, launches) + gradients and weights not hidden + update

with FLOPs, kept activations and messages from the closed forms of cost.py and layout_planner.py, which tests compare
with counted ones, and rates from hardware.py, measured or estimated. Recomputation repeats the forward pass;
docs/scaling.md explains the rest. Not included: reading and encoding of data, checkpoints, evaluations, restarts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from msc.datasets.shards.index import Index
from msc.pretrain import cost
from msc.pretrain.config import Config
from msc.pretrain.layout_planner import ClipShape, ParallelLayout, Rates, choose_layouts, estimates
from msc.pretrain.model.config import ModelConfig
from msc.pretrain.model.recomputation import Recompute
from msc.pretrain.model.scales import spatial_windows
from msc.pretrain.parallelize import can_recompute, check_parallel, clip_shape, peak_activation_bytes

from . import hardware
from .hardware import Device


@dataclass(frozen=True)
class Plan:
    """One way to run a configuration (`config` says which: parallel.sp, zero.stage, recompute, train.micro).

    memory: bytes per GPU by part; at_start: bytes before weights are sharded. traffic: bytes that a GPU sends in a
    step, by (what, link). seconds: of a step, by part. flops: of a step over all GPUs, unmasked, without recomputation.
    """

    config: Config
    device: Device
    gpus: int
    dp: int
    accumulate: int
    layouts: tuple[ParallelLayout, ...]
    parameters: int
    tokens: int
    flops: float
    memory: dict[str, float]
    at_start: float
    traffic: dict[tuple[str, str], float]
    seconds: dict[str, float]

    @property
    def memory_bytes(self) -> float:
        return max(sum(self.memory.values()), self.at_start)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= hardware.USABLE * self.device.memory

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        return self.flops / (self.step_s * self.gpus * self.device.peak)

    @property
    def days(self) -> float:
        return self.step_s * self.config.train.steps / 86400

    @property
    def limit(self) -> str:
        """The part of a step that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def attention_calls(model: ModelConfig, grid: tuple[int, int]) -> float:
    """Kernel launches of a block, in units of those of one scale without spatial windows; each window is a region."""
    calls = 0.0
    for scale in model.scales:
        for shifted in (False, True):  # every second layer
            rows, columns = (len(spatial_windows(side // scale.space, scale.patch_window, shifted)) for side in grid)
            calls += (1 + hardware.REGION * (rows * columns - 1)) / 2
    return calls


def make_plan(config: Config, index: Index, device: Device, gpus: int) -> Plan:
    """Plan of a resolved configuration, nothing searched. ValueError where it cannot run on that many GPUs."""
    model, parallel = config.model, config.parallel
    units = index.frames // model.frames_per_unit
    dp = check_parallel(parallel, model, gpus, units)
    accumulate = config.train.accumulate(dp)
    clip = clip_shape(model, parallel, index.frames, index.height, index.width)
    efficiency = hardware.COMPILED if parallel.compile else hardware.EAGER
    peak = device.fp32 if parallel.precision == "fp32" else device.peak
    attention_rate = peak * efficiency.attention
    inside = parallel.sp <= device.node and device.node % parallel.sp == 0
    rate = (device.link if inside else device.network) * hardware.LINKS
    rates = Rates(rate, attention_rate, parallel.wait_s)
    layouts: tuple[ParallelLayout, ...] = ()
    if parallel.sp > 1:
        layouts = choose_layouts(model.scales, clip, parallel.sp, parallel.layout, rates)
    kept = peak_activation_bytes(model, replace(parallel, recompute="none"), clip, config.train.micro)
    count = cost.parameters(model)
    bf16 = parallel.precision != "fp32"

    # One micro-batch of the slowest rank, forward and backward, of which the forward pass is a third. Recomputation
    # computes all of it once more, or only what is cheap; of eager blocks FlexAttention too.
    again = 1 if parallel.recompute == "none" else 4 / 3
    product_factor = again if parallel.recompute == "full" else 1.0
    attention_factor = again if parallel.block_recompute != "none" else 1.0
    cheap_factor = hardware.CHEAP if attention_factor < again else again
    share = -(-units // parallel.sp) / units
    flops = config.train.micro * 3 * share * cost.linear_flops(model, index.frames, index.height, index.width)
    attention = 3.0 * cost.attention_flops(model, index.frames, index.height, index.width)
    attending = config.train.micro * attention / attention_rate
    sent = exposed = 0.0
    if layouts:
        each = [estimates(scale, clip, parallel.sp, rates)[layout]
                for scale, layout in zip(model.scales, layouts, strict=True)]  # fmt: skip
        attending = config.train.micro * model.depth * sum(e.computing for e in each)
        exposed = config.train.micro * model.depth * sum(e.seconds - e.computing for e in each)
        times = 3 if parallel.recompute == "full" else 2  # forward, backward, and forward again
        exposed *= times / 2
        sent = times * sum(e.sent for e in each) * clip.value_bytes * model.depth * config.train.micro * accumulate
    micro = {
        "matrix products": product_factor * flops / (peak * efficiency.products),
        "attention": attention_factor * attending,
        "memory traffic": cheap_factor * efficiency.passes * kept / device.bandwidth,
    }
    launches = cheap_factor * efficiency.launches * attention_calls(model, clip.grid) * model.depth
    launches *= hardware.SHARDED if parallel.sp > 1 else 1.0
    micro["launches"] = max(0.0, launches - sum(micro.values()))
    computing = sum(micro.values())
    seconds = {name: accumulate * value for name, value in micro.items()}
    seconds["exchanges along time"] = accumulate * exposed

    # Gradients and weights over all ranks
    wide = gpus > device.node
    far = (device.network if wide else device.link) * hardware.LINKS
    reduced, gathered = zero_bytes(count, parallel.zero.stage, gpus, bf16, accumulate, parallel.block_recompute)
    reductions = accumulate if parallel.zero.stage >= 2 else 1
    backward = computing * (1 - 1 / (3 * cheap_factor))
    seconds["gradients"] = reductions * max(0.0, reduced / reductions / far - hardware.OVERLAP * backward)
    behind = hardware.OVERLAP * computing * accumulate if parallel.zero.stage == 3 else 0.0
    seconds["weights"] = max(0.0, gathered / far - behind)
    own = count / (gpus if parallel.zero.stage else 1)
    seconds["update"] = hardware.UPDATE * own / device.bandwidth

    sp_link = "in the machine" if inside else "network"
    dp_link = "network" if wide else "in the machine"
    at_start = 4.0 * count / (model.depth if parallel.zero.stage == 3 else 1)  # at stage 3 a block at a time is whole
    traffic = {("past along time", sp_link): sent, ("gradients", dp_link): reduced, ("weights", dp_link): gathered}
    return Plan(
        config, device, gpus, dp, accumulate, layouts, count,
        index.frames * cost.tokens_per_frame(model, index.height, index.width),
        config.train.batch * float(cost.step_flops(model, index.frames, index.height, index.width)),
        memory(config, clip, count, gpus), at_start, {k: v for k, v in traffic.items() if v}, seconds,
    )  # fmt: skip


def memory(config: Config, clip: ClipShape, count: int, gpus: int) -> dict[str, float]:
    """Bytes per GPU by part, of the rank with the most activations."""
    bf16, stage = config.parallel.precision != "fp32", config.parallel.zero.stage
    parts = {name: float(size) for name, size in cost.state_parts(count, stage, gpus, bf16).items()}
    parallel, micro = config.parallel, config.train.micro
    parts["activations"] = float(peak_activation_bytes(config.model, parallel, clip, micro))
    bucket = min(config.parallel.zero.bucket, count) if gpus > 1 else 0
    parts["communication buffers"] = 2 * 4.0 * bucket
    if stage == 3:
        parts["gathered weights"] = (2.0 if bf16 else 4.0) * min(count, hardware.LIVE)
    parts["reserved"] = hardware.RESERVED
    return parts


def zero_bytes(
    count: int, stage: int, ranks: int, bf16: bool, accumulate: int, recompute: Recompute
) -> tuple[float, float]:
    """Bytes that a rank sends in a step for (gradients, weights). Gradients travel in fp32, as deepspeed_zero.py
    asks, and from stage 2 on with every micro-batch; up to stage 2 by all-reduce (DeepSpeed 0.19 all-reduces its
    buckets also where a rank keeps a share only). Stage 3 fetches weights for every pass over the model, stages 1
    and 2 after the update."""
    if ranks == 1:
        return 0.0, 0.0
    once = count * (ranks - 1) / ranks
    weight = 2 if bf16 else 4
    if stage == 3:
        return accumulate * 4 * once, accumulate * (2 if recompute == "none" else 3) * weight * once
    return (accumulate if stage == 2 else 1) * 2 * 4 * once, weight * once if stage else 0.0


# Search ----------------------------------------------------------------------------------------------------


def search_plans(config: Config, index: Index, device: Device, gpus: int, fixed: Sequence[str] = ()) -> list[Plan]:
    """Plans of all layouts of a resolved configuration on that many GPUs, those that fit first, fastest first.

    fixed: settings that stay as they are ("parallel.sp", "parallel.zero.stage", "parallel.recompute", "train.micro").
    ValueError, with the reason, if there is none.
    """
    feasible, reasons = [], []
    for variant in _variants(config, index, gpus, fixed):
        try:
            feasible.append(make_plan(variant, index, device, gpus))
        except ValueError as error:
            reasons.append(str(error))
    if not feasible:
        raise ValueError(reasons[0] if reasons else _no_layout_message(config, index, gpus))
    return sorted(
        feasible, key=lambda one: (not one.fits, one.step_s if one.fits else one.memory_bytes, one.config.train.micro)
    )


def _variants(config: Config, index: Index, gpus: int, fixed: Sequence[str]) -> Iterator[Config]:
    units = index.frames // config.model.frames_per_unit
    parallel, batch = config.parallel, config.train.batch
    lengths = [sp for sp in range(1, min(units, gpus) + 1) if gpus % sp == 0]
    stages = (2, 3) if parallel.precision != "fp32" else (0, 1, 2, 3)
    for sp in [parallel.sp] if "parallel.sp" in fixed else lengths:
        dp = gpus // sp
        if batch % dp or gpus % sp:
            continue
        each = batch // dp
        micros = [n for n in range(1, each + 1) if each % n == 0]
        for stage in [parallel.zero.stage] if "parallel.zero.stage" in fixed else stages:
            for recompute in [parallel.recompute] if "parallel.recompute" in fixed else get_args(Recompute):
                if not can_recompute(recompute, stage, parallel.compile):
                    continue
                for micro in [config.train.micro] if "train.micro" in fixed else micros:
                    zero = replace(parallel.zero, stage=cast(Literal[0, 1, 2, 3], stage))
                    yield replace(
                        config, parallel=replace(parallel, sp=sp, recompute=recompute, zero=zero),
                        train=replace(config.train, micro=micro),
                    )  # fmt: skip


def _no_layout_message(config: Config, index: Index, gpus: int) -> str:
    units = index.frames // config.model.frames_per_unit
    least = gpus // max(sp for sp in range(1, units + 1) if gpus % sp == 0)
    return (
        f"no dp × sp of {gpus} GPUs shares out train.batch {config.train.batch} (dp must divide it) and {units} units "
        f"of a clip (sp must not exceed them); use another number of GPUs, or a batch of a multiple of {least}"
    )


# Rollout --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutPlan:
    """Generation of one video on one GPU, as `msc sample` does it, in fp32. memory: bytes by part when the last unit is
    made. seconds_per_frame: of the first unit and of the last."""

    units: int
    steps: int
    memory: dict[str, float]
    seconds_per_frame: tuple[float, float]


def plan_rollout(model: ModelConfig, grid: tuple[int, int], device: Device, units: int, steps: int = 16) -> RolloutPlan:
    """units: of the whole video, context included. grid: tokens of a frame."""
    count = cost.parameters(model)

    def seconds(unit: int) -> float:
        """One forward pass: it computes, or reads weights and cache, or waits for launches, whichever takes longest."""
        computing = cost.unit_flops(model, unit, *grid) / (device.fp32 * hardware.EAGER.products)
        reading = (4 * count + cost.cache_bytes(model, unit, *grid)) / device.bandwidth
        launching = hardware.EAGER.launches / 3 * attention_calls(model, grid) * model.depth
        return max(computing, reading, launching)

    own = 4.0 * model.frames_per_unit * grid[0] * grid[1] * (9 * model.width + 2 * model.hidden)
    parts = {"weights": 4.0 * count, "caches": float(cost.cache_bytes(model, units, *grid)), "one block at work": own}
    passes = (steps + 1) / model.frames_per_unit  # the last one lets the finished unit join the past
    return RolloutPlan(units, steps, parts, (passes * seconds(0), passes * seconds(units - 1)))
