"""Autoregressive sampler: denoise a video unit by unit against a cache of keys and values of the past.

Per layer and scale the cache holds what later queries can need: a constant number of units for windowed scales, pooled
groups for unlimited ones (`cost.cache_bytes` is its size). One forward pass per denoising step computes only the new
unit. The finished unit enters the cache clean (t = 0) or at a chosen noise level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from ..model.conditioning import Condition, concatenated, padded
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
    model: MSCTransformer, cache: Cache, x_BTCHW: Tensor, condition: Condition | None = None, level: float = 0.0
) -> None:
    """Append frames (whole units) that hold noise of this level to the cache."""
    with cache.writing_units(x_BTCHW.shape[1] // model.config.frames_per_unit):
        model(x_BTCHW, x_BTCHW.new_full(x_BTCHW.shape[:2], level), condition, cache)


@dataclass(frozen=True)
class Sampling:
    """How units are generated.

    steps: denoising steps; a single one gives the mean of all continuations. seed: of the noise.
    shift: of the noise levels (`rectified_flow.sampling_levels`).
    context_level: noise level of the past in the cache: a little of it hides errors of generation from later units.
    solver: from t = 1 to 0, "euler" or "heun" (second order; 2 · steps - 1 passes, as the last step is Euler's: the
        network learns nothing at t = 0; Karras et al. 2022, algorithm 1).
    guidance: scale w of classifier-free guidance (Ho and Salimans 2022), `v = v(without) + w (v(with) - v(without))`,
        for text and class together; signal_guidance: that of signals, by name. Several add up their changes. Each that
        is not 1 adds the batch once more, and its cache: every condition has a past of its own.
    """

    steps: int = 16
    seed: int = 0
    shift: float = 1.0
    context_level: float = 0.0
    solver: Solver = "euler"
    guidance: float = 1.0
    signal_guidance: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be an integer from 0 to 2^64 - 1")
        if not 0 <= self.context_level < 1:
            raise ValueError(f"context_level is {self.context_level}; it must lie in [0, 1)")
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver is {self.solver!r}; choose one of {', '.join(get_args(Solver))}")
        for name, scale in {"guidance": self.guidance, **self.signal_guidance}.items():
            if not 0 <= scale < float("inf"):
                raise ValueError(f"{name} is {scale}; it must be a finite number, at least 0 (1: no guidance)")

    @property
    def guided(self) -> dict[str, float]:
        """Scales other than 1: of text and class (""), and of signals by name."""
        scales = {"": self.guidance, **self.signal_guidance}
        return {name: scale for name, scale in scales.items() if scale != 1}


Forward = Callable[[Tensor, Tensor], Tensor]  # of x and t


def at_level(forward: Forward) -> Callable[[Tensor, float], Tensor]:
    """The same for one noise level of all frames."""
    return lambda x_BFCHW, t: forward(x_BFCHW, x_BFCHW.new_full(x_BFCHW.shape[:2], t))


class RepeatedPass:
    """A forward pass that is repeated with other values of x and t: from the second time on, a CUDA graph.

    A unit is so little work that a CPU launches its kernels (250 a layer) more slowly than a GPU computes them.
    previous: the last unit's, whose memory is used again.
    """

    def __init__(self, forward: Forward, previous: RepeatedPass | None):
        self._forward, self._previous, self._passes = forward, previous, 0
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, x_BFCHW: Tensor, t: float) -> Tensor:
        self._passes += 1
        if self._passes == 1:  # compiles kernels, and makes what a capture cannot: copies from the CPU
            return at_level(self._forward)(x_BFCHW, t)
        if self._passes == 2:
            self._x, self._t = x_BFCHW.clone(), x_BFCHW.new_empty(x_BFCHW.shape[:2])
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # not torch.cuda.graph: it would empty torch's cache of memory for each unit
                self._graph.capture_begin(None if self._previous is None else self._previous._graph.pool())
                self._velocity = self._forward(self._x, self._t)
                self._graph.capture_end()
            here.wait_stream(aside)
            self._previous = None
        self._x.copy_(x_BFCHW)
        self._t.fill_(t)
        self._graph.replay()
        return self._velocity.clone()


class RollOut:
    """Videos that grow unit by unit, each unit under a condition of its own: what an interactive player drives.

    `generate` makes the next unit and leaves the past as it is; `append` adds a unit to the past, generated or known.
    Memory is that of `cost.cache_bytes`, however many units there are.
    """

    def __init__(
        self,
        model: MSCTransformer,
        like_BTCHW: Tensor,
        sampling: Sampling,
        rows: Sequence[int] | None = None,
        cache: Cache | None = None,
        replay: bool = True,
    ) -> None:
        """like: its size (but for T), type and device. rows: number of every video, by default 0, 1, ...; its noise
        depends on (seed, its number, frame) alone. cache: go on with the past of another roll-out of the same rows.
        replay: on a GPU, repeat denoising steps from a CUDA graph; not with weights that ranks gather (ZeRO-3)."""
        self.model, self.sampling, self.cache = model, sampling, Cache() if cache is None else cache
        self._replay = replay and like_BTCHW.is_cuda and sampling.steps > 1
        self._pass: RepeatedPass | None = None
        self._like, self._rows = like_BTCHW[:, :0], range(len(like_BTCHW)) if rows is None else rows
        if len(self._rows) != len(like_BTCHW):
            raise ValueError(f"{len(self._rows)} rows are numbered, the context has {len(like_BTCHW)}")

    @torch.no_grad()
    def append(self, x_BFCHW: Tensor, condition: Condition) -> None:
        level = self.sampling.context_level
        x = (1 - level) * x_BFCHW + level * self._noise(_CONTEXT) if level else x_BFCHW
        copies = 1 + len(self.sampling.guided)
        extend_cache(self.model, self.cache, torch.cat([x] * copies), self._copies(condition), level)

    @torch.no_grad()
    def generate(self, condition: Condition) -> Tensor:
        """The next unit `[B, F, C, H, W]`."""
        copies = self._copies(condition)

        def forward(x: Tensor, t_BF: Tensor) -> Tensor:
            x, t_BF = (torch.cat([y] * (1 + len(self.sampling.guided))) for y in (x, t_BF))
            given, *without = self.model(x, t_BF, copies, self.cache).split(len(self._like))
            changes = [
                (scale - 1) * (given - v) for v, scale in zip(without, self.sampling.guided.values(), strict=True)
            ]
            return sum(changes, given)

        velocity = at_level(forward)
        if self._replay:
            velocity = self._pass = RepeatedPass(forward, self._pass)
        x = self._noise(_START)
        for t, lower in pairwise(sampling_levels(self.sampling.steps, self.sampling.shift)):
            v = velocity(x, t)
            if self.sampling.solver == "heun" and lower > 0:
                v = (v + velocity(x + (lower - t) * v, lower)) / 2
            x = x + (lower - t) * v
        return x

    def _copies(self, condition: Condition) -> Condition:
        """The condition, and it without what each guidance is for: of a batch so many times larger."""
        classes = self.model.config.classes
        without = [
            condition.without_signal(name) if name else condition.without_text(classes) for name in self.sampling.guided
        ]
        return concatenated([condition, *without])

    def _noise(self, purpose: int) -> Tensor:
        per_unit, seed = self.model.config.frames_per_unit, self.sampling.seed
        frames = range(self.cache.first * per_unit, (self.cache.first + 1) * per_unit)
        shape = self._like.shape[2:]
        return torch.stack([frame_noise(seed, row, purpose, frames, shape) for row in self._rows]).to(self._like)


def generate(
    model: MSCTransformer,
    context_BTCHW: Tensor,
    units: int,
    sampling: Sampling | None = None,
    condition: Condition | None = None,
    *,
    rows: Sequence[int] | None = None,
    cache: Cache | None = None,
    replay: bool = True,
) -> Iterator[Tensor]:
    """Yield `units` new units `[B, F, C, H, W]` that continue normalised latents, one after another.

    The context may hold no frames (T = 0). condition: its signals are those of the context's frames and the new ones;
    beyond their end they are unknown. rows, cache, replay: see `RollOut`; once the iterator has ended, the cache holds
    everything up to the last unit. Raises ValueError at once where the arguments do not fit each other or the model.
    """
    sampling, condition = sampling or Sampling(), condition or Condition()
    frames, per_unit = context_BTCHW.shape[1], model.config.frames_per_unit
    if frames % per_unit:
        raise ValueError(f"the context of {frames} latent frames does not divide into units of {per_unit}")
    for name in sampling.guided:
        if not name and condition.text is None and condition.labels is None:
            raise ValueError(f"guidance is {sampling.guidance:g}, but there is neither text nor a label to guide by")
        if name and name not in condition.signals:
            raise ValueError(f"there is a guidance of {name!r}, but no such signal to guide by")
    roll_out = RollOut(model, context_BTCHW, sampling, rows, cache, replay)

    def of_unit(number: int) -> Condition:
        return padded(condition.of_frames(slice(number * per_unit, (number + 1) * per_unit)), per_unit)

    def new_units() -> Iterator[Tensor]:
        # unit by unit, in bounded memory, and so that the cache is the same to the bit however long the context
        known = context_BTCHW.split(per_unit, 1) if frames else ()
        for number, unit in enumerate(known):
            roll_out.append(unit, of_unit(number))
        for number in range(len(known), len(known) + units):
            x = roll_out.generate(of_unit(number))
            yield x
            roll_out.append(x, of_unit(number))

    return new_units()


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
