"""Shards to batches: reading the clips that come next, in whatever processes.

Which clip comes when is settled in shuffling.py and mixture.py; here it is only read.
"""

import atexit
import math
import os
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import DeterministicFailure
from .mixture import Shards, Stream, batches_per_round, stream_slots
from .shard_reader import ShardReader
from .shuffling import BucketSchedule, WindowShuffle, derive_seed, positions_of_rank, sample_at, stream_at

Frames = tuple[int, int]  # latent frames [start, stop)
Attach = Callable[[int, int, int], Tensor]  # of (sample, epoch, bucket)
MOST_IN_A_ROW = 64  # reads in vain for one clip, after which none is tried any more
# What schedulers and terminals send to every process of a job.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Batch:
    """Rows of one rank: B clips, of their frames those asked for.

    samples: number of each clip in its split, over all sets and buckets; with `epochs` and the frame it names the
    noise. keys: names in the tars, behind that of the set where there are several. bucket: of all clips.
    video: uint8 [B, Tv, 3, H, W], or latents: [B, T, C, h, w], as stored (float16), not normalised.
    text: [B, L, E] embeddings, padded with zeros to the longest. labels: int64 [B]. attached: what the loader was told
    to attach, stacked. unreadable: (sample, why) of samples that could not be read. error: why nothing can be read
    any more; never seen outside of this file.
    """

    samples: list[int]
    epochs: list[int]
    keys: list[str]
    bucket: int = 0
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    labels: Tensor | None = None
    attached: Tensor | None = None
    unreadable: tuple[tuple[int, str], ...] = ()
    error: Exception | None = None

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader, in a thread of its own: copies to a GPU then need not wait."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values)


# --- batches -----------------------------------------------------------------------------------------------

Place = tuple[int, int]  # bucket, position among the clips of that bucket that a run sees


@dataclass(frozen=True)
class _Item:
    """One clip of a batch; or (media None) an error that ends all."""

    sample: int
    epoch: int
    bucket: int = 0
    key: str = ""
    media: Tensor | None = None
    text: Tensor | None = None
    label: int | None = None
    attached: Tensor | None = None
    unreadable: tuple[tuple[int, str], ...] = ()
    error: Exception | None = None


class _Own:
    """The clips of a stream: in what order, and how to read them."""

    def __init__(self, stream: Stream, frames: Frames | None, seed: int, shuffle: bool, window: int) -> None:
        self.stream, self.samples = stream, ShardReader(stream.place, stream.index, stream.split, frames)
        if shuffle and window:
            counts = [shard.samples for shard in stream.index.splits[stream.split]]
            self.at: Callable[[int], tuple[int, int]] = WindowShuffle(counts, window, seed)
        else:
            self.at = partial(sample_at, samples=stream.clips, seed=seed, shuffle=shuffle)


class _Clips(Dataset):
    """Clips by bucket and position in it. `bound`: how many broken samples are tolerated."""

    def __init__(
        self, shards: Shards, split: str, frames: Sequence[Frames | None], seed: int, shuffle: bool, window: int,
        max_bad: float, attach: Attach | None,
    ) -> None:  # fmt: skip
        self.seed, self.where, self.attach = seed, f"{shards} ({split})", attach
        self.clips = shards.samples(split)
        self.bound = max(1, math.floor(max_bad * self.clips))
        self.slots: list[list[int]] = []
        self.buckets: list[list[_Own]] = []
        number = 0
        for streams, own in zip(shards.streams(split), frames, strict=True):
            self.slots.append(stream_slots(streams))
            self.buckets.append([])
            for stream in streams:
                self.buckets[-1].append(_Own(stream, own, derive_seed(seed, number), shuffle, window))
                number += 1

    def __getitem__(self, place: Place) -> _Item:
        """The clip at `place`; a broken sample is replaced by the next good one, on every rank alike."""
        bucket, position = place
        number, position = stream_at(position, self.slots[bucket], derive_seed(self.seed, bucket))
        own = self.buckets[bucket][number]
        stream, clips = own.stream, own.stream.clips
        epoch, first = own.at(position)
        unreadable: list[tuple[int, str]] = []
        reasons: dict[str, None] = {}  # fewer than `unreadable`: all clips of a shard that cannot be read have one
        for step in range(min(clips, self.bound + 1)):
            if len(reasons) == MOST_IN_A_ROW:
                break
            sample = (first + step) % clips
            try:
                key, media, text, label = own.samples.read(sample)
            except ValueError as error:
                unreadable.append((stream.first + sample, str(error)))
                reasons[str(error)] = None
            except OSError as error:
                return _Item(sample, epoch, error=error)
            else:
                key = f"{stream.name}:{key}" if stream.name else key
                number = stream.first + sample
                attached = self.attach(number, epoch, bucket) if self.attach is not None else None
                return _Item(number, epoch, bucket, key, media, text, label, attached, tuple(unreadable))
        found = f"{len(unreadable)} clips in a row of {stream.place} cannot be read: {'; '.join(list(reasons)[:3])}"
        return _Item(first, epoch, unreadable=tuple(unreadable), error=DeterministicFailure(f"{found}: check the disk"))


def loader(
    shards: Shards,
    split: str,
    *,
    seed: int,
    clock: int,
    clips: int,
    rank: int = 0,
    ranks: int = 1,
    frames: Sequence[Frames | None] | None = None,
    workers: int = 2,
    prefetch: int = 2,
    shuffle: bool = True,
    window: int = 0,
    stop: int | None = None,
    max_bad: float = 0.05,
    attach: Attach | None = None,
) -> Generator[Batch, None, None]:
    """This rank's rows of the batches from sample clock `clock` on, of `clips` clips over all ranks, of one bucket
    each; rank r of `ranks` reads the r-th equal part of each.

    With one bucket the n-th batch holds the positions [clock + n clips, clock + (n + 1) clips). With several the
    clock must be a whole number of batches: rounds of batches are shuffled (see mixture.py: rounds).
    frames: of every bucket, latent frames [start, stop) of its clips, of which alone the video is decoded; None for
    all. window: see DataConfig. stop: sample clock to end at, None for never; the last batch may be shorter with one
    rank and one bucket, and must be whole with more. workers: reading processes, 0 for none; prefetch: batches each
    reads ahead. attach: called with (sample, epoch, bucket) of every clip by the process that reads it, for what else
    belongs to the clip and takes time to make.
    Samples that cannot be read are named on stderr and replaced by the next one; once their number exceeds
    `max_bad` of the split (one is always tolerated), or too many follow each other, the iterator raises ValueError.
    Where shards cannot be had at all it raises OSError.
    Raises ValueError for clips that ranks do not divide, an unknown or empty split, or bad frames.
    """
    positions_of_rank(clock, clips, rank, ranks)
    several = len(shards.shapes) > 1
    if not shards.samples(split):
        raise ValueError(f"{shards} has no clips in split {split!r}")
    if several and clock % clips:
        raise ValueError(
            f"the sample clock is {clock}, no whole number of batches of {clips}: with several buckets a run goes on "
            "with a batch that divides it"
        )
    if stop is not None and (ranks > 1 or several) and (stop - clock) % clips:
        raise ValueError(f"{stop - clock} clips are not whole batches of {clips}, which {ranks} ranks need")
    batches = batches_per_round(shards, split, clips) if several else [1]
    dataset = _Clips(shards, split, frames or [None] * len(shards.shapes), seed, shuffle, window, max_bad, attach)
    read = DataLoader(
        dataset,
        batch_sampler=_Places(clock, clips, rank, ranks, stop, batches, seed),
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or it would draw from the one that training draws from
    )
    checked = _checked(read, dataset)
    atexit.register(_close, weakref.ref(checked))
    return checked


def _checked(batches: DataLoader, dataset: _Clips) -> Generator[Batch, None, None]:
    """The batches, until too many samples are broken. Its end, or `close`, ends the workers."""
    seen: set[int] = set()
    # Blocked while workers start, so that a signal to the whole job finds them ignoring it already.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        iterator = iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for batch in iterator:
            for sample, why in batch.unreadable:
                if sample in seen:
                    continue
                seen.add(sample)
                if len(seen) > dataset.bound:
                    raise DeterministicFailure(
                        f"more than {dataset.bound} of the {dataset.clips} samples in {dataset.where} are broken, "
                        f"among them {why}: check the disk, or run `msc convert` again"
                    )
                print(f"data: skipped {why}", file=sys.stderr, flush=True)
            if batch.error is not None:
                raise batch.error
            yield batch
    finally:
        # Not left to the garbage collector: a traceback may hold the iterator, and workers that ignore
        # SIGTERM would make Python wait for them at exit for ever.
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _close(checked: "weakref.ref[Generator[Batch, None, None]]") -> None:
    if (generator := checked()) is not None:
        generator.close()


@dataclass(frozen=True)
class _Places:
    """Endless lists of places, one per batch."""

    clock: int
    clips: int
    rank: int
    ranks: int
    stop: int | None
    batches: list[int]  # of every bucket in a round
    seed: int

    def __iter__(self) -> Iterator[list[Place]]:
        clock = self.clock
        turns = BucketSchedule(self.batches, self.seed)
        while self.stop is None or clock < self.stop:
            bucket, first = 0, clock
            if len(self.batches) > 1:
                bucket, number = turns(clock // self.clips)
                first = number * self.clips
            mine = positions_of_rank(first, self.clips, self.rank, self.ranks)
            end = math.inf if self.stop is None else first + self.stop - clock
            yield [(bucket, k) for k in mine if k < end]
            clock += self.clips


def _collate(items: list[_Item]) -> Batch:
    unreadable = tuple(pair for item in items for pair in item.unreadable)
    if error := next((item.error for item in items if item.error is not None), None):
        return Batch([], [], [], unreadable=unreadable, error=error)
    # Where this is a worker, torch's own function stacks them in shared memory: one copy less.
    media: Tensor = default_collate([item.media for item in items if item.media is not None])
    texts = [item.text for item in items if item.text is not None]
    labels = [item.label for item in items if item.label is not None]
    attached = [item.attached for item in items if item.attached is not None]
    return Batch(
        samples=[item.sample for item in items],
        epochs=[item.epoch for item in items],
        keys=[item.key for item in items],
        bucket=items[0].bucket,
        video=media if media.dtype == torch.uint8 else None,
        latents=None if media.dtype == torch.uint8 else media,
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if texts else None,
        labels=torch.tensor(labels) if labels else None,
        attached=default_collate(attached) if attached else None,
        unreadable=unreadable,
    )


def _start_worker(_: int) -> None:
    """Signals are for the training process, which ends its workers itself; one core each."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Tensors go by a socket that is made with the first of them: in a worker that ends just then, after its temporary
    # folder was emptied, which then could not be removed and was left behind, with a traceback. So it is made now.
    with open(os.devnull) as something:
        reduction.DupFd(something.fileno())
