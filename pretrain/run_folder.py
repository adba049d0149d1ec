"""Run folder: the name of every file that a training run writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from msc.datasets.files import write_atomically

from .model.latent_space import LatentSpace
from .typed_values import read, read_json

log = logging.getLogger(__name__)


class _File:
    """A path in the run folder, by its name."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: RunFolder, owner: type | None = None) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. JSONL files are written with `append_jsonl` and read with `read_jsonl` of datasets/files."""

    path: Path

    config = _File("config.yaml")  # the resolved configuration; a folder that has it is a run
    latent_space = _File("data.json")
    # a record per report, held-out evaluation, step that the spike guard skipped, clip that could not be read
    log = _File("log.jsonl")  # {"step", "clock", "loss", ...}
    held_out = _File("held_out.jsonl")  # {"step", "clock", "mean", ...}
    skipped_steps = _File("skipped.jsonl")  # {"step", "clock", "batch", "why", "clips"}
    unreadable_clips = _File("broken.jsonl")  # {"step", "sample", "why"}
    checkpoints = _File("checkpoints")  # step-00000500/ ... and `latest`; see checkpoints/directory.py
    excluded_ranges = _File("left_out.json")  # of the sample clock, by `msc train --rollback`
    heartbeat = _File("heartbeat.json")
    mlflow = _File("mlflow.json")  # identity of the MLflow run
    unsent_metrics = _File("mlflow-unsent-live.json")  # with the newest checkpoint; others at a process's end
    jobs = _File("jobs")  # records of Slurm jobs
    logs = _File("logs")  # output of ranks
    samples = _File("samples")
    export = _File("export")

    @property
    def step_logs(self) -> tuple[Path, ...]:
        """Every file with a record per step, cut back to the checkpoint that a resumed run starts from."""
        return self.log, self.skipped_steps, self.unreadable_clips, self.held_out

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def evaluation(self, suffix: str, step: int | None = None) -> Path:
        """Result of `msc evaluate` as "json", "txt" or "png"; of the newest checkpoint, or of a step named by hand."""
        return self.path / (f"evaluation.{suffix}" if step is None else f"evaluation-{step:08d}.{suffix}")

    def exists(self) -> bool:
        """Whether a run began here."""
        return self.config.is_file()

    def has_only_startup_files(self) -> bool:
        """Whether it is empty but for what a run that failed before its first step leaves."""
        left = ("logs", "heartbeat.json", ".heartbeat.*")
        return not self.path.exists() or all(any(map(path.match, left)) for path in self.path.iterdir())

    def read_settings(self) -> dict[Path, bytes]:
        """The files that a resumed run needs besides a checkpoint, and their contents."""
        settings = (self.config, self.latent_space, self.excluded_ranges)
        return {path: path.read_bytes() for path in settings if path.is_file()}

    def restore_settings(self, contents: Mapping[Path, bytes]) -> bool:
        """Write those of the files again that are missing; whether there were any."""
        if missing := [path for path in contents if not path.exists()]:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in missing:
                write_atomically(path, contents[path])
            names = ", ".join(path.name for path in missing)
            log.warning("%s were removed from %s during training: they are written again", names, self.path)
        return bool(missing)

    def write_latent_space(self, space: LatentSpace) -> None:
        self.latent_space.write_text(json.dumps(asdict(space), indent=1))

    def read_latent_space(self) -> LatentSpace:
        return read(LatentSpace, read_json(self.latent_space), "data", self.latent_space)
