"""Trained models: loaded from the checkpoints of a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints import directory as checkpoint_directory
from ..checkpoints import format as checkpoint_format
from ..config import Config, load
from ..diffusion.autoencoder import Autoencoder, open_autoencoder
from ..model.exported_weights import check_model, check_sizes
from ..model.latent_space import LatentSpace
from ..model.transformer import MSCTransformer
from ..run_folder import RunFolder


@dataclass(frozen=True)
class TrainedModel:
    """A model with the weights of a checkpoint, in evaluation mode on `device`, and what it was trained on."""

    model: MSCTransformer
    config: Config
    space: LatentSpace
    autoencoder: Autoencoder
    step: int
    clock: int
    device: torch.device


def read_run(run: Path) -> tuple[Config, LatentSpace]:
    """The configuration of a run and what its latents are; FileNotFoundError if it is no run folder."""
    for name in ("config.yaml", "data.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a run folder: it has no {name}")
    config, space = load(file=run / "config.yaml"), RunFolder(run).read_latent_space()
    check_model(config.model, space, run / "config.yaml")
    return config, space


def open_run(run: Path, weights: str = "ema", checkpoint: str | None = None) -> TrainedModel:
    """Load the averaged ("ema") or last ("raw") weights of the newest checkpoint, or one by step or folder, in fp32."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is {weights!r}; it must be 'ema' (averaged) or 'raw' (as trained)")
    config, space = read_run(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with checkpoint_directory.held(run, checkpoint) as path:
        meta = checkpoint_directory.CheckpointMeta.read(path)
        check_sizes(config.model, meta.parameters, RunFolder(run).config)
        with torch.device("meta"):
            model = MSCTransformer(config.model)
        model.load_state_dict(dict(checkpoint_format.weights(path, weights)), assign=True)
    model.to(device).eval()
    autoencoder = open_autoencoder(space.autoencoder, device)
    return TrainedModel(model, config, space, autoencoder, meta.step, meta.clock, device)
