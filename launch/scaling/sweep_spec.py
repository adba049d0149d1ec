"""Sweep specification: the list of named runs that a sweep file describes, a pure function of the file and the shards.

A file has settings of all runs (`preset` or `config`, `set`), and what varies: `grid` (all combinations), `list`
(alternatives, one after another) and `ladder` (sizes × budgets). All are combined: every size and budget of the
ladder with every entry of the list with every point of the grid. Later ones win: set < ladder < list < grid.

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

import builtins
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.loading.mixture import open_shards
from msc.datasets.shards.index import Index
from msc.pretrain import cost, typed_values
from msc.pretrain.config import Config, load
from msc.pretrain.model.config import check_clip
from msc.pretrain.presets import preset
from msc.pretrain.validation import absolute_paths, resolve

BUDGETS = ("clips", "tokens", "flops", "tokens_per_parameter")
Settings = dict[str, Any]


def check_positive(where: str, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{where}.{name} is {value:g}; it must be positive and finite")


@dataclass(frozen=True)
class Base:
    """Settings that were tuned together, from which the rules of a ladder scale (default: those of all runs)."""

    width: int | None = None
    depth: int | None = None
    batch: int | None = None
    lr: float | None = None
    tokens: float | None = None

    def __post_init__(self):
        check_positive("ladder: base", vars(self))


@dataclass(frozen=True)
class Rules:
    """Exponents of the module's docstring."""

    width: float = -1.0
    depth: float = -0.5
    batch: float = 0.5
    tokens: float = 0.5


@dataclass(frozen=True)
class Ladder:
    """sizes: settings of the model. One of `clips` to `tokens_per_parameter`: the budgets of every size. batch, lr:
    factors on what the rules give. warmup, ema: shares of the clips."""

    sizes: tuple[Settings, ...]
    clips: tuple[float, ...] = ()
    tokens: tuple[float, ...] = ()
    flops: tuple[float, ...] = ()
    tokens_per_parameter: tuple[float, ...] = ()
    base: Base = Base()
    rules: Rules = Rules()
    batch: tuple[float, ...] = (1.0,)
    lr: tuple[float, ...] = (1.0,)
    warmup: float = 0.05
    ema: float = 0.05

    def __post_init__(self):
        if sum(bool(getattr(self, name)) for name in BUDGETS) != 1 or not self.sizes:
            raise ValueError(f"a ladder needs `sizes` and exactly one of {', '.join(BUDGETS)}")
        for name in (*BUDGETS, "batch", "lr"):
            for value in getattr(self, name):
                check_positive("ladder", {name: value})

    def budget(self) -> tuple[str, tuple[float, ...]]:
        return next((name, values) for name in BUDGETS if (values := getattr(self, name)))


@dataclass(frozen=True)
class SweepFile:
    """The keys of a sweep file."""

    preset: str | None = None
    config: str | None = None
    processes: int = 1
    set: Settings | None = None
    grid: Settings | None = None
    list: tuple[Settings, ...] | None = None
    ladder: Ladder | None = None

    def __post_init__(self):
        check_positive("the sweep", {"processes": self.processes})
        if self.preset and self.config:
            raise ValueError(f"both a preset ({self.preset}) and a config ({self.config}) are named")
        for key, choices in (self.grid or {}).items():
            if not isinstance(choices, builtins.list) or not choices:
                raise ValueError(f"grid: {key} must be a list of values, not {choices!r}")


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
        """The whole configuration of a run; ValueError if it is invalid."""
        return load(self.base(), overrides=run.overrides)

    def resolved(self, run: RunSpec) -> Config:
        """As saved in the run's folder, with the settings that the shards determine."""
        assert self.index is not None
        return resolve(self.configured(run), self.index)


def read_sweep_spec(path: Path) -> SweepSpec:
    """Read a sweep file and check the settings of every run. ValueError or OSError if it is invalid."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    file = typed_values.read(SweepFile, values, "", path)
    config = path.parent / file.config if file.config else None
    sweep, shared = SweepSpec((), file.preset or None, config, file.processes), dict(file.set or {})
    start = load(sweep.base(), overrides=RunSpec("", shared).overrides)
    if not start.data.sets:
        raise ValueError(f"{path} names no shards; put `data.shards: FOLDER` under `set`")
    shards = open_shards(start.data)
    if len(shards.shapes) > 1:
        raise ValueError(f"{path}: {shards} has clips of {len(shards.shapes)} shapes; a sweep counts tokens of one")
    index = shards.index
    if isinstance(result := absolute_paths(start.data).shards, str):
        shared |= {"data.shards": result}
    sweep = replace(sweep, runs=tuple(expand(file, shared, start, index)), index=index)
    for run in sweep.runs:
        try:
            config_of_run = sweep.resolved(run)
            check_clip(config_of_run.model, index.frames, index.height, index.width)
            config_of_run.train.accumulate(max(1, sweep.processes // config_of_run.parallel.sp))
        except ValueError as error:
            raise ValueError(f"{path}: run {run.name}: {error}") from None
    return sweep


def expand(file: SweepFile, shared: Settings, start: Config, index: Index) -> list[RunSpec]:
    """All runs of a sweep file, named by what varies between them. `shared`, `start`: settings of all runs."""
    points = [
        dict(zip(file.grid or (), point, strict=True)) for point in itertools.product(*(file.grid or {}).values())
    ]
    own = [{**entry, **point} for entry in file.list or ({},) for point in points]
    # A ladder for each entry anew: what a budget buys depends on the model that it makes.
    ladders: list[list[Settings]] = [
        list(expand_ladder(file.ladder, start, index, over)) if file.ladder else [{}] for over in own
    ]
    varied = [{**rung, **over} for rungs in zip(*ladders, strict=True) for rung, over in zip(rungs, own, strict=True)]
    runs = [RunSpec(name, {**shared, **own}) for name, own in zip(run_names(varied), varied, strict=True)]
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("the sweep holds the same run twice; every entry must differ in a setting")
    return runs


def expand_ladder(ladder: Ladder, start: Config, index: Index, over: Settings) -> Iterator[Settings]:
    """Sizes × budgets × factors of batch and learning rate, with the rules applied. over: settings over theirs."""
    base, rules, (kind, budgets) = ladder.base, ladder.rules, ladder.budget()
    for size in ladder.sizes:
        own = settings_of_size(size, start)
        model = resolve(load(start, overrides=RunSpec("", {**own, **over}).overrides), index).model
        tokens = index.frames * cost.tokens_per_frame(model, index.height, index.width)
        per_clip = {
            "clips": 1.0,
            "tokens": tokens,
            "flops": cost.step_flops(model, index.frames, index.height, index.width),
            "tokens_per_parameter": tokens / cost.parameters(model),
        }[kind]
        rate = (base.lr or start.optimizer.lr) * (model.width / (base.width or start.model.width)) ** rules.width
        rate *= (model.depth / (base.depth or start.model.depth)) ** rules.depth
        for budget, batch_factor, lr_factor in itertools.product(budgets, ladder.batch, ladder.lr):
            clips, base_batch = budget / per_clip, base.batch or start.train.batch
            growth = (clips * tokens / base.tokens) ** rules.tokens if base.tokens else 1.0
            batch = nearest_power(base_batch * growth * batch_factor, start.train.micro)
            steps = round(clips / batch)
            if steps < 1:
                raise ValueError(f"ladder: {kind} {budget:g} is {clips:.2g} clips, less than one batch of {batch}")
            yield {
                **own,
                "train.clips": steps * batch,
                "train.batch": batch,
                "optimizer.lr": float(f"{rate * (batch / base_batch) ** rules.batch * lr_factor:.4g}"),
                "optimizer.warmup": round(ladder.warmup * clips),
                "optimizer.ema_halflife": round(ladder.ema * clips),
            }


def settings_of_size(size: Settings, start: Config) -> Settings:
    """`width`, `depth`, `heads` and other keys of the model. Heads are shared among the scales as before."""
    settings = {key if "." in str(key) else f"model.{key}": value for key, value in size.items()}
    heads = settings.pop("model.heads", None)
    if heads is not None:
        scales, total = start.model.scales, start.model.heads
        if not isinstance(heads, int) or heads < 1 or any(scale.heads * heads % total for scale in scales):
            raise ValueError(f"ladder: {heads!r} heads cannot be shared as {[scale.heads for scale in scales]} are")
        settings["model.scales"] = [vars(replace(scale, heads=scale.heads * heads // total)) for scale in scales]
    return settings


def nearest_power(value: float, multiple: int) -> int:
    """The power of two times `multiple` nearest to `value` on a log scale, at least `multiple`."""
    return multiple * 2 ** max(0, round(math.log2(max(value, 1e-9) / multiple)))


def run_names(runs: Sequence[Mapping[str, Any]]) -> list[str]:
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


def yaml_text(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
