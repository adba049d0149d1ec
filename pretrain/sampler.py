"""Video unit by unit: denoise one unit against caches of the past, then let it join the past.

Per layer and scale the cache holds what `Scale` says later queries can need: a constant number of units for
windowed scales, pooled groups for far-seeing ones. One forward pass per denoising step touches only the
new unit. The finished unit re-enters the past clean (t = 0) or at a chosen noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .diffusion import frame_noise, sampling_levels
from .model import MSCTransformer
from .timeline import Key, Placement


class Cache:
    """A `Timeline` whose past is remembered: the units generated so far."""

    travels = False

    def __init__(self) -> None:
        self.first = 0
        self.writing = False
        self._kept: dict[Key, Tensor] = {}

    def ask(
        self, key: Key, x_BU: Tensor, before: Callable[[int], int], kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        stored, need = self._kept.get(key), before(self.first)
        assert need == 0 or (stored is not None and stored.shape[1] >= need), f"the cache lacks part of {key}"
        if self.writing:
            whole = x_BU if stored is None else torch.cat((stored, x_BU), 1)
            # a copy, or a slice would keep all of a long context alive
            self._kept[key] = whole if kept is None else whole[:, max(0, whole.shape[1] - kept) :].clone()
        earlier = None if stored is None or need == 0 else stored[:, stored.shape[1] - need :]
        return lambda: earlier

    def placement(self, scale: int) -> Placement | None:
        return None

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


@torch.no_grad()
def remember(
    model: MSCTransformer,
    cache: Cache,
    x_BTCHW: Tensor,
    text: Tensor | None = None,
    labels: Tensor | None = None,
    level: float = 0.0,
) -> None:
    """Let frames (whole units) join the cache's past; they hold noise of this level."""
    cache.writing = True
    model(x_BTCHW, x_BTCHW.new_full(x_BTCHW.shape[:2], level), text, labels, cache)
    cache.writing = False
    cache.first += x_BTCHW.shape[1] // model.config.frames_per_unit


@torch.no_grad()
def generate(
    model: MSCTransformer,
    context_BTCHW: Tensor,
    units: int,
    steps: int = 16,
    seed: int = 0,
    shift: float = 1.0,
    text: Tensor | None = None,
    labels: Tensor | None = None,
    context_level: float = 0.0,
) -> Iterator[Tensor]:
    """Yield `units` new units `[B, F, C, H, W]` that continue normalised latents, one after another.

    The context may hold no frames (T = 0). Euler steps from t = 1 to 0; a single step gives the mean of all
    continuations. Row b's noise depends on (seed, b, frame) alone. `context_level` is the noise level at which
    the past is looked at: a little hides what generation got wrong from the units that follow.
    """
    if not 0 <= context_level < 1:
        raise ValueError(f"context_level is {context_level}; it must lie in [0, 1)")
    per_unit = model.config.frames_per_unit
    batch, frames, *shape = context_BTCHW.shape
    if frames % per_unit:
        raise ValueError(f"the context of {frames} latent frames does not divide into units of {per_unit}")
    cache, levels = Cache(), sampling_levels(steps, shift)

    def join(x: Tensor) -> None:
        seen = x
        if context_level:
            own = range(cache.first * per_unit, cache.first * per_unit + x.shape[1])
            noise = torch.stack([frame_noise(seed, row, 1, own, shape) for row in range(batch)]).to(x)
            seen = (1 - context_level) * x + context_level * noise
        remember(model, cache, seen, text, labels, context_level)

    if frames:
        join(context_BTCHW)
    for _ in range(units):
        own = range(cache.first * per_unit, (cache.first + 1) * per_unit)
        x = torch.stack([frame_noise(seed, row, 0, own, shape) for row in range(batch)]).to(context_BTCHW)
        for level, next_level in zip(levels, levels[1:], strict=False):
            t = x.new_full(x.shape[:2], level)
            x = x + (next_level - level) * model(x, t, text, labels, cache)
        yield x
        join(x)
