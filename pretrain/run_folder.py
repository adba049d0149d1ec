"""A run folder: what is in it, and how to get a trained model back out.

config.yaml   the resolved configuration      data.json        what the latents are
log.jsonl     one line per report             checkpoints/     see checkpoints/format.py
held_out.jsonl  one per held-out evaluation   samples/ export/ evaluation*.{json,txt,png}
mlflow.json   the MLflow run                  heartbeat.json   where rank 0 is
jobs/ logs/   of `msc submit`, and of ranks
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

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
            index.autoencoder,
            index.frames,
            index.height,
            index.width,
            index.video_height,
            index.video_width,
            index.fps,
        )


def write_space(run: Path, space: LatentSpace) -> None:
    (run / "data.json").write_text(json.dumps(asdict(space), indent=1))
