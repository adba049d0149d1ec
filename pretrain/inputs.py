"""From a batch of the loader to what the model trains on: normalised latents, their noise, their levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msc.datasets.batches import Batch

from .autoencoder import Autoencoder
from .diffusion import DiffusionConfig, add_noise, drop_text, frame_noise, noise_levels
from .model import MSCTransformer


@dataclass(frozen=True)
class Inputs:
    """Own frames of some clips: x and noise `[B, T, C, H, W]`, t `[B, T]`; supervised frames have t > 0."""

    x: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor | None
    labels: Tensor | None

    @property
    def noisy(self) -> Tensor:
        return add_noise(self.x, self.noise, self.t)

    @property
    def supervised(self) -> Tensor:
        return self.t > 0

    def rows(self, size: int) -> list[Inputs]:
        """Cut into micro-batches of `size` clips."""

        def cut(value: Tensor | None, some: slice) -> Tensor | None:
            return None if value is None else value[some]

        slices = [slice(i, i + size) for i in range(0, len(self.x), size)]
        return [Inputs(self.x[r], self.noise[r], self.t[r], cut(self.text, r), cut(self.labels, r)) for r in slices]


def latents_of(batch: Batch, autoencoder: Autoencoder) -> Tensor:
    """Latents `[B, T, C, h, w]` of a batch, not normalised, encoded here where the shards hold video."""
    if batch.latents is not None:
        return batch.latents
    assert batch.video is not None
    return autoencoder.encode(batch.video)


@dataclass(frozen=True)
class Feed:
    """How batches become inputs in a run: the same on every rank but for `units`, the rank's own."""

    model: MSCTransformer
    autoencoder: Autoencoder
    diffusion: DiffusionConfig
    shift: float
    seed: int
    units: range
    all_units: int
    text_dropout: float
    device: torch.device

    def __call__(self, batch: Batch) -> Inputs:
        per_unit = self.model.config.frames_per_unit
        frames = range(self.units.start * per_unit, self.units.stop * per_unit)
        latents = latents_of(batch, self.autoencoder)
        assert latents.shape[1] == len(frames)
        clips = list(zip(batch.samples, batch.epochs, strict=True))
        t = torch.stack(
            [
                noise_levels(self.diffusion, self.shift, self.seed, sample, epoch, self.all_units, per_unit)
                for sample, epoch in clips
            ]
        )
        noise = torch.stack([frame_noise(self.seed, *clip, frames, latents.shape[2:]) for clip in clips])
        text = None if batch.text is None else drop_text(batch.text, self.text_dropout, self.seed, clips)

        def here(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(self.device, non_blocking=True)

        return Inputs(
            self.model.normalise(latents.to(self.device, torch.float32)),
            noise.to(self.device),
            t[:, frames.start : frames.stop].to(self.device),
            here(text),
            here(batch.labels),
        )
