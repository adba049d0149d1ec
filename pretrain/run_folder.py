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

import torch

from msc.datasets.shards.index import Index

from .checkpoints import directory as checkpoint_directory
from .checkpoints import format as checkpoint_format
from .config import Config, load
from .diffusion.autoencoder import Autoencoder, open_autoencoder
from .model.transformer import MSCTransformer


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


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a run's newest checkpoint, ready to compute with."""

    model: MSCTransformer
    config: Config
    space: LatentSpace
    autoencoder: Autoencoder
    step: int
    clock: int
    device: torch.device


def write_space(run: Path, space: LatentSpace) -> None:
    (run / "data.json").write_text(json.dumps(asdict(space), indent=1))


def read_run(run: Path) -> tuple[Config, LatentSpace]:
    """The configuration of a run and what its latents are; FileNotFoundError if it is no run folder."""
    for name in ("config.yaml", "data.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a run folder: it has no {name}")
    return load(file=run / "config.yaml"), LatentSpace(**json.loads((run / "data.json").read_text()))


def open_run(run: Path, weights: str = "ema", wanted: str | None = None) -> Trained:
    """Load a run's newest checkpoint, or that of the `wanted` step or folder: its averaged ("ema") or last ("raw")
    weights, in fp32."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is {weights!r}; it must be 'ema' (averaged) or 'raw' (as trained)")
    config, space = read_run(run)
    path = checkpoint_format.latest(run) if wanted is None else checkpoint_directory.find(run, wanted)
    if path is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet; train longer, or set checkpoint.every lower")
    meta = checkpoint_directory.CheckpointMeta.read(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = MSCTransformer(config.model)
    model.load_state_dict(dict(checkpoint_format.weights(path, weights)), assign=True)
    model.to(device).eval()
    return Trained(model, config, space, open_autoencoder(space.autoencoder, device), meta.step, meta.clock, device)
