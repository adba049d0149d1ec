"""Multi-scale causal self-attention: one fused projection, several resolutions, one output projection.

The heads are divided among the scales (scales.py). A group's queries, keys and values are average-pooled
to its resolution after the projection, attend there to their own unit and to the visible past, and are
repeated back to full resolution. With the single scale `(all heads, 1, 1, None)` this is dense causal
attention. What of the past lies elsewhere (another rank, a generation cache) comes through a `Timeline`;
this module knows neither ranks nor caches. Shape suffixes: B batch, T frames, U units, F frames of a
unit, H W token grid, n tokens of a unit, R key blocks, h heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import Backend, Blocks, attend
from .gate import (
    NODES,
    UNMEASURED,
    GateConstants,
    GatePlace,
    effective_log_snr,
    log_gate,
    log_gate_at_nodes,
    log_snr,
    node_weights,
    pooled_log_snr,
)
from .rope import Rope, rope_angles
from .scales import Scale, spatial_windows

# The gates that act on past keys, so that the own unit's keys, never gated, need a row of their own.
ON_KEYS: tuple[GatePlace, ...] = ("values", "logits", "pair")


def unrotated(gate: GatePlace) -> int:
    """Channels of a head that carry no position; there the gate rides."""
    return len(NODES) if gate == "pair" else 2


class Timeline(Protocol):
    """Where a run of units lies in its video, and how to get at what comes before it."""

    first: int

    def extend(
        self, key: Hashable, x_BU: Tensor, before: Callable[[int], int], kept: int | None, every: int = 1
    ) -> Tensor:
        """Put earlier items in front of the own ones along dimension 1.

        An item covers `every` units and belongs to whoever holds the last of them; `before(first)`
        is how many earlier items a run that starts at unit `first` needs; no later run ever needs more
        than `kept` of them (None: all may be needed). `key` names the tensor across calls.
        """
        ...


class WholeVideo:
    """The timeline of a video that lies here from its first frame: nothing comes before it."""

    first = 0

    def extend(
        self, key: Hashable, x_BU: Tensor, before: Callable[[int], int], kept: int | None, every: int = 1
    ) -> Tensor:
        return x_BU


@dataclass(frozen=True)
class View:
    """What one scale needs to know of the frames of a call; the same for all layers."""

    scale: Scale
    frames_per_unit: int
    blocks: Blocks
    rope_fresh: Rope  # unpooled keys: past units, then own ones; queries use its end
    rope_groups: Rope | None  # groups pooled in time that own units complete
    constants: GateConstants
    log_snr_own: Tensor | None  # [B, T]
    log_snr_fresh: Tensor | None  # [B, frames of rope_fresh]
    log_snr_groups: Tensor | None  # [B, frames of rope_groups]


def view_frames(
    scale: Scale,
    index: int,
    t_BT: Tensor,
    grid: tuple[int, int],
    frames_per_unit: int,
    rotated: int,
    theta: float,
    gate: GatePlace,
    constants: GateConstants | None,
    timeline: Timeline,
) -> View:
    """Positions, noise and visible blocks of a call's frames at one scale.

    t_BT are the noise levels of the own frames; grid is the full token grid (H, W); constants are what was
    measured of the data at this scale (gate.gate_constants; None: nothing).
    """
    constants = constants or UNMEASURED
    t_BUF = t_BT.unflatten(1, (-1, frames_per_unit))
    first, units = timeline.first, t_BUF.shape[1]
    past = scale.fresh_before(first)
    finished = (first + units) // scale.time - first // scale.time if scale.time > 1 else 0
    if gate in ON_KEYS:
        t_BUF = timeline.extend(("noise", index), t_BUF, scale.fresh_before, scale.fresh_kept)
    t_fresh = t_BUF.flatten(1)

    def rope(frames: Tensor) -> Rope:
        rows, columns = (
            torch.arange(side // scale.space, device=t_BT.device) * scale.space + (scale.space - 1) / 2 for side in grid
        )
        dtype = torch.float64 if t_BT.dtype == torch.float64 else torch.float32
        return rope_angles((frames, rows, columns), rotated, theta, dtype)

    start = (first - past) * frames_per_unit
    rope_fresh = rope(torch.arange(start, start + (past + units) * frames_per_unit, device=t_BT.device))
    rope_groups = log_snr_groups = None
    if finished:
        pooled = torch.arange(finished * frames_per_unit, device=t_BT.device)
        rope_groups = rope(start + pooled * scale.time + (scale.time - 1) / 2)
        if gate in ON_KEYS:
            members = t_fresh[:, : finished * scale.time * frames_per_unit]
            log_snr_groups = pooled_log_snr(members, scale.time) + constants.b_pooled
    return View(
        scale,
        frames_per_unit,
        scale.key_blocks(first, units, separate_own=gate in ON_KEYS),
        rope_fresh,
        rope_groups,
        constants,
        log_snr(t_BT) + constants.b if gate in ("mix", "pair") else None,
        log_snr(t_fresh) + constants.b if gate in ON_KEYS else None,
        log_snr_groups,
    )


class MultiScaleAttention(nn.Module):
    """Self-attention over frames `[B, T, H, W, D]` on several scales, causal between units.

    gate: where the noise gate g acts. "logits" adds log g to the logits of past keys, so that g → 0 falls
    back to image diffusion; "pair" does so with the gate of two observations, which also asks how much the
    query's frame knows itself; "values" multiplies past values by g. The own unit is never gated. "mix" weighs
    the outputs of the heads by g at the query's own noise, normalised to mean 1. "none" leaves it out.
    `shifted` moves local spatial windows by half.
    """

    def __init__(self, width: int, scales: Sequence[Scale], gate: GatePlace = "logits", shifted: bool = False):
        super().__init__()
        self.scales = tuple(scales)
        self.gate: GatePlace = gate
        self.shifted = shifted
        self.backend: Backend = "auto"  # set by parallelize
        self.heads = sum(scale.heads for scale in self.scales)
        if width % self.heads:
            raise ValueError(f"width {width} does not divide by {self.heads} heads")
        self.head_width = width // self.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        # Parameters of this module, not submodules: ZeRO-3 gathers per module call, in step on all ranks, and
        # how often keys are normalised depends on which groups a rank completes.
        self.q_gain = nn.Parameter(torch.ones(self.head_width))
        self.k_gain = nn.Parameter(torch.ones(self.head_width))
        self.delta = nn.Parameter(torch.zeros(self.heads)) if gate != "none" else None

    def forward(self, x_BTHWD: Tensor, views: Sequence[View], timeline: Timeline, layer: int = 0) -> Tensor:
        qkv = self.qkv(x_BTHWD).unflatten(-1, (3, self.heads, self.head_width))
        groups = qkv.split([scale.heads for scale in self.scales], dim=-2)
        deltas = (
            [None] * len(groups) if self.delta is None else self.delta.split([scale.heads for scale in self.scales])
        )
        outs = [
            self._one_scale(part, view, delta, timeline, (layer, i))
            for i, (part, view, delta) in enumerate(zip(groups, views, deltas, strict=True))
        ]
        if self.gate == "mix":
            outs = self._mixed(outs, views, deltas)
        return self.out(torch.cat(outs, dim=-2).flatten(-2))

    def _one_scale(
        self,
        qkv_BTHW3hd: Tensor,
        view: View,
        delta_h: Tensor | None,
        timeline: Timeline,
        key: tuple[int, int],
    ) -> Tensor:
        scale, frames = view.scale, view.frames_per_unit
        x = pool_space(qkv_BTHW3hd, scale.space)
        q, kv = x[..., 0, :, :], x[..., 1:, :, :]
        fresh = timeline.extend((*key, "fresh"), kv.unflatten(1, (-1, frames)), scale.fresh_before, scale.fresh_kept)
        units = q.shape[1] // frames

        q = view.rope_fresh.last(units * frames).rotate(normalise(q, self.q_gain)).unflatten(1, (-1, frames))
        k, v = fresh.unbind(-3)
        k = view.rope_fresh.rotate(normalise(k, self.k_gain).flatten(1, 2)).unflatten(1, (-1, frames))

        # Key blocks, as Scale.key_blocks orders them: [pooled groups | unpooled units | own units again, ungated].
        k_past, v_past = self._gated(k, v, view.log_snr_fresh, view.constants.rho, delta_h)
        k_row, v_row = [k_past], [v_past]
        if scale.time > 1:
            pooled = self._pool_time(fresh, view, delta_h)
            pooled = timeline.extend((*key, "pooled"), pooled, scale.pooled_before, scale.window, every=scale.time)
            k_row.insert(0, pooled[..., 0, :, :])
            v_row.insert(0, pooled[..., 1, :, :])
        if self.gate in ON_KEYS:
            k_row.append(self._ungated(k[:, -units:]))
            v_row.append(v[:, -units:])
            q = self._asking(q, view.log_snr_own)
        out = attend_windows(
            q, torch.cat(k_row, 1), torch.cat(v_row, 1), view.blocks, scale.patch_window, self.shifted, self.backend
        )
        return repeat_space(out.flatten(1, 2), scale.space)

    def _pool_time(self, fresh: Tensor, view: View, delta_h: Tensor | None) -> Tensor:
        """Keys and values of the groups that own units complete: `[B, groups, F, H, W, 2, h, d]`."""
        time, frames = view.scale.time, view.frames_per_unit
        finished = 0 if view.rope_groups is None else view.rope_groups.frames // frames
        if view.rope_groups is None:
            return fresh[:, :0]
        members = fresh[:, : finished * time].flatten(1, 2)
        k, v = members.unflatten(1, (-1, time)).mean(2).unbind(-3)
        k = view.rope_groups.rotate(normalise(k, self.k_gain)).unflatten(1, (-1, frames))
        v = v.unflatten(1, (-1, frames))
        k, v = self._gated(k, v, view.log_snr_groups, view.constants.rho_pooled, delta_h)
        return torch.stack((k, v), -3)

    # The gate of the logits rides in the last channels of a head, which carry no position; no kernel needs to
    # know of it, and no head grows wider. "logits": the query holds 1 in two channels, a key √d·log g split into
    # a coarse and a fine half so that bf16 keeps it to 2^-16. "pair": one channel per node.

    def _gated(
        self, k: Tensor, v: Tensor, log_snr_BF: Tensor | None, rho: float, delta_h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Past keys and values `[B, U, F, H, W, h, d]` with the gate on them."""
        if self.gate not in ON_KEYS:
            return k, v
        assert log_snr_BF is not None and delta_h is not None
        delta_h, like = delta_h.to(log_snr_BF.dtype), (k.shape[1], -1)
        if self.gate == "pair":
            bias = log_gate_at_nodes(effective_log_snr(log_snr_BF, rho), delta_h) * self.head_width**0.5
            return _with_tail(k, bias.unflatten(1, like)[:, :, :, None, None]), v
        log_g = log_gate(log_snr_BF, delta_h).unflatten(1, like)[:, :, :, None, None, :, None]  # [B, U, F, 1, 1, h, 1]
        if self.gate == "values":
            return k, v * log_g.exp().to(v.dtype)
        bias = log_g * self.head_width**0.5
        coarse = bias.to(k.dtype)
        return _with_tail(k, torch.cat((coarse, (bias - coarse).to(k.dtype)), -1)), v

    def _ungated(self, k: Tensor) -> Tensor:
        tail = unrotated(self.gate)
        return k if self.gate == "values" else F.pad(k[..., :-tail], (0, tail))

    def _asking(self, q: Tensor, log_snr_BT: Tensor | None) -> Tensor:
        if self.gate == "values":
            return q
        if self.gate == "logits":
            return F.pad(q[..., :-2], (0, 2), value=1.0)
        assert log_snr_BT is not None
        return _with_tail(q, node_weights(log_snr_BT).unflatten(1, q.shape[1:3])[:, :, :, None, None, None])

    def _mixed(self, outs: list[Tensor], views: Sequence[View], deltas: Sequence[Tensor | None]) -> list[Tensor]:
        """Outputs `[B, T, H, W, h, d]` of the scales, weighed by what each still tells at the frame's own noise."""
        log_g = torch.cat([_own_log_gate(view, delta) for view, delta in zip(views, deltas, strict=True)], -1)
        weights = (self.heads * log_g.softmax(-1)).split([scale.heads for scale in self.scales], -1)
        return [
            out * weight[:, :, None, None, :, None].to(out.dtype) for out, weight in zip(outs, weights, strict=True)
        ]


def _own_log_gate(view: View, delta_h: Tensor | None) -> Tensor:
    assert view.log_snr_own is not None and delta_h is not None
    return log_gate(view.log_snr_own, delta_h.to(view.log_snr_own.dtype))


def _with_tail(x: Tensor, tail: Tensor) -> Tensor:
    """Replace the last channels of every head."""
    width = tail.shape[-1]
    return torch.cat((x[..., :-width], tail.to(x.dtype).expand(*x.shape[:-1], width)), -1)


def normalise(x: Tensor, gain_d: Tensor) -> Tensor:
    """Root mean square 1 over the last dimension, times a gain per channel."""
    return F.rms_norm(x, gain_d.shape, gain_d, 1e-6)


def pool_space(x_BTHW: Tensor, space: int) -> Tensor:
    """Mean over `space × space` tokens of a frame: `[B, T, H, W, ...] -> [B, T, H/space, W/space, ...]`."""
    if space == 1:
        return x_BTHW
    return x_BTHW.unflatten(3, (-1, space)).unflatten(2, (-1, space)).mean((3, 5))


def repeat_space(x_BTHWhd: Tensor, space: int) -> Tensor:
    """Repeat every token over the `space × space` it was pooled from."""
    if space == 1:
        return x_BTHWhd
    B, T, H, W, h, d = x_BTHWhd.shape
    out = x_BTHWhd[:, :, :, None, :, None].expand(B, T, H, space, W, space, h, d)
    return out.reshape(B, T, H * space, W * space, h, d)


def attend_windows(
    q_BUFHWhd: Tensor,
    k_BRFHWhd: Tensor,
    v_BRFHWhd: Tensor,
    blocks: Blocks,
    window: int | None,
    shifted: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Attention inside local spatial windows (None: the whole frame); returns `[B, U, F, H, W, h, d]`."""
    B, U, frames, H, W, h, d = q_BUFHWhd.shape
    rows, columns = spatial_windows(H, window, shifted), spatial_windows(W, window, shifted)

    def cut(x: Tensor, row: tuple[int, int, int], column: tuple[int, int, int]) -> Tensor:
        """One region of equal windows: `[B, R, F, H, W, h, d] -> [B·windows, R, n, h, d]`."""
        (y, ny, sy), (x0, nx, sx) = row, column
        x = x[:, :, :, y : y + ny * sy, x0 : x0 + nx * sx]
        x = x.unflatten(4, (nx, sx)).unflatten(3, (ny, sy))  # B R F ny sy nx sx h d
        return x.permute(0, 3, 5, 1, 2, 4, 6, 7, 8).flatten(0, 2).flatten(2, 4)

    bands = []
    for row in rows:
        band = []
        for column in columns:
            q, k, v = (cut(x, row, column) for x in (q_BUFHWhd, k_BRFHWhd, v_BRFHWhd))
            out = attend(q, k, v, blocks, backend)
            (_, ny, sy), (_, nx, sx) = row, column
            out = out.reshape(B, ny, nx, U, frames, sy, sx, h, d).permute(0, 3, 4, 1, 5, 2, 6, 7, 8)
            band.append(out.reshape(B, U, frames, ny * sy, nx * sx, h, d))
        bands.append(band[0] if len(band) == 1 else torch.cat(band, 4))
    return bands[0] if len(bands) == 1 else torch.cat(bands, 3)
