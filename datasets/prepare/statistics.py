"""What the noise gate must know of the data: how much variance survives pooling, and how long it lasts.

For unit-variance data and unit-variance white noise, average pooling by `s x s` pixels and `m` frames with
`R(s, m) = Var(pooled) / Var` leaves a signal-to-noise ratio of `((1-t)/t)^2 s^2 m R` at noise level `t`.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

SPACES = (1, 2, 4, 8, 16, 32)
TIMES = (1, 2, 4, 8, 16)
LAGS = (1, 2, 4, 8)
FLOOR = 1e-6  # nothing that is later put into a logarithm is smaller

# Where no data was measured: means over 20 clips of 32 frames of three real videos at 25 to 30 fps, scaled to
# 128 x 128 pixels (R by side, R by frames, correlation by side and lag). The joint ratio is taken as their
# product, which was right within 4 % there.
TYPICAL_SPACE = (1.0, 0.965, 0.904, 0.80, 0.65, 0.40)
TYPICAL_TIME = (1.0, 0.972, 0.927, 0.867, 0.773)
TYPICAL_CORRELATION = (
    (0.940, 0.885, 0.797, 0.670),
    (0.944, 0.892, 0.806, 0.682),
    (0.949, 0.900, 0.818, 0.699),
    (0.955, 0.910, 0.832, 0.717),
    (0.962, 0.920, 0.847, 0.735),
    (0.969, 0.927, 0.853, 0.734),
)


@dataclass(frozen=True)
class Statistics:
    """Measured statistics of latents. Tables are nested tuples so that the value is hashable.

    mean, std: per channel [C]. ratios: R(space, time) [spaces, times]. correlations: of the field pooled by
    `space`, at a lag in latent frames [spaces, lags].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    spaces: tuple[int, ...]
    times: tuple[int, ...]
    lags: tuple[int, ...]
    ratios: tuple[tuple[float, ...], ...]
    correlations: tuple[tuple[float, ...], ...]
    clips: int = 0
    measured: bool = True

    def ratio(self, space: float, time: float = 1) -> float:
        """R(space, time): share of variance left after pooling; interpolated in log-log, clamped at the ends.

        Beyond the largest measured size the last value is returned (an upper bound, as R falls with size).
        """
        return _interpolate(self.spaces, self.times, self.ratios, space, time)

    def correlation(self, space: float, lag: float) -> float:
        """Correlation of the pooled field with itself `lag` latent frames later, in [1e-6, 1].

        Interpolated in log-log between measured sizes and lags, linearly from 1 at lag 0 to the first lag,
        and held constant beyond the last.
        """
        if lag < 0:
            raise ValueError(f"lag is {lag}, it must not be negative")
        if not self.lags:
            return 1.0
        if lag < self.lags[0]:
            first = self.correlation(space, self.lags[0])
            return 1.0 + (first - 1.0) * lag / self.lags[0]
        return _interpolate(self.spaces, self.lags, self.correlations, space, lag)

    def detail(self, space: float) -> float:
        """D(s) = (4/3) s^2 (R(s) - R(2s)): signal-to-noise of the band between sides s and 2s at t = 1/2.

        At least 1e-6; that floor is also the answer beyond half the largest measured side.
        """
        return max(FLOOR, 4 / 3 * space**2 * (self.ratio(space) - self.ratio(2 * space)))

    def detail_correlation(self, space: float, lag: float) -> float:
        """Correlation of the detail band between sides s and 2s at a lag, in [1e-6, 1].

        Pooling is a projection, so the band's covariance is the difference of the two pooled ones.
        """
        fine, coarse = self.ratio(space), self.ratio(2 * space)
        if fine - coarse <= FLOOR:
            return self.correlation(space, lag)
        shared = fine * self.correlation(space, lag) - coarse * self.correlation(2 * space, lag)
        return min(1.0, max(FLOOR, shared / (fine - coarse)))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {name: _lists(value) for name, value in vars(self).items()}

    def problem(self, channels: int) -> str:
        """What is wrong with values read from a file, whose types are right; or nothing."""
        if not len(self.mean) == len(self.std) == channels:
            return f"statistics are of {len(self.mean)} channels, latents of {channels}"
        for name, least in (("spaces", 1), ("times", 1), ("lags", 0)):
            grid = getattr(self, name)
            ascending = all(0 < a < b for a, b in pairwise((*grid, 1 << 31))) if grid else not least
            if not ascending or (least and grid[:1] != (1,)):
                return f"statistics: {name} are {grid[:8]}"
        tables = ((self.ratios, self.times), (self.correlations, self.lags))
        if any(len(t) != len(self.spaces) or any(len(row) != len(grid) for row in t) for t, grid in tables):
            return "statistics: a table is not of the size of its grid"
        values = [value for table, _ in tables for row in table for value in row]
        if not all(abs(value) <= 1e6 for value in values) or not all(0 < x < 1e30 for x in self.std):
            return "statistics: a ratio, correlation or deviation is out of range"
        return "" if all(abs(x) < 1e30 for x in self.mean) else "statistics: a mean is out of range"

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Statistics":
        """The inverse of `to_json`; TypeError or KeyError for other fields."""
        return Statistics(**{name: _tuples(value) for name, value in fields.items()})

    @staticmethod
    def default(channels: int) -> "Statistics":
        """Typical values of natural video for latents of which nothing was measured (`measured` is False)."""
        return Statistics(
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            spaces=SPACES,
            times=TIMES,
            lags=LAGS,
            ratios=tuple(tuple(s * m for m in TYPICAL_TIME) for s in TYPICAL_SPACE),
            correlations=TYPICAL_CORRELATION,
            measured=False,
        )


def measure_statistics(clips: Iterable[Tensor]) -> Statistics:
    """Statistics of latents given clip by clip, [T, C, h, w] each, of one shape; one pass, bounded memory.

    The mean removed is the one over all clips, as in training. Raises ValueError for no clips, clips of
    different shapes, or values that are not finite.
    """
    sums: _Sums | None = None
    for clip in clips:
        if clip.dim() != 4:
            raise ValueError(f"a clip of latents must be [T, C, h, w], this one is {list(clip.shape)}")
        if sums is None:
            sums = _Sums(tuple(clip.shape))
        sums.add(clip)
    if sums is None:
        raise ValueError("no clips to measure statistics on")
    return sums.statistics()


def mix_statistics(parts: Sequence[tuple[float, Statistics]]) -> Statistics:
    """Statistics of clips that come from several sets, by (weight, statistics) of each; weights need not add up to 1.

    Mean and variance per channel are exact. Variance between the sets' means survives any pooling and never fades;
    ratios and correlations, which are kept as means over channels, are weighted by the variance that a set adds. A
    size or lag that only some of the sets have (longer or larger clips) is taken from those.
    """
    if len(parts) == 1:
        return parts[0][1]
    total = sum(weight for weight, _ in parts)
    weights = torch.tensor([[weight / total] for weight, _ in parts], dtype=torch.float64)
    means, stds = (
        torch.tensor([getattr(found, name) for _, found in parts], dtype=torch.float64) for name in ("mean", "std")
    )
    mean = (weights * means).sum(0)
    between = (weights * (means - mean).square()).sum(0)
    variance = (weights * stds.square()).sum(0) + between
    shares = (weights * stds.square() / variance).mean(1).tolist()
    common = float((between / variance).mean())
    spaces, times, lags = (
        tuple(sorted({x for _, found in parts for x in getattr(found, name)})) for name in ("spaces", "times", "lags")
    )

    def having(**sizes: int) -> list[tuple[float, Statistics]]:
        """(share, statistics) of those whose tables hold these sizes."""
        held = zip(shares, (found for _, found in parts), strict=True)
        return [(a, x) for a, x in held if all(size in getattr(x, name) for name, size in sizes.items())]

    # The tables themselves, not what is interpolated: that knows no negative correlation.
    def ratio(space: int, time: int) -> float:
        those = having(spaces=space, times=time)
        variance = sum(a * x.ratios[x.spaces.index(space)][x.times.index(time)] for a, x in those) + common
        return variance / (sum(a for a, _ in those) + common)

    def correlation(space: int, lag: int) -> float:
        those = having(spaces=space, lags=lag)
        powers = [a * x.ratios[x.spaces.index(space)][0] for a, x in those]
        kept = (x.correlations[x.spaces.index(space)][x.lags.index(lag)] for _, x in those)
        shared = sum(power * held for power, held in zip(powers, kept, strict=True)) + common
        return shared / max(sum(powers) + common, FLOOR)

    spaces = tuple(
        s for s in spaces
        if all(having(spaces=s, times=m) for m in times) and all(having(spaces=s, lags=lag) for lag in lags)
    )  # fmt: skip
    return Statistics(
        mean=_tuples(mean.tolist()),
        std=_tuples(variance.sqrt().tolist()),
        spaces=spaces,
        times=times,
        lags=lags,
        ratios=tuple(tuple(ratio(s, m) for m in times) for s in spaces),
        correlations=tuple(tuple(correlation(s, lag) for lag in lags) for s in spaces),
        clips=sum(found.clips for _, found in parts),
        measured=all(found.measured for _, found in parts),
    )


class _Sums:
    """float64 sums per channel of everything that `measure` reports."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        frames, channels, height, width = shape
        self.shape = shape
        self.spaces = tuple(s for s in SPACES if s <= min(height, width))
        self.times = tuple(m for m in TIMES if m <= frames)
        self.lags = tuple(lag for lag in LAGS if lag < frames)
        # Last axis: count, sum, sum of squares / of products: count, a + b, a^2 + b^2, a b.
        self.pooled = torch.zeros(len(self.spaces), len(self.times), channels, 3, dtype=torch.float64)
        self.lagged = torch.zeros(len(self.spaces), len(self.lags), channels, 4, dtype=torch.float64)
        self.clips = 0

    def add(self, clip: Tensor) -> None:
        if tuple(clip.shape) != self.shape:
            raise ValueError(f"clips differ in shape: {list(clip.shape)} after {list(self.shape)}")
        field = clip.detach().to("cpu", torch.float64)
        if not torch.isfinite(field).all():
            raise ValueError("latents hold values that are not finite: the autoencoder overflows")
        self.clips += 1
        for i, space in enumerate(self.spaces):
            if space > 1:
                field = _halve_space(field)
            for j, lag in enumerate(self.lags):
                a, b = field[:-lag], field[lag:]
                count = torch.full((field.shape[1],), a[:, 0].numel(), dtype=torch.float64)
                terms = (count, _total(a + b), _total(a * a + b * b), _total(a * b))
                self.lagged[i, j] += torch.stack(terms, dim=-1)
            pooled = field
            for j, time in enumerate(self.times):
                if time > 1:
                    pooled = _halve_time(pooled)
                count = torch.full((field.shape[1],), pooled[:, 0].numel(), dtype=torch.float64)
                self.pooled[i, j] += torch.stack((count, _total(pooled), _total(pooled * pooled)), dim=-1)

    def statistics(self) -> Statistics:
        count, total, squares = self.pooled.unbind(-1)
        variances = (squares / count - (total / count) ** 2).clamp_min(0)  # [spaces, times, C]
        mean, variance = (total / count)[0, 0], variances[0, 0]
        used = variance > 1e-12 * (1 + mean**2)  # a constant channel says nothing
        weights = torch.where(used, 1 / variance.clamp_min(1e-300), 0.0)  # unit variance per channel
        ratios = (variances * weights).sum(-1) / max(1, int(used.sum()))
        pairs, sums, squares2, products = self.lagged.unbind(-1)
        centre = mean * sums / pairs
        shared = ((products / pairs - centre + mean**2) * weights).sum(-1)
        power = ((squares2 / pairs / 2 - centre + mean**2) * weights).sum(-1)
        correlations = (shared / power.clamp_min(1e-300)).clamp(-1, 1)
        if not used.any():
            ratios, correlations = torch.ones_like(ratios), torch.ones_like(correlations)
        return Statistics(
            mean=_tuples(mean.tolist()),
            std=_tuples(torch.where(used, variance, 1.0).sqrt().tolist()),
            spaces=self.spaces,
            times=self.times,
            lags=self.lags,
            ratios=_tuples(ratios.tolist()),
            correlations=_tuples(correlations.tolist()),
            clips=self.clips,
        )


def _total(x: Tensor) -> Tensor:
    return x.sum(dim=(0, 2, 3))


def _halve_space(x: Tensor) -> Tensor:
    """Average 2 x 2 neighbours of [T, C, h, w]; an odd last row or column is left out."""
    x = x[..., : x.shape[-2] // 2 * 2, : x.shape[-1] // 2 * 2]
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def _halve_time(x: Tensor) -> Tensor:
    x = x[: x.shape[0] // 2 * 2]
    return (x[::2] + x[1::2]) / 2


def _interpolate(
    rows: Sequence[int], columns: Sequence[int], table: Sequence[Sequence[float]], row: float, column: float
) -> float:
    """Bilinear in the logarithms of row, column and value; clamped at the ends of the table."""
    i, u = _place(rows, row)
    j, v = _place(columns, column)
    logs = [
        [math.log(max(FLOOR, table[a][b])) for b in (j, min(j + 1, len(columns) - 1))]
        for a in (i, min(i + 1, len(rows) - 1))
    ]
    value = (1 - u) * ((1 - v) * logs[0][0] + v * logs[0][1]) + u * ((1 - v) * logs[1][0] + v * logs[1][1])
    return math.exp(value)


def _place(grid: Sequence[int], x: float) -> tuple[int, float]:
    """Index of the grid point at or below x, and how far x lies towards the next one, in logarithms."""
    if x <= 0:
        raise ValueError(f"sizes and lags are positive, got {x}")
    if x <= grid[0]:
        return 0, 0.0
    if x >= grid[-1]:
        return len(grid) - 1, 0.0
    i = bisect.bisect_right(grid, x) - 1
    return i, math.log(x / grid[i]) / math.log(grid[i + 1] / grid[i])


def _lists(value: Any) -> Any:
    return [_lists(x) for x in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(x) for x in value) if isinstance(value, list) else value
