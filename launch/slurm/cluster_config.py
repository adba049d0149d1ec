"""What a cluster wants of every job, written once: ~/.config/msc/site.yaml, or $MSC_SITE, or `--site FILE`."""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from msc.datasets.files import describe_validation_error, nearest

TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # as sbatch reads it: minutes, [H:]MM:SS, D-H[:MM[:SS]]
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
OPTION = re.compile(r"[a-z][a-z-]*")


@dataclass(frozen=True)
class Site:
    """partition, account, qos, constraint, time: of sbatch; the command line goes over them. sbatch: further options
    of it, without "--"; true for those that take no value.
    signal_seconds: how long before the time limit, or the end of a preemption's grace, the ranks are told to save.
    starts: how often in a row a job may start without a new checkpoint in between before it is given up.
    python: the interpreter on the nodes (default: the one that submits). container: words before it, such as
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
            one_line(getattr(self, name), name)
        for name, value in self.sbatch.items():
            if not OPTION.fullmatch(name):
                raise ValueError(f"sbatch.{name} is not an option of sbatch: write it without the leading --")
            if name in OURS:
                raise ValueError(f"sbatch.{name} is set by msc submit itself and cannot be changed here")
            one_line(str(value), f"sbatch.{name}")
        for name in self.environment:
            if not VARIABLE.fullmatch(name):
                raise ValueError(f"environment.{name} is not a name that a variable can have")

    @property
    def variables(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.environment.items()}


# Options of sbatch that the way jobs are written, signalled and requeued rests on.
OURS = ("array", "dependency", "error", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue",
        "signal")  # fmt: skip


def one_line(text: str, name: str) -> str:
    """`text`; ValueError if it would not stay on one line of a batch script."""
    if CONTROL.search(text):
        raise ValueError(f"{name} is {text!r}; it must not hold line breaks or other control characters")
    return text


def find(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file to read: named by `--site`, else by $MSC_SITE, else the user's own, if there is one."""
    if given is not None or environment.get("MSC_SITE"):
        return given or Path(environment["MSC_SITE"])
    home = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "msc" / "site.yaml"
    return home if home.is_file() else None


def read(path: Path | None) -> Site:
    """The settings in a file, checked; ValueError names the file, the key and the nearest key there is."""
    if path is None:
        return Site()
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must be a table of keys, not {values!r}")
    known = [f.name for f in dataclasses.fields(Site)]
    for key in values:
        if key not in known:
            near = nearest(str(key), known)
            raise ValueError(f"{path}: unknown key {key}" + (f"; did you mean {near}?" if near else ""))
    return build(values, str(path))


def build(values: Mapping[str, Any], source: str) -> Site:
    import pydantic  # 0.1 s that `msc --help` need not wait for

    try:
        return pydantic.TypeAdapter(Site).validate_python(values)
    except pydantic.ValidationError as error:
        # not the value: it may be a secret
        raise ValueError(f"{source}: {describe_validation_error(error, values=False)}") from None
