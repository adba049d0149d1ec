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


def _colours(sizes: list[float]) -> dict[float, Any]:
    return dict(zip(sizes, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(sizes))), strict=True))


def _loss_curves(axes: Any, study: Study) -> None:
    points = study.data.used
    held_out = set(study.held_out)
    colours = _colours(sorted({point.N for point in points}))
    many = len(colours) > MOST_NAMES
    for N, colour in colours.items():
        own = [point for point in points if point.N == N]
        name = None if many else f"N = {_short(N)}"
        seen = [point for point in own if point not in held_out]
        axes.plot([p.C for p in seen], [p.L for p in seen], "o", color=colour, label=name if seen else None)
        new = [point for point in own if point in held_out]
        axes.plot([p.C for p in new], [p.L for p in new], "*", ms=8, color=colour,
                  label=f"{name}, held out" if new and name else None)  # fmt: skip
        if study.usable_fit is not None and not many:
            D = np.geomspace(min(p.D for p in own) / 2, max(p.D for p in own) * 2, 50)
            per_token = np.mean([p.C / p.N / p.D for p in own])
            axes.plot(per_token * N * D, study.usable_fit.law.loss(N, D), color=colour, lw=0.8)
    if study.usable_fit is not None:
        C = np.geomspace(min(p.C for p in points), max(p.C for p in points) * 3, 50)
        law = study.usable_fit.law
        axes.plot(C, law.loss(*law.optimal(C, study.flops_per_token[0])), "k--", lw=0.8, label="best size")
    title = "losses and the law" if study.usable_fit else "losses"
    axes.set(xscale="log", yscale="log", xlabel="training compute C (FLOPs)", ylabel="loss L", title=title)
    axes.set_ylim(top=2 * max(point.L for point in points))
    axes.legend(loc="upper right", ncols=2)


def _parity(axes: Any, study: Study) -> None:
    axes.set(xlabel="measured loss", ylabel="predicted loss", title="law against runs")
    if study.usable_fit is None:
        _no_data(axes, "no law: see fit.json")
        return
    held_out = set(study.held_out)
    law = study.usable_fit.law
    for unseen, mark, size, name in ((False, "o", 4, "fitted"), (True, "*", 8, "held out")):
        if own := [point for point in study.data.used if (point in held_out) is unseen]:
            axes.plot([p.L for p in own], [law.loss(p.N, p.D) for p in own], mark, ms=size, label=name, alpha=0.8)
    ends = [min(p.L for p in study.data.used), max(p.L for p in study.data.used)]
    axes.plot(ends, ends, "k-", lw=0.6)
    axes.set(xscale="log", yscale="log")
    axes.legend()


def _optima(axes: Any, study: Study) -> None:
    axes.set(xlabel="training compute C (FLOPs)", ylabel="N (parameters), D (tokens)")
    axes.set_title("compute-optimal size and tokens")
    if study.usable_fit is not None:
        C = np.geomspace(min(p.C for p in study.data.used), max(p.C for p in study.data.used) * 10, 40)
        best = study.usable_fit.law.optimal(C, study.flops_per_token[0])
        each = study.usable_fit.draws.optimal(C[:, None], study.flops_per_token[0])
        for name, line, draws, colour in zip("ND", best, each, ("C0", "C1"), strict=True):
            axes.plot(C, line, color=colour, label=f"{name}, from the law")
            low, high = np.array([study.usable_fit.interval(row) for row in draws]).T
            axes.fill_between(C, low, high, color=colour, alpha=0.2, lw=0)
    for index, (name, colour) in enumerate(zip("ND", ("C0", "C1"), strict=True)):
        if minima := study.isoflop.minima:
            at, values = [m.at[2] for m in minima], [m.at[index] for m in minima]
            axes.plot(at, values, "s", color=colour, label=f"{name}, IsoFLOP")
            if power := study.isoflop.powers.get(name):
                label = f"{name} ∝ C^{power.exponents['C']:.2f}"
                axes.plot(at, [power(C=C) for C in at], ":", color=colour, label=label)
    axes.set(xscale="log", yscale="log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _minima(axes: Any, study: Study) -> None:
    """Parabolas: over size at equal compute, or over learning rate or batch."""
    if study.isoflop.minima:
        by_compute = group_similar(sorted(study.data.used, key=lambda p: p.C), lambda p: p.C, EQUAL_COMPUTE)
        groups = [group for group in by_compute if len(group) > 2]
        lines = [("N", f"C = {g[0].C:.1e}", [(p.N, p.L) for p in g]) for g in groups]
        minima, title = study.isoflop.minima, "equal compute"
    else:
        everything = [p for p in (*study.data.used, *study.data.others) if p.lr and p.batch]
        groups = [g for g in group_similar(everything, lambda p: (p.N, p.D)) if len({p.lr for p in g}) > 2]
        lines = [("lr", f"N = {_short(g[0].N)}, batch {batch:g}", [(p.lr, p.L) for p in g if p.lr and p.batch == batch])
                 for g in groups for batch in sorted({p.batch for p in g if p.batch})]  # fmt: skip
        minima, title = study.tuning.minima, "learning rates"
    if not lines:
        _no_data(axes, "neither equal compute nor learning rates were tried")
        return
    axes.set(title=title, ylabel="loss L", xscale="log", yscale="log")
    axes.set_xlabel({"N": "N (parameters)", "lr": "learning rate"}[lines[0][0]])
    many = len(lines) > MOST_NAMES
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(lines)))
    for colour, (_, label, pairs) in zip(colours, lines, strict=True):
        axes.plot(*zip(*sorted(pairs), strict=True), "o", color=colour, label=None if many else label)
    name = lines[0][0]
    for minimum in minima:
        if name in minimum.place and minimum.curve:
            x = minimum.place[name] * np.geomspace(0.25, 4, 50)
            axes.plot(x, np.exp(np.polyval(minimum.curve, np.log(x))), "k-", lw=0.5)
            axes.plot(minimum.place[name], minimum.loss, "kx")
    if not many:
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
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"
