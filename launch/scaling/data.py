"""Scaling data: one result per training run, from a sweep folder or a table, and which runs are left out and why."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from msc.datasets.files import last_jsonl_record, read_jsonl
from msc.pretrain import cost
from msc.pretrain.config import Config, flat, load
from msc.pretrain.run_folder import RunFolder

MIN_REPORTS = 20  # of a run whose curve is judged: fewer are too noisy
REBOUND = 1.2  # a run whose last tenth lies that much above its best tenth did not recover
TOLERANCE = 0.02  # sizes, and budgets, that differ by less (relative) are the same
# Settings, by how they begin, that change no result but by rounding: runs that differ in nothing else are one run.
NUMERICS_ONLY = (
    "train.micro", "train.report", "train.evaluate", "data.workers", "data.prefetch", "data.cache", "parallel.",
    "checkpoint.", "metrics.",
)  # fmt: skip
# Those that may differ within a law: size and budget, and what a ladder lets follow from them or tries. Of
# `model.scales` the heads, if they are shared out alike.
MAY_DIFFER = (
    "model.width", "model.depth", "model.mlp_ratio", "train.clips", "train.batch", "train.seed", "optimizer.lr",
    "optimizer.warmup", "optimizer.ema_halflife", *NUMERICS_ONLY,
)  # fmt: skip
# Columns that other people's tables use.
ALIASES = {
    "N": ("n", "parameters", "params", "model size"), "D": ("d", "tokens", "training tokens"), "L": ("l", "loss"),
    "C": ("c", "flops", "compute", "training flop"), "name": ("run",), "lr": ("learning rate",), "batch": (),
}  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """A trained model. N parameters, D training tokens, C training FLOPs, L loss; lr and batch where columns."""

    name: str
    N: float
    D: float
    C: float
    L: float
    lr: float | None = None
    batch: float | None = None


@dataclass(frozen=True)
class ScalingData:
    """used: what the law is fitted to. others: runs of the same size and budget with a higher loss, which only show
    where learning rate and batch are best. left_out: (run, why)."""

    used: tuple[RunResult, ...]
    others: tuple[RunResult, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()


def read_scaling_data(path: Path, loss: str = "held out", only: Sequence[str] = ()) -> ScalingData:
    """From a sweep folder, or a .csv, .json or .jsonl file with columns N, D and L (and C, lr, batch, name). only: of a
    sweep the runs with all these settings `section.key=value`, and names of these patterns."""
    if path.is_dir():
        return read_sweep_folder(path, loss, only)
    if only:
        raise ValueError(f"--only chooses among the runs of a sweep folder; {path} is a table")
    results, left_out = [], []
    for number, row in enumerate(read_table(path), 1):
        try:
            result = parse_row(row, f"row {number}")
        except (TypeError, ValueError, OverflowError) as error:
            left_out.append((f"row {number}", str(error)))
            continue
        if reason := invalid_loss(result.L):
            left_out.append((result.name, reason))
        else:
            results.append(result)
    return keep_best(results, left_out)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .json or .jsonl file."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
        rows = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is no table in {path.suffix[1:]}, in UTF-8: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} must hold a list of tables, one per run")
    return rows


def parse_row(row: Mapping[str, Any], name: str) -> RunResult:
    """ValueError where a number is missing, or none that a law is made of. C is 6 N D, or D is C / (6 N), where only
    one is given."""
    columns = {key.strip().lower(): value for key, value in row.items() if key and value not in ("", None)}
    names = {key: next((name for name in (key.lower(), *ALIASES[key]) if name in columns), None) for key in ALIASES}
    values = {key: columns[name] for key, name in names.items() if name is not None}
    name = str(values.pop("name", name))
    numbers = {key: float(value) for key, value in values.items()}
    for key, value in numbers.items():
        if key != "L" and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key} is {value:g}; it must be positive")
    if "D" not in numbers and {"C", "N"} <= numbers.keys():
        numbers["D"] = numbers["C"] / (6 * numbers["N"])
    if missing := [key for key in ("N", "D", "L") if key not in numbers]:
        raise ValueError(f"no {' and no '.join(missing)}; the columns are {', '.join(map(str, row))}")
    numbers.setdefault("C", 6 * numbers["N"] * numbers["D"])
    return RunResult(name, **numbers)


def read_sweep_folder(folder: Path, loss: str, only: Sequence[str] = ()) -> ScalingData:
    """loss: "held out" (of the averaged weights) or "train" (mean of the last tenth). ValueError if the runs are of
    different models."""
    path = folder / "sweep.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no sweep folder: it has no sweep.json")
    for word in only:
        if "=" in word and word.partition("=")[0] not in flat(Config()):
            raise ValueError(f"--only {word}: there is no setting {word.partition('=')[0]}")
    results, left_out, settings, seen = [], [], [], dict[str, str]()
    for name, overrides in json.loads(path.read_text()).items():
        run = RunFolder(folder / name)
        config = load(file=run.config) if run.exists() else None
        if not all(matches(word, name, flat(config) if config else overrides) for word in only):
            continue
        result, reason = result_of_run(run, config, loss) if config else (None, "not started")
        if result is None or config is None:
            left_out.append((name, reason))
        elif (duplicate := seen.setdefault(json.dumps(without(flat(config), NUMERICS_ONLY)), name)) != name:
            left_out.append((name, f"the same run as {duplicate}: no setting differs, nor does the seed"))
        else:
            results.append(result)
            settings.append(flat(config))
    if only and not (results or left_out):
        raise ValueError(f"no run of {folder} is of --only {' --only '.join(only)}")
    check_one_model(folder, settings)
    return keep_best(results, left_out)


def matches(word: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run has a setting `section.key=value`, or a name of a pattern."""
    key, sign, text = word.partition("=")
    if not sign:
        return fnmatchcase(name, word)
    try:
        value, wanted = settings.get(key), yaml.safe_load(text)
        # YAML reads 1e-3 as a text
        return bool(value == (float(wanted) if isinstance(value, float) else wanted))
    except (yaml.YAMLError, TypeError, ValueError):
        raise ValueError(f"--only {word}: {text!r} is no value of {key}") from None


def check_one_model(folder: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """ValueError if runs differ in more than one law can span."""
    results = []
    for one in settings:
        kept, heads = without(one, MAY_DIFFER), sum(scale["heads"] for scale in one["model.scales"])
        kept["model.scales"] = [{**scale, "heads": scale["heads"] / heads} for scale in one["model.scales"]]
        results.append(kept)
    different = []
    for key in results[0] if results else ():
        values = list(dict.fromkeys(str(one[key]) for one in results))
        if len(values) > 1:
            different.append(f"{key} ({', '.join(values)})" if max(map(len, values)) < 20 else key)
    if different:
        raise ValueError(
            f"the runs of {folder} differ in {', '.join(different)} besides size, budget, learning rate, batch and "
            "seed, and one law does not hold for all: choose with --only section.key=value, or with --only and a "
            "pattern of the runs' names"
        )


def without(settings: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Flat settings but for those that begin so; precision is none of rounding."""
    return {key: value for key, value in settings.items() if not key.startswith(keys) or key == "parallel.precision"}


def result_of_run(run: RunFolder, config: Config, loss: str) -> tuple[RunResult | None, str]:
    """The result of a finished run, or None and why there is none."""
    reports = read_jsonl(run.log)
    curve = [(line["clock"], math.nan if line["loss"] is None else line["loss"]) for line in reports]
    if reason := divergence(run.path, [value for _, value in curve], config.guard.stop_after):
        return None, reason
    if not curve or curve[-1][0] < config.train.clips:
        return None, f"not finished: {curve[-1][0] if curve else 0} of {config.train.clips} clips"
    tenth = [value for clock, value in curve if clock > 0.9 * config.train.clips]
    held_out = last_jsonl_record(run.held_out)
    if loss == "train":
        final_loss = sum(tenth) / len(tenth)
    elif held_out.get("clock", 0) < config.train.clips:
        return None, "no held-out loss at its end (train.evaluate is 0?); use --loss train"
    else:
        final_loss = math.nan if held_out["mean"] is None else held_out["mean"]
    if reason := invalid_loss(final_loss):
        return None, reason
    space, clips = run.read_latent_space(), config.train.steps * config.train.batch
    size = space.frames, space.height, space.width
    tokens = clips * space.frames * cost.tokens_per_frame(config.model, space.height, space.width)
    flops, parameters = clips * cost.step_flops(config.model, *size), cost.parameters(config.model)
    return RunResult(run.path.name, parameters, tokens, flops, final_loss, config.optimizer.lr, config.train.batch), ""


def divergence(run: Path, losses: Sequence[float], stop_after: int) -> str:
    """Why a run counts as diverged, or nothing."""
    if any(not math.isfinite(value) for value in losses):
        return "diverged: its loss was not finite"
    steps = [line["step"] for line in read_jsonl(RunFolder(run).skipped_steps)][-stop_after:]
    if len(steps) == stop_after and steps[-1] - steps[0] == stop_after - 1:
        return f"diverged: {stop_after} steps in a row could not be taken"
    if len(losses) < MIN_REPORTS:
        return ""
    each = max(1, len(losses) // 10)
    tenths = [sum(losses[i : i + each]) / each for i in range(0, len(losses) - each + 1, each)]
    ends = sum(losses[-each:]) / each
    if ends >= tenths[0]:
        return f"diverged: it ended at {ends:.4g}, no better than it began ({tenths[0]:.4g})"
    if ends > REBOUND * min(tenths):
        return f"diverged: it ended at {ends:.4g} after it had been at {min(tenths):.4g}"
    return ""


def invalid_loss(loss: float) -> str:
    return "" if math.isfinite(loss) and loss > 0 else f"diverged: its loss is {loss}"


def keep_best(results: Sequence[RunResult], left_out: Sequence[tuple[str, str]]) -> ScalingData:
    """Of runs of one size and budget that differ in learning rate or batch, the law takes the best."""
    used, others = [], []
    for group in group_similar(results, lambda result: (result.N, result.D)):
        rest = sorted(group, key=lambda result: result.L)
        if len({(result.lr, result.batch) for result in rest}) > 1:
            used.append(rest[0])
            others += rest[1:]
        else:
            used += rest  # repeats
    used.sort(key=lambda result: (result.N, result.D))
    return ScalingData(tuple(used), tuple(others), tuple(left_out))


def group_similar(points: Sequence[RunResult], key: Any, same: float = TOLERANCE) -> list[list[RunResult]]:
    """Runs whose `key` (a number, or several) agrees within `same`, relative to the group's first."""
    groups: list[list[RunResult]] = []
    for result in points:
        alike = (g for g in groups if np.all(np.abs(np.divide(key(result), key(g[0])) - 1) <= same))
        if (group := next(alike, None)) is None:
            groups.append(group := [])
        group.append(result)
    return groups
