"""Data loader: reads the next clips of every rank in worker processes and stacks them into batches.

Which clip comes when is decided in shuffling.py and mixture.py.
"""

import atexit
import itertools
import logging
import math
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from ..errors import DeterministicFailure
from .mixture import Shards, Stream, batches_per_round, stream_slots
from .shard_reader import Clip, ShardReader
from .shuffling import BucketSchedule, WindowShuffle, derive_seed, positions_of_rank, sample_at, stream_at

Frames = tuple[int, int]  # latent frames [start, stop)
Position = tuple[int, int]  # bucket, position among the clips of that bucket that a run sees
Draw = Callable[[int, int, int], tuple[Tensor, Tensor]]  # (sample, epoch, bucket) to a clip's (t, noise)
MAX_FAILURES_IN_A_ROW = 64
MAX_CLIPS_IN_A_ROW = 1 << 18  # that are tried in place of one: a shard that cannot be read is one failure, many clips
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # to all of a job
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch: B clips of one bucket.

    samples: number of each clip in its split, over all sets and buckets; with `epochs` and the frame it is the key of
    the noise. keys: names in the tars, after the set's name where there are several.
    video: uint8 [B, Tv, 3, H, W], or latents: [B, T, C, h, w], as stored (float16), not normalised; T are the frames
    requested. text: [B, L, E] embeddings, padded with zeros to the longest. labels: int64 [B]. signals: by name,
    float32 [B, T, k W], raw, for a latent frame the values of its k video frames one after another (see
    signals.rows_of_latent_frames); NaN for clips without. t, noise: stacked results of the loader's `draw`.
    unreadable: (sample, reason) of clips that others replace. error: why nothing can be read; raised by the loader,
    never seen outside.
    """

    samples: list[int]
    epochs: list[int]
    keys: list[str]
    bucket: int = 0
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    labels: Tensor | None = None
    signals: dict[str, Tensor] | None = None
    t: Tensor | None = None
    noise: Tensor | None = None
    unreadable: tuple[tuple[int, str], ...] = ()
    error: Exception | None = None

    def pin_memory(self) -> "Batch":
        """Called by torch's DataLoader in a thread of its own: copies to a GPU then need not wait."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values |= {name: value.pin_memory() for name, value in values.items() if isinstance(value, Tensor)}
        if self.signals is not None:
            values["signals"] = {name: value.pin_memory() for name, value in self.signals.items()}
        return Batch(**values)


class _StreamReader:
    """One stream with its reader and its shuffling."""

    def __init__(self, stream: Stream, frames: Frames | None, seed: int, shuffle: bool, window: int) -> None:
        self.stream, self.reader = stream, ShardReader(stream.place, stream.index, stream.split, frames)
        counts = [shard.samples for shard in stream.index.splits[stream.split]]
        self.sample_at: Callable[[int], tuple[int, int]] = (
            WindowShuffle(counts, window, seed) if shuffle and window
            else partial(sample_at, samples=stream.clips, seed=seed, shuffle=shuffle)
        )  # fmt: skip


class _Batches(Dataset):
    """Batches by the positions of their clips. max_unreadable: how many different clips may be unreadable."""

    def __init__(
        self, shards: Shards, split: str, frames: Sequence[Frames | None], seed: int, shuffle: bool, window: int,
        max_bad: float, draw: Draw | None,
    ) -> None:  # fmt: skip
        self.seed, self.name, self.draw = seed, f"{shards} ({split})", draw
        self.clips = shards.samples(split)
        self.max_unreadable = max(1, math.floor(max_bad * self.clips))
        buckets = shards.streams(split)
        self.slots = [stream_slots(streams) for streams in buckets]
        numbers = itertools.count()
        self.buckets = [
            [_StreamReader(stream, own, derive_seed(seed, next(numbers)), shuffle, window) for stream in streams]
            for streams, own in zip(buckets, frames, strict=True)
        ]

    def __getitems__(self, positions: list[Position]) -> Batch:
        """Called by DataLoader with the positions of a batch."""
        unreadable: list[tuple[int, str]] = []
        try:
            read = [self._read(*position, unreadable) for position in positions]
        except (OSError, DeterministicFailure) as error:
            return Batch([], [], [], unreadable=tuple(unreadable), error=error)
        samples, epochs, clips = map(list, zip(*read, strict=True))
        keys, all_media, texts, labels, signals = map(list, zip(*clips, strict=True))
        bucket = positions[0][0]
        # In a worker, torch's function stacks them in shared memory: one copy less.
        media: Tensor = default_collate(all_media)
        t = noise = None
        if self.draw is not None:
            draws = [self.draw(sample, epoch, bucket) for sample, epoch in zip(samples, epochs, strict=True)]
            t, noise = default_collate(draws)
        return Batch(
            samples,
            epochs,
            keys,
            bucket,
            video=media if media.dtype == torch.uint8 else None,
            latents=None if media.dtype == torch.uint8 else media,
            text=None if texts[0] is None else torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
            labels=None if labels[0] is None else torch.tensor(labels),
            signals=None if signals[0] is None else default_collate(signals),
            t=t,
            noise=noise,
            unreadable=tuple(unreadable),
        )

    def _read(self, bucket: int, position: int, unreadable: list[tuple[int, str]]) -> tuple[int, int, Clip]:
        """(sample, epoch, clip) at a position. An unreadable clip is replaced by the next readable one of its stream,
        on every rank alike."""
        number, position = stream_at(position, self.slots[bucket], derive_seed(self.seed, bucket))
        own = self.buckets[bucket][number]
        stream = own.stream
        epoch, first = own.sample_at(position)
        before = len(unreadable)
        reasons: dict[str, None] = {}  # fewer than the clips: all of a shard that cannot be read share one
        for attempt in range(min(stream.clips, self.max_unreadable + 1, MAX_CLIPS_IN_A_ROW)):
            if len(reasons) == MAX_FAILURES_IN_A_ROW:
                break
            sample = (first + attempt) % stream.clips
            try:
                clip = own.reader.read(sample)
            except DeterministicFailure:
                raise
            except ValueError as error:
                unreadable.append((stream.first + sample, str(error)))
                reasons[str(error)] = None
            else:
                key = f"{stream.name}:{clip.key}" if stream.name else clip.key
                return stream.first + sample, epoch, clip._replace(key=key)
        raise DeterministicFailure(
            f"{len(unreadable) - before} clips in a row of {stream.place} cannot be read: "
            f"{'; '.join(list(reasons)[:3])}: check the disk"
        )


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
    draw: Draw | None = None,
) -> Generator[Batch, None, None]:
    """This data-parallel rank's part of every batch from sample clock `clock` on. A batch is `clips` clips of one
    bucket; each of `ranks` reads an equal part.

    With one bucket the n-th batch holds the positions [clock + n clips, clock + (n + 1) clips). With several, epoch
    rounds of batches are shuffled (mixture.py: batches_per_round) and the clock must be a whole number of batches.
    frames: of every bucket, latent frames [start, stop) of its clips, the only ones decoded; None for all. window: see
    DataConfig. stop: sample clock to end at, None for never; with one rank and bucket the last batch may be shorter,
    otherwise it must be whole. workers: reading processes, 0 for none; prefetch: batches each reads ahead. draw:
    picklable, called by the reading process with (sample, epoch, bucket) of every clip.
    Unreadable clips are logged and replaced by the next one. DeterministicFailure (a ValueError) once more than
    `max_bad` of the split (one is always tolerated), or too many in a row, are unreadable; OSError where shards cannot
    be reached at all; ValueError for clips that ranks do not divide, an unknown or empty split, or bad frames.
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
    dataset = _Batches(shards, split, frames or [None] * len(shards.shapes), seed, shuffle, window, max_bad, draw)
    data_loader = DataLoader(
        dataset,
        batch_sampler=_positions(clock, clips, rank, ranks, stop, batches, seed),
        collate_fn=default_convert,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or it would draw from the global one, which training uses
    )
    generator = _checked(data_loader, dataset)
    atexit.register(_close, weakref.ref(generator))
    return generator


def _positions(
    clock: int, clips: int, rank: int, ranks: int, stop: int | None, batches: list[int], seed: int
) -> Iterator[list[Position]]:
    """Positions of this rank's clips, batch by batch. batches: of every bucket in a round."""
    schedule = BucketSchedule(batches, seed)
    while stop is None or clock < stop:
        bucket, first = 0, clock
        if len(batches) > 1:
            bucket, number = schedule(clock // clips)
            first = number * clips
        end = math.inf if stop is None else first + stop - clock
        yield [(bucket, k) for k in positions_of_rank(first, clips, rank, ranks) if k < end]
        clock += clips


def _checked(data_loader: DataLoader, dataset: _Batches) -> Generator[Batch, None, None]:
    """The batches, until too many clips are unreadable. Its end, or `close`, ends the workers."""
    unreadable: set[int] = set()
    logged: set[str] = set()  # all clips of a shard that cannot be read share a reason: one line
    # Blocked while workers start, so that a signal to the whole job finds them ignoring it already.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        iterator = iter(data_loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for batch in iterator:
            for sample, reason in batch.unreadable:
                if sample in unreadable:
                    continue
                unreadable.add(sample)
                if len(unreadable) > dataset.max_unreadable:
                    raise DeterministicFailure(
                        f"more than {dataset.max_unreadable} of the {dataset.clips} samples in {dataset.name} are "
                        f"unreadable, among them {reason}: check the disk, or run `msc convert` again"
                    )
                if reason not in logged:
                    logged.add(reason)
                    log.warning("unreadable clip skipped: %s", reason)
            if batch.error is not None:
                raise batch.error
            yield batch
    finally:
        # Not left to the garbage collector: a traceback may hold the iterator, and workers that ignore
        # SIGTERM would make Python wait for them at exit for ever.
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def _close(reference: "weakref.ref[Generator[Batch, None, None]]") -> None:
    if (generator := reference()) is not None:
        generator.close()


def _start_worker(_: int) -> None:
    """Signals are for the training process, which ends its workers itself; one core each."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Tensors travel by a socket that is created with the first of them. A worker that ends just then leaves it behind
    # in a temporary folder that cannot be removed, with a traceback; so it is created now.
    with open(os.devnull) as file:
        reduction.DupFd(file.fileno())
