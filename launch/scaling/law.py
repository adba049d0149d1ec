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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares
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
LAST_DIGIT = 1e-15  # tolerance of fits: an exponent that has no bound drifts, and shows it in its interval


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
    theta = fit_constants(x, y, z, delta or 1e-3, restarts(z)).x
    if delta is None:
        for _ in range(2):  # the residuals' spread and the threshold settle together
            residuals = z - _model(x, y, theta)[0]
            spread = np.median(np.abs(residuals)) / 0.6745 * np.sqrt(len(z) / (len(z) - 5))
            delta = max(1.345 * float(spread), 1e-9)
            theta = fit_constants(x, y, z, delta, [theta]).x
    assert delta is not None
    fitted, J = _model(x, y, theta)
    residuals = z - fitted
    leverage = np.einsum("ni,ij,nj->n", J, np.linalg.pinv(J.T @ J), J)
    noise = residuals / np.sqrt(np.clip(1 - leverage, 0.05, None))
    noise -= noise.mean()
    resampled = fitted + np.random.default_rng(seed).choice(noise, (draws, len(z)))
    thetas = np.array([fit_constants(x, y, drawn, delta, [theta]).x for drawn in resampled])
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


# Least Huber loss ------------------------------------------------------------------------------------------


def fit_constants(x: Array, y: Array, z: Array, delta: float, starts: Iterable[Array]) -> OptimizeResult:
    """The best fit of log L = z at centred log N = x and log D = y, of those from `starts`: constants `x` (log E, a, α,
    b, β) and `cost`."""
    fits = [
        least_squares(
            lambda theta: _model(x, y, theta)[0] - z, start, jac=lambda theta: _model(x, y, theta)[1], loss="huber",
            f_scale=delta, x_scale="jac", xtol=LAST_DIGIT, ftol=LAST_DIGIT, gtol=LAST_DIGIT,
        )
        for start in starts
    ]  # fmt: skip
    return min(fits, key=lambda fit: fit.cost)


def restarts(z: Array) -> list[Array]:
    """Constants to start from, by the floor's share of the least loss, and those of the other terms."""
    low, middle, exponents = z.min(), np.median(z), (0.2, 0.8)
    grid = itertools.product((0.5, 0.95), (0.1, 0.5), exponents, exponents)
    return [
        np.array((low + np.log(floor), middle + np.log(share), alpha, middle + np.log(share), beta))
        for floor, share, alpha, beta in grid
    ]


def _model(x: Array, y: Array, theta: Array) -> tuple[Array, Array]:
    """log L [n] and its derivatives [n, 5] by (log E, a, α, b, β), where A/N^α = exp(a - α x)."""
    e, a, alpha, b, beta = theta
    terms = np.stack((e + 0 * x, a - alpha * x, b - beta * y))
    total = np.logaddexp.reduce(terms)
    e_share, n_share, d_share = np.exp(terms - total)
    return total, np.stack((e_share, n_share, -x * n_share, d_share, -y * d_share), -1)


def _law(theta: Array, x0: float, y0: float) -> Law:
    e, a, alpha, b, beta = theta
    with np.errstate(over="ignore"):
        return Law(np.exp(e), np.exp(a + alpha * x0), np.exp(b + beta * y0), alpha, beta)
