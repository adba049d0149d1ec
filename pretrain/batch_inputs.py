"""Batch inputs: what the model trains on, made of a batch of the loader: normalised latents, noise levels t, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msc.datasets.loading.dataloader import Batch

from .diffusion.autoencoder import Autoencoder
from .diffusion.loss import Loss
from .diffusion.rectified_flow import DiffusionConfig, add_noise, frame_noise, frame_shift, keep_condition, noise_levels
from .model.conditioning import Condition
from .model.past_context import PastContext, WholeVideo
from .model.transformer import MSCTransformer


@dataclass(frozen=True)
class BatchInputs:
    """Own frames of some clips: x and noise `[B, T, C, H, W]`, t `[B, T]`; supervised frames have t > 0. all_t are the
    noise levels of all frames of the clips, where others have the rest."""

    x: Tensor
    noise: Tensor
    t: Tensor
    condition: Condition = field(default_factory=Condition)
    all_t: Tensor | None = None

    @property
    def noisy(self) -> Tensor:
        return add_noise(self.x, self.noise, self.t)

    @property
    def supervised(self) -> Tensor:
        return Loss().supervised(self.t)


def latents_of(batch: Batch, autoencoder: Autoencoder, device: torch.device) -> Tensor:
    """Latents `[B, T, C, h, w]` of a batch in float32, not normalised, on `device`. Video is moved there as bytes and
    encoded there, a clip at a time: in floating point a batch of it would take many times the memory."""
    if batch.latents is not None:
        return batch.latents.to(device, non_blocking=True).float()
    assert batch.video is not None
    return torch.stack([autoencoder.encode(clip.to(device, non_blocking=True)) for clip in batch.video]).float()


def condition_of(batch: Batch, model: MSCTransformer) -> Condition:
    """What the clips of a batch are conditioned on, on the CPU."""
    return Condition(batch.text, batch.labels, model.normalise_signals(batch.signals or {}))


@dataclass(frozen=True)
class NoiseSource:
    """Noise levels and noise for the clips of one bucket: functions of (seed, sample, epoch, frame) alone.

    size: frames, height and width of its latents. units: the rank's own. The loader's workers draw both, as the noise
    would take a good part of a GPU's step.
    """

    diffusion: DiffusionConfig
    seed: int
    size: tuple[int, int, int]
    channels: int
    frames_per_unit: int
    units: range

    @property
    def frames(self) -> range:
        """The own latent frames of every clip."""
        return range(self.units.start * self.frames_per_unit, self.units.stop * self.frames_per_unit)

    @property
    def shift(self) -> float:
        return frame_shift(self.diffusion, *self.size[1:])

    def __call__(self, sample: int, epoch: int) -> tuple[Tensor, Tensor]:
        """t of all frames of a clip `[T]`, noise of the own ones `[own T, C, H, W]`."""
        units = self.size[0] // self.frames_per_unit
        t = noise_levels(self.diffusion, self.shift, self.seed, sample, epoch, units, self.frames_per_unit)
        return t, frame_noise(self.seed, sample, epoch, self.frames, (self.channels, *self.size[1:]))


@dataclass(frozen=True)
class InputBuilder:
    """Makes batches of one bucket into inputs: the same on every rank but for the own units of `noise`, and
    `past_context`, where those lie in their clips.
    """

    model: MSCTransformer
    autoencoder: Autoencoder
    noise: NoiseSource
    device: torch.device
    text_dropout: float = 0.0
    signal_dropout: float = 0.0
    past_context: PastContext = field(default_factory=WholeVideo)

    @property
    def frames(self) -> range:
        """The own latent frames of every clip."""
        return self.noise.frames

    def own_t(self, batch: Batch) -> Tensor:
        """Noise levels of the own frames, `[B, T]` on the CPU, of a batch that carries them."""
        assert batch.t is not None
        return batch.t[:, self.frames.start : self.frames.stop]

    def __call__(self, batch: Batch) -> BatchInputs:
        latents = latents_of(batch, self.autoencoder, self.device)
        assert latents.shape[1] == len(self.frames)
        clips = list(zip(batch.samples, batch.epochs, strict=True))
        if batch.t is None or batch.noise is None:  # the loader drew none
            t, noise = zip(*(self.noise(*clip) for clip in clips), strict=True)
            batch = replace(batch, t=torch.stack(t), noise=torch.stack(noise))
        assert batch.t is not None and batch.noise is not None
        to = partial(Tensor.to, device=self.device, non_blocking=True)
        all_t = to(batch.t)
        return BatchInputs(
            self.model.normalise(latents),
            to(batch.noise),
            all_t[:, self.frames.start : self.frames.stop],
            self._condition(batch, clips).to(self.device),
            all_t,
        )

    def _condition(self, batch: Batch, clips: Sequence[tuple[int, int]]) -> Condition:
        """Condition of a batch, of which some clips go without: text and class together, every signal by itself."""
        condition, seed, config = condition_of(batch, self.model), self.noise.seed, self.model.config
        kept = keep_condition(self.text_dropout, seed, clips)
        text = None if condition.text is None else condition.text * kept[:, None, None]
        labels = None if condition.labels is None else condition.labels.where(kept, config.classes)
        signals = dict(condition.signals)
        for number, signal in enumerate(config.signals):
            if signal.name in signals:
                kept = keep_condition(self.signal_dropout, seed, clips, signal=number)
                signals[signal.name] = signals[signal.name].where(kept[:, None, None], torch.nan)
        return Condition(text, labels, signals)


def draw_noise(sources: Sequence[NoiseSource], sample: int, epoch: int, bucket: int) -> tuple[Tensor, Tensor]:
    """For the loader, with the `sources` of every bucket: t and noise of a clip."""
    return sources[bucket](sample, epoch)


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into parts of `size` clips."""
    values = {item.name: getattr(batch, item.name) for item in fields(batch) if item.name != "unreadable"}
    per_clip: dict[str, Any] = {k: value for k, value in values.items() if isinstance(value, list | Tensor | dict)}

    def part(value: Any, first: int) -> Any:
        if isinstance(value, dict):
            return {name: part(inner, first) for name, inner in value.items()}
        return value[first : first + size]

    return [
        replace(batch, unreadable=(), **{name: part(value, first) for name, value in per_clip.items()})
        for first in range(0, len(batch.samples), size)
    ]
