"""Plots of a scaling study, for a page (PNG) and for print (PDF)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .data import group_similar
from .fit import Study
from .isoflop import EQUAL_COMPUTE

STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 6.5, "lines.linewidth": 1.0, "lines.markersize": 4, "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip
MOST_NAMES = 10  # in a legend


def plot_study(study: Study, folder: Path) -> list[Path]:
    """Write fit.png and fit.pdf: losses and the law over compute, predicted against measured, the compute-optimal
    size and tokens, and the losses that learning rates, batches or equal compute were tried for."""
    with matplotlib.rc_context(STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5.2), layout="constrained")  # no pyplot: no window, nothing global
        (curves, parity), (best, minima) = figure.subplots(2, 2)
        _loss_curves(curves, study)
        _parity(parity, study)
        _optima(best, study)
        _minima(minima, study)
        written = [folder / "fit.png", folder / "fit.pdf"]
        _plain_loss_ticks(curves.yaxis, parity.xaxis, parity.yaxis, minima.yaxis)
        for axes in (curves, best, minima):
            axes.xaxis.set_minor_formatter("")  # over less than a decade they would be written over each other
        for path in written:
            figure.savefig(path)
    return written


def _colours(count: int) -> Any:
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))


def _loss_curves(axes: Any, study: Study) -> None:
    points, fit = study.data.used, study.usable_fit
    sizes = sorted({point.N for point in points})
    few = len(sizes) <= MOST_NAMES
    for N, colour in zip(sizes, _colours(len(sizes)), strict=True):
        own = [point for point in points if point.N == N]
        for held_out, style, note in ((False, {"marker": "o"}, ""), (True, {"marker": "*", "ms": 8}, ", held out")):
            if group := [point for point in own if (point in study.held_out) is held_out]:
                label = f"N = {_short(N)}{note}" if few else None
                axes.plot([p.C for p in group], [p.L for p in group], ls="", color=colour, label=label, **style)
        if fit is not None and few:
            D = np.geomspace(min(p.D for p in own) / 2, max(p.D for p in own) * 2, 50)
            per_token = np.mean([p.C / p.N / p.D for p in own])
            axes.plot(per_token * N * D, fit.law.loss(N, D), color=colour, lw=0.8)
    if fit is not None:
        C = np.geomspace(min(p.C for p in points), max(p.C for p in points) * 3, 50)
        best = fit.law.loss(*fit.law.optimal(C, study.flops_per_token[0]))
        axes.plot(C, best, "k--", lw=0.8, label="best size")
    title = "losses and the law" if fit is not None else "losses"
    axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel="loss L", title=title)
    axes.set_ylim(top=2 * max(point.L for point in points))
    axes.legend(loc="upper right", ncols=2)


def _parity(axes: Any, study: Study) -> None:
    axes.set(xlabel="measured loss", ylabel="predicted loss", title="law against runs")
    if study.usable_fit is None:
        _no_data(axes, "no law: see fit.json")
        return
    for held_out, mark, size, name in ((False, "o", 4, "fitted"), (True, "*", 8, "held out")):
        if own := [point for point in study.data.used if (point in study.held_out) is held_out]:
            predicted = [study.usable_fit.law.loss(p.N, p.D) for p in own]
            axes.plot([p.L for p in own], predicted, mark, ms=size, label=name, alpha=0.8)
    losses = [p.L for p in study.data.used]
    axes.plot([min(losses), max(losses)], [min(losses), max(losses)], "k-", lw=0.6)
    axes.set(xscale="log", yscale="log")
    axes.legend()


def _optima(axes: Any, study: Study) -> None:
    axes.set(xlabel="training compute C (FLOPs)", ylabel="N (parameters), D (tokens)")
    axes.set(xscale="log", yscale="log", title="compute-optimal size and tokens")
    minima, fit = study.isoflop.minima, study.usable_fit
    for index, (name, colour) in enumerate(zip("ND", ("C0", "C1"), strict=True)):
        if fit is not None:
            C = np.geomspace(min(p.C for p in study.data.used), max(p.C for p in study.data.used) * 10, 40)
            axes.plot(
                C, fit.law.optimal(C, study.flops_per_token[0])[index], color=colour, label=f"{name}, from the law"
            )
            draws = fit.draws.optimal(C[:, None], study.flops_per_token[0])[index]
            axes.fill_between(C, *np.array([fit.interval(row) for row in draws]).T, color=colour, alpha=0.2, lw=0)
        if minima:
            at = [m.at[2] for m in minima]
            axes.plot(at, [m.at[index] for m in minima], "s", color=colour, label=f"{name}, IsoFLOP")
            if power := study.isoflop.powers.get(name):
                label = f"{name} ∝ C^{power.exponents['C']:.2f}"
                axes.plot(at, [power(C=C) for C in at], ":", color=colour, label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _minima(axes: Any, study: Study) -> None:
    """Parabolas: over size at equal compute, or over learning rate at equal size and batch."""
    if study.isoflop.minima:
        title, variable, axis, minima = "equal compute", "N", "N (parameters)", study.isoflop.minima
        groups = group_similar(sorted(study.data.used, key=lambda p: p.C), lambda p: p.C, EQUAL_COMPUTE)
        lines = {f"C = {g[0].C:.1e}": [(p.N, p.L) for p in g] for g in groups if len(g) > 2}
    else:
        title, variable, axis, minima = "learning rates", "lr", "learning rate", study.tuning.minima
        tried = [p for p in (*study.data.used, *study.data.others) if p.lr and p.batch]
        lines = {f"N = {_short(g[0].N)}, batch {batch:g}": [(p.lr, p.L) for p in g if p.lr and p.batch == batch]
                 for g in group_similar(tried, lambda p: (p.N, p.D)) if len({p.lr for p in g}) > 2
                 for batch in sorted({p.batch for p in g if p.batch})}  # fmt: skip
    if not lines:
        _no_data(axes, "neither equal compute nor learning rates were tried")
        return
    axes.set(title=title, xlabel=axis, ylabel="loss L", xscale="log", yscale="log")
    for colour, (label, pairs) in zip(_colours(len(lines)), lines.items(), strict=True):
        axes.plot(*zip(*sorted(pairs), strict=True), "o", color=colour, label=label)
    for minimum in minima:
        if variable in minimum.place and minimum.curve:
            x = minimum.place[variable] * np.geomspace(0.25, 4, 50)
            axes.plot(x, np.exp(np.polyval(minimum.curve, np.log(x))), "k-", lw=0.5)
            axes.plot(minimum.place[variable], minimum.loss, "kx")
    if len(lines) <= MOST_NAMES:
        axes.legend()


def _no_data(axes: Any, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)


def _plain_loss_ticks(*axes: Any) -> None:
    """Plain numbers at 1, 2, 3, 5, 7 of every power of ten: losses rarely span one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in axes:
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    size, letter = next((pair for pair in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if value >= pair[0]), (1.0, ""))
    return f"{value / size:.3g}{letter}"
