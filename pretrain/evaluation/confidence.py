"""Figures of an evaluation: means over clips with 95 % intervals, as tables to read, to keep and to draw.

What was drawn at random is the clip. Its frames resemble each other, so that counting them one by one would give
intervals that are far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

CONFIDENCE = 0.95
SHOWN = 8  # columns of a table as text
OTHERS = "other's "  # before the rows of a run that is compared with

# What clips add to a row of a table: numerators and denominators `[clips, columns]`, whose totals' ratio is estimated.
Part = tuple[Tensor, Tensor]


def ratio_over_clips(sums_NK: Tensor, counts_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Ratio of totals over clips and half the width of its 95 % interval, `[K]` float64 each.

    The ratio estimator of sampling by clusters (Cochran 1977, Sampling Techniques, section 2.11 and chapter 6): for
    r = Σ a / Σ b over n clips, Var(r) ≈ n / (n-1) · Σ (a - r b)² / (Σ b)², with Student's t of n-1 degrees of
    freedom. Where all b are equal it is the usual interval of a mean. Clips with b = 0 take no part. NaN where no
    clip takes part; a half width of NaN where only one does.
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


def summed(sums_BK: Tensor, counts_BK: Tensor | None = None) -> Part:
    """A row whose first column is the total of all others; without counts, of plain values."""
    counts_BK = torch.ones_like(sums_BK) if counts_BK is None else counts_BK
    a, b = (torch.cat((x.sum(1, keepdim=True), x), 1).double().cpu() for x in (sums_BK, counts_BK))
    return a, b


def join(parts: Sequence[Part]) -> Part:
    """Clips of several batches; those with fewer columns take no part in the last ones."""
    most = max(sums.shape[1] for sums, _ in parts)
    a, b = (
        torch.cat([torch.nn.functional.pad(x, (0, most - x.shape[1])) for x in of]) for of in zip(*parts, strict=True)
    )
    return a, b


@dataclass(frozen=True)
class Table:
    """Estimates by row and column; the first column sums up the others. Lists hold NaN for what is not known.

    axis: what the columns go along. unit: of the values. digits: after the point, as text.
    """

    title: str
    axis: str
    unit: str
    columns: list[str]
    rows: dict[str, tuple[list[float], list[float]]]
    digits: int = 4

    @staticmethod
    def of(title: str, axis: str, unit: str, columns: Sequence[str], rows: Mapping[str, Part], digits: int) -> Table:
        found = {}
        for name, part in rows.items():
            mean, half = ratio_over_clips(*part)
            found[name] = (mean.tolist(), half.tolist())
        return Table(title, axis, unit, list(columns), found, digits)

    def json(self) -> dict[str, Any]:
        """Plain values; null for what is not known."""

        def plain(values: list[float]) -> list[float | None]:
            return [round(value, 6) if math.isfinite(value) else None for value in values]

        rows = {name: {"mean": plain(mean), "half_width": plain(half)} for name, (mean, half) in self.rows.items()}
        return {"title": self.title, "axis": self.axis, "unit": self.unit, "columns": self.columns, "rows": rows}

    def shown(self) -> list[int]:
        """Columns to print: all, or the first ones and some of the others up to the last."""
        last = len(self.columns) - 1
        return sorted({round(i * last / (SHOWN - 1)) for i in range(SHOWN)} | {0, min(1, last)})

    def text(self) -> str:
        columns, left = self.shown(), max(map(len, [self.axis, *self.rows])) + 2
        cells = {
            name: [f"{mean[i]:.{self.digits}f} ±{half[i]:.{self.digits}f}" for i in columns]
            for name, (mean, half) in self.rows.items()
        }
        width = 2 + max(len(cell) for row in [*cells.values(), [self.columns[i] for i in columns]] for cell in row)
        head = f"{self.axis:<{left}}" + "".join(f"{self.columns[i]:>{width}}" for i in columns)
        lines = [f"{name:<{left}}" + "".join(f"{cell:>{width}}" for cell in row) for name, row in cells.items()]
        return "\n".join([f"{self.title} ({self.unit})", head, *lines]).replace("nan", "  –")

    def metrics(self, prefix: str) -> dict[str, float]:
        """What the text shows, by names that MLflow takes."""
        return {
            prefix + _plain(f"{row}/{self.columns[i]}"): mean[i]
            for row, (mean, _) in self.rows.items()
            for i in self.shown()
            if math.isfinite(mean[i])
        }


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)


def draw(tables: Sequence[Table], title: str) -> bytes:
    """All tables as curves with their intervals, a PNG. Of rows named `a - b` only the sum is told."""
    from io import BytesIO

    from matplotlib.figure import Figure  # no pyplot: no window, nothing global

    figure = Figure(figsize=(8, 2.8 * len(tables)), layout="constrained")
    figure.suptitle(title)
    for axes, table in zip(figure.subplots(len(tables), squeeze=False).flat, tables, strict=True):
        at, colours = torch.arange(len(table.columns) - 1), dict[str, Any]()
        for name, (mean, half) in table.rows.items():
            label = f"{name}: {mean[0]:.{table.digits}f} ±{half[0]:.{table.digits}f}".replace("nan", "–")
            if " - " in name:
                axes.plot([], [], " ", label=label)
                continue
            own = name.removeprefix(OTHERS)
            (line,) = axes.plot(
                at, mean[1:], ".-" if own == name else ".:", lw=1, ms=4, label=label, c=colours.get(own)
            )
            colours[own] = line.get_color()
            low, up = ([m + sign * h for m, h in zip(mean[1:], half[1:], strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, up, color=colours[own], alpha=0.15, lw=0)
        some = [i for i in table.shown() if i]
        axes.set_xticks([i - 1 for i in some], [table.columns[i] for i in some])
        axes.set_title(table.title, fontsize=9)
        axes.set_xlabel(table.axis, fontsize=8)
        axes.set_ylabel(table.unit, fontsize=8)
        axes.tick_params(labelsize=7)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": 7, "title_fontsize": 7}
        axes.legend(title=f"{table.columns[0]}, 95 % interval", **beside)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
