"""Held-out clips, always the same ones with the same noise, and the loss on them: by noise level, by position, and
with parts of the past hidden."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msc.datasets.loading.dataloader import Batch, loader
from msc.datasets.loading.mixture import Shards, Stream, only

from ..batch_inputs import Feed, Inputs
from ..config import Config
from ..diffusion.rectified_flow import add_noise, frame_losses
from ..diffusion.sampler import Cache, remember
from ..model.transformer import MSCTransformer
from .confidence import Part, summed

BINS = 5  # equal ranges of the noise level
HELD_OUT_SEED = 1_000_003  # noise of evaluations: the same in every run and at every step


def bin_of(t: Tensor) -> Tensor:
    """Which range a noise level in [0, 1] lies in; same shape."""
    return (t * BINS).long().clamp(max=BINS - 1)


def bin_names() -> list[str]:
    return [f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]


@dataclass
class Losses:
    """Squared velocity errors of supervised frames, summed by noise level; `[BINS]` sums and counts."""

    sums: Tensor
    counts: Tensor

    @staticmethod
    def zeros(device: torch.device) -> Losses:
        return Losses(*(torch.zeros(BINS, dtype=torch.float64, device=device) for _ in range(2)))

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

    def merge(self, other: Losses) -> None:
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


def held_out_batches(
    shards: Shards,
    clips: int,
    each: int,
    rows: int = 1,
    row: int = 0,
    frames: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[Batch, int]]:
    """The first held-out clips, in order, `each` at a time and row; and how many of a batch count, from its first on.

    All rows get as many whole batches, as a pass is for all ranks together. What lies beyond the last clip there is
    read but does not count, so that the clips measured are the same for any number of rows. frames: of every bucket.
    """
    for bucket, (streams, parts) in enumerate(zip(shards.streams("held_out"), parts_of(shards, clips), strict=True)):
        for stream, some in zip(streams, parts, strict=True):
            own, whole = None if frames is None else frames[bucket], rows * each
            read = some if rows == 1 else math.ceil(some / whole) * whole
            for number, batch in enumerate(_held_out(stream, bucket, 0, read, whole, row, rows, own)):
                first = (number * rows + row) * each
                yield batch, min(max(some - first, 0), len(batch.samples))


def parts_of(shards: Shards, clips: int) -> list[list[int]]:
    """How many of `clips` held-out clips each set gives of every bucket: its share, at least one."""
    return [[min(stream.clips, max(1, round(clips * stream.share))) for stream in streams]
            for streams in shards.streams("held_out")]  # fmt: skip


def held_out_clip(shards: Shards, clip: int) -> Batch:
    """One held-out clip, by its number over all buckets and sets."""
    for bucket, streams in enumerate(shards.streams("held_out")):
        for stream in streams:
            if stream.first <= clip < stream.first + stream.clips:
                return next(_held_out(stream, bucket, clip - stream.first, 1, 1))
    raise ValueError(f"clip {clip} does not exist; there are {shards.samples('held_out')} held-out clips")


def _held_out(
    stream: Stream, bucket: int, first: int, clips: int, each: int, row: int = 0, rows: int = 1,
    frames: tuple[int, int] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    batches = loader(
        only(stream.place, stream.index), "held_out", seed=0, clock=first, clips=each, rank=row, ranks=rows,
        frames=[frames], workers=0, shuffle=False, stop=first + clips,
    )  # fmt: skip
    for batch in batches:
        yield replace(batch, bucket=bucket, samples=[stream.first + sample for sample in batch.samples])


@torch.no_grad()
def held_out_losses(
    model: nn.Module, config: Config, shards: Shards, feeds: Sequence[Feed], rows: int, row: int
) -> Losses:
    """Held-out loss of a model that may be sharded over ranks; the same noise at every call. feeds: of every bucket."""
    feeds = [replace(feed, seed=HELD_OUT_SEED, text_dropout=0.0) for feed in feeds]
    frames = [(feed.frames.start, feed.frames.stop) for feed in feeds]
    losses = Losses.zeros(feeds[0].device)
    model.eval()
    each = config.train.micro
    for batch, count in held_out_batches(shards, config.train.held_out, each, rows, row, frames):
        feed = feeds[batch.bucket]
        inputs = feed(batch)
        velocity = model(inputs.noisy, inputs.t, inputs.text, inputs.labels, feed.past_context, inputs.all_t)
        counted = inputs.supervised & (torch.arange(len(inputs.t), device=inputs.t.device) < count)[:, None]
        losses.add(frame_losses(velocity, inputs.x, inputs.noise), inputs.t, counted)
    model.train()
    losses.reduce()
    return losses


# What clips add to the tables of `msc evaluate` ------------------------------------------------------


def by_noise(errors_BT: Tensor, inputs: Inputs) -> Part:
    """Squared velocity errors of supervised frames, by range of the noise level."""
    in_bin = torch.nn.functional.one_hot(bin_of(inputs.t), BINS) * inputs.supervised[..., None]
    return summed((errors_BT[..., None] * in_bin).sum(1), in_bin.sum(1))


def by_position(errors_BT: Tensor, inputs: Inputs) -> Part:
    """The same by place of the frame in its clip."""
    return summed(errors_BT * inputs.supervised, inputs.supervised)


@torch.no_grad()
def by_context(model: MSCTransformer, inputs: Inputs) -> dict[str, Part]:
    """Loss of the clips' last unit at the middle of every range of noise levels, after a clean past that is seen
    whole; and what is added where the unit sees nothing of the past, or nothing at one scale."""
    per_unit = model.config.frames_per_unit
    past, last, noise = inputs.x[:, :-per_unit], inputs.x[:, -per_unit:], inputs.noise[:, -per_unit:]
    cache = Cache()
    remember(model, cache, past, inputs.text, inputs.labels)

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
    return {name: summed(values) for name, values in {"with all of the past": whole, **added}.items()}


def blind(model: MSCTransformer, hidden: Collection[int]) -> MSCTransformer:
    """The same weights, not copied, in a model whose queries see no past at the `hidden` scales: a window of no units.

    Own units are seen as before, also by pooled heads. What others keep in a cache can be read with it.
    """
    scales = tuple(
        replace(scale, time=1, window=0) if i in hidden else scale for i, scale in enumerate(model.config.scales)
    )
    with torch.device("meta"):
        other = MSCTransformer(replace(model.config, scales=scales), model.attention_inputs.kernel)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()
