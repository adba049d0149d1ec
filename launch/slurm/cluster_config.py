"""Cluster configuration: what a cluster wants of every job, written once in ~/.config/msc/site.yaml, $MSC_SITE or
`--site FILE`; and JobRequest, what a single command line asks for."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import yaml

from msc.pretrain import typed_values

Cluster = Literal["slurm", "local", "debug"]

TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # as sbatch reads it: minutes, [H:]MM:SS, D-H[:MM[:SS]]
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
OPTION = re.compile(r"[a-z][a-z-]*")
# Options of sbatch that the way jobs are written, signalled and requeued rests on.
RESERVED = ("array", "dependency", "error", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue",
            "signal")  # fmt: skip


@dataclass(frozen=True)
class ClusterConfig:
    """partition, account, qos, constraint, time, cpus_per_task, mem: of sbatch; a JobRequest overrides them. sbatch:
    further options of it, without "--"; true for those that take no value.
    signal_seconds: how long before the time limit, or the end of a preemption's grace, the ranks are signalled to save.
    starts: how often in a row a job may start without a new checkpoint in between before it is given up.
    python: the interpreter on the nodes (default: the one that submits). container: command before it, such as
    [apptainer, exec, --nv, msc.sif]. srun: further arguments of srun. setup: lines of shell before anything else, such
    as `module load cuda`; they are written to the job's script, so secrets belong in `environment`, which is not.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time: str = ""
    cpus_per_task: int = 0
    mem: str = ""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    signal_seconds: int = 120
    starts: int = 3
    python: str = ""
    container: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self):
        if self.time and not TIME.fullmatch(self.time):
            raise ValueError(f"time is {self.time!r}; write minutes, H:MM:SS or D-HH:MM:SS")
        for name in ("starts", "signal_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("partition", "account", "qos", "constraint", "mem", "python"):
            check_one_line(getattr(self, name), name)
        for table in ("sbatch", "environment"):
            for name, value in getattr(self, table).items():  # without the value, which may be a secret
                if not isinstance(value, str | int):
                    raise ValueError(f"{table}.{name} must be a text or a whole number")
        for name, value in self.sbatch.items():
            if not OPTION.fullmatch(name):
                raise ValueError(f"sbatch.{name} is not an option of sbatch: write it without the leading --")
            if name in RESERVED:
                raise ValueError(f"sbatch.{name} is set by msc submit itself and cannot be changed here")
            check_one_line(str(value), f"sbatch.{name}")
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment.{name} is not a name of an environment variable")

    @property
    def variables(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.environment.items()}


@dataclass(frozen=True)
class JobRequest:
    """The options of `msc submit` and `msc sweep --cluster slurm` that say where a command runs; None: not given.

    partition to cpus_per_task override the cluster configuration, read from `site`. parts: of a conversion.
    """

    cluster: Cluster = "slurm"
    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    site: Path | None = None
    parts: int | None = None

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def tasks(self) -> int:
        return (self.nodes or 1) * self.ranks_per_node

    def options(self) -> list[str]:
        """The command-line options that ask for the same."""
        values = {name: value for name, value in vars(self).items() if value not in (None, "slurm")}
        return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]

    def cluster_config(self) -> ClusterConfig:
        """The cluster configuration of the file, with what this request overrides."""
        names = ("partition", "account", "qos", "constraint", "time", "mem", "cpus_per_task")
        overrides = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(read_cluster_config(find_config_file(self.site)), **overrides)


def check_one_line(text: str, name: str) -> None:
    """ValueError if `text` would not stay on one line of a batch script."""
    if CONTROL.search(text):
        raise ValueError(f"{name} is {text!r}; it must not hold line breaks or other control characters")


def find_config_file(site: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file named by `--site`, else by $MSC_SITE, else the user's own, if it exists."""
    if site is not None or environment.get("MSC_SITE"):
        return site or Path(environment["MSC_SITE"])
    home = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "msc" / "site.yaml"
    return home if home.is_file() else None


def read_cluster_config(path: Path | None) -> ClusterConfig:
    """The settings in a file, checked; ValueError names the file, the key and the nearest valid key."""
    if path is None:
        return ClusterConfig()
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    return typed_values.read(ClusterConfig, values, "", path)
