"""Statistics of latents: mean and deviation per channel, and the share of variance left after average pooling.

For unit-variance data and unit-variance white noise, average pooling by `s x s` pixels and `m` frames with
`R(s, m) = Var(pooled) / Var` leaves a signal-to-noise ratio of `((1-t)/t)^2 s^2 m R` at noise level `t`; from it the
noise gate takes its constants. Indexes of earlier versions hold lag correlations as well, which nothing reads any more.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

SPACES = (1, 2, 4, 8, 16, 32)
TIMES = (1, 2, 4, 8, 16)
FLOOR = 1e-6  # least value that goes into a logarithm

# Where no data was measured: means over 20 clips of 32 frames of three real videos at 25 to 30 fps, scaled to
# 128 x 128 pixels (R by side, R by frames). Their product is within 4 % of the joint ratio there.
TYPICAL_SPACE = (1.0, 0.965, 0.904, 0.80, 0.65, 0.40)
TYPICAL_TIME = (1.0, 0.972, 0.927, 0.867, 0.773)


@dataclass(frozen=True)
class Statistics:
    """Measured statistics of latents. Tables are nested tuples so that the value is hashable.

    mean, std: per channel [C]. ratios: R(space, time) [spaces, times]. clips: number of clips measured.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    spaces: tuple[int, ...]
    times: tuple[int, ...]
    ratios: tuple[tuple[float, ...], ...]
    clips: int = 0
    measured: bool = True

    def ratio(self, space: float, time: float = 1) -> float:
        """R(space, time): share of variance left after pooling; interpolated in log-log, clamped at the ends.

        Beyond the largest measured size the last value is returned (an upper bound, as R falls with size).
        """
        i, u = _grid_position(self.spaces, space)
        j, v = _grid_position(self.times, time)
        logs = [
            [math.log(max(FLOOR, self.ratios[a][b])) for b in (j, min(j + 1, len(self.times) - 1))]
            for a in (i, min(i + 1, len(self.spaces) - 1))
        ]
        return math.exp((1 - u) * ((1 - v) * logs[0][0] + v * logs[0][1]) + u * ((1 - v) * logs[1][0] + v * logs[1][1]))

    def detail(self, space: float) -> float:
        """D(s) = (4/3) s^2 (R(s) - R(2s)): signal-to-noise of the band between sides s and 2s at t = 1/2.

        At least 1e-6; that floor is also the answer beyond half the largest measured side.
        """
        return max(FLOOR, 4 / 3 * space**2 * (self.ratio(space) - self.ratio(2 * space)))

    def to_json(self) -> dict[str, Any]:
        """The fields as json.dumps takes them."""
        return dict(vars(self))

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Statistics":
        """The inverse of `to_json`; fields of earlier versions are ignored. TypeError or KeyError for other fields."""
        fields = {name: value for name, value in fields.items() if name not in ("lags", "correlations")}
        return Statistics(**{name: _tuples(value) for name, value in fields.items()})

    def problem(self, channels: int) -> str:
        """What is wrong with values read from a file, whose types are right; "" if nothing is."""
        if not len(self.mean) == len(self.std) == channels:
            return f"statistics are of {len(self.mean)} channels, latents of {channels}"
        for name, grid in (("spaces", self.spaces), ("times", self.times)):
            if grid[:1] != (1,) or not all(a < b for a, b in pairwise((*grid, 1 << 31))):
                return f"statistics: {name} are {grid[:8]}"
        if len(self.ratios) != len(self.spaces) or any(len(row) != len(self.times) for row in self.ratios):
            return "statistics: the table of ratios is not of the size of its grid"
        values = [value for row in self.ratios for value in row]
        if not all(abs(value) <= 1e6 for value in values) or not all(0 < x < 1e30 for x in self.std):
            return "statistics: a ratio or deviation is out of range"
        return "" if all(abs(x) < 1e30 for x in self.mean) else "statistics: a mean is out of range"

    @staticmethod
    def default(channels: int) -> "Statistics":
        """Typical values of natural video for latents of which nothing was measured (`measured` is False)."""
        ratios = tuple(tuple(s * m for m in TYPICAL_TIME) for s in TYPICAL_SPACE)
        return Statistics((0.0,) * channels, (1.0,) * channels, SPACES, TIMES, ratios, measured=False)


@dataclass(frozen=True)
class LatentSums:
    """Sums over latents of one shape [T, C, h, w], pooled by every space and time: float64
    [spaces, times, C, 3] of count, sum and sum of squares.
    """

    shape: tuple[int, ...]
    spaces: tuple[int, ...]
    times: tuple[int, ...]
    table: Tensor


def sum_latents(latents: Tensor) -> LatentSums:
    """Sums of [T, C, h, w] latents. ValueError for other ranks and for values that are not finite."""
    if latents.dim() != 4:
        raise ValueError(f"a clip of latents must be [T, C, h, w], this one is {list(latents.shape)}")
    frames, channels, height, width = latents.shape
    spaces = tuple(s for s in SPACES if s <= min(height, width))
    times = tuple(m for m in TIMES if m <= frames)
    table = torch.zeros(len(spaces), len(times), channels, 3, dtype=torch.float64)
    field = latents.detach().to("cpu", torch.float64).numpy()  # torch takes twice as long for so many small operations
    for i in range(len(spaces)):
        if i:  # average 2 x 2 neighbours; an odd last row or column is left out
            field = field[..., : field.shape[-2] // 2 * 2, : field.shape[-1] // 2 * 2]
            field = field[..., ::2, ::2] + field[..., 1::2, ::2] + field[..., ::2, 1::2] + field[..., 1::2, 1::2]
            field /= 4
        pooled = field
        for j in range(len(times)):
            if j:
                pooled = pooled[: len(pooled) // 2 * 2]
                pooled = pooled[::2] + pooled[1::2]
                pooled /= 2
            table[i, j, :, 0] = pooled[:, 0].size
            table[i, j, :, 1] = torch.from_numpy(pooled.sum(axis=(0, 2, 3)))
            table[i, j, :, 2] = torch.from_numpy(np.einsum("tchw,tchw->c", pooled, pooled))
    if not torch.isfinite(table).all():
        raise ValueError("latents hold values that are not finite: the autoencoder overflows")
    return LatentSums(tuple(latents.shape), spaces, times, table)


def statistics_of_sums(sums: Iterable[LatentSums]) -> Statistics:
    """Statistics of latents of one shape from the sums of each clip. The mean removed is the one over all clips, as in
    training. ValueError for no clips or clips of different shapes.
    """
    total, clips = None, 0
    for one in sums:
        clips += 1
        if total is not None and one.shape != total.shape:
            raise ValueError(f"clips differ in shape: {list(one.shape)} after {list(total.shape)}")
        total = one if total is None else dataclasses.replace(total, table=total.table + one.table)
    if total is None:
        raise ValueError("no clips to measure statistics on")
    count, summed, squares = total.table.unbind(-1)
    variances = (squares / count - (summed / count) ** 2).clamp_min(0)  # [spaces, times, C]
    mean, variance = (summed / count)[0, 0], variances[0, 0]
    used = variance > 1e-12 * (1 + mean**2)  # a constant channel has no information
    weights = torch.where(used, 1 / variance.clamp_min(1e-300), 0.0)  # unit variance per channel
    ratios = (variances * weights).sum(-1) / max(1, int(used.sum()))
    return Statistics(
        mean=_tuples(mean.tolist()),
        std=_tuples(torch.where(used, variance, 1.0).sqrt().tolist()),
        spaces=total.spaces,
        times=total.times,
        ratios=_tuples((ratios if used.any() else torch.ones_like(ratios)).tolist()),
        clips=clips,
    )


def measure_statistics(clips: Iterable[Tensor]) -> Statistics:
    """Statistics of latents given clip by clip, [T, C, h, w] each, of one shape; one pass, bounded memory."""
    return statistics_of_sums(map(sum_latents, clips))


def mix_statistics(parts: Sequence[tuple[float, Statistics]]) -> Statistics:
    """Statistics of a mixture of data sets, from (weight, statistics) of each; weights need not add up to 1.

    Mean and variance per channel are exact. Variance between the sets' means survives any pooling; ratios, which are
    kept as means over channels, are weighted by the variance that a set adds. A size that only part of the sets have
    (longer or larger clips) is taken from those.
    """
    if len(parts) == 1:
        return parts[0][1]
    total = sum(weight for weight, _ in parts)
    weights = torch.tensor([[weight / total] for weight, _ in parts], dtype=torch.float64)
    means = torch.tensor([one.mean for _, one in parts], dtype=torch.float64)
    variances = torch.tensor([one.std for _, one in parts], dtype=torch.float64).square()
    mean = (weights * means).sum(0)
    between = (weights * (means - mean).square()).sum(0)
    variance = (weights * variances).sum(0) + between
    shares = (weights * variances / variance).mean(1).tolist()
    common = float((between / variance).mean())
    spaces = sorted({space for _, one in parts for space in one.spaces})
    times = sorted({time for _, one in parts for time in one.times})

    def ratios(space: int, time: int) -> list[tuple[float, float]]:
        """(share of variance, R) of the sets that have these sizes."""
        return [
            (share, one.ratios[one.spaces.index(space)][one.times.index(time)])
            for share, (_, one) in zip(shares, parts, strict=True)
            if space in one.spaces and time in one.times
        ]

    def mixed_ratio(space: int, time: int) -> float:
        own = ratios(space, time)
        return (sum(share * ratio for share, ratio in own) + common) / (sum(share for share, _ in own) + common)

    spaces = [space for space in spaces if all(ratios(space, time) for time in times)]
    return Statistics(
        mean=_tuples(mean.tolist()),
        std=_tuples(variance.sqrt().tolist()),
        spaces=tuple(spaces),
        times=tuple(times),
        ratios=tuple(tuple(mixed_ratio(space, time) for time in times) for space in spaces),
        clips=sum(one.clips for _, one in parts),
        measured=all(one.measured for _, one in parts),
    )


def _grid_position(grid: Sequence[int], x: float) -> tuple[int, float]:
    """Index of the grid point at or below x, and how far x lies towards the next one, in logarithms."""
    if x <= 0:
        raise ValueError(f"sizes are positive, got {x}")
    if x <= grid[0]:
        return 0, 0.0
    if x >= grid[-1]:
        return len(grid) - 1, 0.0
    i = bisect.bisect_right(grid, x) - 1
    return i, math.log(x / grid[i]) / math.log(grid[i + 1] / grid[i])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value
