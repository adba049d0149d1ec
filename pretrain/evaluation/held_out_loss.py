"""Held-out clips, always the same ones with the same noise, and the loss on them: by noise level, by position, and
with parts of the past hidden."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msc.datasets.loading.held_out import held_out_batches
from msc.datasets.loading.mixture import Shards

from ..batch_inputs import Feed, Inputs
from ..config import Config
from ..diffusion.rectified_flow import add_noise, frame_losses
from ..diffusion.sampler import Cache, extend_cache
from ..model.layers import Block
from ..model.transformer import MSCTransformer
from .confidence import ClipRatios, with_total

BINS = 5  # equal ranges of the noise level
HELD_OUT_SEED = 1_000_003  # noise of evaluations: the same in every run and at every step


def bin_of(t: Tensor) -> Tensor:
    """Which range a noise level in [0, 1] lies in; same shape."""
    return (t * BINS).long().clamp(max=BINS - 1)


def bin_names() -> list[str]:
    return [f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]


@dataclass
class LossByNoise:
    """Squared velocity errors of supervised frames, summed by noise level; `[BINS]` sums and counts."""

    sums: Tensor
    counts: Tensor

    @staticmethod
    def zeros(device: torch.device) -> LossByNoise:
        return LossByNoise(*(torch.zeros(BINS, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, errors_BT: Tensor, t_BT: Tensor, counted_BT: Tensor) -> None:
        """Those of frames that count. Without indexing by a mask, for which a CPU would wait for the GPU."""
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
        """Mean, and the mean in every range of noise levels that was met."""
        found = {prefix + "mean": self.mean}
        for name, total, count in zip(bin_names(), self.sums.tolist(), self.counts.tolist(), strict=True):
            if count:
                found[f"{prefix}t_{name.replace('-', '_')}"] = total / count
        return found


@torch.no_grad()
def held_out_losses(
    model: nn.Module, config: Config, shards: Shards, feeds: Sequence[Feed], rows: int, row: int
) -> LossByNoise:
    """Held-out loss of a model that may be sharded over ranks; the same noise at every call. feeds: of every bucket."""
    feeds = [replace(feed, seed=HELD_OUT_SEED, text_dropout=0.0) for feed in feeds]
    frames = [(feed.frames.start, feed.frames.stop) for feed in feeds]
    losses = LossByNoise.zeros(feeds[0].device)
    model.eval()
    each = config.train.micro
    for batch, count in held_out_batches(shards, config.train.held_out, each, rows, row, frames):
        feed = feeds[batch.bucket]
        inputs = feed(batch)
        velocity = model(inputs.noisy, inputs.t, inputs.text, inputs.labels, feed.timeline, inputs.all_t)
        counted = inputs.supervised & (torch.arange(len(inputs.t), device=inputs.t.device) < count)[:, None]
        losses.add(frame_losses(velocity, inputs.x, inputs.noise), inputs.t, counted)
    model.train()
    losses.reduce()
    return losses


# What clips add to the tables of `msc evaluate` ------------------------------------------------------


def by_noise(errors_BT: Tensor, inputs: Inputs) -> ClipRatios:
    """Squared velocity errors of supervised frames, by range of the noise level."""
    in_bin = torch.nn.functional.one_hot(bin_of(inputs.t), BINS) * inputs.supervised[..., None]
    return with_total((errors_BT[..., None] * in_bin).sum(1), in_bin.sum(1))


def by_position(errors_BT: Tensor, inputs: Inputs) -> ClipRatios:
    """The same by place of the frame in its clip."""
    return with_total(errors_BT * inputs.supervised, inputs.supervised)


@torch.no_grad()
def by_context(model: MSCTransformer, inputs: Inputs) -> dict[str, ClipRatios]:
    """Loss of the clips' last unit at the middle of every range of noise levels, after a clean past that is seen
    whole; and what is added where the unit sees nothing of the past, or nothing at one scale."""
    per_unit = model.config.frames_per_unit
    past, last, noise = inputs.x[:, :-per_unit], inputs.x[:, -per_unit:], inputs.noise[:, -per_unit:]
    cache = Cache()
    extend_cache(model, cache, past, inputs.text, inputs.labels)

    def losses(seeing: MSCTransformer) -> Tensor:
        found = []
        for level in range(BINS):
            t = inputs.t.new_full(last.shape[:2], (level + 0.5) / BINS)
            velocity = seeing(add_noise(last, noise, t), t, inputs.text, inputs.labels, cache)
            found.append(frame_losses(velocity, last, noise).mean(1))
        return torch.stack(found, 1)

    scales = model.config.scales
    hidden = {"added without any past": set(range(len(scales)))}
    if len(scales) > 1:
        hidden |= {f"without scale {i + 1} (space {s.space}, time {s.time})": {i} for i, s in enumerate(scales)}
    whole = losses(model)
    added = {name: losses(blind(model, which)) - whole for name, which in hidden.items()}
    return {name: with_total(values) for name, values in {"with all of the past": whole, **added}.items()}


def blind(model: MSCTransformer, hidden: Collection[int]) -> MSCTransformer:
    """The same weights, not copied, in a model whose queries see no past at the `hidden` scales: a window of no units.

    Own units are seen as before, also by pooled heads. What others keep in a cache can be read with it.
    """
    scales = tuple(
        replace(scale, time=1, window=0) if i in hidden else scale for i, scale in enumerate(model.config.scales)
    )
    with torch.device("meta"):
        other = MSCTransformer(replace(model.config, scales=scales))
    other.load_state_dict(model.state_dict(), assign=True)
    for block, own in zip(other.blocks, model.blocks, strict=True):
        assert isinstance(block, Block) and isinstance(own, Block)
        block.attention.backend = own.attention.backend
    return other.eval()
