"""Autoregressive sampler: denoise a video unit by unit against a cache of keys and values of the past.

Per layer and scale the cache holds what later queries can need: a constant number of units for windowed scales, pooled
groups for unlimited ones (`cost.cache_bytes` is its size). One forward pass per denoising step computes only the new
unit. The finished unit enters the cache clean (t = 0) or at a chosen noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from ..model.past_context import Key, Placement
from ..model.scales import Scale
from ..model.transformer import MSCTransformer
from ..requests import Solver
from .rectified_flow import frame_noise, sampling_levels

LEVELS: Key = ("noise levels",)  # of all layers and scales
_START, _CONTEXT = 0, 1  # what a frame's noise is for


class Cache:
    """A `PastContext` whose past is remembered: the units generated so far."""

    grows = True

    def __init__(self) -> None:
        self.first = 0
        self.writing = False
        self._kept: dict[Key, Tensor] = {}

    def exchange(
        self, key: Key, x_BU: Tensor, before: Callable[[int], int], kept: int | None, every: int = 1
    ) -> Callable[[], Tensor | None]:
        stored, need = self._kept.get(key), before(self.first)
        assert need == 0 or (stored is not None and stored.shape[1] >= need), f"the cache lacks part of {key}"
        if self.writing and x_BU.shape[1]:
            self._kept[key] = _newest(stored, x_BU, kept)
        earlier = None if stored is None or need == 0 else stored[:, stored.shape[1] - need :]
        return lambda: earlier

    def noise_levels(self, t_BUF: Tensor, kept: int | None) -> tuple[Tensor, int]:
        stored = self._kept.get(LEVELS)
        if self.writing:
            self._kept[LEVELS] = _newest(stored, t_BUF, kept)
        known = t_BUF if stored is None else torch.cat((stored, t_BUF), 1)
        return known, self.first + t_BUF.shape[1] - known.shape[1]

    def placement(self, scale: int) -> Placement | None:
        return None

    @contextmanager
    def writing_units(self, units: int) -> Iterator[None]:
        """Forward passes inside the block append their units to the cache; after an error it is as it was before."""
        before, self.writing = dict(self._kept), True
        try:
            yield
            self.first += units
        except BaseException:
            self._kept = before
            raise
        finally:
            self.writing = False

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _newest(stored: Tensor | None, x_BU: Tensor, kept: int | None) -> Tensor:
    """The last `kept` items (None: all), copied: a view would keep the whole tensor that it is cut from alive."""
    own = x_BU if kept is None else x_BU[:, max(0, x_BU.shape[1] - kept) :]
    if stored is None:
        return own.clone(memory_format=torch.contiguous_format)
    earlier = stored if kept is None else stored[:, max(0, stored.shape[1] + own.shape[1] - kept) :]
    return torch.cat((earlier, own), 1)


@torch.no_grad()
def extend_cache(
    model: MSCTransformer,
    cache: Cache,
    x_BTCHW: Tensor,
    text: Tensor | None = None,
    labels: Tensor | None = None,
    level: float = 0.0,
) -> None:
    """Append frames (whole units) that hold noise of this level to the cache."""
    with cache.writing_units(x_BTCHW.shape[1] // model.config.frames_per_unit):
        model(x_BTCHW, x_BTCHW.new_full(x_BTCHW.shape[:2], level), text, labels, cache)


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
    *,
    solver: Solver = "euler",
    guidance: float = 1.0,
    rows: Sequence[int] | None = None,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yield `units` new units `[B, F, C, H, W]` that continue normalised latents, one after another.

    The context may hold no frames (T = 0). A single step gives the mean of all continuations. Memory is that of
    `cost.cache_bytes`, however many units were yielded before.

    context_level: noise level of the past in the cache: a little of it hides errors of generation from later units.
    solver: from t = 1 to 0, "euler" or "heun" (second order; 2 · steps - 1 passes, as the last step is Euler's: the
        network learns nothing at t = 0; Karras et al. 2022, algorithm 1).
    guidance: scale w of classifier-free guidance (Ho and Salimans 2022), `v = v(none) + w (v(condition) - v(none))`,
        for text and labels together. Other than 1 it doubles batch and cache: each condition has a past of its own.
    rows: number of every row, by default 0, 1, ...; its noise depends on (seed, its number, frame) alone.
    cache: continue from this one, which another call with the same rows and conditions has filled. Once the iterator
        has ended it holds everything up to the last unit.
    Raises ValueError at once where the arguments do not fit each other or the model.
    """
    batch, frames = context_BTCHW.shape[:2]
    per_unit, shape = model.config.frames_per_unit, context_BTCHW.shape[2:]
    rows = range(batch) if rows is None else rows
    if frames % per_unit:
        raise ValueError(f"the context of {frames} latent frames does not divide into units of {per_unit}")
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} rows are numbered, the context has {batch}")
    check_sampling(steps, seed, context_level, solver, guidance)
    if guidance != 1 and text is None and labels is None:
        raise ValueError(f"guidance is {guidance:g}, but there is neither text nor a label to guide by")
    cache = Cache() if cache is None else cache
    levels = sampling_levels(steps, shift)
    copies = 1 if guidance == 1 else 2
    if copies == 2:  # the second half of the batch has no condition, through all of its past
        text = None if text is None else torch.cat((text, torch.zeros_like(text)))
        labels = None if labels is None else torch.cat((labels, torch.full_like(labels, model.config.classes)))

    def noise(purpose: int) -> Tensor:
        own = range(cache.first * per_unit, (cache.first + 1) * per_unit)
        return torch.stack([frame_noise(seed, row, purpose, own, shape) for row in rows]).to(context_BTCHW)

    def velocity(x: Tensor, level: float) -> Tensor:
        x = torch.cat([x] * copies)
        v = model(x, x.new_full(x.shape[:2], level), text, labels, cache)
        if copies == 1:
            return v
        conditional, unconditional = v.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def append(x: Tensor) -> None:
        x = (1 - context_level) * x + context_level * noise(_CONTEXT) if context_level else x
        extend_cache(model, cache, torch.cat([x] * copies), text, labels, context_level)

    @torch.no_grad()
    def roll_out() -> Iterator[Tensor]:
        # unit by unit, in bounded memory, and so that the cache is the same to the bit however long the context
        for unit in context_BTCHW.split(per_unit, 1) if frames else ():
            append(unit)
        for _ in range(units):
            x = noise(_START)
            for level, lower in pairwise(levels):
                v = velocity(x, level)
                if solver == "heun" and lower > 0:
                    v = (v + velocity(x + (lower - level) * v, lower)) / 2
                x = x + (lower - level) * v
            yield x
            append(x)

    return roll_out()


def check_sampling(steps: int, seed: int, context_level: float, solver: str, guidance: float) -> None:
    """ValueError for settings that are invalid for every model."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must be an integer from 0 to 2^64 - 1")
    if not 0 <= context_level < 1:
        raise ValueError(f"context_level is {context_level}; it must lie in [0, 1)")
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; choose one of {', '.join(get_args(Solver))}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance is {guidance}; it must be a finite number, at least 0 (1: no guidance)")


def limit_context(model: MSCTransformer, units: int) -> MSCTransformer:
    """The same weights in a model whose queries see no group that begins more than `units` units back.

    Unlimited scales then need no more memory than that, however long the video, and meet no distance that training did
    not if `units` is below a training clip's. Shares all parameters with `model`.
    """
    if units < 1:
        raise ValueError(f"the limit of the context (--reach) is {units} units; it must be at least 1")
    scales = [
        replace(s, window=min(units // s.time, units if s.window is None else s.window)) for s in model.config.scales
    ]
    return with_scales(model, scales)


def with_scales(model: MSCTransformer, scales: Sequence[Scale]) -> MSCTransformer:
    """A model of other scales that shares all parameters with `model`, in evaluation mode."""
    with torch.device("meta"):
        other = MSCTransformer(replace(model.config, scales=tuple(scales)), model.attention_inputs.kernel)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()
