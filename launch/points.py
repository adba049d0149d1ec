"""What a fit is made of: one point per run, from a sweep folder or from a file; and which runs are left out, and
why."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msc.datasets.files import last_line
from msc.pretrain import cost, runs
from msc.pretrain.config import load
from msc.pretrain.rollback import read_lines

LEAST_REPORTS = 20  # of a run whose curve is judged: fewer are too noisy
UP_AGAIN = 1.2  # a run whose last tenth lies that much above its best tenth did not recover
SAME = 0.02  # sizes, and budgets, that differ by less (relative) are the same
# Columns that other people's tables use.
ALIASES = {
    "N": ("n", "parameters", "params", "model size"), "D": ("d", "tokens", "training tokens"), "L": ("l", "loss"),
    "C": ("c", "flops", "compute", "training flop"), "name": ("run",), "lr": ("learning rate",), "batch": (),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A trained model. N parameters, D training tokens, C training FLOPs, L loss; lr and batch where known."""

    name: str
    N: float
    D: float
    C: float
    L: float
    lr: float | None = None
    batch: float | None = None


@dataclass(frozen=True)
class Points:
    """used: what the law is fitted to. others: runs of the same size and budget with a higher loss, which only show
    where learning rate and batch are best. left_out: (run, why)."""

    used: tuple[Point, ...]
    others: tuple[Point, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def read_points(path: Path, loss: str = "held out") -> Points:
    """From a sweep folder, or a .csv, .json or .jsonl file with columns N, D and L (and C, lr, batch, name)."""
    if path.is_dir():
        return of_sweep(path, loss)
    rows = list(csv.DictReader(path.open())) if path.suffix == ".csv" else read_json(path)
    found, left_out = [], []
    for number, row in enumerate(rows, 1):
        try:
            point = of_row(row, f"row {number}")
        except (TypeError, ValueError) as error:
            left_out.append((f"row {number}", str(error)))
            continue
        if reason := unusable(point.L):
            left_out.append((point.name, reason))
        else:
            found.append(point)
    return sorted_out(found, left_out)


def read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} must hold a list of tables, one per run")
    return rows


def of_row(row: Mapping[str, Any], name: str) -> Point:
    """ValueError where a number is missing. C is 6 N D, or D is C / (6 N), where only one is given."""
    known = {key.strip().lower(): value for key, value in row.items() if key and value not in ("", None)}
    values = {}
    for key, aliases in ALIASES.items():
        for alias in (key.lower(), *aliases):
            if alias in known:
                values[key] = known[alias]
                break
    if "D" not in values and {"C", "N"} <= values.keys():
        values["D"] = float(values["C"]) / (6 * float(values["N"]))
    if missing := [key for key in ("N", "D", "L") if key not in values]:
        raise ValueError(f"no {' and no '.join(missing)}; the columns are {', '.join(row)}")
    values.setdefault("C", 6 * float(values["N"]) * float(values["D"]))
    numbers = {key: float(value) for key, value in values.items() if key != "name"}
    return Point(str(values.get("name", name)), **numbers)


def of_sweep(folder: Path, loss: str) -> Points:
    """Every run that `sweep.json` names. loss: "held out" (averaged weights) or "train" (mean of the last tenth)."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no sweep folder: it has no sweep.json")
    found, left_out = [], []
    for name in json.loads(path.read_text()):
        point, reason = of_run(folder / name, loss)
        if point is None:
            left_out.append((name, reason))
        else:
            found.append(point)
    return sorted_out(found, left_out)


def of_run(run: Path, loss: str) -> tuple[Point | None, str]:
    """The point of a finished run, or None and why there is none."""
    if not (run / "config.yaml").is_file():
        return None, "not started"
    config = load(file=run / "config.yaml")
    curve = [(line["clock"], line["loss"]) for line in read_lines(run / "log.jsonl")]
    if reason := diverged(run, [value for _, value in curve], config.guard.stop_after):
        return None, reason
    if not curve or curve[-1][0] < config.train.clips:
        return None, f"not finished: {curve[-1][0] if curve else 0} of {config.train.clips} clips"
    tenth = [value for clock, value in curve if clock > 0.9 * config.train.clips]
    held_out = last_line(run / "held_out.jsonl")
    if loss == "train":
        reached = sum(tenth) / len(tenth)
    elif held_out.get("clock", 0) < config.train.clips:
        return None, "no held-out loss at its end (train.evaluate is 0?); use --loss train"
    else:
        reached = held_out["mean"]
    if reason := unusable(reached):
        return None, reason
    space = runs.LatentSpace(**json.loads((run / "data.json").read_text()))
    size = space.frames, space.height, space.width
    tokens = space.frames * cost.tokens_per_frame(config.model, space.height, space.width)
    clips = config.train.steps * config.train.batch
    point = Point(
        run.name, cost.parameters(config.model), clips * tokens, clips * cost.step_flops(config.model, *size), reached,
        config.optimizer.lr, config.train.batch,
    )  # fmt: skip
    return point, ""


def diverged(run: Path, losses: Sequence[float], stop_after: int) -> str:
    """Why a run counts as diverged, or nothing."""
    skipped = read_lines(run / "skipped.jsonl")
    if any(not math.isfinite(value) for value in losses):
        return "diverged: its loss was not finite"
    steps = [line["step"] for line in skipped][-stop_after:]
    if len(steps) == stop_after and steps[-1] - steps[0] == stop_after - 1:
        return f"diverged: {stop_after} steps in a row could not be taken"
    if len(losses) < LEAST_REPORTS:
        return ""
    each = max(1, len(losses) // 10)
    tenths = [sum(losses[i : i + each]) / each for i in range(0, len(losses) - each + 1, each)]
    ends = sum(losses[-each:]) / each
    if ends >= tenths[0]:
        return f"diverged: it ended at {ends:.4g}, no better than it began ({tenths[0]:.4g})"
    if ends > UP_AGAIN * min(tenths):
        return f"diverged: it ended at {ends:.4g} after it had been at {min(tenths):.4g}"
    return ""


def unusable(loss: float) -> str:
    return "" if math.isfinite(loss) and loss > 0 else f"diverged: its loss is {loss}"


def sorted_out(found: Sequence[Point], left_out: Sequence[tuple[str, str]]) -> Points:
    """Of runs of one size and budget that differ in learning rate or batch, the law takes the best."""
    groups = grouped(found, lambda point: (point.N, point.D))
    used, others = [], []
    for group in groups:
        rest = sorted(group, key=lambda point: point.L)
        if len({(point.lr, point.batch) for point in rest}) > 1:
            used.append(rest[0])
            others += rest[1:]
        else:
            used += rest  # repeats
    used.sort(key=lambda point: (point.N, point.D))
    return Points(tuple(used), tuple(others), tuple(left_out))


def grouped(points: Sequence[Point], key: Any, same: float = SAME) -> list[list[Point]]:
    """Points whose `key` (a number, or several) agrees within `same`, relative to the group's first."""
    groups: list[tuple[tuple[float, ...], list[Point]]] = []
    for point in points:
        values = key(point)
        values = values if isinstance(values, tuple) else (values,)
        for first, group in groups:
            if all(abs(v / f - 1) <= same for v, f in zip(values, first, strict=True)):
                group.append(point)
                break
        else:
            groups.append((values, [point]))
    return [group for _, group in groups]
