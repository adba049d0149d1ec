"""A sweep file and what it stands for: a list of named runs, as a pure function of the file and the shards.

A file has settings of all runs (`preset` or `config`, `set`), and what varies: `grid` (all combinations), `list`
(alternatives, one after another) and `ladder` (sizes × budgets). What varies is combined: every rung of the ladder
with every entry of the list with every point of the grid. Later ones win: set < ladder < list < grid.

A ladder trains every size for every budget and sets what must follow size and budget: learning rate, batch, warm-up
and average. Its rules are powers, relative to a `base` that was tuned at a small size:

    lr    = base.lr    · (width / base.width)^rules.width · (depth / base.depth)^rules.depth · (batch / base.batch)^rules.batch
    batch = base.batch · (tokens / base.tokens)^rules.tokens    (only where base.tokens is given)

Defaults. width: -1, as Adam's step on a matrix of fan-in `width` must shrink with it (Yang et al. 2022, arXiv 2203.03466;
our matrices start with variance 1/fan-in). depth: -1/2, as residual branches start scaled by depth^-1/2 (Yang et al. 2023,
arXiv 2310.02244). batch: 1/2, Adam's square-root rule (Malladi et al. 2022, arXiv 2205.10220). tokens: 1/2, as the
critical batch follows the tokens rather than the size (Zhang et al. 2024, arXiv 2410.21676). None of them is exact for video,
which is more sensitive to both than language (arXiv 2411.17470): `lr` and `batch` of a ladder are factors on top of the
rules, and every run at several of them shows where the optimum of a small size really lies.
"""  # noqa: E501

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.loading.mixture import open_shards
from msc.datasets.shards.index import Index
from msc.pretrain import cost
from msc.pretrain.config import Config, load
from msc.pretrain.model.config import check_clip
from msc.pretrain.presets import preset
from msc.pretrain.validation import absolute_paths, resolve

RULES = {"width": -1.0, "depth": -0.5, "batch": 0.5, "tokens": 0.5}
BUDGETS = ("clips", "tokens", "flops", "tokens_per_parameter")
KEYS = ("preset", "config", "processes", "set", "grid", "list", "ladder")
LADDER_KEYS = ("sizes", *BUDGETS, "base", "rules", "lr", "batch", "warmup", "ema")


@dataclass(frozen=True)
class RunSpec:
    """One training run of a sweep: its name (also of its folder) and its settings over the sweep's base."""

    name: str
    settings: dict[str, Any]

    @property
    def overrides(self) -> list[str]:
        """As words for `msc train`."""
        return [f"{key}={yaml_text(value)}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class SweepSpec:
    """preset, config: what all runs start from. processes: ranks of every run. index: of the shards."""

    runs: tuple[RunSpec, ...]
    preset: str | None = None
    config: Path | None = None
    processes: int = 1
    index: Index | None = None

    def base(self) -> Config:
        return load(preset(self.preset) if self.preset else None, self.config)

    def configured(self, run: RunSpec) -> Config:
        """The whole configuration of a run; ValueError if there is no such."""
        return load(self.base(), overrides=run.overrides)

    def resolved(self, run: RunSpec) -> Config:
        """As the run's folder keeps it, with what the shards know."""
        assert self.index is not None
        return resolve(self.configured(run), self.index)


@dataclass(frozen=True)
class Base:
    """Where the rules of a ladder start: settings that were tuned together."""

    width: int
    depth: int
    batch: int
    lr: float
    tokens: float | None = None
    rules: dict[str, float] = field(default_factory=dict)

    def batch_at(self, tokens: float) -> float:
        return self.batch * ((tokens / self.tokens) ** self.rules["tokens"] if self.tokens else 1.0)

    def lr_at(self, width: int, depth: int, batch: int) -> float:
        scaled = (width / self.width) ** self.rules["width"] * (depth / self.depth) ** self.rules["depth"]
        return self.lr * scaled * (batch / self.batch) ** self.rules["batch"]


def read_sweep_spec(path: Path) -> SweepSpec:
    """ValueError or OSError says what is wrong with the file; every run's settings have been checked."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a table with some of the keys {', '.join(KEYS)}")
    only(values, KEYS, str(path))
    if values.get("preset") and values.get("config"):
        raise ValueError(f"{path} names both a preset ({values['preset']}) and a config ({values['config']})")
    config = path.parent / str(values["config"]) if values.get("config") else None
    named = str(values["preset"]) if values.get("preset") else None
    sweep = SweepSpec((), named, config, whole(values.get("processes", 1), f"{path}: processes"))
    shared = settings_of(values.get("set"), f"{path}: set")
    start = load(sweep.base(), overrides=RunSpec("", shared).overrides)
    if not start.data.sets:
        raise ValueError(f"{path} names no shards; put `data.shards: FOLDER` under `set`")
    shards = open_shards(start.data)
    if len(shards.shapes) > 1:
        raise ValueError(f"{path}: {shards} has clips of {len(shards.shapes)} shapes; a sweep counts tokens of one")
    index = shards.index
    if isinstance(found := absolute_paths(start.data).shards, str):
        shared |= {"data.shards": found}
    sweep = replace(sweep, runs=tuple(expand(values, shared, start, index)), index=index)
    for run in sweep.runs:
        try:
            config_of_run = sweep.resolved(run)
            check_clip(config_of_run.model, index.frames, index.height, index.width)
            config_of_run.train.accumulate(max(1, sweep.processes // config_of_run.parallel.sp))
        except ValueError as error:
            raise ValueError(f"{path}: run {run.name}: {error}") from None
    return sweep


def expand(values: Mapping[str, Any], shared: Mapping[str, Any], start: Config, index: Index) -> list[RunSpec]:
    """All runs of a sweep file, named by what varies between them. `shared`, `start`: settings of all runs."""
    entries = [settings_of(entry, "list") for entry in as_list(values.get("list") or [{}], "list")]
    grid = {key: as_list(choices, f"grid: {key}") for key, choices in settings_of(values.get("grid"), "grid").items()}
    points = [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    own = [{**entry, **point} for entry in entries for point in points]
    ladders: list[list[dict[str, Any]]] = [[{}]] * len(own)
    # For each entry anew: what a budget buys depends on the model that it makes.
    if ladder := settings_of(values.get("ladder"), "ladder"):
        ladders = [list(rungs_of(ladder, start, index, over)) for over in own]
    found = [{**rung, **over} for rungs in zip(*ladders, strict=True) for rung, over in zip(rungs, own, strict=True)]
    runs = [RunSpec(name, {**shared, **own}) for name, own in zip(names(found), found, strict=True)]
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("the sweep holds the same run twice; every entry must differ in a setting")
    return runs


def rungs_of(
    ladder: Mapping[str, Any], start: Config, index: Index, over: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Sizes × budgets × factors of batch and learning rate, with the rules applied. over: settings over theirs."""
    only(ladder, LADDER_KEYS, "ladder")
    budgets = [name for name in BUDGETS if name in ladder]
    if len(budgets) != 1 or not ladder.get("sizes"):
        raise ValueError(f"a ladder needs `sizes` and exactly one of {', '.join(BUDGETS)}; given: {', '.join(ladder)}")
    kind = budgets[0]
    base = base_of(ladder, start)
    shares = {name: number(ladder.get(name, 0.05), f"ladder: {name}") for name in ("warmup", "ema")}
    for size in as_list(ladder["sizes"], "ladder: sizes"):
        own = size_settings(settings_of(size, "ladder: sizes"), start)
        model = resolve(load(start, overrides=RunSpec("", {**own, **over}).overrides), index).model
        tokens = index.frames * cost.tokens_per_frame(model, index.height, index.width)
        per_clip = {
            "clips": 1.0,
            "tokens": tokens,
            "flops": cost.step_flops(model, index.frames, index.height, index.width),
            "tokens_per_parameter": tokens / cost.parameters(model),
        }[kind]
        for budget in positives(ladder[kind], f"ladder: {kind}"):
            clips = budget / per_clip
            multiple = start.train.micro
            factors = (positives(ladder.get(name, [1.0]), f"ladder: {name}") for name in ("batch", "lr"))
            for batch_factor, lr_factor in itertools.product(*factors):
                batch = nearest_power(base.batch_at(clips * tokens) * batch_factor, multiple)
                steps = round(clips / batch)
                if steps < 1:
                    raise ValueError(f"ladder: {kind} {budget:g} is {clips:.2g} clips, less than one batch of {batch}")
                rate = base.lr_at(model.width, model.depth, batch) * lr_factor
                yield {
                    **own, "train.clips": steps * batch, "train.batch": batch,
                    "optimizer.lr": float(f"{rate:.4g}"),
                    "optimizer.warmup": round(shares["warmup"] * clips),
                    "optimizer.ema_halflife": round(shares["ema"] * clips),
                }  # fmt: skip


def base_of(ladder: Mapping[str, Any], start: Config) -> Base:
    """Defaults of the ladder's base are the settings of all runs."""
    known: dict[str, Any] = {
        "width": start.model.width, "depth": start.model.depth, "batch": start.train.batch, "lr": start.optimizer.lr,
        "tokens": None,
    }  # fmt: skip
    given, rules = (settings_of(ladder.get(name), f"ladder: {name}") for name in ("base", "rules"))
    only(given, tuple(known), "ladder: base")
    only(rules, tuple(RULES), "ladder: rules")
    values = {key: given.get(key, default) for key, default in known.items()}
    width, depth, batch = (whole(values[key], f"ladder: base.{key}") for key in ("width", "depth", "batch"))
    lr = positive(values["lr"], "ladder: base.lr")
    tokens = None if values["tokens"] is None else positive(values["tokens"], "ladder: base.tokens")
    rules = {key: number(value, f"ladder: rules.{key}") for key, value in {**RULES, **rules}.items()}
    return Base(width, depth, batch, lr, tokens, rules)


def size_settings(size: Mapping[str, Any], start: Config) -> dict[str, Any]:
    """`width`, `depth`, `heads` and other keys of the model. Heads are shared among the scales as before."""
    settings = {key if "." in key else f"model.{key}": value for key, value in size.items()}
    heads = settings.pop("model.heads", None)
    if heads is not None:
        heads = whole(heads, "ladder: heads")
        scales, total = start.model.scales, start.model.heads
        if any(scale.heads * heads % total for scale in scales):
            raise ValueError(f"ladder: {heads} heads cannot be shared as {[scale.heads for scale in scales]} are")
        settings["model.scales"] = [vars(replace(scale, heads=scale.heads * heads // total)) for scale in scales]
    return settings


def nearest_power(value: float, multiple: int) -> int:
    """The power of two times `multiple` nearest to `value` on a log scale, at least `multiple`."""
    return multiple * 2 ** max(0, round(math.log2(max(value, 1e-9) / multiple)))


def names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """`width32-depth2-clips400`: the keys in which the runs differ. Tables are numbered in order of appearance."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    seen = {key: list(dict.fromkeys(yaml_text(run[key]) for run in runs if key in run)) for key in keys}
    varying = [key for key in keys if len(seen[key]) > 1]
    for key in ("optimizer.warmup", "optimizer.ema_halflife", "train.batch", "optimizer.lr"):
        rest = [other for other in varying if other != key]  # a key that follows from the others tells nothing more
        if len({yaml_text([run.get(other) for other in rest]) for run in runs}) == len(runs):
            varying = rest

    def part(run: Mapping[str, Any], key: str) -> str:
        value, leaf = run[key], key.rsplit(".", 1)[-1]
        text = str(seen[key].index(yaml_text(value))) if isinstance(value, list | dict) else f"{value}"
        return re.sub(r"[^\w.+-]+", "_", f"{leaf}{text}")

    return ["-".join(part(run, key) for key in varying if key in run) or "run" for run in runs]


def settings_of(table: Any, where: str) -> dict[str, Any]:
    if table is not None and not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table of `key: value`, not {table!r}")
    return {str(key): value for key, value in (table or {}).items()}


def as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of values, not {value!r}")
    return value


def number(value: Any, where: str) -> float:
    """YAML reads 1e-3 as a text: it wants 1.0e-3."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{where} is {value!r}; it must be a number")
    return found


def whole(value: Any, where: str) -> int:
    if (found := number(value, where)) < 1 or found != int(found):
        raise ValueError(f"{where} is {value!r}; it must be a whole number of at least 1")
    return int(found)


def positive(value: Any, where: str) -> float:
    if not (found := number(value, where)) > 0:
        raise ValueError(f"{where} is {value!r}; it must be positive")
    return found


def positives(value: Any, where: str) -> list[float]:
    return [positive(one, where) for one in as_list(value, where)]


def only(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}; known: {', '.join(known)}")


def yaml_text(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
