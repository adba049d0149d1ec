"""Building blocks of the transformer besides its self-attention. All act on own frames only.

Noise enters as adaLN-single (Chen et al. 2023, PixArt-α): one projection of the noise embedding serves
all layers, each of which adds a small table of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.compile_helpers import allow_many_shapes
from ..kernels.rectangle import scaled_dot_product
from .attention import MultiScaleAttention, project
from .attention_inputs import ScaleInputs
from .config import LayerConfig, ModelConfig
from .past_context import Layer
from .recomputation import Recompute, recompute_cheap


class NoiseEmbedding(nn.Module):
    """Sinusoidal features of the noise level and two linear layers: `t [B, T] -> [B, T, D]`."""

    FREQUENCIES = 128

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(2 * self.FREQUENCIES, width)
        self.outer = nn.Linear(width, width)

    def forward(self, t_BT: Tensor) -> Tensor:
        # the noise level lies in [0, 1]; the usual table of frequencies is made for 1,000 steps
        speeds = torch.exp(
            -math.log(10_000) * torch.arange(self.FREQUENCIES, device=t_BT.device, dtype=t_BT.dtype) / self.FREQUENCIES
        )
        angles = 1000 * t_BT.unsqueeze(-1) * speeds
        features = torch.cat((angles.cos(), angles.sin()), -1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(features)))


class ModulationTable(nn.Module):
    """Shift and scale that are a frame's embedding plus a row each: `[..., D] -> [..., 2 D]`."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, width))

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding.unsqueeze(-2) + self.weight).flatten(-2)


class FeedForward(nn.Module):
    """Two linear layers, `[..., width] -> [..., out]` (None: width)."""

    def __init__(self, width: int, hidden: int, out: int | None = None):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        # In two dimensions, in which DeepSpeed at ZeRO-3 does not add the bias in place to what recomputation keeps.
        rows = x.flatten(0, -2)
        return self.down(F.gelu(self.up(rows), approximate="tanh")).unflatten(0, x.shape[:-1])


class ImageEmbedding(nn.Module):
    """Embedding of an image's tokens, `[B, L, E] -> [B, L, D]`: two linear layers between norms (Wan 2.1)."""

    def __init__(self, image_width: int, width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(image_width)
        self.up = nn.Linear(image_width, image_width)
        self.down = nn.Linear(image_width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, image_BLE: Tensor) -> Tensor:
        return self.norm_out(self.down(F.gelu(self.up(self.norm_in(image_BLE)))))


class Text(NamedTuple):
    """What video tokens attend to: embedded text `[B, L, D]`; `seen` `[B, L]`, False for padding, which then has no
    part in the result, and True at least once a row (None: there is no padding); an embedded image, if the model knows
    any."""

    text_BLD: Tensor
    seen_BL: Tensor | None
    image_BLD: Tensor | None


class CrossAttention(nn.Module):
    """Attention of video tokens to text, and, of its own, to an image."""

    def __init__(self, width: int, heads: int, layers: LayerConfig):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6) if layers.cross_norm else nn.Identity()
        self.q = nn.Linear(width, width, bias=layers.bias)
        self.kv = nn.Linear(width, 2 * width, bias=layers.bias)
        self.out = nn.Linear(width, width, bias=layers.bias)
        self.normalised = width // heads if layers.qk_norm == "head" else width  # channels that are normalised together
        self.q_norm = nn.RMSNorm(self.normalised, eps=layers.qk_eps)
        self.k_norm = nn.RMSNorm(self.normalised, eps=layers.qk_eps)
        self.image_kv = self.image_k_norm = None
        if layers.image_width:
            self.image_kv = nn.Linear(width, 2 * width, bias=layers.bias)
            self.image_k_norm = nn.RMSNorm(self.normalised, eps=layers.qk_eps)

    def forward(self, x_BTHWD: Tensor, text: Text) -> Tensor:
        q = self._normalise(self.q_norm, project(self.q, self.norm(x_BTHWD)).flatten(1, 3))
        out = self._attend(q, self.kv, self.k_norm, text.text_BLD, text.seen_BL)
        if self.image_kv is not None:
            assert self.image_k_norm is not None and text.image_BLD is not None
            out = out + self._attend(q, self.image_kv, self.image_k_norm, text.image_BLD)
        return project(self.out, out.transpose(1, 2).flatten(-2)).reshape(x_BTHWD.shape)

    def _attend(
        self, q_BhNd: Tensor, kv: nn.Module, norm: nn.Module, text_BLD: Tensor, seen_BL: Tensor | None = None
    ) -> Tensor:
        k, v = project(kv, text_BLD).chunk(2, -1)
        k, v = self._normalise(norm, k), v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return scaled_dot_product(q_BhNd, k, v, None if seen_BL is None else seen_BL[:, None, None])

    def _normalise(self, norm: nn.Module, x_BND: Tensor) -> Tensor:
        """Queries or keys by head, `[B, h, N, d]`."""
        x_BND = norm(x_BND.unflatten(-1, (-1, self.normalised))).flatten(-2)
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward; modulated per frame by its noise level."""

    def __init__(self, config: ModelConfig, shifted: bool, recompute: Recompute = "none"):
        """recompute: recomputation.py; "full" is for the caller to do."""
        super().__init__()
        width = config.width
        self.recompute = recompute
        norm = nn.LayerNorm if config.layers.norm == "layer" else nn.RMSNorm
        self.attention_norm = norm(width, elementwise_affine=False, eps=1e-6)
        self.attention = MultiScaleAttention(config, shifted)
        self.cross_attention = CrossAttention(width, config.heads, config.layers) if config.text_width else None
        self.feed_forward_norm = norm(width, elementwise_affine=False, eps=1e-6)
        self.feed_forward = FeedForward(width, config.hidden)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        x_BTHWD: Tensor,
        modulation_BT6D: Tensor,
        text: Text | None,
        inputs: Sequence[ScaleInputs],
        layer: Layer,
    ) -> Tensor:
        if self.recompute == "cheap" and torch.is_grad_enabled():  # here, so that a compiled block has it inside
            return recompute_cheap(self._forward, x_BTHWD, modulation_BT6D, text, inputs, layer)
        return self._forward(x_BTHWD, modulation_BT6D, text, inputs, layer)

    def _forward(
        self,
        x_BTHWD: Tensor,
        modulation_BT6D: Tensor,
        text: Text | None,
        inputs: Sequence[ScaleInputs],
        layer: Layer,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            part[:, :, None, None] for part in (modulation_BT6D + self.modulation).unbind(2)
        )
        h = self.attention_norm(x_BTHWD) * (1 + scale_a) + shift_a
        x = x_BTHWD + gate_a * self.attention(h, inputs, layer)
        if self.cross_attention is not None:
            assert text is not None
            x = x + self.cross_attention(x, text)
        h = self.feed_forward_norm(x) * (1 + scale_f) + shift_f
        return x + gate_f * self.feed_forward(h)

    def compile(self, **options: Any) -> None:
        """Compile as one graph for each shape that is met (torch.compile).

        Each for itself: after a second shape torch would otherwise compile for all shapes at once, and attention
        of any shape took two and a half times as long (H200, torch 2.11).
        """
        allow_many_shapes()
        super().compile(dynamic=False, **options)
