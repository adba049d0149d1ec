"""Where losses are least: parabolas through runs of equal compute, and through runs that differ in learning rate and batch.

Each minimum must lie inside what was tried, or it is refused with the reason; power laws go through the minima.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .data import Point, Points, grouped

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
class Power:
    """y = factor · Π x^exponent through minima; spread: largest ratio between it and a minimum."""

    factor: float
    exponents: dict[str, float]
    spread: float
    minima: int

    def __call__(self, **x: float) -> float:
        return self.factor * math.prod(x[name] ** power for name, power in self.exponents.items())


@dataclass(frozen=True)
class Optima:
    """minima, powers by name, and what could not be said, with the reason."""

    minima: tuple[Minimum, ...] = ()
    powers: dict[str, Power] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def iso_flop(points: Points) -> Optima:
    """N and D of least loss at each compute, and their powers of C (Hoffmann et al. 2022, approach 2)."""
    minima, refused = [], []
    for group in grouped(sorted(points.used, key=lambda p: p.C), lambda point: point.C, EQUAL_COMPUTE):
        C = math.exp(sum(math.log(point.C) for point in group) / len(group))
        if len({point.N for point in group}) < 3:
            continue
        near = near_minimum(group)
        found = _parabola([(point.N, point.L) for point in near])
        if isinstance(found, str):
            refused.append(f"IsoFLOP at {C:.2e}: {found}")
            continue
        N, loss, curve = found
        per_token = sum(point.C / point.N / point.D for point in group) / len(group)
        minima.append(Minimum((N, C / per_token / N, C), {"N": N}, loss, len(near), curve))
    if not minima and not refused:
        return Optima(refused=("IsoFLOP: no three sizes were trained with equal compute",))
    powers = {}
    for index, name in enumerate(("N", "D")):
        found_power = _power([((m.at[2],), m.at[index]) for m in minima], ("C",))
        if isinstance(found_power, str):
            refused.append(f"IsoFLOP {name}(C): {found_power}")
        else:
            powers[name] = found_power
    return Optima(tuple(minima), powers, tuple(refused))


def near_minimum(group: Sequence[Point]) -> list[Point]:
    """The runs that a parabola may go through: far from its minimum the curve levels off, as a run with too few steps
    has learned nothing whatever its size. Where fewer than three sizes are near, the best runs up to the third size;
    `group` holds as many."""
    ordered = sorted(group, key=lambda point: point.L)
    near = [point for point in ordered if point.L <= NEAR * ordered[0].L]
    while len({point.N for point in near}) < 3:  # not the best three runs: they may be seeds of one size
        near.append(ordered[len(near)])
    return near


def learning_rate_and_batch(points: Points) -> Optima:
    """lr and batch of least loss for each size and budget, and their powers of N and D."""
    minima, refused = [], []
    everything = [point for point in (*points.used, *points.others) if point.lr and point.batch]
    for group in grouped(everything, lambda point: (point.N, point.D)):
        rates, batches = ({getattr(point, name) for point in group} for name in ("lr", "batch"))
        if len(rates) < 3 and len(batches) < 3:
            continue
        where = f"N = {group[0].N:.3g}, D = {group[0].D:.3g}"
        at = group[0].N, group[0].D, group[0].C
        if len(rates) >= 3 and len(batches) >= 3:
            both = _bowl(group)
            if isinstance(both, str):
                refused.append(f"learning rate and batch at {where}: {both}")
            else:
                minima.append(Minimum(at, both[0], both[1], len(group)))
            continue
        name, other = ("lr", "batch") if len(rates) >= 3 else ("batch", "lr")
        best = min(group, key=lambda point: point.L)
        line = [point for point in group if getattr(point, other) == getattr(best, other)]
        found = _parabola([(getattr(point, name), point.L) for point in line])
        if isinstance(found, str):
            refused.append(f"{name} at {where}: {found}")
        else:
            minima.append(Minimum(at, {name: found[0]}, found[1], len(line), found[2]))
    if not minima and not refused:
        refused.append("lr_opt and B_opt: no size and budget was trained at three learning rates or batches")
    powers = {}
    for name in ("lr", "batch"):
        own = [((m.at[0], m.at[1]), m.place[name]) for m in minima if name in m.place]
        if not own:
            continue
        found_power = _power(own, ("N", "D"))
        if isinstance(found_power, str):
            refused.append(f"{name}_opt(N, D): {found_power}")
        else:
            powers[name] = found_power
    return Optima(tuple(minima), powers, tuple(refused))


def _parabola(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, tuple[float, ...]] | str:
    """(x of the least loss, that loss, coefficients) of log L over log x; or why there is none."""
    x, z = np.log(np.array(pairs)).T
    if len(np.unique(x)) < 3:
        return f"{len(np.unique(x))} different values; three are needed"
    a, b, c = np.polyfit(x, z, 2)
    if a <= 0:
        return "the losses have no minimum among the values tried"
    lowest = -b / (2 * a)
    if not x.min() < lowest < x.max():
        side = "smaller" if lowest <= x.min() else "larger"
        tried = f"{np.exp(x.min()):.3g} to {np.exp(x.max()):.3g}"
        return f"the minimum lies beyond the values tried ({tried}); try {side} ones"
    return float(np.exp(lowest)), float(np.exp(c - b**2 / (4 * a))), (float(a), float(b), float(c))


def _bowl(group: Sequence[Point]) -> tuple[dict[str, float], float] | str:
    """The least point of a quadratic of log L in log lr and log batch."""
    if len(group) < 7:
        return f"{len(group)} runs; a bowl in two directions needs 7"
    x, y = (np.log([float(getattr(point, name)) for point in group]) for name in ("lr", "batch"))
    x0, y0 = x.mean(), y.mean()
    u, v = x - x0, y - y0
    terms = np.stack((np.ones_like(u), u, v, u * u, u * v, v * v), 1)
    (c, cx, cy, xx, xy, yy), _, rank, _ = np.linalg.lstsq(terms, np.log([point.L for point in group]), rcond=None)
    if rank < 6:
        return "learning rates and batches were not varied independently"
    curvature = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return "the losses have no minimum among the values tried"
    place = -np.linalg.solve(curvature, [cx, cy])
    for name, value, tried in (("lr", place[0], u), ("batch", place[1], v)):
        if not tried.min() < value < tried.max():
            return (
                f"the best {name} lies beyond those tried; try {'smaller' if value <= tried.min() else 'larger'} ones"
            )
    loss = c + (cx * place[0] + cy * place[1]) / 2
    return {"lr": float(np.exp(x0 + place[0])), "batch": float(np.exp(y0 + place[1]))}, float(np.exp(loss))


def _power(pairs: Sequence[tuple[tuple[float, ...], float]], names: tuple[str, ...]) -> Power | str:
    """Least squares in logarithms, over the variables that were varied."""
    if not pairs:
        return "no minimum was found"
    x, y = np.log([at for at, _ in pairs]), np.log([value for _, value in pairs])
    varied = [i for i in range(len(names)) if np.ptp(x[:, i]) > math.log(1.2)]
    if not varied or len(pairs) < len(varied) + 2:
        return f"{len(pairs)} minima; {max(1, len(varied)) + 2} are needed for a power law and a look at its error"
    terms = np.column_stack([np.ones(len(x)), x[:, varied]])
    spreads = np.linalg.svd(x[:, varied] - x[:, varied].mean(0), compute_uv=False)
    if spreads[-1] < 0.05 * spreads[0]:
        return f"{' and '.join(names[i] for i in varied)} vary together; their exponents cannot be told apart"
    solution = np.linalg.lstsq(terms, y, rcond=None)[0]
    spread = float(np.exp(np.abs(terms @ solution - y).max()))
    exponents = {names[i]: float(power) for i, power in zip(varied, solution[1:], strict=True)}
    return Power(float(np.exp(solution[0])), exponents, spread, len(pairs))
