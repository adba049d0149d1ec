"""Confidence intervals of an evaluation: ratios over clips with 95 % intervals, as tables for text, JSON and figures.

The clip is the unit of sampling: frames of one clip resemble each other, so counting them one by one would give
intervals that are far too narrow.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import pad

from msc.datasets.text_table import text_table

CONFIDENCE = 0.95
TEXT_COLUMNS = 8  # of a table as text
OTHER_RUN = "other's "  # before the rows of a run that is compared with

# Numerators and denominators of every clip, `[clips, columns]` each; what is estimated is the ratio of their totals.
ClipRatios = tuple[Tensor, Tensor]


def ratio_over_clips(sums_NK: Tensor, counts_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio of totals over clips and half the width of its 95 % interval, `[K]` float64 each.

    The ratio estimator of cluster sampling (Cochran 1977, Sampling Techniques, section 2.11 and chapter 6): for
    r = Σ a / Σ b over n clips, Var(r) ≈ n / (n-1) · Σ (a - r b)² / (Σ b)², with Student's t of n-1 degrees of
    freedom. Where all b are equal it is the usual interval of a mean. Clips with b = 0 are left out. NaN where there is
    no clip; a half width of NaN where there is only one.
    """
    b = counts_NK.double()
    a = sums_NK.double().where(b != 0, 0)
    clips, total = (b != 0).sum(0), b.sum(0)
    ratio = (a.sum(0) / total).where(total != 0, math.nan)
    spread = (a - ratio * b).square().sum(0).sqrt() / total.abs()
    freedom = (clips - 1).double()
    quantile = torch.from_numpy(stdtrit(freedom.numpy(), (1 + CONFIDENCE) / 2))
    half = quantile * spread * (clips / freedom).sqrt()
    return ratio, half.where(clips > 1, math.nan)


def with_total(sums_BK: Tensor, counts_BK: Tensor | None = None) -> ClipRatios:
    """The columns after a first one that is the total of all; without counts, of plain values."""
    counts_BK = torch.ones_like(sums_BK) if counts_BK is None else counts_BK
    a, b = (torch.cat((x.sum(1, keepdim=True), x), 1).double().cpu() for x in (sums_BK, counts_BK))
    return a, b


def concatenate(batches: Sequence[ClipRatios]) -> ClipRatios:
    """Clips of several batches; those with fewer columns have counts of 0 in the others."""
    columns = max(sums.shape[1] for sums, _ in batches)
    a, b = (torch.cat([pad(x, (0, columns - x.shape[1])) for x in tensors]) for tensors in zip(*batches, strict=True))
    return a, b


@dataclass(frozen=True)
class Table:
    """Estimates and half widths by row and column; the first column is that of the total. NaN where there is none.

    axis: what the columns are values of. unit: of the estimates. digits: after the point, as text.
    """

    title: str
    axis: str
    unit: str
    columns: list[str]
    rows: dict[str, tuple[list[float], list[float]]]
    digits: int = 4

    @staticmethod
    def of(
        title: str, axis: str, unit: str, columns: Sequence[str], rows: Mapping[str, ClipRatios], digits: int
    ) -> Table:
        estimates = {name: ratio_over_clips(*ratios) for name, ratios in rows.items()}
        lists = {name: (mean.tolist(), half.tolist()) for name, (mean, half) in estimates.items()}
        return Table(title, axis, unit, list(columns), lists, digits)

    def json(self) -> dict[str, Any]:
        """Plain values, null for NaN."""

        def plain(values: list[float]) -> list[float | None]:
            return [round(value, 6) if math.isfinite(value) else None for value in values]

        rows = {name: {"mean": plain(mean), "half_width": plain(half)} for name, (mean, half) in self.rows.items()}
        return {"title": self.title, "axis": self.axis, "unit": self.unit, "columns": self.columns, "rows": rows}

    def main_columns(self) -> list[int]:
        """Columns to print: all, or the first two and evenly spaced ones up to the last."""
        last = len(self.columns) - 1
        return sorted({round(i * last / (TEXT_COLUMNS - 1)) for i in range(TEXT_COLUMNS)} | {0, min(1, last)})

    def text(self) -> str:
        columns, digits = self.main_columns(), self.digits
        rows = [
            [name, *(f"{mean[i]:.{digits}f} ±{half[i]:.{digits}f}".replace("nan", "  –") for i in columns)]
            for name, (mean, half) in self.rows.items()
        ]
        table = text_table(rows, [self.axis, *(self.columns[i] for i in columns)], align="<>")
        return f"{self.title} ({self.unit})\n{table}"

    def metrics(self, prefix: str) -> dict[str, float]:
        """The columns of the text, under names that MLflow accepts."""
        return {
            prefix + re.sub(r"[^\w\-./ ]", "_", f"{row}/{self.columns[i]}"): mean[i]
            for row, (mean, _) in self.rows.items()
            for i in self.main_columns()
            if math.isfinite(mean[i])
        }


def draw(tables: Sequence[Table], title: str) -> bytes:
    """All tables as curves with their intervals, a PNG. Rows named `a - b` have their total in the legend only."""
    from matplotlib.figure import Figure  # no pyplot: no window, nothing global

    figure = Figure(figsize=(8, 2.8 * len(tables)), layout="constrained")
    figure.suptitle(title)
    for axes, table in zip(figure.subplots(len(tables), squeeze=False).flat, tables, strict=True):
        positions, colours = torch.arange(len(table.columns) - 1), dict[str, Any]()
        for name, (mean, half) in table.rows.items():
            label = f"{name}: {mean[0]:.{table.digits}f} ±{half[0]:.{table.digits}f}".replace("nan", "–")
            if " - " in name:
                axes.plot([], [], " ", label=label)
                continue
            own = name.removeprefix(OTHER_RUN)
            style = ".-" if own == name else ".:"
            (line,) = axes.plot(positions, mean[1:], style, lw=1, ms=4, label=label, c=colours.get(own))
            colours[own] = line.get_color()
            low, up = ([m + sign * h for m, h in zip(mean[1:], half[1:], strict=True)] for sign in (-1, 1))
            axes.fill_between(positions, low, up, color=colours[own], alpha=0.15, lw=0)
        ticks = [i for i in table.main_columns() if i]
        axes.set_xticks([i - 1 for i in ticks], [table.columns[i] for i in ticks])
        axes.set_title(table.title, fontsize=9)
        axes.set_xlabel(table.axis, fontsize=8)
        axes.set_ylabel(table.unit, fontsize=8)
        axes.tick_params(labelsize=7)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": 7, "title_fontsize": 7}
        axes.legend(title=f"{table.columns[0]}, 95 % interval", **beside)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
