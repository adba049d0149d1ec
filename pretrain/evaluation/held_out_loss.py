"""Held-out loss: by noise level, by position in the clip, and with parts of the past hidden."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msc.datasets.loading.held_out import held_out_batches
from msc.datasets.loading.mixture import Shards

from ..batch_inputs import BatchInputs, InputBuilder
from ..config import Config
from ..diffusion.loss import Loss
from ..diffusion.rectified_flow import add_noise
from ..diffusion.sampler import Cache, extend_cache, with_scales
from ..model.conditioning import Condition
from ..model.transformer import MSCTransformer
from .confidence import ClipRatios, with_total

BINS = 5  # equal ranges of the noise level
BIN_NAMES = [f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]
HELD_OUT_SEED = 1_000_003  # noise of evaluations: the same in every run and at every step


def bin_of(t: Tensor) -> Tensor:
    """The index of the bin of noise levels in [0, 1]; same shape."""
    return (t * BINS).long().clamp(max=BINS - 1)


@dataclass
class LossByNoise:
    """Squared velocity errors of supervised frames, summed by noise level; `[BINS]` sums and counts."""

    sums: Tensor
    counts: Tensor

    @staticmethod
    def zeros(device: torch.device) -> LossByNoise:
        return LossByNoise(*torch.zeros(2, BINS, dtype=torch.float64, device=device))

    def add(self, errors_BT: Tensor, t_BT: Tensor, counted_BT: Tensor) -> None:
        """Add the frames that count. Without indexing by a mask, for which a CPU would wait for the GPU."""
        bins = bin_of(t_BT).flatten()
        self.sums.index_add_(0, bins, errors_BT.where(counted_BT, 0).flatten().double())
        self.counts.index_add_(0, bins, counted_BT.flatten().double())

    def reduce(self) -> None:
        """Sum over all ranks."""
        if torch.distributed.is_initialized():
            both = torch.stack([self.sums, self.counts])
            torch.distributed.all_reduce(both)
            self.sums, self.counts = both

    def merge(self, other: LossByNoise) -> None:
        self.sums += other.sums
        self.counts += other.counts

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    def metrics(self, prefix: str) -> dict[str, float]:
        """The mean, and the mean of every bin that holds frames."""
        values = {prefix + "mean": self.mean}
        for name, total, count in zip(BIN_NAMES, self.sums.tolist(), self.counts.tolist(), strict=True):
            if count:
                values[f"{prefix}t_{name.replace('-', '_')}"] = total / count
        return values


@torch.no_grad()
def held_out_losses(
    model: nn.Module, config: Config, shards: Shards, builders: Sequence[InputBuilder], ranks: int, rank: int
) -> LossByNoise:
    """Held-out loss of a model that may be sharded over ranks; the same noise at every call. builders: of every bucket;
    ranks, rank: of the data-parallel group."""
    builders = [
        replace(builder, noise=replace(builder.noise, seed=HELD_OUT_SEED), text_dropout=0.0, signal_dropout=0.0)
        for builder in builders
    ]
    frames = [(builder.frames.start, builder.frames.stop) for builder in builders]
    losses = LossByNoise.zeros(builders[0].device)
    model.eval()
    for batch, count in held_out_batches(shards, config.train.held_out, config.train.micro, ranks, rank, frames):
        builder = builders[batch.bucket]
        inputs = builder(batch)
        velocity = model(inputs.noisy, inputs.t, inputs.condition, builder.past_context, inputs.all_t)
        counted = inputs.supervised & (torch.arange(len(inputs.t), device=inputs.t.device) < count)[:, None]
        losses.add(Loss().per_frame(velocity, inputs.x, inputs.noise), inputs.t, counted)
    model.train()
    losses.reduce()
    return losses


# Of every clip, for the tables of `msc evaluate` -----------------------------------------------------


def by_noise(errors_BT: Tensor, inputs: BatchInputs) -> ClipRatios:
    """Squared velocity errors of supervised frames, by bin of the noise level."""
    in_bin = torch.nn.functional.one_hot(bin_of(inputs.t), BINS) * inputs.supervised[..., None]
    return with_total((errors_BT[..., None] * in_bin).sum(1), in_bin.sum(1))


def by_position(errors_BT: Tensor, inputs: BatchInputs) -> ClipRatios:
    """Squared velocity errors of supervised frames, by position of the frame in its clip."""
    return with_total(errors_BT * inputs.supervised, inputs.supervised)


@torch.no_grad()
def by_context(model: MSCTransformer, inputs: BatchInputs) -> dict[str, ClipRatios]:
    """Loss of the clips' last unit at the middle of every noise bin, after a clean past; and the increase where all of
    the past is hidden, or that of one scale, or where that unit has the signals of another clip of the batch."""
    per_unit = model.config.frames_per_unit
    past, last, noise = inputs.x[:, :-per_unit], inputs.x[:, -per_unit:], inputs.noise[:, -per_unit:]
    own = inputs.condition.of_frames(slice(-per_unit, None))
    cache = Cache()
    extend_cache(model, cache, past, inputs.condition.of_frames(slice(-per_unit)))

    def losses(model: MSCTransformer, condition: Condition = own) -> Tensor:
        by_bin = []
        for i in range(BINS):
            t = inputs.t.new_full(last.shape[:2], (i + 0.5) / BINS)
            velocity = model(add_noise(last, noise, t), t, condition, cache)
            by_bin.append(Loss().per_frame(velocity, last, noise).mean(1))
        return torch.stack(by_bin, 1)

    scales = model.config.scales
    hidden = {"added without any past": set(range(len(scales)))}
    if len(scales) > 1:
        hidden |= {f"without scale {i + 1} (space {s.space}, time {s.time})": {i} for i, s in enumerate(scales)}
    full = losses(model)
    increase = {name: losses(hide_past(model, which)) - full for name, which in hidden.items()}
    if len(last) > 1:  # how much the model listens
        for name, value in own.signals.items():
            shuffled = replace(own, signals={**own.signals, name: value.roll(1, 0)})
            increase[f"with {name} of another clip"] = losses(model, shuffled) - full
    return {name: with_total(values) for name, values in {"with all of the past": full, **increase}.items()}


def hide_past(model: MSCTransformer, hidden: Collection[int]) -> MSCTransformer:
    """The same weights in a model whose queries see no past at the `hidden` scales: a window of no units.

    Own units are seen as before, also by pooled heads. It can read a cache that `model` has filled.
    """
    scales = [replace(scale, time=1, window=0) if i in hidden else scale for i, scale in enumerate(model.config.scales)]
    return with_scales(model, scales)
