"""Multi-scale causal self-attention: one fused projection, several resolutions, one output projection.

The heads are divided among the scales (scales.py). A group's queries, keys and values are average-pooled
to its resolution after the projection, attend there to their own unit and to the visible past, and are
repeated back to full resolution. With the single scale `(all heads, 1, 1, None)` this is dense causal
attention. What of the past lies elsewhere (another rank, a generation cache) comes through the views' timeline
(past_context.py); this module knows neither ranks nor caches. Shape suffixes: B batch, T frames, U units, F frames of a
unit, H W token grid, n tokens of a unit, R key blocks, h heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.blocks import Blocks
from ..kernels.dispatch import Attend, Backend, attend
from .attention_inputs import View
from .noise_gate import NODES, ON_KEYS, GatePlace, effective_log_snr, log_gate, log_gate_at_nodes, node_weights
from .past_context import Layer
from .rope import Rope, normalise_and_rotate, still_channels
from .scales import Scale, spatial_windows

FIRST = Layer(0)


def still(gate: GatePlace) -> int:
    """Channels of a head that carry no position, half of them at the end of each half; there the gate rides."""
    return len(NODES) if gate == "pair" else 2


@dataclass(frozen=True)
class Part:
    """One scale of one call, between asking for its past and attending to it. `[B, U, F, H, W, h, d]`."""

    key: tuple[Layer, int]  # and scale
    view: View
    delta_h: Tensor | None
    q: Tensor
    kv: Tensor  # raw, as it travels: [B, U, F, H, W, 2, h, d]
    k_past: Tensor  # as later units see the own ones: gated
    v_past: Tensor
    k_own: Tensor  # as a unit sees itself
    v_own: Tensor
    past: Callable[[], Tensor | None]


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

    def forward(self, x_BTHWD: Tensor, views: Sequence[View], layer: Layer = FIRST) -> Tensor:
        qkv = self.qkv(x_BTHWD).unflatten(-1, (3, self.heads, self.head_width))
        frames = x_BTHWD.shape[1]
        sizes = [scale.heads for scale in self.scales]
        deltas = [None] * len(sizes) if self.delta is None else self.delta.split(sizes)
        groups = zip(qkv.split(sizes, dim=-2), views, deltas, strict=True)
        # The past of all scales is on its way while own queries and keys are placed; only then is it waited for.
        parts = [self._ask((layer, i), *group) for i, group in enumerate(groups)]
        pasts = [self._receive(part) for part in parts]
        outs = []
        for part, past in zip(parts, pasts, strict=True):
            out = self._attend(part, *past)
            if part.view.placement is not None:
                out = part.view.placement.leave(out)
            outs.append(repeat_space(out.reshape(out.shape[0], frames, *out.shape[3:]), part.view.scale.space))
        if self.gate == "mix":
            outs = self._mixed(outs, views, deltas)
        return self.out(torch.cat(outs, dim=-2).flatten(-2))

    def _ask(self, key: tuple[Layer, int], qkv_BTHW3hd: Tensor, view: View, delta_h: Tensor | None) -> Part:
        """Queries and keys of the own units; asks for the earlier ones."""
        scale = view.scale
        x = pool_space(qkv_BTHW3hd, scale.space).unflatten(1, (-1, view.frames_per_unit))
        if view.placement is not None:
            x = view.placement.enter(x)
            delta_h = None if delta_h is None else delta_h[view.placement.heads]
        q, kv = x.split((1, 2), -3)  # on the way back a split costs one pass, slices cost several
        past = view.timeline.ask(("past", *key), kv, scale.fresh_before, scale.fresh_kept)
        q = place(q.squeeze(-3), self.q_gain, view.rope_own, self._asking(q, view.log_snr_query))
        k, v = self._gated(kv, view.rope_own, view.log_snr_own, view.constants.rho, delta_h)
        return Part(key, view, delta_h, q, kv, k, v, self._ungated(k), kv.unbind(-3)[1], past)

    def _receive(self, part: Part) -> tuple[list[Tensor], list[Tensor], Callable | None]:
        """Keys and values of the units before the run and of the groups pooled in time; asks for earlier groups."""
        view, scale = part.view, part.view.scale
        past = part.past()
        k, v = [], []
        if past is not None:
            k_past, v_past = self._gated(past, view.rope_past, view.log_snr_past, view.constants.rho, part.delta_h)
            k, v = [k_past], [v_past]
        if scale.time == 1:
            return k, v, None
        fresh = part.kv if past is None else torch.cat((past, part.kv), 1)
        pooled = self._pool_time(fresh, view, part.delta_h)
        key, before = ("pooled past", *part.key), scale.pooled_before
        groups = view.timeline.ask(key, pooled, before, scale.window, every=scale.time)
        k_pooled, v_pooled = pooled.unbind(-3)
        return [k_pooled, *k], [v_pooled, *v], groups

    def _attend(self, part: Part, k: list[Tensor], v: list[Tensor], groups: Callable | None) -> Tensor:
        """Output of the own units.

        Key blocks lie as Scale.key_blocks orders them: [pooled groups | unpooled units | own units, ungated].
        """
        view = part.view
        if groups is not None and (earlier := groups()) is not None:
            k_pooled, v_pooled = earlier.unbind(-3)
            k, v = [k_pooled, *k], [v_pooled, *v]
        k, v = [*k, part.k_past], [*v, part.v_past]
        if self.gate in ON_KEYS:
            k, v = [*k, part.k_own], [*v, part.v_own]
        elsewhere = None if view.placement is None else view.placement.attend
        kernel = elsewhere or partial(attend, backend=self.backend, masks=view.masks)
        k_row, v_row = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (k, v))
        return attend_windows(part.q, k_row, v_row, view.blocks, view.scale.patch_window, self.shifted, kernel)

    def _pool_time(self, fresh: Tensor, view: View, delta_h: Tensor | None) -> Tensor:
        """Keys and values of the groups that own units complete: `[B, groups, F, H, W, 2, h, d]`."""
        if view.rope_groups is None:
            return fresh[:, :0]
        time, frames = view.scale.time, fresh.shape[2]
        finished = view.rope_groups.frames // frames
        members = _cut(fresh, 0, finished * time).flatten(1, 2)
        kv = members.unflatten(1, (-1, time)).mean(2).unflatten(1, (-1, frames))
        kv = self._gated(kv, view.rope_groups, view.log_snr_groups, view.constants.rho_pooled, delta_h)
        return torch.stack(kv, -3)

    # The gate of the logits rides in the channels of a head that carry no position; no kernel needs to know of it,
    # and no head grows wider. "logits": the query holds 1 in two channels, a key √d·log g split into
    # a coarse and a fine half so that bf16 keeps it to 2^-16. "pair": one channel per node.

    def _gated(
        self, kv: Tensor, rope: Rope, log_snr_BF: Tensor | None, rho: float, delta_h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Past keys, placed, and values `[B, U, F, H, W, h, d]` with the gate on them; from raw ones."""
        k, v = kv.unbind(-3)
        tail = None
        if self.gate in ON_KEYS:
            assert log_snr_BF is not None and delta_h is not None
            delta_h = delta_h.to(log_snr_BF.dtype)
            if self.gate == "pair":
                tail = log_gate_at_nodes(effective_log_snr(log_snr_BF, rho), delta_h) * self.head_width**0.5
            else:
                log_g = log_gate(log_snr_BF, delta_h).unsqueeze(-1)
                if self.gate == "values":
                    v = v * log_g.exp().to(v.dtype).unflatten(1, k.shape[1:3])[:, :, :, None, None]
                else:
                    bias = log_g * self.head_width**0.5
                    coarse = bias.to(k.dtype)
                    tail = torch.cat((coarse, bias - coarse), -1)
        return place(k, self.k_gain, rope, tail), v

    def _ungated(self, k: Tensor) -> Tensor:
        if self.gate not in ("logits", "pair"):
            return k
        kept = k.new_ones(self.head_width)
        still_channels(kept, still(self.gate)).zero_()
        return k * kept

    def _asking(self, q: Tensor, log_snr_BT: Tensor | None) -> Tensor | None:
        """What queries carry in the still channels: `[B, frames, 1, channels]`."""
        if self.gate == "logits":
            return q.new_ones(1, 1, 1, still(self.gate))
        if self.gate == "pair":
            assert log_snr_BT is not None
            return node_weights(log_snr_BT).unsqueeze(2)
        return None

    def _mixed(self, outs: list[Tensor], views: Sequence[View], deltas: Sequence[Tensor | None]) -> list[Tensor]:
        """Outputs `[B, T, H, W, h, d]` of the scales, weighed by what each still tells at the frame's own noise."""
        log_g = torch.cat([_own_log_gate(view, delta) for view, delta in zip(views, deltas, strict=True)], -1)
        weights = (self.heads * log_g.softmax(-1)).split([scale.heads for scale in self.scales], -1)
        return [
            out * weight[:, :, None, None, :, None].to(out.dtype) for out, weight in zip(outs, weights, strict=True)
        ]


def _own_log_gate(view: View, delta_h: Tensor | None) -> Tensor:
    assert view.log_snr_query is not None and delta_h is not None
    return log_gate(view.log_snr_query, delta_h.to(view.log_snr_query.dtype))


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    """`x[:, start:stop]`; all of it as it is, because on the way back even a whole slice costs a pass."""
    return x if (start, stop) == (0, x.shape[1]) else x[:, start:stop]


def place(x_BUFHWhd: Tensor, gain_d: Tensor, rope: Rope, tail_BThc: Tensor | None = None) -> Tensor:
    """Normalised and rotated to where the units lie; `tail` takes the place of the still channels."""
    tail = None if tail_BThc is None else tail_BThc[:, :, None, None]
    return normalise_and_rotate(x_BUFHWhd.flatten(1, 2), gain_d, rope, tail).unflatten(1, x_BUFHWhd.shape[1:3])


def pool_space(x_BTHW: Tensor, space: int) -> Tensor:
    """Mean over `space × space` tokens of a frame: `[B, T, H, W, ...] -> [B, T, H/space, W/space, ...]`."""
    if space == 1:
        return x_BTHW
    rows = x_BTHW.unflatten(2, (-1, space)).mean(3)  # one axis at a time: on a CPU three times as fast
    return rows.unflatten(3, (-1, space)).mean(4)


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
    kernel: Attend = attend,
) -> Tensor:
    """Attention inside local spatial windows (None: the whole frame); returns `[B, U, F, H, W, h, d]`."""
    B, U, frames, H, W, h, d = q_BUFHWhd.shape
    rows, columns = spatial_windows(H, window, shifted), spatial_windows(W, window, shifted)

    one = len(rows) == len(columns) == 1

    def cut(x: Tensor, row: tuple[int, int, int], column: tuple[int, int, int]) -> Tensor:
        """One region of equal windows: `[B, R, F, H, W, h, d] -> [B·windows, R, n, h, d]`."""
        (y, ny, sy), (x0, nx, sx) = row, column
        x = x[:, :, :, y : y + ny * sy, x0 : x0 + nx * sx]
        x = x.unflatten(4, (nx, sx)).unflatten(3, (ny, sy))  # B R F ny sy nx sx h d
        x = x.permute(0, 3, 5, 1, 2, 4, 6, 7, 8).flatten(0, 2).flatten(2, 4)
        return x if one else x.contiguous()  # a view of a small region would keep all of the keys alive

    bands = []
    for row in rows:
        band = []
        for column in columns:
            q, k, v = (cut(x, row, column) for x in (q_BUFHWhd, k_BRFHWhd, v_BRFHWhd))
            out = kernel(q, k, v, blocks)
            (_, ny, sy), (_, nx, sx) = row, column
            out = out.reshape(B, ny, nx, U, frames, sy, sx, h, d).permute(0, 3, 4, 1, 5, 2, 6, 7, 8)
            band.append(out.reshape(B, U, frames, ny * sy, nx * sx, h, d))
        bands.append(band[0] if len(band) == 1 else torch.cat(band, 4))
    return bands[0] if len(bands) == 1 else torch.cat(bands, 3)
