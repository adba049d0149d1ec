"""Video unit by unit: denoise one unit against caches of the past, then let it join the past.

Per layer and scale the cache holds what `Scale` says later queries can need: a constant number of units for
windowed scales, pooled groups for far-seeing ones (`cost.cache_bytes` counts them). One forward pass per denoising
step touches only the new unit. The finished unit re-enters the past clean (t = 0) or at a chosen noise level.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from ..model.past_context import Key, Placement
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
    def joined_by(self, units: int) -> Iterator[None]:
        """What asks inside the block leaves its units here. Where that fails, the cache is as it was before."""
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
    """The last `kept` items (None: all), in memory of their own: a view would keep alive all that it is cut from."""
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
    """Let frames (whole units) join the cache's past; they hold noise of this level."""
    with cache.joined_by(x_BTCHW.shape[1] // model.config.frames_per_unit):
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
    `cost.cache_bytes`, whatever was yielded before.

    context_level: noise level at which the past is looked at: a little hides what generation got wrong from the units
        that follow.
    solver: from t = 1 to 0, "euler" or "heun" (second order; 2 · steps - 1 passes, as the last step is Euler's: the
        network learns nothing at t = 0; Karras et al. 2022, algorithm 1).
    guidance: scale w of classifier-free guidance (Ho and Salimans 2022), `v = v(none) + w (v(condition) - v(none))`,
        for text and labels together. Other than 1 it doubles batch and cache: each condition has a past of its own.
    rows: number of every row, by default 0, 1, ...; its noise depends on (seed, its number, frame) alone.
    cache: continue where this one stands, if another call of as many rows, and guided alike, has filled it. It holds
        everything up to the last unit that was asked for once the iterator has ended.
    Raises ValueError at once where the arguments do not fit each other or the model.
    """
    batch, frames = context_BTCHW.shape[:2]
    rows = range(batch) if rows is None else rows
    if frames % model.config.frames_per_unit:
        raise ValueError(
            f"the context of {frames} latent frames does not divide into units of {model.config.frames_per_unit}"
        )
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} rows are numbered, the context has {batch}")
    check_sampling(steps, seed, context_level, solver, guidance)
    if guidance != 1 and text is None and labels is None:
        raise ValueError(f"guidance is {guidance:g}, but there is neither text nor a label to guide by")
    cache = Cache() if cache is None else cache
    levels = sampling_levels(steps, shift)
    return _roll_out(
        model, context_BTCHW, units, levels, seed, text, labels, context_level, solver, guidance, rows, cache
    )


def check_sampling(steps: int, seed: int, context_level: float, solver: str, guidance: float) -> None:
    """ValueError for what no model can be asked for."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must be a whole number from 0 on, of 64 bits")
    if not 0 <= context_level < 1:
        raise ValueError(f"context_level is {context_level}; it must lie in [0, 1)")
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; there are {', '.join(get_args(Solver))}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance is {guidance}; it must be a number from 0 on (1: none)")


@torch.no_grad()
def _roll_out(
    model: MSCTransformer,
    context_BTCHW: Tensor,
    units: int,
    levels: Sequence[float],
    seed: int,
    text: Tensor | None,
    labels: Tensor | None,
    context_level: float,
    solver: Solver,
    guidance: float,
    rows: Sequence[int],
    cache: Cache,
) -> Iterator[Tensor]:
    per_unit, shape = model.config.frames_per_unit, context_BTCHW.shape[2:]
    copies = 1
    if guidance != 1:  # the second half of the batch goes without a condition, through all of its past
        copies = 2
        text = None if text is None else torch.cat((text, torch.zeros_like(text)))
        labels = None if labels is None else torch.cat((labels, torch.full_like(labels, model.config.classes)))

    def noise(purpose: int) -> Tensor:
        own = range(cache.first * per_unit, (cache.first + 1) * per_unit)
        return torch.stack([frame_noise(seed, row, purpose, own, shape) for row in rows]).to(context_BTCHW)

    def velocity(x: Tensor, level: float) -> Tensor:
        both = torch.cat([x] * copies)
        v = model(both, both.new_full(both.shape[:2], level), text, labels, cache)
        if copies == 1:
            return v
        conditional, without = v.chunk(2)
        return without + guidance * (conditional - without)

    def join(x: Tensor) -> None:
        seen = (1 - context_level) * x + context_level * noise(_CONTEXT) if context_level else x
        extend_cache(model, cache, torch.cat([seen] * copies), text, labels, context_level)

    # unit by unit, in bounded memory, and so that the past is the same to the bit however much of it was given
    for unit in context_BTCHW.split(per_unit, 1) if context_BTCHW.shape[1] else ():
        join(unit)
    for _ in range(units):
        x = noise(_START)
        for level, lower in pairwise(levels):
            v = velocity(x, level)
            if solver == "heun" and lower > 0:
                v = (v + velocity(x + (lower - level) * v, lower)) / 2
            x = x + (lower - level) * v
        yield x
        join(x)


def limit_context(model: MSCTransformer, reach: int) -> MSCTransformer:
    """The same weights in a model that sees no group that begins more than `reach` units back.

    Far-seeing scales then need no more memory than that, however long the video, and meet no distance that training
    did not if `reach` is below a training clip's units. Shares all parameters with `model`.
    """
    if reach < 1:
        raise ValueError(f"reach is {reach} units; it must be at least 1")
    scales = [
        replace(s, window=min(reach // s.time, reach if s.window is None else s.window)) for s in model.config.scales
    ]
    near = copy.copy(model)
    near.config = replace(model.config, scales=tuple(scales))
    return near
