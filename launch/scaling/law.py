"""The law L(N, D) = E + A/N^α + B/D^β: fitted to losses, with intervals, and what follows from it. Pure functions.

N parameters, D training tokens, L loss (Hoffmann et al. 2022, arXiv 2203.15556, approach 3). The fit minimises the
Huber loss of log L, from many restarts; its threshold is 1.345 robust standard deviations of the residuals, where a
Huber fit is nearly as sharp as least squares on clean data (Huber 1964), unless one is given. Intervals come from a
bootstrap that draws residuals, each divided by √(1 - its leverage) as fitted residuals are too small (Davison &
Hinkley 1997, 6.2.3), with tails as wide as Student's t of n - 5 degrees asks (Hesterberg 2015); they assume equal
relative noise of all runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

Array = NDArray[np.float64]
LEAST_POINTS = 8  # five constants and something to see noise by
LEAST_VALUES = 3  # of N, and of D: two cannot tell an exponent from a floor
LEAST_RATIO = 2.0  # between the largest and the smallest N, and D
MOST_CORRELATION = 0.98  # of log N and log D; beyond, A/N^α and B/D^β stand in for each other
FARTHEST = 100.0  # times the largest compute of the fit, for statements about larger runs
MOST_SPREAD = 10.0  # between the ends of an exponent's interval
PARAMETERS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Law:
    """E + A/N^alpha + B/D^beta; every field a number, or an array of one number per bootstrap draw."""

    E: Any
    A: Any
    B: Any
    alpha: Any
    beta: Any

    def loss(self, N: Any, D: Any) -> Any:
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    @property
    def exponent(self) -> Any:
        """a of the compute-optimal N ∝ C^a; D ∝ C^(1-a)."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, C: Any, per_token: float) -> tuple[Any, Any]:
        """(N, D) of least loss at compute C = per_token · N · D."""
        size = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = size * (C / per_token) ** self.exponent
        return N, C / per_token / N


@dataclass(frozen=True)
class LawFit:
    """law: the best fit. draws: the law of every bootstrap draw. residuals: of log L. noise: what the bootstrap drew
    from. delta: the Huber threshold. level: of intervals. compute: largest N · D of the fit's points."""

    law: Law
    draws: Law
    residuals: Array
    noise: Array
    delta: float
    level: float
    compute: float

    def interval(self, values: Array) -> tuple[float, float]:
        """Of a value computed from `draws`."""
        freedom = len(self.residuals) - len(PARAMETERS)
        edge = norm.cdf(student.ppf((1 - self.level) / 2, freedom))
        low, high = np.quantile(values, (edge, 1 - edge))
        return float(low), float(high)

    def with_interval(self, value: Callable[[Law], Any]) -> dict[str, float]:
        """`value` of the law, and its interval over the draws."""
        low, high = self.interval(value(self.draws))
        return {"value": float(value(self.law)), "low": low, "high": high}

    def predict(self, N: float, D: float, seed: int = 0) -> tuple[float, float, float]:
        """Loss of one more run, and the interval it should lie in: the law's uncertainty and a run's own noise.

        ValueError where N · D is too far from what was fitted."""
        if FARTHEST * self.compute < N * D:
            raise ValueError(
                f"N·D = {N * D:.2e} is {N * D / self.compute:.0f} times the largest of the fit's runs; predictions "
                f"stop at {FARTHEST:g} times: train larger runs first"
            )
        run_noise = np.random.default_rng(seed).choice(self.noise, len(self.draws.E))
        low, high = self.interval(np.exp(np.log(self.draws.loss(N, D)) + run_noise))
        return float(self.law.loss(N, D)), low, high


def fit_law(
    N: Array, D: Array, L: Array, draws: int = 500, level: float = 0.9, delta: float | None = None, seed: int = 0
) -> LawFit:
    """Fit the law to losses L of runs with N parameters and D tokens. ValueError if they cannot carry it."""
    check_runs(N, D, L)
    x, y, z = np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean(), np.log(L)
    theta, _ = best_of_restarts(x, y, z, delta or 1e-3)
    if delta is None:
        for _ in range(2):  # the residuals' spread and the threshold settle together
            residuals = z - _model(x, y, theta[None])[0][0]
            spread = np.median(np.abs(residuals)) / 0.6745 * np.sqrt(len(z) / (len(z) - 5))
            delta = max(1.345 * float(spread), 1e-9)
            theta = minimise_huber(x, y, z[None], theta[None], delta)[0][0]
    assert delta is not None
    fitted, J = (value[0] for value in _model(x, y, theta[None]))
    residuals = z - fitted
    leverage = np.einsum("ni,ij,nj->n", J, np.linalg.pinv(J.T @ J), J)
    noise = residuals / np.sqrt(np.clip(1 - leverage, 0.05, None))
    noise -= noise.mean()
    resampled = fitted + np.random.default_rng(seed).choice(noise, (draws, len(z)))
    thetas = minimise_huber(x, y, resampled, np.repeat(theta[None], draws, 0), delta)[0]
    centre = np.log(N).mean(), np.log(D).mean()
    return LawFit(_law(theta, *centre), _law(thetas.T, *centre), residuals, noise, delta, level, float((N * D).max()))


def check_runs(N: Array, D: Array, L: Array) -> None:
    """ValueError where the runs cannot determine the law's five constants."""
    if len(L) < LEAST_POINTS:
        raise ValueError(f"{len(L)} runs cannot carry a law of 5 constants; at least {LEAST_POINTS} are needed")
    if not (np.isfinite(L).all() and (L > 0).all()):
        raise ValueError("every loss must be finite and positive")
    for name, values in (("sizes N", N), ("budgets D", D)):
        distinct = len(np.unique(values.round(-int(np.log10(values.max())) + 3)))
        if distinct < LEAST_VALUES:
            raise ValueError(f"the runs have {distinct} different {name}; {LEAST_VALUES} are needed to see an exponent")
        if values.max() < LEAST_RATIO * values.min():
            raise ValueError(
                f"the {name} reach from {values.min():.3g} to {values.max():.3g} only; they must differ by a factor of "
                f"{LEAST_RATIO:g} or more"
            )
    correlation = float(np.corrcoef(np.log(N), np.log(D))[0, 1])
    if abs(correlation) > MOST_CORRELATION:
        raise ValueError(
            f"sizes and tokens vary together (correlation of their logarithms {correlation:.3f}): A/N^α and B/D^β "
            "cannot be told apart; vary tokens at a fixed size"
        )


def check_fit(fit: LawFit) -> None:
    """ValueError where the fit does not support statements about other runs."""
    for name in ("alpha", "beta"):
        low, high = fit.interval(getattr(fit.draws, name))
        if low <= 0:
            variable = "size" if name == "alpha" else "the number of tokens"
            raise ValueError(
                f"the interval of {name} is {low:.3f} to {high:.3f}: these runs do not show that {variable} matters; "
                "vary it more, or repeat runs with other seeds"
            )
        if high > MOST_SPREAD * low:
            raise ValueError(
                f"the interval of {name} is {low:.3g} to {high:.3g}: these runs do not pin it down; more of them, over "
                "wider ranges, would"
            )


# Least Huber loss, for many restarts or many draws at once ----------------------------------------------------


def best_of_restarts(x: Array, y: Array, z: Array, delta: float) -> tuple[Array, float]:
    """The best fit of restarts from a grid: (constants, objective)."""
    floors, exponents, shares = (0.3, 0.7, 0.95), (0.1, 0.3, 0.7, 1.2), (0.05, 0.3, 1.0)
    grid = itertools.product(floors, shares, exponents, shares, exponents)
    low, middle = z.min(), np.median(z)
    starts = np.array([
        (low + np.log(floor), middle + np.log(a), alpha, middle + np.log(b), beta) for floor, a, alpha, b, beta in grid
    ])  # fmt: skip
    rough, objective = minimise_huber(x, y, z[None], starts, delta, steps=30)
    leading = rough[np.argsort(objective)[:20]]
    thetas, objective = minimise_huber(x, y, z[None], leading, delta, steps=500)
    return thetas[objective.argmin()], float(objective.min())


def minimise_huber(x: Array, y: Array, z: Array, theta: Array, delta: float, steps: int = 300) -> tuple[Array, Array]:
    """Levenberg-Marquardt on the Huber loss of `model - z`, weights renewed in every step.

    x, y: centred log N and log D [n]. z: log L [R or 1, n]. theta: initial values [R, 5]. Returns (constants [R, 5],
    mean Huber loss [R]). scipy.optimize.least_squares solves one problem at a time, which takes 25 times as long for a
    bootstrap of hundreds; tests compare the two.
    """
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    f, J = _model(x, y, theta)
    objective, stalled = huber(f - z, delta), 0
    for _ in range(steps):
        r = f - z
        weight = np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
        JW = J * weight[..., None]
        H, g = np.matmul(JW.transpose(0, 2, 1), J), np.matmul(JW.transpose(0, 2, 1), r[..., None])
        H += np.eye(5) * (damping[:, None, None] * np.einsum("rii->ri", H)[:, None] + 1e-14)
        new = theta - np.linalg.solve(H, g)[..., 0]
        new_f, new_J = _model(x, y, new)
        new_objective = huber(new_f - z, delta)
        better = new_objective < objective
        gained = np.where(better, 1 - new_objective / objective, 0.0)
        theta[better], f[better], J[better] = new[better], new_f[better], new_J[better]
        objective = np.where(better, new_objective, objective)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-12, 1e12)
        stalled = stalled + 1 if gained.max() < 1e-9 else 0
        if stalled == 8:
            break
    return theta, objective


def huber(r: Array, delta: float) -> Array:
    """Mean over the last axis."""
    size = np.abs(r)
    return np.where(size <= delta, r**2 / 2, delta * (size - delta / 2)).mean(-1)


def _model(x: Array, y: Array, theta: Array) -> tuple[Array, Array]:
    """log L [R, n] and its derivatives [R, n, 5] by (log E, a, α, b, β), where A/N^α = exp(a - α x)."""
    e, a, alpha, b, beta = (value[:, None] for value in theta.T)
    terms = np.stack(np.broadcast_arrays(e + 0 * x, a - alpha * x, b - beta * y))
    top = terms.max(0)
    parts = np.exp(np.clip(terms - top, -700, 0))
    total = parts.sum(0)
    e_share, n_share, d_share = parts / total
    J = np.stack((e_share, n_share, -x * n_share, d_share, -y * d_share), -1)
    return top + np.log(total), J


def _law(theta: Array, x0: float, y0: float) -> Law:
    e, a, alpha, b, beta = theta
    with np.errstate(over="ignore"):
        return Law(np.exp(e), np.exp(a + alpha * x0), np.exp(b + beta * y0), alpha, beta)
