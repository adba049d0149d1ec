"""Attention inputs: positions, noise levels and visible key blocks of a call's frames, scale by scale.

Made once a forward pass, for all layers alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels import routed
from ..kernels.dispatch import Kernel, KeyBlocks, Masks, prepare, resolve_kernel
from ..kernels.routed import Routes
from .config import ModelConfig
from .noise_gate import UNMEASURED, GateConstants, log_snr, pooled_log_snr
from .past_context import PastContext, Placement, WholeVideo
from .rope import Rope, RopeLayout
from .scales import Scale

UnitRun = tuple[int, int]  # neighbouring units, first to end


@dataclass(frozen=True)
class ScaleInputs:
    """What one scale's attention needs besides tokens, of the units whose attention is computed here."""

    scale: Scale
    frames_per_unit: int
    past_context: PastContext
    placement: Placement | None
    kernel: Kernel
    key_blocks: KeyBlocks
    masks: Masks
    routes: Routes | None  # of a routed scale
    rope_past: Rope  # unpooled past units
    rope_own: Rope
    rope_groups: Rope | None  # groups pooled in time that own units complete
    log_snr_past: Tensor | None  # [B, frames of rope_past]; None without a gate
    log_snr_own: Tensor | None
    log_snr_groups: Tensor | None


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels `[B, units, F]` of the units from `first` on, and their log SNR: the same for all scales."""

    first: int
    t_BUF: Tensor
    log_snr_BUF: Tensor

    def select(self, x_BUF: Tensor, runs: tuple[UnitRun, ...]) -> Tensor:
        """`[B, frames]` of runs of units."""
        last = self.first + x_BUF.shape[1]
        for first, end in runs:
            if not self.first <= first <= end <= last:
                raise ValueError(f"noise levels of units {self.first} to {last} are known, not of {first} to {end}")
        return _joined([x_BUF[:, first - self.first : end - self.first] for first, end in runs], 1).flatten(1)


@dataclass(frozen=True)
class AttentionInputs:
    """Makes the inputs of all scales for the frames of a call, by the model's configuration and a kernel's name."""

    config: ModelConfig
    kernel: Kernel = "auto"

    def prepare(
        self, t_BT: Tensor, grid: tuple[int, int], past_context: PastContext, all_t_BT: Tensor | None = None
    ) -> list[ScaleInputs]:
        """t_BT: noise levels of the own frames. grid: the full token grid (H, W). all_t_BT: levels of all frames of the
        video (None: the past context brings those that are needed)."""
        config, per_unit = self.config, self.config.frames_per_unit
        noise = None
        if config.gate == "logits":
            if all_t_BT is not None:
                t_BUF, first = all_t_BT.unflatten(1, (-1, per_unit)), 0
            else:
                kept = [scale.fresh_kept for scale in config.scales]
                most = None if None in kept else max(units for units in kept if units is not None)
                t_BUF, first = past_context.noise_levels(t_BT.unflatten(1, (-1, per_unit)), most)
            noise = NoiseLevels(first, t_BUF, log_snr(t_BUF))
        constants = config.gate_constants or (UNMEASURED,) * len(config.scales)
        return [
            self._prepare_scale(index, constants[index], t_BT, grid, past_context, noise)
            for index in range(len(config.scales))
        ]

    def _prepare_scale(
        self, index: int, constants: GateConstants, t_BT: Tensor, grid: tuple[int, int], past_context: PastContext,
        noise: NoiseLevels | None,
    ) -> ScaleInputs:  # fmt: skip
        config, scale, device = self.config, self.config.scales[index], t_BT.device
        first = past_context.first
        units: range | tuple[int, ...] = range(first, first + t_BT.shape[1] // config.frames_per_unit)
        placement = past_context.placement(index)
        if placement is not None:
            past_context, first, units = WholeVideo(), 0, placement.units
        past, own = (first - scale.fresh_before(first), first), _runs(units, first)
        finished = scale.finished(first, len(units))
        groups = past[0], past[0] + finished * scale.time  # the units of complete groups

        # What follows from where the units lie is the same at every step of a training run, and takes the CPU tens of
        # milliseconds to count or to start: made once. Not so in a roll-out, where it changes from unit to unit.
        lasting = not past_context.grows and _lasting(device)
        tables = _rope_tables if lasting else _rope_tables.__wrapped__
        blocks_and_masks = _blocks_and_masks if lasting else _blocks_and_masks.__wrapped__
        dtype = torch.float64 if t_BT.dtype == torch.float64 else torch.float32
        offset = sum(other.heads for other in config.scales[:index])
        heads = range(offset, offset + scale.heads)[placement.heads if placement is not None else slice(None)]
        axes = config.frames_per_unit, scale.space, grid, _rope_layout(config, heads), dtype, device

        log_snr_past = log_snr_own = log_snr_groups = None
        if noise is not None:
            log_snr_past = noise.select(noise.log_snr_BUF, (past,)) + constants.b
            log_snr_own = noise.select(noise.log_snr_BUF, own) + constants.b
            if finished:
                log_snr_groups = pooled_log_snr(noise.select(noise.t_BUF, (groups,)), scale.time) + constants.b_pooled
        resolved = resolve_kernel(self.kernel, len(units), device.type, config.head_width)
        blocks, masks, routes = blocks_and_masks(
            scale,
            first,
            len(units),
            noise is not None,
            grid,
            config.frames_per_unit,
            device,
            config.head_width,
            resolved,
        )
        return ScaleInputs(
            scale=scale,
            frames_per_unit=config.frames_per_unit,
            past_context=past_context,
            placement=placement,
            kernel=self.kernel,
            key_blocks=blocks,
            masks=masks,
            routes=routes,
            rope_past=tables((past,), 1, *axes),
            rope_own=tables(own, 1, *axes),
            rope_groups=tables((groups,), scale.time, *axes) if finished else None,
            log_snr_past=log_snr_past,
            log_snr_own=log_snr_own,
            log_snr_groups=log_snr_groups,
        )


def _rope_layout(config: ModelConfig, heads: range) -> RopeLayout:
    layers = config.layers
    own = (heads, config.width, layers.rope_steps) if layers.rope == "ltx" else ()  # else all heads share one table
    return RopeLayout(layers.rope, config.head_width, config.rope_theta, *own)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@lru_cache(maxsize=64)
def _runs(units: range | tuple[int, ...], first: int) -> tuple[UnitRun, ...]:
    """Ascending numbers as runs; an empty one at `first` where there are none."""
    if not units:
        return ((first, first),)
    edges = [0, *(i for i in range(1, len(units)) if units[i] != units[i - 1] + 1), len(units)]
    return tuple((units[a], units[b - 1] + 1) for a, b in pairwise(edges))


def _lasting(device: torch.device) -> bool:
    """Whether tensors made here may be kept: not a tracer's, nor in the memory of a CUDA graph."""
    if torch.compiler.is_dynamo_compiling():
        return True  # it looks behind the cache
    if _is_traced(device):
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _is_traced(device: torch.device) -> bool:
    """Whether tensors made here are a tracer's."""
    probe = torch.empty(0, device=device)
    return type(probe) is not Tensor or torch._is_functional_tensor(probe)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # so that training may use what an evaluation needed first
def _blocks_and_masks(
    scale: Scale, first: int, units: int, gated: bool, grid: tuple[int, int], frames_per_unit: int,
    device: torch.device, head_width: int, kernel: Kernel,
) -> tuple[KeyBlocks, Masks, Routes | None]:  # fmt: skip
    """Key blocks that the units see, and the kernel's masks for them, for every size of spatial window, or the routes
    of a routed scale."""
    blocks = scale.key_blocks(first, units, separate_own=gated)
    if scale.top is not None and units:
        make = routed.prepare.__wrapped__ if _is_traced(device) else routed.prepare
        return blocks, {}, make(blocks, scale.candidates(first, units), scale.tiles(grid), scale.top, device)
    heights, widths = (
        {size for shifted in (False, True) for *_, size in scale.spatial_windows(side, shifted)} for side in grid
    )
    tokens = {frames_per_unit * height * width for height in heights for width in widths}
    return blocks, prepare(blocks, tokens, device, head_width, kernel), None


@lru_cache(maxsize=64)  # of `base` some 350 bytes a token and shape of clips
@torch.inference_mode(False)
def _rope_tables(
    runs: tuple[UnitRun, ...], step: int, frames_per_unit: int, space: int, grid: tuple[int, int],
    layout: RopeLayout, dtype: torch.dtype, device: torch.device,
) -> Rope:  # fmt: skip
    """Of the frames in runs of units, every `step` of them as one at their centre."""

    def centres(first: int, end: int, step: int) -> Tensor:
        return torch.arange(first, end, step, dtype=torch.float64, device=device) + (step - 1) / 2

    frames = _joined([centres(first * frames_per_unit, end * frames_per_unit, step) for first, end in runs], 0)
    rows, columns = (centres(0, side, space) for side in grid)
    return layout.tables((frames, rows, columns), dtype)
