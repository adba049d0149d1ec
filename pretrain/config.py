"""The whole configuration of a run: defaults < preset < YAML file < `section.key=value`.

The sections are frozen dataclasses that live beside the code they steer; they check their own values.
Nothing is ignored silently: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import describe_validation_error, nearest
from msc.datasets.loading.mixture import DataConfig, ShardSetConfig

from .checkpoints.format import CheckpointConfig
from .diffusion.rectified_flow import DiffusionConfig
from .model.config import ModelConfig
from .model.noise_gate import without_correlations
from .model.scales import Scale
from .optimizer import OptimizerConfig
from .parallelize import ParallelConfig
from .tracking.spike_guard import GuardConfig
from .tracking.tracker import MetricsConfig

# Settings that are lists of tables, with one such table.
LISTS: dict[str, Any] = {"scales": Scale(1), "shards": ShardSetConfig("x")}


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
        """Micro-batches per rank and step; ValueError if the batch cannot be cut so."""
        if self.batch % (dp * self.micro):
            raise ValueError(
                f"train.batch {self.batch} does not divide by {dp} data-parallel rows × train.micro {self.micro}"
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
    """Lay a YAML file and single settings over `base` (a preset, or the defaults).

    ValueError names the offending key or value and where it came from.
    """
    values = dataclasses.asdict(base or Config())
    if file is not None:
        try:
            text = Path(file).read_text()
            read = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {error}") from None
        _merge(values, read, Config, str(file), "")
    for override in overrides:
        name, sign, text = override.partition("=")
        if not sign or not name:
            raise ValueError(f"{override!r} is not of the form section.key=value")
        try:
            nested: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"the value of {override!r} is not valid YAML") from None
        for part in reversed(name.split(".")):
            nested = {part: nested}
        _merge(values, nested, Config, "the command line", "")
    return build(values)


def build(values: Mapping[str, Any]) -> Config:
    """Validate plain values into a Config."""
    import pydantic

    try:
        return pydantic.TypeAdapter(Config).validate_python(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"configuration: {describe_validation_error(error)}") from None


def dump(config: Config) -> str:
    """The configuration as YAML that `load` reads back."""
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def flat(config: Config) -> dict[str, Any]:
    """`{"section.key": value}`, for MLflow parameters and comparisons."""

    def walk(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    return walk(plain(dataclasses.asdict(config)), "")


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _merge(values: dict[str, Any], new: Any, kind: type, source: str, prefix: str) -> None:
    """Write `new` over `values`, section by section, refusing keys that the dataclass `kind` does not have."""
    if not isinstance(new, Mapping):
        raise ValueError(f"{source}: {prefix.rstrip('.') or 'the configuration'} must be a table of keys, not {new!r}")
    types = typing.get_type_hints(kind)
    for key, value in new.items():
        if key not in types:
            raise ValueError(f"{source}: unknown key {prefix}{key}{_nearest(prefix + str(key))}")
        if dataclasses.is_dataclass(types[key]):
            _merge(values[key], value, typing.cast(type, types[key]), source, f"{prefix}{key}.")
        else:
            if key in LISTS and isinstance(value, list | tuple):
                for item in value:  # a list of tables: each is checked against its own fields
                    _merge(dataclasses.asdict(LISTS[key]), item, type(LISTS[key]), source, f"{prefix}{key}.")
            if key == "gate_constants":
                value = without_correlations(value)
            values[key] = "" if value is None and types[key] is str else value  # `key=` empties a text


def _nearest(name: str) -> str:
    known = list(flat(Config())) + [section.name for section in dataclasses.fields(Config)]
    leaves = {path.rsplit(".", 1)[-1]: path for path in known}
    near = nearest(name, known) or leaves.get(nearest(name.rsplit(".", 1)[-1], leaves))
    return f"; did you mean {near}?" if near else ""
