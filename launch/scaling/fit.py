"""Scaling study: everything that can be fitted to scaling data, as one object and as values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from .data import RunResult, ScalingData
from .isoflop import Minima, fit_isoflop, fit_learning_rate_and_batch
from .law import FARTHEST, LEAST_POINTS, PARAMETERS, LawFit, check_fit, fit_law


@dataclass(frozen=True)
class Study:
    """law_fit: None where too few or unsuitable runs were given. law_error: why the law must not be used, or "".
    refused: all that cannot be stated, with the reason. flops_per_token: C / (N D) of the fitted runs, their median and
    the largest ratio to one of them."""

    data: ScalingData
    held_out: tuple[RunResult, ...]
    law_fit: LawFit | None
    law_error: str
    isoflop: Minima
    tuning: Minima
    flops_per_token: tuple[float, float]

    @property
    def usable_fit(self) -> LawFit | None:
        """The fit if it supports statements about other runs."""
        return None if self.law_error else self.law_fit

    @property
    def refused(self) -> tuple[str, ...]:
        law = (f"the law: {self.law_error}",) if self.law_error else ()
        return (*law, *self.isoflop.refused, *self.tuning.refused)


def fit_study(data: ScalingData, hold_out: int | None = None, draws: int = 500, delta: float | None = None) -> Study:
    """Fit everything that the data allow. hold_out: how many runs of the largest N · D the fit does not see (default:
    one, where enough remain)."""
    by_size = sorted(data.used, key=lambda run: run.N * run.D)
    if hold_out is None:
        hold_out = 1 if len(by_size) > LEAST_POINTS else 0
    fitted, held_out = by_size[: len(by_size) - hold_out], by_size[len(by_size) - hold_out :]
    law_fit, law_error = None, ""
    try:
        N, D, L = (np.array([getattr(run, name) for run in fitted], np.float64) for name in "NDL")
        law_fit = fit_law(N, D, L, draws=draws, delta=delta)
        check_fit(law_fit)
    except ValueError as error:
        law_error = str(error)
    ratios = np.array([run.C / run.N / run.D for run in fitted] or [6.0])
    median = float(np.median(ratios))
    spread = float(max((ratios / median).max(), (median / ratios).max()))
    isoflop, tuning = fit_isoflop(data), fit_learning_rate_and_batch(data)
    return Study(data, tuple(held_out), law_fit, law_error, isoflop, tuning, (median, spread))


def as_json(study: Study, compute: Sequence[float] = ()) -> dict[str, Any]:
    """compute: FLOPs at which to give the best size, tokens and loss."""
    values: dict[str, Any] = {
        "points": [asdict(run) for run in study.data.used],
        "not_best": [asdict(run) for run in study.data.others],
        "left_out": [{"run": name, "why": reason} for name, reason in study.data.left_out],
        "refused": list(study.refused),
        "flops_per_parameter_and_token": study.flops_per_token[0],
        "flops_per_parameter_and_token_spread": study.flops_per_token[1],
    }
    for name, minima in {"isoflop": study.isoflop, "learning_rate_and_batch": study.tuning}.items():
        powers = {variable: asdict(power) for variable, power in minima.powers.items()}
        values[name] = {"minima": [asdict(minimum) for minimum in minima.minima], "powers": powers}
    if (fit := study.law_fit) is None:
        return values
    values["law"] = {name: fit.with_interval(attrgetter(name)) for name in PARAMETERS}
    values["law"]["exponent_N"] = fit.with_interval(attrgetter("exponent"))
    values |= {"level": fit.level, "delta": fit.delta, "error": float(np.sqrt((fit.residuals**2).mean()))}
    if study.usable_fit:
        values["held_out"] = []
        for run in study.held_out:
            try:
                loss, low, high = fit.predict(run.N, run.D)
            except ValueError as error:  # too far from what was fitted
                values["refused"].append(f"held out {run.name}: {error}")
                continue
            values["held_out"].append(
                {"run": run.name, "N": run.N, "D": run.D, "measured": run.L, "predicted": loss, "low": low,
                 "high": high, "relative_error": loss / run.L - 1, "inside": bool(low <= run.L <= high)}
            )  # fmt: skip
        values["optimal"] = [optimum(fit, C, study.flops_per_token[0]) for C in compute]
    return values


def optimum(fit: LawFit, C: float, flops_per_token: float) -> dict[str, Any]:
    """Size, tokens and loss at compute C, or "refused" with the reason."""
    if FARTHEST * fit.compute * flops_per_token < C:
        return {"C": C, "refused": f"more than {FARTHEST:g} times the fit's largest run"}
    return {
        "C": C,
        "N": fit.with_interval(lambda law: law.optimal(C, flops_per_token)[0]),
        "D": fit.with_interval(lambda law: law.optimal(C, flops_per_token)[1]),
        "loss": fit.with_interval(lambda law: law.loss(*law.optimal(C, flops_per_token))),
    }
