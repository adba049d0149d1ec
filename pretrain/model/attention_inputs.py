"""What one scale needs to know of the frames of a call: positions, noise, visible blocks. For all layers alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.blocks import Blocks
from ..kernels.dispatch import Backend, Masks, chosen, prepare
from .noise_gate import ON_KEYS, UNMEASURED, GateConstants, GatePlace, log_snr, pooled_log_snr
from .past_context import Placement, Timeline, WholeVideo
from .rope import Rope, rope_angles
from .scales import Scale, spatial_windows

Run = tuple[int, int]  # units, first to end


@dataclass(frozen=True)
class View:
    """One scale's view of the units whose attention is computed here."""

    scale: Scale
    frames_per_unit: int
    timeline: Timeline
    placement: Placement | None
    blocks: Blocks
    masks: Masks
    rope_past: Rope  # unpooled past units
    rope_own: Rope
    rope_groups: Rope | None  # groups pooled in time that own units complete
    constants: GateConstants
    log_snr_query: Tensor | None  # [B, frames] of the units computed here; for "mix", of the frames that lie here
    log_snr_past: Tensor | None  # [B, frames of rope_past]
    log_snr_own: Tensor | None  # [B, frames of rope_own]
    log_snr_groups: Tensor | None  # [B, frames of rope_groups]


def view_frames(
    scales: Sequence[Scale],
    t_BT: Tensor,
    grid: tuple[int, int],
    frames_per_unit: int,
    head_width: int,
    still: int,
    theta: float,
    gate: GatePlace,
    constants: Sequence[GateConstants | None],
    timeline: Timeline,
    backend: Backend = "sdpa",
    all_t_BT: Tensor | None = None,
) -> list[View]:
    """Positions, noise and visible blocks of a call's frames at every scale.

    t_BT are the noise levels of the own frames; grid is the full token grid (H, W); constants are what was
    measured of the data at each scale (gate.gate_constants; None: nothing). `still` channels of a head carry no
    position. The kernel `backend` prepares what it can. all_t_BT are the levels of all of the video's frames (None: the
    timeline brings those that are needed).
    """
    noise = None
    if gate in ON_KEYS and all_t_BT is not None:
        noise = Noise.of(0, all_t_BT.unflatten(1, (-1, frames_per_unit)))
    elif gate in ON_KEYS:
        kept = [scale.fresh_kept for scale in scales]
        most = None if None in kept else max(units for units in kept if units is not None)
        t_BUF, first = timeline.levels(t_BT.unflatten(1, (-1, frames_per_unit)), most)
        noise = Noise.of(first, t_BUF)
    return [
        _view_frames(
            scale, index, t_BT, noise, grid, frames_per_unit, head_width, still, theta, gate,
            measured or UNMEASURED, timeline, backend,
        )
        for index, (scale, measured) in enumerate(zip(scales, constants, strict=True))
    ]  # fmt: skip


@dataclass(frozen=True)
class Noise:
    """Noise levels `[B, units, F]` of the units from `first` on, and their log SNR: the same for all scales."""

    first: int
    t_BUF: Tensor
    log_snr_BUF: Tensor

    @staticmethod
    def of(first: int, t_BUF: Tensor) -> Noise:
        return Noise(first, t_BUF, log_snr(t_BUF))

    def cut(self, x_BUF: Tensor, runs: tuple[Run, ...]) -> Tensor:
        """`[B, frames]` of some runs of units."""
        known = self.first, self.first + x_BUF.shape[1]
        for first, end in runs:
            if not known[0] <= first <= end <= known[1]:
                raise ValueError(f"noise levels of units {known[0]} to {known[1]} are known, not of {first} to {end}")
        return _joined([x_BUF[:, first - self.first : end - self.first] for first, end in runs], 1).flatten(1)


def _view_frames(
    scale: Scale, index: int, t_BT: Tensor, noise: Noise | None, grid: tuple[int, int], frames_per_unit: int,
    head_width: int, still: int, theta: float, gate: GatePlace, constants: GateConstants, timeline: Timeline,
    backend: Backend,
) -> View:  # fmt: skip
    first = timeline.first
    units: range | tuple[int, ...] = range(first, first + t_BT.shape[1] // frames_per_unit)
    placement = timeline.placement(index)
    if placement is not None:
        timeline, first, units = WholeVideo(), 0, placement.units
    before, own = (first - scale.fresh_before(first), first), _runs(units, first)
    finished = scale.finished(first, len(units))
    groups = before[0], before[0] + finished * scale.time  # the units of complete groups

    kept = not timeline.grows and _lasting(t_BT.device)
    tables, seen = (_tables, _seen) if kept else (_tables.__wrapped__, _seen.__wrapped__)
    dtype = torch.float64 if t_BT.dtype == torch.float64 else torch.float32
    axes = frames_per_unit, scale.space, grid, head_width, still, theta, dtype, t_BT.device

    log_snr_past = log_snr_own = log_snr_groups = log_snr_query = None
    if noise is not None:
        log_snr_past, log_snr_own = (noise.cut(noise.log_snr_BUF, runs) + constants.b for runs in ((before,), own))
        if finished:
            log_snr_groups = pooled_log_snr(noise.cut(noise.t_BUF, (groups,)), scale.time) + constants.b_pooled
    if gate == "pair":
        log_snr_query = log_snr_own
    elif gate == "mix":
        log_snr_query = log_snr(t_BT) + constants.b
    sizes = frozenset(window_sizes(scale, grid, frames_per_unit))
    where = t_BT.device, head_width, chosen(backend, len(units), t_BT.device.type, head_width)
    blocks, masks = seen(scale, first, len(units), noise is not None, sizes, *where)
    return View(
        scale,
        frames_per_unit,
        timeline,
        placement,
        blocks,
        masks,
        tables((before,), 1, *axes),
        tables(own, 1, *axes),
        tables((groups,), scale.time, *axes) if finished else None,
        constants,
        log_snr_query,
        log_snr_past,
        log_snr_own,
        log_snr_groups,
    )


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@lru_cache(maxsize=64)
def _runs(units: range | tuple[int, ...], first: int) -> tuple[Run, ...]:
    """Ascending numbers as runs, first to end; an empty one at `first` where there are none."""
    if not units:
        return ((first, first),)
    edges = [0, *(i for i in range(1, len(units)) if units[i] != units[i - 1] + 1), len(units)]
    return tuple((units[a], units[b - 1] + 1) for a, b in pairwise(edges))


# What follows from where the units lie is the same at every step of a training run, and takes the CPU tens of
# milliseconds to count or to start: made once. Not so in a roll-out, where it changes from unit to unit.


def _lasting(device: torch.device) -> bool:
    """Whether what is made here is still good later: not a tracer's, nor in the memory of a CUDA graph."""
    if torch.compiler.is_dynamo_compiling():
        return True  # it looks behind the cache
    made = torch.empty(0, device=device)
    if type(made) is not Tensor or torch._is_functional_tensor(made):
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # so that training may use what an evaluation needed first
def _seen(
    scale: Scale, first: int, units: int, gated: bool, sizes: frozenset[int],
    device: torch.device, head_width: int, backend: Backend,
) -> tuple[Blocks, Masks]:  # fmt: skip
    """Which blocks of keys the units see, and the kernel's masks."""
    blocks = scale.key_blocks(first, units, separate_own=gated)
    return blocks, prepare(blocks, sizes, device, head_width, backend)


@lru_cache(maxsize=64)  # of `base` some 350 bytes a token and shape of clips
@torch.inference_mode(False)
def _tables(
    runs: tuple[Run, ...], step: int, frames_per_unit: int, space: int, grid: tuple[int, int],
    head_width: int, still: int, theta: float, dtype: torch.dtype, device: torch.device,
) -> Rope:  # fmt: skip
    """Of the frames in runs of units, every `step` of them as one at their centre."""

    def centres(first: int, end: int, step: int) -> Tensor:
        return torch.arange(first, end, step, dtype=torch.float64, device=device) + (step - 1) / 2

    frames = _joined([centres(first * frames_per_unit, end * frames_per_unit, step) for first, end in runs], 0)
    rows, columns = (centres(0, side, space) for side in grid)
    return rope_angles((frames, rows, columns), head_width, still, theta, dtype)


def window_sizes(scale: Scale, grid: tuple[int, int], frames_per_unit: int) -> set[int]:
    """Tokens that a unit has in the spatial windows of a scale, shifted ones included."""

    def widths(side: int) -> set[int]:
        cuts = (spatial_windows(side // scale.space, scale.patch_window, shifted) for shifted in (False, True))
        return {width for cut in cuts for _, _, width in cut}

    return {frames_per_unit * a * b for a in widths(grid[0]) for b in widths(grid[1])}
