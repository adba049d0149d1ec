"""What a model costs, in closed form: parameters, multiply-adds, memory. The plan and the MFU rest on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .model import ModelConfig, MSCTransformer
from .scales import Scale, spatial_windows


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MSCTransformer(config).parameters())


def tokens_per_frame(config: ModelConfig, height: int, width: int) -> int:
    return (height // config.patch) * (width // config.patch)


def _windows(scale: Scale, grid: tuple[int, int], shifted: bool) -> Iterator[tuple[int, int]]:
    """(number of local windows, tokens of one) at a scale, region by region."""
    rows, columns = (spatial_windows(side // scale.space, scale.patch_window, shifted) for side in grid)
    for _, ny, sy in rows:
        for _, nx, sx in columns:
            yield ny * nx, sy * sx


def attention_flops(config: ModelConfig, frames: int, height: int, width: int) -> int:
    """Floating-point operations (2 per multiply-add) of all layers' attention proper for one clip, forward."""
    grid = (height // config.patch, width // config.patch)
    F, total = config.frames_per_unit, 0
    for layer in range(config.depth):
        for scale in config.scales:
            blocks = sum(map(len, scale.key_blocks(0, frames // F, separate_own=False)))
            pairs = blocks * F * F * sum(n * size**2 for n, size in _windows(scale, grid, bool(layer % 2)))
            total += 2 * 2 * pairs * scale.heads * config.head_width  # q·k and weights·v
    return total


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


def state_bytes(count: int, stage: int, ranks: int, bf16: bool) -> int:
    """Weights, gradients, fp32 masters, two moments and the average on one rank under ZeRO `stage`."""
    weight = 2 if bf16 else 4
    parts = [
        (weight, 3),
        (4, 2),
        (4 * 3 + (4 if bf16 else 0), 1),
    ]  # (bytes per parameter, sharded from this stage on)
    return sum(size * count // (ranks if stage >= sharded else 1) for size, sharded in parts)


def activation_bytes(config: ModelConfig, tokens: int, bf16: bool, recompute: bool) -> int:
    """Estimate of what one rank keeps for the backward pass of `tokens` tokens.

    Counted in values of the model's width per token and block: norm input and output twice, q k v, attention's
    keys and values as gathered per scale, its output, and the feed-forward's two hidden rows.
    """
    gathered = sum(
        scale.heads / config.heads / scale.space**2 * 2 * (2 + (scale.window or 1) / scale.time)
        for scale in config.scales
    )
    values = 4 + 3 + gathered + 2 + 2 * config.mlp_ratio
    per_block = tokens * config.width * values * (2 if bf16 else 4)
    kept = tokens * config.width * (2 if bf16 else 4)
    return int(config.depth * kept + per_block if recompute else config.depth * per_block)
