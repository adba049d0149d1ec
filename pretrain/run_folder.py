"""Run folder: the name of every file that a training run writes, and what its latents are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msc.datasets.shards.index import Index


@dataclass(frozen=True)
class LatentSpace:
    """What must be known of the latents to turn the model's output into video."""

    autoencoder: str
    frames: int
    height: int
    width: int
    video_height: int
    video_width: int
    fps: float

    @staticmethod
    def of(index: Index) -> LatentSpace:
        return LatentSpace(
            index.autoencoder, index.frames, index.height, index.width, index.video_height, index.video_width, index.fps
        )


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. JSONL files are written with `append_jsonl` and read with `read_jsonl` of datasets/files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; a folder with this file is a run."""
        return self.path / "config.yaml"

    @property
    def latent_space(self) -> Path:
        return self.path / "data.json"

    # JSONL, a record per line --------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        """Loss, learning rate and throughput: {"step", "clock", "loss", ...} per report."""
        return self.path / "log.jsonl"

    @property
    def held_out(self) -> Path:
        """{"step", "clock", "mean", ...} per held-out evaluation."""
        return self.path / "held_out.jsonl"

    @property
    def skipped_steps(self) -> Path:
        """{"step", "clock", "batch", "why", "clips"} per step that the spike guard skipped."""
        return self.path / "skipped.jsonl"

    @property
    def unreadable_clips(self) -> Path:
        """{"step", "sample", "why"} per clip that could not be read."""
        return self.path / "broken.jsonl"

    @property
    def step_logs(self) -> tuple[Path, ...]:
        """Every file with a record per step, cut back to the checkpoint that a resumed run starts from."""
        return self.log, self.skipped_steps, self.unreadable_clips, self.held_out

    # State ---------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        """step-00000500/ ... and `latest`; see checkpoints/directory.py."""
        return self.path / "checkpoints"

    @property
    def excluded_ranges(self) -> Path:
        """Ranges of the sample clock left out by `msc train --rollback`."""
        return self.path / "left_out.json"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def mlflow(self) -> Path:
        """Identity of the MLflow run."""
        return self.path / "mlflow.json"

    @property
    def jobs(self) -> Path:
        """Records of the Slurm jobs of this run."""
        return self.path / "jobs"

    @property
    def logs(self) -> Path:
        """Output of ranks."""
        return self.path / "logs"

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    # Results -------------------------------------------------------------------------------------------------

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def evaluation(self, suffix: str, step: int | None = None) -> Path:
        """Result of `msc evaluate` as "json", "txt" or "png"; of the newest checkpoint, or of a step named by hand."""
        return self.path / (f"evaluation.{suffix}" if step is None else f"evaluation-{step:08d}.{suffix}")

    # Contents ------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a run began here."""
        return self.config.is_file()

    def has_only_startup_files(self) -> bool:
        """Whether it is empty but for what a run that failed before its first step leaves."""
        left = ("logs", "heartbeat.json", ".heartbeat.*")
        return not self.path.exists() or all(any(map(path.match, left)) for path in self.path.iterdir())

    def write_latent_space(self, space: LatentSpace) -> None:
        self.latent_space.write_text(json.dumps(asdict(space), indent=1))

    def read_latent_space(self) -> LatentSpace:
        return LatentSpace(**json.loads(self.latent_space.read_text()))
