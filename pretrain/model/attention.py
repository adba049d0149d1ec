"""Multi-scale causal self-attention: one fused projection, several resolutions, one output projection.

The heads are divided among the scales (scales.py). A group's queries, keys and values are average-pooled
to its resolution after the projection, attend there to their own unit and to the visible past, and are
repeated back to full resolution. With the single scale `(all heads, 1, 1, None)` this is dense causal
attention. What of the past lies elsewhere (another rank, a generation cache) comes through the past context
(past_context.py); this module knows neither ranks nor caches. Shape suffixes: B batch, T frames, U units, F frames of a
unit, H W token grid, n tokens of a unit, R key blocks, h heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import routed
from ..kernels.dispatch import Attend, KeyBlocks, attend
from ..kernels.routed import Routes
from .attention_inputs import ScaleInputs
from .config import ModelConfig
from .noise_gate import log_gate
from .past_context import Layer
from .rope import UNROTATED, Rope, normalise_and_rotate, rotate, unrotated_channels
from .scales import Scale, spatial_windows

FIRST = Layer(0)


@dataclass(frozen=True)
class OwnUnits:
    """One scale's queries, keys and values of the own units `[B, U, F, H, W, h, d]`, and its past on the way."""

    key: tuple[Layer, int]  # layer and scale
    inputs: ScaleInputs
    delta_h: Tensor | None
    q: Tensor
    kv: Tensor  # raw, as it travels: [B, U, F, H, W, 2, h, d]
    k_past: Tensor  # as later units see the own ones: gated
    k_own: Tensor  # as a unit sees itself
    v_past: Tensor
    v_own: Tensor
    past: Callable[[], Tensor | None]


class MultiScaleAttention(nn.Module):
    """Self-attention over frames `[B, T, H, W, D]` on several scales, causal between units.

    `shifted` moves local spatial windows by half.
    """

    def __init__(self, config: ModelConfig, shifted: bool = False):
        super().__init__()
        self.config = config
        self.shifted = shifted
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.layers.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.layers.bias)
        # Parameters of this module, not submodules: ZeRO-3 gathers per module call, in step on all ranks, and
        # how often keys are normalised depends on which groups a rank completes.
        normalised = config.head_width if config.layers.qk_norm == "head" else config.width
        self.q_gain = nn.Parameter(torch.ones(normalised))
        self.k_gain = nn.Parameter(torch.ones(normalised))
        # The gate's δ of every head, padded: see check_alignment in parallelize.py.
        self.delta = nn.Parameter(torch.zeros(-(-config.heads // 8) * 8)) if config.gate == "logits" else None

    def forward(self, x_BTHWD: Tensor, inputs: Sequence[ScaleInputs], layer: Layer = FIRST) -> Tensor:
        qkv = project(self.qkv, x_BTHWD)
        if self.config.layers.qk_norm == "width":
            qkv = self._normalise_all_heads(qkv)
        qkv = qkv.unflatten(-1, (3, self.config.heads, self.config.head_width))
        frames = x_BTHWD.shape[1]
        sizes = [scale.heads for scale in self.config.scales]
        deltas = [None] * len(sizes) if self.delta is None else self.delta[: self.config.heads].split(sizes)
        groups = zip(qkv.split(sizes, dim=-2), inputs, deltas, strict=True)
        # The past of all scales is on its way while own queries and keys are placed; only then is it waited for.
        own_units = [self._own_units((layer, i), *group) for i, group in enumerate(groups)]
        pasts = [self._receive_past(own) for own in own_units]
        outs = []
        for own, past in zip(own_units, pasts, strict=True):
            out = self._attend(own, *past)
            if own.inputs.placement is not None:
                out = own.inputs.placement.leave(out)
            outs.append(repeat_space(out.reshape(out.shape[0], frames, *out.shape[3:]), own.inputs.scale.space))
        return project(self.out, torch.cat(outs, dim=-2).flatten(-2))

    def _normalise_all_heads(self, qkv: Tensor) -> Tensor:
        """With queries and keys `[..., D]` of root mean square 1 over all heads, times a gain per channel."""
        q, k, v = qkv.chunk(3, -1)
        q, k = (
            F.rms_norm(x, (self.config.width,), gain, self.config.layers.qk_eps)
            for x, gain in ((q, self.q_gain), (k, self.k_gain))
        )
        return torch.cat((q, k, v), -1)

    def _rotate(self, x: Tensor, gain: Tensor, rope: Rope, bias: Tensor | None) -> Tensor:
        """Queries or keys, normalised by head where all heads are not yet, at their positions."""
        if self.config.layers.qk_norm == "width":
            return rotate(x, rope, bias)
        return normalise_and_rotate(x, gain, rope, bias)

    def _own_units(
        self, key: tuple[Layer, int], qkv_BTHW3hd: Tensor, inputs: ScaleInputs, delta_h: Tensor | None
    ) -> OwnUnits:
        """Queries, keys and values of the own units; requests the earlier ones."""
        scale = inputs.scale
        x = pool_space(qkv_BTHW3hd, scale.space).unflatten(1, (-1, inputs.frames_per_unit))
        if inputs.placement is not None:
            x = inputs.placement.enter(x)
            delta_h = None if delta_h is None else delta_h[inputs.placement.heads]
        q, kv = x.split((1, 2), -3)  # on the way back a split costs one pass, slices cost several
        past = inputs.past_context.exchange(("past", *key), kv, scale.fresh_before, scale.fresh_kept)
        # The gate's log g is added to the logits by channels of a head that carry no position; no kernel needs to know
        # of it, and no head grows wider: the query holds 1 there, a key √d · log g (see _place_keys).
        query_bias = None if delta_h is None else q.new_ones(1, 1, 1, UNROTATED)
        q = self._rotate(q.squeeze(-3), self.q_gain, inputs.rope_own, query_bias)
        k, v = self._place_keys(kv, inputs.rope_own, inputs.log_snr_own, delta_h)
        k_own = k
        if delta_h is not None:
            ungated = k.new_ones(self.config.head_width)
            unrotated_channels(ungated).zero_()
            k_own = k * ungated
        return OwnUnits(key, inputs, delta_h, q, kv, k, k_own, v, kv.unbind(-3)[1], past)

    def _receive_past(self, own: OwnUnits) -> tuple[list[Tensor], list[Tensor], Callable[[], Tensor | None] | None]:
        """Keys and values of the units before the run and of the groups pooled in time; requests earlier groups."""
        inputs, scale = own.inputs, own.inputs.scale
        past = own.past()
        k, v = [], []
        if past is not None:
            k_past, v_past = self._place_keys(past, inputs.rope_past, inputs.log_snr_past, own.delta_h)
            k, v = [k_past], [v_past]
        if scale.time == 1:
            return k, v, None
        fresh = own.kv if past is None else torch.cat((past, own.kv), 1)
        pooled = self._pool_time(fresh, inputs, own.delta_h)
        groups = inputs.past_context.exchange(
            ("pooled past", *own.key), pooled, scale.pooled_before, scale.window, every=scale.time
        )
        k_pooled, v_pooled = pooled.unbind(-3)
        return [k_pooled, *k], [v_pooled, *v], groups

    def _attend(
        self, own: OwnUnits, k: list[Tensor], v: list[Tensor], groups: Callable[[], Tensor | None] | None
    ) -> Tensor:
        """Output of the own units.

        Key blocks lie as Scale.key_blocks orders them: [pooled groups | unpooled units | own units, ungated].
        """
        inputs = own.inputs
        if groups is not None and (earlier := groups()) is not None:
            k_pooled, v_pooled = earlier.unbind(-3)
            k, v = [k_pooled, *k], [v_pooled, *v]
        k, v = [*k, own.k_past], [*v, own.v_past]
        if own.delta_h is not None:
            k, v = [*k, own.k_own], [*v, own.v_own]
        k_row, v_row = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in (k, v))
        if inputs.routes is not None:
            return attend_routed(own.q, k_row, v_row, inputs.scale, inputs.routes)
        elsewhere = None if inputs.placement is None else inputs.placement.attend
        kernel = elsewhere or partial(attend, kernel=inputs.kernel, masks=inputs.masks)
        return attend_windows(own.q, k_row, v_row, inputs.key_blocks, inputs.scale.patch_window, self.shifted, kernel)

    def _pool_time(self, fresh: Tensor, inputs: ScaleInputs, delta_h: Tensor | None) -> Tensor:
        """Keys and values of the groups that own units complete: `[B, groups, F, H, W, 2, h, d]`."""
        if inputs.rope_groups is None:
            return fresh[:, :0]
        time, frames = inputs.scale.time, fresh.shape[2]
        units = inputs.rope_groups.frames // frames * time
        # all of them as they are where they can be, because on the way back even a whole slice costs a pass
        members = (fresh if units == fresh.shape[1] else fresh[:, :units]).flatten(1, 2)
        kv = members.unflatten(1, (-1, time)).mean(2).unflatten(1, (-1, frames))
        return torch.stack(self._place_keys(kv, inputs.rope_groups, inputs.log_snr_groups, delta_h), -3)

    def _place_keys(
        self, kv: Tensor, rope: Rope, log_snr_BT: Tensor | None, delta_h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Keys, normalised, rotated and gated, and values `[B, U, F, H, W, h, d]`; from raw ones."""
        k, v = kv.unbind(-3)
        key_bias = None
        if delta_h is not None:
            assert log_snr_BT is not None
            bias = log_gate(log_snr_BT, delta_h).unsqueeze(-1) * self.config.head_width**0.5
            coarse = bias.to(k.dtype)  # a coarse and a fine half, so that bf16 keeps it to 2^-16
            key_bias = torch.cat((coarse, bias - coarse), -1)
        return self._rotate(k, self.k_gain, rope, key_bias), v


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer; one with a bias in two dimensions, in which DeepSpeed at ZeRO-3 does not add it in place to what
    recomputation keeps."""
    if layer.bias is None:
        return layer(x)
    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


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
    blocks: KeyBlocks,
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


def attend_routed(q_BUFHWhd: Tensor, k_BRFHWhd: Tensor, v_BRFHWhd: Tensor, scale: Scale, routes: Routes) -> Tensor:
    """Attention of a routed scale; returns `[B, U, F, H, W, h, d]`."""
    B, U, F, H, W, h, d = q_BUFHWhd.shape
    rows, columns = (side // scale.tile_side(side * scale.space) for side in (H, W))

    def cut(x: Tensor) -> Tensor:
        """`[B, R, F, H, W, h, d] -> [B, R, tiles, n, h, d]`."""
        x = x.unflatten(4, (columns, -1)).unflatten(3, (rows, -1))  # B R F rows y columns x h d
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(4, 6).flatten(2, 3)

    q, k, v = (cut(x) for x in (q_BUFHWhd, k_BRFHWhd, v_BRFHWhd))
    out = routed.attend(q, k, v, routes)
    out = out.reshape(B, U, rows, columns, F, H // rows, W // columns, h, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6, 7, 8).reshape(q_BUFHWhd.shape)
