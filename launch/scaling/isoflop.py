"""Where losses are least: parabolas through runs of equal compute, and through runs that differ in learning rate and batch.

Each minimum must lie inside what was tried, or it is refused with the reason; power laws go through the minima.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .data import RunResult, ScalingData, group_similar

NEAR = 1.25  # of runs with equal compute, those whose loss is at most so many times the least lie on the parabola
EQUAL_COMPUTE = 0.1  # runs whose FLOPs differ by less (relative) lie on one parabola


@dataclass(frozen=True)
class Minimum:
    """at: (N, D, C) it belongs to. place: the values of least loss, such as {"lr": …}. curve: polynomial of log L in
    the logarithm of the one variable, highest power first (empty for two). loss: there. points: how many."""

    at: tuple[float, float, float]
    place: dict[str, float]
    loss: float
    points: int
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · Π x^exponent through minima; spread: largest ratio between it and a minimum."""

    factor: float
    exponents: dict[str, float]
    spread: float
    minima: int

    def __call__(self, **x: float) -> float:
        return self.factor * math.prod(x[name] ** power for name, power in self.exponents.items())


@dataclass(frozen=True)
class Minima:
    """minima, powers by name, and what could not be said, with the reason."""

    minima: tuple[Minimum, ...] = ()
    powers: dict[str, PowerLaw] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def fit_isoflop(data: ScalingData) -> Minima:
    """N and D of least loss at each compute, and their powers of C (Hoffmann et al. 2022, approach 2)."""
    minima, refused = [], []
    for group in group_similar(sorted(data.used, key=lambda p: p.C), lambda run: run.C, EQUAL_COMPUTE):
        C = math.exp(sum(math.log(run.C) for run in group) / len(group))
        if len({run.N for run in group}) < 3:
            continue
        # Far from its minimum the curve levels off, as a run with too few steps has learned nothing whatever its size.
        # Where fewer than three sizes are near, the best runs up to the third size.
        ordered = sorted(group, key=lambda run: run.L)
        near = [run for run in ordered if run.L <= NEAR * ordered[0].L]
        while len({run.N for run in near}) < 3:  # not the best three runs: they may be seeds of one size
            near.append(ordered[len(near)])
        try:
            N, loss, curve = _parabola_minimum([(run.N, run.L) for run in near])
        except ValueError as error:
            refused.append(f"IsoFLOP at {C:.2e}: {error}")
            continue
        per_token = sum(run.C / run.N / run.D for run in group) / len(group)
        minima.append(Minimum((N, C / per_token / N, C), {"N": N}, loss, len(near), curve))
    if not minima and not refused:
        return Minima(refused=("IsoFLOP: no three sizes were trained with equal compute",))
    powers = {}
    for index, name in enumerate("ND"):
        try:
            powers[name] = _fit_power_law([((m.at[2],), m.at[index]) for m in minima], ("C",))
        except ValueError as error:
            refused.append(f"IsoFLOP {name}(C): {error}")
    return Minima(tuple(minima), powers, tuple(refused))


def fit_learning_rate_and_batch(data: ScalingData) -> Minima:
    """lr and batch of least loss for each size and budget, and their powers of N and D."""
    minima, refused = [], []
    tuned_runs = [run for run in (*data.used, *data.others) if run.lr and run.batch]
    for group in group_similar(tuned_runs, lambda run: (run.N, run.D)):
        varied = [name for name in ("lr", "batch") if len({getattr(run, name) for run in group}) >= 3]
        at = group[0].N, group[0].D, group[0].C
        try:
            if len(varied) == 2:
                minima.append(Minimum(at, *_quadratic_minimum(group), len(group)))
            elif varied:
                name, other = varied[0], "batch" if varied == ["lr"] else "lr"
                best = min(group, key=lambda run: run.L)
                line = [run for run in group if getattr(run, other) == getattr(best, other)]
                place, loss, curve = _parabola_minimum([(getattr(run, name), run.L) for run in line])
                minima.append(Minimum(at, {name: place}, loss, len(line), curve))
        except ValueError as error:
            what = "learning rate and batch" if len(varied) == 2 else varied[0]
            refused.append(f"{what} at N = {at[0]:.3g}, D = {at[1]:.3g}: {error}")
    if not minima and not refused:
        refused.append("lr_opt and B_opt: no size and budget was trained at three learning rates or batches")
    powers = {}
    for name in ("lr", "batch"):
        if own := [((m.at[0], m.at[1]), m.place[name]) for m in minima if name in m.place]:
            try:
                powers[name] = _fit_power_law(own, ("N", "D"))
            except ValueError as error:
                refused.append(f"{name}_opt(N, D): {error}")
    return Minima(tuple(minima), powers, tuple(refused))


def _parabola_minimum(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, tuple[float, ...]]:
    """(x of the least loss, that loss, coefficients) of log L over log x. ValueError if there is none."""
    x, z = np.log(np.array(pairs)).T
    if len(np.unique(x)) < 3:
        raise ValueError(f"{len(np.unique(x))} different values; three are needed")
    a, b, c = np.polyfit(x, z, 2)
    if a <= 0:
        raise ValueError("the losses have no minimum among the values tried")
    lowest = -b / (2 * a)
    if not x.min() < lowest < x.max():
        side = "smaller" if lowest <= x.min() else "larger"
        tried = f"{np.exp(x.min()):.3g} to {np.exp(x.max()):.3g}"
        raise ValueError(f"the minimum lies beyond the values tried ({tried}); try {side} ones")
    return float(np.exp(lowest)), float(np.exp(c - b**2 / (4 * a))), (float(a), float(b), float(c))


def _quadratic_minimum(group: Sequence[RunResult]) -> tuple[dict[str, float], float]:
    """(place, loss) of least log L, a quadratic in log lr and log batch; ValueError, with the reason, if none."""
    if len(group) < 7:
        raise ValueError(f"{len(group)} runs; a bowl in two directions needs 7")
    x, y = (np.log([float(getattr(run, name)) for run in group]) for name in ("lr", "batch"))
    x0, y0 = x.mean(), y.mean()
    u, v = x - x0, y - y0
    terms = np.stack((np.ones_like(u), u, v, u * u, u * v, v * v), 1)
    (c, cx, cy, xx, xy, yy), _, rank, _ = np.linalg.lstsq(terms, np.log([run.L for run in group]), rcond=None)
    if rank < 6:
        raise ValueError("learning rates and batches were not varied independently")
    curvature = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        raise ValueError("the losses have no minimum among the values tried")
    place = -np.linalg.solve(curvature, [cx, cy])
    for name, value, tried in (("lr", place[0], u), ("batch", place[1], v)):
        if not tried.min() < value < tried.max():
            side = "smaller" if value <= tried.min() else "larger"
            raise ValueError(f"the best {name} lies beyond those tried; try {side} ones")
    loss = c + (cx * place[0] + cy * place[1]) / 2
    return {"lr": float(np.exp(x0 + place[0])), "batch": float(np.exp(y0 + place[1]))}, float(np.exp(loss))


def _fit_power_law(pairs: Sequence[tuple[tuple[float, ...], float]], names: tuple[str, ...]) -> PowerLaw:
    """Least squares in logarithms, over the variables that were varied. ValueError if the minima are too few."""
    if not pairs:
        raise ValueError("there is no minimum to fit it to")
    x, y = np.log([at for at, _ in pairs]), np.log([value for _, value in pairs])
    varied = [i for i in range(len(names)) if np.ptp(x[:, i]) > math.log(1.2)]
    if not varied or len(pairs) < len(varied) + 2:
        least = max(1, len(varied)) + 2
        raise ValueError(f"{len(pairs)} minima; {least} are needed for a power law and a look at its error")
    terms = np.column_stack([np.ones(len(x)), x[:, varied]])
    spreads = np.linalg.svd(x[:, varied] - x[:, varied].mean(0), compute_uv=False)
    if spreads[-1] < 0.05 * spreads[0]:
        alike = " and ".join(names[i] for i in varied)
        raise ValueError(f"{alike} vary together; their exponents cannot be told apart")
    solution = np.linalg.lstsq(terms, y, rcond=None)[0]
    spread = float(np.exp(np.abs(terms @ solution - y).max()))
    exponents = {names[i]: float(power) for i, power in zip(varied, solution[1:], strict=True)}
    return PowerLaw(float(np.exp(solution[0])), exponents, spread, len(pairs))
