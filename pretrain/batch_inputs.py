"""From a batch of the loader to what the model trains on: normalised latents, their noise, their levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from msc.datasets.loading.dataloader import Attach, Batch

from .diffusion.autoencoder import Autoencoder
from .diffusion.rectified_flow import DiffusionConfig, add_noise, frame_noise, keep_condition, noise_levels
from .model.past_context import PastContext, WholeVideo
from .model.transformer import MSCTransformer


@dataclass(frozen=True)
class BatchInputs:
    """Own frames of some clips: x and noise `[B, T, C, H, W]`, t `[B, T]`; supervised frames have t > 0. all_t are the
    noise levels of all frames of the clips, where others have the rest."""

    x: Tensor
    noise: Tensor
    t: Tensor
    text: Tensor | None
    labels: Tensor | None
    all_t: Tensor | None = None

    @property
    def noisy(self) -> Tensor:
        return add_noise(self.x, self.noise, self.t)

    @property
    def supervised(self) -> Tensor:
        return self.t > 0


def latents_of(batch: Batch, autoencoder: Autoencoder, device: torch.device) -> Tensor:
    """Latents `[B, T, C, h, w]` of a batch in float32, not normalised, on `device`. Video comes there as bytes and is
    encoded there, a clip at a time: in floating point a batch of it would take many times the memory."""
    if batch.latents is not None:
        return batch.latents.to(device, non_blocking=True).float()
    assert batch.video is not None
    return torch.stack([autoencoder.encode(clip.to(device, non_blocking=True)) for clip in batch.video]).float()


@dataclass(frozen=True)
class InputBuilder:
    """How batches of one bucket become inputs in a run: the same on every rank but for `units`, the rank's own, and
    `past_context`, where those lie in their clips.
    """

    model: MSCTransformer
    autoencoder: Autoencoder
    diffusion: DiffusionConfig
    shift: float
    seed: int
    units: range
    all_units: int
    text_dropout: float
    device: torch.device
    past_context: PastContext = field(default_factory=WholeVideo)

    @property
    def frames(self) -> range:
        """The own latent frames of every clip."""
        per_unit = self.model.config.frames_per_unit
        return range(self.units.start * per_unit, self.units.stop * per_unit)

    def levels(self, batch: Batch) -> Tensor:
        """Noise levels of the own frames, `[B, T]` on the CPU; known before anything is decoded."""
        return self._all_levels(batch)[:, self.frames.start : self.frames.stop]

    def _all_levels(self, batch: Batch) -> Tensor:
        per_unit = self.model.config.frames_per_unit
        t = [
            noise_levels(self.diffusion, self.shift, self.seed, sample, epoch, self.all_units, per_unit)
            for sample, epoch in zip(batch.samples, batch.epochs, strict=True)
        ]
        return torch.stack(t)

    def __call__(self, batch: Batch) -> BatchInputs:
        latents = latents_of(batch, self.autoencoder, self.device)
        assert latents.shape[1] == len(self.frames)
        clips = list(zip(batch.samples, batch.epochs, strict=True))
        noise = batch.attached
        if noise is None:
            noise = torch.stack([frame_noise(self.seed, *clip, self.frames, latents.shape[2:]) for clip in clips])
        kept = keep_condition(self.text_dropout, self.seed, clips)
        text = None if batch.text is None else batch.text * kept[:, None, None]
        labels = None if batch.labels is None else batch.labels.where(kept, self.model.config.classes)

        to = partial(Tensor.to, device=self.device, non_blocking=True)
        all_t = to(self._all_levels(batch))
        return BatchInputs(
            self.model.normalise(latents),
            to(noise),
            all_t[:, self.frames.start : self.frames.stop],
            None if text is None else to(text),
            None if labels is None else to(labels),
            all_t,
        )


def noise_beside(builders: Sequence[InputBuilder], sizes: Sequence[tuple[int, int, int]]) -> Attach:
    """For the loader to attach: the noise of every clip's own frames, which would take a good part of a GPU's step.

    sizes: (frames, height, width) of every bucket's latents, as `builders` are of every bucket.
    """
    channels = builders[0].model.config.channels
    own = [
        (builder.frames, (channels, height, width)) for builder, (_, height, width) in zip(builders, sizes, strict=True)
    ]
    return partial(_noise, builders[0].seed, own)


def _noise(seed: int, own: list[tuple[range, tuple[int, int, int]]], sample: int, epoch: int, bucket: int) -> Tensor:
    return frame_noise(seed, sample, epoch, *own[bucket])


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch into parts of `size` clips."""

    def cut(value: Tensor | None, some: slice) -> Tensor | None:
        return None if value is None else value[some]

    return [
        Batch(
            batch.samples[some],
            batch.epochs[some],
            batch.keys[some],
            batch.bucket,
            video=cut(batch.video, some),
            latents=cut(batch.latents, some),
            text=cut(batch.text, some),
            labels=cut(batch.labels, some),
            attached=cut(batch.attached, some),
        )
        for some in (slice(i, i + size) for i in range(0, len(batch.samples), size))
    ]
