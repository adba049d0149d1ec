"""`msc fit`: from the runs of a sweep, or a table of losses, to a scaling law; a table, JSON, plots, MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msc.datasets.files import write_atomically
from msc.pretrain.tracking.mlflow_store import read_identity
from msc.pretrain.tracking.tracker import MetricsConfig, Tracker

from .data import Point, Points, read_points
from .isoflop import Optima, iso_flop, learning_rate_and_batch
from .law import FARTHEST, LEAST_POINTS, PARAMETERS, Fit, check_fit, fit

NAMES = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}
SPREAD = 1.1  # of C / (N D) over the runs, above which the closed form of the optimum is only rough


@dataclass(frozen=True)
class Study:
    """All that was found. fit is None where it was refused; refused: what cannot be said, with the reason. per_token:
    C / (N D) of the fit's runs, their median and its largest ratio to one of them."""

    points: Points
    held_out: tuple[Point, ...]
    fit: Fit | None
    flops: Optima
    rates: Optima
    refused: tuple[str, ...]
    per_token: tuple[float, float]


def study(points: Points, hold_out: int | None = None, draws: int = 500, delta: float | None = None) -> Study:
    """Fit everything that the points allow.

    hold_out: how many runs of the largest N · D the fit does not see (default: one, where enough remain).
    """
    by_size = sorted(points.used, key=lambda point: point.N * point.D)
    if hold_out is None:
        hold_out = 1 if len(by_size) > LEAST_POINTS else 0
    inside, outside = by_size[: len(by_size) - hold_out], by_size[len(by_size) - hold_out :]
    refused, found = [], None
    try:
        N, D, L = (np.array([getattr(p, name) for p in inside], np.float64) for name in "NDL")
        found = fit(N, D, L, draws=draws, delta=delta)
        check_fit(found)
    except ValueError as error:
        refused.append(f"the law: {error}")
    per_token = np.array([point.C / point.N / point.D for point in inside]) if inside else np.array([6.0])
    middle = float(np.median(per_token))
    spread = float(max((per_token / middle).max(), (middle / per_token).max()))
    flops, rates = iso_flop(points), learning_rate_and_batch(points)
    refused += [*flops.refused, *rates.refused]
    return Study(points, tuple(outside), found, flops, rates, tuple(refused), (middle, spread))


def usable(found: Study) -> bool:
    """Whether statements about other runs may be made."""
    return found.fit is not None and not any(reason.startswith("the law") for reason in found.refused)


def results(found: Study, compute: Sequence[float] = ()) -> dict[str, Any]:
    """For JSON. compute: FLOPs at which to say what is best."""
    values: dict[str, Any] = {
        "points": [asdict(point) for point in found.points.used],
        "not_best": [asdict(point) for point in found.points.others],
        "left_out": [{"run": name, "why": why} for name, why in found.points.left_out],
        "refused": list(found.refused),
        "flops_per_parameter_and_token": found.per_token[0],
        "flops_per_parameter_and_token_spread": found.per_token[1],
        "isoflop": {"minima": [asdict(m) for m in found.flops.minima],
                    "powers": {name: asdict(power) for name, power in found.flops.powers.items()}},
        "learning_rate_and_batch": {"minima": [asdict(m) for m in found.rates.minima],
                                    "powers": {name: asdict(power) for name, power in found.rates.powers.items()}},
    }  # fmt: skip
    if found.fit is None:
        return values
    law, draws = found.fit.law, found.fit.draws
    values["law"] = {name: interval(found.fit, getattr(law, name), getattr(draws, name)) for name in PARAMETERS}
    values["law"]["exponent_N"] = interval(found.fit, law.exponent, draws.exponent)
    values["level"], values["delta"] = found.fit.level, found.fit.delta
    values["error"] = float(np.sqrt((found.fit.residuals**2).mean()))
    if usable(found):
        values["held_out"] = []
        for point in found.held_out:
            try:
                values["held_out"].append(prediction(found.fit, point))
            except ValueError as error:  # too far from what was fitted
                values["refused"].append(f"held out {point.name}: {error}")
        values["optimal"] = [optimum(found, C) for C in compute]
    return values


def interval(fit: Fit, value: float, draws: Any) -> dict[str, float]:
    low, high = fit.interval(draws)
    return {"value": float(value), "low": low, "high": high}


def prediction(fit: Fit, point: Point) -> dict[str, Any]:
    """What the law says of a run that it has not seen."""
    expected, low, high = fit.predict(point.N, point.D)
    error = expected / point.L - 1
    return {"run": point.name, "N": point.N, "D": point.D, "measured": point.L, "predicted": expected, "low": low,
            "high": high, "relative_error": error, "inside": bool(low <= point.L <= high)}  # fmt: skip


def optimum(found: Study, C: float) -> dict[str, Any]:
    """Size, tokens and loss at compute C; what is refused says why instead."""
    assert found.fit is not None
    law, draws, per_token = found.fit.law, found.fit.draws, found.per_token[0]
    if FARTHEST * found.fit.compute * per_token < C:
        return {"C": C, "refused": f"more than {FARTHEST:g} times the fit's largest run"}
    N, D = law.optimal(C, per_token)
    each_N, each_D = draws.optimal(C, per_token)
    return {"C": C, "N": interval(found.fit, N, each_N), "D": interval(found.fit, D, each_D),
            "loss": interval(found.fit, law.loss(N, D), draws.loss(each_N, each_D))}  # fmt: skip


# For people -------------------------------------------------------------------------------------------------


def report(found: Study, values: dict[str, Any]) -> str:
    lines = [f"{len(found.points.used)} runs, {len(found.held_out)} of them held out from the fit"]
    if found.points.others:
        lines.append(f"{len(found.points.others)} more runs with another learning rate or batch were not the best")
    lines += [f"left out: {name}: {why}" for name, why in found.points.left_out]
    if "law" in values:
        percent = f"{values['level']:.0%}"
        lines += ["", f"L = E + A/N^α + B/D^β{'':<12}{percent} interval", *(
            f"  {NAMES[name]:<4}{shown(values['law'][name])}" for name in PARAMETERS
        )]  # fmt: skip
        lines.append(
            f"  error of log L {values['error']:.2%} (root mean square), Huber threshold {values['delta']:.2g}"
        )
        a = values["law"]["exponent_N"]
        lines.append(f"  best N ∝ C^a, D ∝ C^(1-a): a = {shown(a)}")
    for held in values.get("held_out", []):
        lines.append(
            f"held out {held['run']}: predicted {held['predicted']:.4g} ({held['low']:.4g} to {held['high']:.4g}), "
            f"measured {held['measured']:.4g}: {held['relative_error']:+.1%}, "
            f"{'inside' if held['inside'] else 'OUTSIDE'} the interval"
        )
    if found.per_token[1] > SPREAD and values.get("optimal"):
        lines.append(
            f"C / (N D) differs by up to {found.per_token[1]:.2f} between runs (attention, embeddings): the optimum "
            f"below is for {found.per_token[0]:.2f} and so only rough"
        )
    for best in values.get("optimal", []):
        if "refused" in best:
            lines.append(f"at {best['C']:.2e} FLOPs: refused, {best['refused']}")
            continue
        lines.append(
            f"at {best['C']:.2e} FLOPs: N {shown(best['N'])}, D {shown(best['D'])}, loss {shown(best['loss'])}"
        )
    for name, power in (*found.flops.powers.items(), *found.rates.powers.items()):
        terms = " ".join(f"{variable}^{exponent:.3f}" for variable, exponent in power.exponents.items())
        what = f"IsoFLOP {name}" if name in "ND" else f"best {name}"
        lines.append(f"{what} = {power.factor:.3g} {terms} ({power.minima} minima, off by up to {power.spread:.2f}×)")
    for minimum in found.rates.minima:
        place = ", ".join(f"{name} {value:.3g}" for name, value in minimum.place.items())
        lines.append(f"at N = {minimum.at[0]:.3g}, D = {minimum.at[1]:.3g}: best {place} ({minimum.points} runs)")
    lines += [f"refused: {reason}" for reason in values["refused"]]
    return "\n".join(lines)


def shown(value: dict[str, float]) -> str:
    return f"{value['value']:<10.4g} ({value['low']:.4g} to {value['high']:.4g})"


# The command ------------------------------------------------------------------------------------------------


def fit_file(
    path: Path, out: Path | None = None, loss: str = "held out", hold_out: int | None = None, draws: int = 500,
    delta: float | None = None, compute: Sequence[float] = (), tracking: str = "", only: Sequence[str] = (),
) -> tuple[str, bool]:  # fmt: skip
    """Fit a sweep folder or a table, write fit.json and plots, log to MLflow; (report, whether a law was found).

    out: default: the sweep folder, or a folder beside the table named after it.
    """
    found = study(read_points(path, loss, only), hold_out, draws, delta)
    largest = max((point.C for point in found.points.used), default=0.0)
    values = results(found, compute or [factor * largest for factor in (1, 10) if largest])
    values["only"] = list(only)
    folder = out or (path if path.is_dir() else path.with_name(f"{path.stem}-fit"))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fit.json", json.dumps(values, indent=1).encode())
    written = [folder / "fit.json"]
    if found.points.used:
        from .plots import draw

        written += draw(found, folder)
    known = read_identity(folder)  # of the sweep, or of an earlier fit
    tracker = Tracker(MetricsConfig(tracking_uri=tracking or known.get("tracking_uri", ""), system=False))
    tracker.start(folder, {"fit": str(path)}, "", f"fit {path.stem}", attach=bool(known))
    tracker.log(dict(numbers(values)), 0)
    for file in written:
        tracker.artifact(file, "fit")
    tracker.finish("FINISHED")
    text = report(found, values)
    return f"{text}\nwritten: {', '.join(map(str, written))}", usable(found)


def numbers(values: dict[str, Any]) -> list[tuple[str, float]]:
    """What of the results are metrics."""
    found = [(f"fit/{name}{end}", value[key]) for name, value in values.get("law", {}).items()
             for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))]  # fmt: skip
    found += [(f"fit/held_out_error/{held['run']}", held["relative_error"]) for held in values.get("held_out", [])]
    return found or [("fit/points", float(len(values["points"])))]
