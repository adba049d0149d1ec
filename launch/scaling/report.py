"""`msc fit`: the report on a scaling study as text, JSON and plots, and its metrics for MLflow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msc.datasets.files import write_atomically
from msc.pretrain.tracking.mlflow_store import read_identity
from msc.pretrain.tracking.tracker import MetricsConfig, Tracker

from .data import read_scaling_data
from .fit import Study, as_json, fit_study

SYMBOLS = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}
SPREAD = 1.1  # of C / (N D) over the runs, above which the closed form of the optimum is only rough


def report_fit(
    path: Path, out: Path | None = None, loss: str = "held out", hold_out: int | None = None, draws: int = 500,
    delta: float | None = None, compute: Sequence[float] = (), tracking: str = "", only: Sequence[str] = (),
) -> tuple[str, bool]:  # fmt: skip
    """Fit a sweep folder or a table, write fit.json and plots, log to MLflow; (report, whether the law is usable).

    out: default: the sweep folder, or a folder beside the table named after it.
    """
    study = fit_study(read_scaling_data(path, loss, only), hold_out, draws, delta)
    largest = max((run.C for run in study.data.used), default=0.0)
    values = as_json(study, compute or [factor * largest for factor in (1, 10) if largest])
    values["only"] = list(only)
    folder = out or (path if path.is_dir() else path.with_name(f"{path.stem}-fit"))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "fit.json"]
    write_atomically(files[0], json.dumps(values, indent=1).encode())
    if study.data.used:
        from .plots import plot_study  # matplotlib takes a second to import

        files += plot_study(study, folder)
    log_to_mlflow(path, folder, tracking, values, files)
    return f"{text_report(study, values)}\nwritten: {', '.join(map(str, files))}", study.usable_fit is not None


def log_to_mlflow(path: Path, folder: Path, tracking: str, values: dict[str, Any], files: Sequence[Path]) -> None:
    """Into the run of the sweep or of an earlier fit, if the folder has one."""
    identity = read_identity(folder)
    tracker = Tracker(MetricsConfig(tracking_uri=tracking or identity.get("tracking_uri", ""), system=False))
    tracker.start(folder, {"fit": str(path)}, "", f"fit {path.stem}", attach=bool(identity))
    metrics = {
        f"fit/{name}{suffix}": value[key]
        for name, value in values.get("law", {}).items()
        for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high"))
    }
    metrics |= {f"fit/held_out_error/{run['run']}": run["relative_error"] for run in values.get("held_out", [])}
    tracker.log(metrics or {"fit/points": float(len(values["points"]))}, 0)
    for file in files:
        tracker.artifact(file, "fit")
    tracker.finish("FINISHED")


def text_report(study: Study, values: dict[str, Any]) -> str:
    """values: `as_json` of the study."""
    lines = [f"{len(study.data.used)} runs, {len(study.held_out)} of them held out from the fit"]
    if study.data.others:
        lines.append(f"{len(study.data.others)} more runs with another learning rate or batch were not the best")
    lines += [f"left out: {name}: {reason}" for name, reason in study.data.left_out]
    if law := values.get("law"):
        lines += ["", f"L = E + A/N^α + B/D^β{'':<12}{values['level']:.0%} interval"]
        lines += [f"  {symbol:<4}{with_interval(law[name])}" for name, symbol in SYMBOLS.items()]
        error, delta = values["error"], values["delta"]
        lines.append(f"  error of log L {error:.2%} (root mean square), Huber threshold {delta:.2g}")
        lines.append(f"  best N ∝ C^a, D ∝ C^(1-a): a = {with_interval(law['exponent_N'])}")
    for run in values.get("held_out", []):
        lines.append(
            f"held out {run['run']}: predicted {run['predicted']:.4g} ({run['low']:.4g} to {run['high']:.4g}), "
            f"measured {run['measured']:.4g}: {run['relative_error']:+.1%}, "
            f"{'inside' if run['inside'] else 'OUTSIDE'} the interval"
        )
    flops_per_token, spread = study.flops_per_token
    if spread > SPREAD and values.get("optimal"):
        lines.append(
            f"C / (N D) differs by up to {spread:.2f} between runs (attention, embeddings): the optimum "
            f"below is for {flops_per_token:.2f} and so only rough"
        )
    for best in values.get("optimal", []):
        optimum = f"refused, {best['refused']}" if "refused" in best else ", ".join(
            f"{name} {with_interval(best[name])}" for name in ("N", "D", "loss")
        )  # fmt: skip
        lines.append(f"at {best['C']:.2e} FLOPs: {optimum}")
    for name, power in (*study.isoflop.powers.items(), *study.tuning.powers.items()):
        terms = " ".join(f"{variable}^{exponent:.3f}" for variable, exponent in power.exponents.items())
        label = f"IsoFLOP {name}" if name in "ND" else f"best {name}"
        lines.append(f"{label} = {power.factor:.3g} {terms} ({power.minima} minima, off by up to {power.spread:.2f}×)")
    for minimum in study.tuning.minima:
        place = ", ".join(f"{name} {value:.3g}" for name, value in minimum.place.items())
        lines.append(f"at N = {minimum.at[0]:.3g}, D = {minimum.at[1]:.3g}: best {place} ({minimum.points} runs)")
    return "\n".join([*lines, *(f"refused: {reason}" for reason in values["refused"])])


def with_interval(value: dict[str, float]) -> str:
    return f"{value['value']:<10.4g} ({value['low']:.4g} to {value['high']:.4g})"
