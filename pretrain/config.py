"""Configuration of a run: defaults < preset < YAML file < `section.key=value`, validated strictly.

The sections are frozen dataclasses beside the code they configure, which check their own values. An unknown key is an
error that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.loading.mixture import DataConfig

from .checkpoints.format import CheckpointConfig
from .diffusion.rectified_flow import DiffusionConfig
from .model.config import ModelConfig
from .optimizer import OptimizerConfig
from .parallelize import ParallelConfig
from .tracking.spike_guard import GuardConfig
from .tracking.tracker import MetricsConfig
from .typed_values import read, shown


@dataclass(frozen=True)
class TrainConfig:
    """clips: how many clips to train on in all; batch: clips per optimizer step over all ranks; micro: clips
    per rank and forward pass (the rest is gradient accumulation). seed: of weights, order and noise.
    report, evaluate: optimizer steps between reports and between held-out evaluations with previews (0: never);
    held_out: clips in such an evaluation. init_from: a folder of `msc export`, or a run, whose averaged weights this
    one starts from (empty: from random ones); see initialize_from.py."""

    clips: int = 100_000
    batch: int = 8
    micro: int = 1
    seed: int = 0
    report: int = 10
    evaluate: int = 1000
    held_out: int = 64
    init_from: str = ""

    def __post_init__(self):
        for name, least in {"clips": 1, "batch": 1, "micro": 1, "report": 1, "evaluate": 0, "held_out": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least {least}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"train.seed is {self.seed}; it must fit into 64 bits")

    @property
    def steps(self) -> int:
        return -(-self.clips // self.batch)

    def accumulate(self, dp: int) -> int:
        """Micro-batches per rank and step; ValueError if the batch does not divide."""
        if self.batch % (dp * self.micro):
            raise ValueError(
                f"train.batch {self.batch} does not divide by {dp} data-parallel ranks × train.micro {self.micro}"
            )
        return self.batch // (dp * self.micro)


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


def load(base: Config | None = None, file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Merge a YAML file and single settings into `base` (a preset, or the defaults).

    ValueError names the offending key or value and its source.
    """
    values = dataclasses.asdict(base or Config())
    if file is not None:
        _merge(values, _parse(Path(file).read_text(), str(file)) or {}, str(file))
    for override in overrides:
        name, sign, text = override.partition("=")
        if not sign or not name:
            raise ValueError(f"{override!r} is not of the form section.key=value")
        _merge(values, _nested(name, _parse(text, f"the value of {override!r}")), "the command line")
    sources = [str(file)] * (file is not None) + ["the command line"] * bool(overrides)
    return _read(values, " and ".join(sources) or "the defaults")


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{what} is not valid YAML: {reason}") from None


def from_flat(settings: Mapping[str, Any], source: str) -> Config:
    """The configuration that `flat` gave these settings of, such as a checkpoint's. source: for error messages."""
    values = dataclasses.asdict(Config())
    for name, value in settings.items():
        _merge(values, _nested(name, value), source)
    return _read(values, source)


def _read(values: Mapping[str, Any], source: str) -> Config:
    known = [*flat(Config()), *(section.name for section in dataclasses.fields(Config))]
    return read(Config, values, "", source, known)


def _nested(name: str, value: Any) -> Any:
    """`{"a": {"b": value}}` of the name `a.b`."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _merge(values: dict[str, Any], new: Any, source: str, prefix: str = "") -> None:
    """Write `new` over `values`, section by section; `read` checks what comes of it."""
    if not isinstance(new, Mapping):
        raise ValueError(f"{source}: {prefix or 'the configuration'} must be a table of keys, not {shown.repr(new)}")
    for key, value in new.items():
        if isinstance(values.get(key), dict):
            _merge(values[key], value, source, f"{prefix}.{key}".lstrip("."))
        else:
            values[key] = value


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads back."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """`{"section.key": value}`, for MLflow parameters and comparisons."""
    return dict(_leaves(plain(dataclasses.asdict(config)), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def plain(value: Any) -> Any:
    """With tuples as lists, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
