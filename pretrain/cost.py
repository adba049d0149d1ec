"""Cost of a model in closed form: parameters, floating-point operations, memory. The plan and the MFU rest on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .model.config import ModelConfig
from .model.recomputation import Recompute
from .model.scales import Scale
from .model.transformer import MSCTransformer


@lru_cache(maxsize=64)  # a plan asks for the same model many times
def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MSCTransformer(config).parameters())


def tokens_per_frame(config: ModelConfig, height: int, width: int) -> int:
    return (height // config.patch) * (width // config.patch)


@lru_cache(maxsize=64)
def attention_flops(config: ModelConfig, frames: int, height: int, width: int) -> int:
    """Floating-point operations (2 per multiply-add) of all layers' attention proper for one clip, forward."""
    grid = (height // config.patch, width // config.patch)
    units = frames // config.frames_per_unit
    blocks = [sum(scale.blocks_seen(unit, grid) for unit in range(units)) for scale in config.scales]
    return _attention_flops(config, blocks, grid)


def _attention_flops(config: ModelConfig, blocks: Sequence[int], grid: tuple[int, int]) -> int:
    """Of all layers, where the queries see so many blocks of keys in all at each scale: q·k and weights·v."""
    return sum(
        4
        * seen
        * config.frames_per_unit**2
        * scale.token_pairs(grid, bool(layer % 2))
        * scale.heads
        * config.head_width
        for layer in range(config.depth)
        for scale, seen in zip(config.scales, blocks, strict=True)
    )


def linear_flops(config: ModelConfig, frames: int, height: int, width: int) -> int:
    """Floating-point operations of the matrix products on video tokens for one clip, forward.

    The noise embedding acts once per frame and text once per clip; both are left out.
    """
    tokens = frames * tokens_per_frame(config, height, width)
    per_layer = 4 * config.width**2 + 2 * config.width * config.hidden
    if config.text_width:
        per_layer += 2 * config.width**2
    ends = 2 * config.channels * config.patch**2 * config.width
    return 2 * tokens * (config.depth * per_layer + ends)


def block_flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
    """Forward and backward of one (unshifted) block for one clip of frames of `rows × columns` tokens."""
    one = replace(config, depth=1, channels=0)
    height, width = rows * config.patch, columns * config.patch
    return 3 * (attention_flops(one, frames, height, width) + linear_flops(one, frames, height, width))


def step_flops(config: ModelConfig, frames: int, height: int, width: int) -> int:
    """Forward and backward of one clip; recomputation is not counted, as is usual for MFU."""
    return 3 * (attention_flops(config, frames, height, width) + linear_flops(config, frames, height, width))


def state_parts(count: int, stage: int, ranks: int, bf16: bool) -> dict[str, int]:
    """Bytes on one rank under ZeRO `stage`: weights, gradients (kept in fp32), optimizer (two moments and fp32 masters,
    which DeepSpeed from stage 1 on keeps beside weights in fp32, too) and average."""
    optimizer = 4 * 2 + (4 if bf16 or stage else 0)
    parts = {"weights": (2 if bf16 else 4, 3), "gradients": (4, 2), "optimizer": (optimizer, 1), "average": (4, 1)}
    # (bytes per parameter, sharded from this stage on)
    return {name: size * count // (ranks if stage >= sharded else 1) for name, (size, sharded) in parts.items()}


def state_bytes(count: int, stage: int, ranks: int, bf16: bool) -> int:
    """All of `state_parts`."""
    return sum(state_parts(count, stage, ranks, bf16).values())


@dataclass(frozen=True)
class Run:
    """The units of a video that one rank holds: their number and the first of them. sharded: other ranks hold others
    (a halo layout), so that what a run lacks of the past is received."""

    units: int
    first: int = 0
    sharded: bool = False


def activation_bytes(
    config: ModelConfig,
    run: Run,
    rows: int,
    columns: int,
    batch: int = 1,
    value_bytes: int = 4,
    recompute: Recompute = "none",
    kept_share: float = 1.0,
) -> int:
    """Most bytes of activations at once, for a run of units with frames of `rows × columns` tokens: what autograd keeps
    for the backward pass and, with recomputation, what one layer at a time has again of its own.

    What grows with the tokens is counted exactly for the `sdpa` kernel (tests/test_cost.py counts the tensors);
    what frames and text keep is left out. Parameters are not counted. value_bytes: of weights and activations.
    kept_share: of what blocks without recomputation of their own would keep besides their input, where a compiler
    recomputes the rest.
    """
    tokens = batch * run.units * config.frames_per_unit * rows * columns
    whole = layer_activation_bytes(config, run, rows, columns, batch, value_bytes)
    kept = layer_activation_bytes(config, run, rows, columns, batch, value_bytes, recompute)
    # ends: patches in; the last tokens, these normalised, and the same modulated
    ends = tokens * (config.channels * config.patch**2 + 3 * config.width) * value_bytes
    # cosines and sines of positions, which all layers share
    positions = sum(
        (run.units + scale.fresh_before(run.first) + scale.finished(run.first, run.units))
        * scale.tokens((rows, columns))
        for scale in config.scales
    )
    ends += 4 * config.head_width * config.frames_per_unit * positions
    if recompute == "none":
        inputs = tokens * config.width * value_bytes
        return config.depth * (inputs + int(kept_share * (whole - inputs))) + ends
    return (config.depth - 1) * kept + whole + ends


def layer_activation_bytes(
    config: ModelConfig,
    run: Run,
    rows: int,
    columns: int,
    batch: int,
    value_bytes: int,
    recompute: Recompute = "none",
) -> int:
    """Bytes that a block keeps from its forward to its backward pass."""
    tokens = batch * run.units * config.frames_per_unit * rows * columns
    if recompute == "full":
        return tokens * config.width * value_bytes
    if recompute == "cheap":
        # the input and what products gave: the first projection, the last, both of the feed-forward network
        values, statistics = tokens * (6 * config.width + config.hidden), 0
        if config.text_width:  # queries, attention's output, and it projected
            values += tokens * 3 * config.width
            statistics += tokens * config.heads
        for scale in config.scales:
            kept, sums = _scale_results(scale, config, run, rows, columns)
            values += batch * kept
            statistics += batch * sums
        return values * value_bytes + statistics * 4
    # Both halves: the input, it normalised, it modulated, and the branch's output. Attention: its output before the
    # last projection. Feed-forward: both sides of its nonlinearity. Mean and deviation of both norms.
    values = tokens * (9 * config.width + 2 * config.hidden)
    if config.layers.qk_norm == "width":  # queries and keys normalised, and values beside them
        values += tokens * 3 * config.width
    statistics = tokens * 4
    if config.text_width:  # input, it normalised, the queries raw, normalised and with their gain, the output
        values += tokens * 6 * config.width
        statistics += tokens * (2 + 2 * config.heads)
    if any(scale.space == 1 for scale in config.scales):
        values += tokens * 3 * config.width  # the first projection's output, of which the rest is a view
    for scale in config.scales:
        kept, sums = _scale_activations(scale, config, run, rows, columns)
        values += batch * kept
        statistics += batch * sums
    return values * value_bytes + statistics * 4


def _scale_activations(scale: Scale, config: ModelConfig, run: Run, rows: int, columns: int) -> tuple[int, int]:
    """(values, fp32 statistics) that the attention of one scale keeps per clip, besides a view of the projection."""
    size = config.frames_per_unit * scale.tokens((rows, columns)) * scale.heads
    gated, past, finished = config.gate == "logits", scale.fresh_before(run.first), scale.finished(run.first, run.units)
    whole = scale.patch_window is None or max(rows, columns) // scale.space <= scale.patch_window
    keys = scale.pooled_before(run.first) + finished + past + run.units * (1 + gated)
    # Keys always lie in rows of their own; values do, unless all there are is a view of the projection.
    rows_of_values = keys if gated or not whole or run.sharded or scale.time > 1 or past else 0
    raw = (3 * run.units if scale.space > 1 else 0) + 2 * past + 2 * finished
    values = raw + 2 * run.units + keys + rows_of_values  # 2: queries and output
    # inverse norms of queries and keys, and the log-sum-exp
    statistics = (2 * run.units + past + finished + run.units) * size
    if scale.top is not None:  # the chosen blocks, as integers of twice the bytes
        tiles = scale.tiles((rows, columns))
        statistics += 2 * run.units * tiles * scale.heads * min(scale.top, keys * tiles)
    return values * size * config.head_width, statistics


def _scale_results(scale: Scale, config: ModelConfig, run: Run, rows: int, columns: int) -> tuple[int, int]:
    """(values, fp32 statistics) of one scale that are not recomputed where only the cheap is: attention's output and
    log-sum-exp, the choice of blocks, and what other ranks sent."""
    size = config.frames_per_unit * scale.tokens((rows, columns)) * scale.heads
    before = scale.fresh_before(run.first) + scale.pooled_before(run.first)
    values, statistics = run.units + 2 * before, run.units * size
    if scale.top is not None:  # the chosen blocks and their scores, as integers of twice the bytes
        tiles = scale.tiles((rows, columns))
        keys = before + scale.finished(run.first, run.units) + run.units * (1 + (config.gate == "logits"))
        statistics += 4 * run.units * tiles * scale.heads * min(scale.top, keys * tiles)
    return values * size * config.head_width, statistics


# Roll-out: one unit at a time against caches of the past ---------------------------------------------------


def cache_bytes(config: ModelConfig, units: int, rows: int, columns: int, batch: int = 1, value_bytes: int = 4) -> int:
    """Bytes that generation keeps of `units` past units of `rows × columns` tokens: keys and values per layer, and, for
    a gate, the fp32 noise level of every frame kept. With guidance the batch is twice the videos."""
    kept = levels = 0
    for scale in config.scales:
        fresh = units if scale.fresh_kept is None else min(scale.fresh_kept, units)
        tokens = config.frames_per_unit * scale.tokens((rows, columns))
        kept += (fresh + scale.pooled_before(units)) * 2 * tokens * scale.heads * config.head_width
        levels = max(levels, fresh * config.frames_per_unit if config.gate == "logits" else 0)
    return batch * (config.depth * kept * value_bytes + levels * 4)


def unit_flops(config: ModelConfig, unit: int, rows: int, columns: int) -> int:
    """Floating-point operations of one forward pass of one unit against the cached past, for one clip."""
    blocks = [scale.blocks_seen(unit, (rows, columns)) for scale in config.scales]
    frames, height, width = config.frames_per_unit, rows * config.patch, columns * config.patch
    return _attention_flops(config, blocks, (rows, columns)) + linear_flops(config, frames, height, width)
