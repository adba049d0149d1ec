"""Tables and plots of study.py's results.

    python tests/bench/study_report.py RESULTS.jsonl --out docs/attention.png

Prints Markdown; losses are means over seeds, with the range where there are several.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy.special import j0
from study import CONTEXT, HIDDEN, QUERY, SIDE, TASKS, VARIANTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FRAMES = 16  # of the fields' clips
LOOK = 2  # index in QUERY of the noise at which context matters and is plotted
FAR = {  # what can only be known from far back
    "curtains": f"the first frame of a picture, and of its return {HIDDEN} frames after it was last seen",
    "camera": "the columns that enter, which in the second turn were seen 18 frames ago",
}
Runs = dict[tuple[str, str], list[dict]]


def field_bounds(t_q: float, t_c: float) -> tuple[float, float]:
    """Velocity error at the last frame of a translating 1/f² field, unit speed, unknown direction:

    (the best linear estimate from all frames, the best of one who is told the direction). Both are sums over spatial
    frequencies f: over directions the correlation at lag l averages to J0(2π|f|l); with the direction known all
    frames are observations of one field, and their signal-to-noise ratios add up. The error of the velocity is
    that of the clean frame over t_q².
    """
    f = np.fft.fftfreq(SIDE)
    radius = np.hypot(f[:, None], f[None]).ravel()
    power = np.maximum(radius, 1 / SIDE) ** -2.0
    power[0] = 0
    power = power / power.mean()
    t = np.full(FRAMES, t_c)
    t[-1] = t_q
    lags = np.abs(np.subtract.outer(np.arange(FRAMES), np.arange(FRAMES)))
    linear = told = 0.0
    with np.errstate(divide="ignore"):
        gained = (((1 - t) / t) ** 2).sum()
    for signal, r in zip(power, radius, strict=True):
        if not signal:
            continue
        shared = signal * j0(2 * math.pi * r * lags)
        seen = np.outer(1 - t, 1 - t) * shared + np.diag(t**2 + 1e-12)
        asked = (1 - t) * shared[-1]
        linear += signal - asked @ np.linalg.solve(seen, asked)
        told += 0.0 if math.isinf(gained) else signal / (1 + signal * gained)
    return linear / len(power) / t_q**2, told / len(power) / t_q**2


def load(path: Path) -> Runs:
    runs: Runs = defaultdict(list)
    for line in path.read_text().splitlines():
        run = json.loads(line)
        if not any(other["seed"] == run["seed"] for other in runs[run["task"], run["variant"]]):
            runs[run["task"], run["variant"]].append(run)
    return runs


def spread(values: list[float]) -> str:
    """Mean, and the range of several."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def tables(runs: Runs) -> None:
    tasks = [task for task in TASKS if any(key[0] == task for key in runs)]
    print("Held-out loss, noise independent per frame:\n")
    print("| variant | " + " | ".join(tasks) + " |\n| --- |" + " ---: |" * len(tasks))
    for variant in VARIANTS:
        cells = [spread([run["loss"] for run in runs.get((task, variant), [])]) for task in tasks]
        print(f"| {variant} | " + " | ".join(cells) + " |")
    for task in tasks:
        print(f"\n{task}: error of a frame at noise t_q, all earlier frames at t_c, by t_q / t_c:\n")
        places = [(i, j) for i in range(len(QUERY)) for j in range(len(CONTEXT))]
        print("| variant | " + " | ".join(f"{QUERY[i]:g} / {CONTEXT[j]:g}" for i, j in places) + " |")
        print("| --- |" + " ---: |" * len(places))
        for variant in VARIANTS:
            if found := runs.get((task, variant)):
                print(f"| {variant} | " + " | ".join(f"{mean(found, i, j):.3f}" for i, j in places) + " |")
        if task == "fields":
            bounds = [field_bounds(QUERY[i], CONTEXT[j]) for i, j in places]
            for name, row in zip(("best linear", "told the direction"), zip(*bounds, strict=True), strict=True):
                print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    print("\nRoll-out of 4 frames in 4 steps: squared error of the first and the last, by noise put on the past:\n")
    levels = list(next(iter(runs.values()))[0]["roll_out"])
    print("| task | variant | " + " | ".join(f"level {level}" for level in levels) + " |")
    print("| --- | --- |" + " ---: |" * len(levels))
    for task in tasks:
        for variant in VARIANTS:
            if found := runs.get((task, variant)):
                errors = [np.mean([run["roll_out"][level]["error"] for run in found], 0) for level in levels]
                print(f"| {task} | {variant} | " + " | ".join(f"{e[0]:.3f}, {e[-1]:.3f}" for e in errors) + " |")
    for task, what in FAR.items():
        if task in tasks:
            print(f"\n{task}: error of {what}, by t_q:\n")
            print("| variant | turn | " + " | ".join(f"{q:g}" for q in QUERY) + " |")
            print("| --- | --- |" + " ---: |" * len(QUERY))
            for variant in VARIANTS:
                for turn in ("first", "second"):
                    if found := runs.get((task, variant)):
                        values = [spread([run["far"][turn][str(q)] for run in found]) for q in QUERY]
                        print(f"| {variant} | {turn} | " + " | ".join(values) + " |")


def mean(found: list[dict], i: int, j: int) -> float:
    return sum(run["grid"][i][j] for run in found) / len(found)


def plot(runs: Runs, path: Path) -> None:
    tasks = [task for task in TASKS if any(key[0] == task for key in runs)]
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.2 * len(tasks), 7), squeeze=False, layout="constrained")
    colours = dict(zip(VARIANTS, matplotlib.color_sequences["tab10"], strict=False))
    for column, task in enumerate(tasks):
        names = [name for name, variant in VARIANTS.items() if (task, name) in runs and not variant.prefix]
        above, below = axes[0, column], axes[1, column]
        for place, variant in enumerate(names):
            losses = [run["loss"] for run in runs[task, variant]]
            above.plot([place] * len(losses), losses, "o", color=colours[variant])
            errors = [mean(runs[task, variant], LOOK, j) for j in range(len(CONTEXT))]
            below.plot(CONTEXT, errors, color=colours[variant], label=variant)
        above.set_xticks(range(len(names)), names, rotation=60)
        above.set_title(f"{task}: held-out loss, a dot per seed")
        if task == "fields":
            noise = np.linspace(0.01, 0.95, 40)
            bounds = np.array([field_bounds(QUERY[LOOK], t) for t in noise])
            below.plot(noise, bounds[:, 0], "k--", label="best linear")
            below.plot(noise, bounds[:, 1], "k:", label="told the direction")
        below.set_title(f"{task}: a frame at t = {QUERY[LOOK]:g}")
        below.set_xlabel("noise of all frames before it")
    axes[1, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/attention.png"))
    args = parser.parse_args()
    runs = load(args.results)
    tables(runs)
    plot(runs, args.out)
    print(f"\nplot: {args.out}")


if __name__ == "__main__":
    main()
