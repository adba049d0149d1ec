"""Shards to batches: which clip comes when, and reading it.

The order of clips is a pure function of (seed, position), where the position counts the clips of the whole
run. Ranks, workers and restarts only choose who reads which positions, so none of them changes what is seen.
"""

import atexit
import math
import signal
import sys
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msc.datasets.samples import Samples
from msc.datasets.shards import Index

ROUNDS = 8
MASK = (1 << 64) - 1
# What schedulers and terminals send to every process of a job.
JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class DataConfig:
    """Section `data`: the folder of shards, loader processes per rank, batches each reads ahead, and the
    share of clips whose text is left out (for guidance).
    """

    shards: str = ""
    workers: int = 2
    prefetch: int = 2
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}, it must be at least 0")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch is {self.prefetch}, it must be at least 1")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"data.text_dropout is {self.text_dropout}, it must be between 0 and 1")


@dataclass(frozen=True)
class Batch:
    """Rows of one rank: B clips, of their frames those asked for.

    samples: index of each clip in its split; with `epochs` and the frame it names the noise. keys: names in
    the tars. video: uint8 [B, Tv, 3, H, W], or latents: float32 [B, T, C, h, w], as stored, not normalised.
    text: [B, L, E] embeddings, padded with zeros to the longest. labels: int64 [B]. broken: (sample, why) of those
    met that could not be read.
    """

    samples: list[int]
    epochs: list[int]
    keys: list[str]
    video: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    labels: Tensor | None = None
    broken: tuple[tuple[int, str], ...] = ()


# --- order -------------------------------------------------------------------------------------------------


def sample_at(position: int, samples: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """(epoch, sample) of the clip at `position` of a run over `samples` clips.

    Every epoch holds each sample once, in an order of its own. It costs the same at any position and takes
    no memory: a keyed permutation (a Feistel network, walked until inside the range), not a shuffled list.
    """
    if samples < 1:
        raise ValueError(f"there are {samples} samples to choose from")
    if position < 0:
        raise ValueError(f"position is {position}, it must not be negative")
    epoch, sample = divmod(position, samples)
    if not shuffle:
        return epoch, sample
    half = max(4, -(-(samples - 1).bit_length() // 2))  # small ranges would mix badly in fewer bits
    key = _mix(_mix(seed) ^ epoch)
    while True:
        left, right = sample >> half, sample & ((1 << half) - 1)
        for round_ in range(ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right * ROUNDS + round_)) >> (64 - half))
        sample = left << half | right
        if sample < samples:
            return epoch, sample


def order(samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of `samples` clips that is seen in `epoch`."""
    return [sample_at(epoch * samples + i, samples, seed)[1] for i in range(samples)]


def rows(clock: int, clips: int, rank: int, ranks: int) -> range:
    """Positions read by `rank` of the batch of `clips` clips that begins at sample clock `clock`."""
    if clips < 1 or ranks < 1 or clips % ranks:
        raise ValueError(f"{clips} clips per batch cannot be divided evenly over {ranks} data-parallel ranks")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, there are {ranks}")
    share = clips // ranks
    return range(clock + rank * share, clock + (rank + 1) * share)


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every bit of the input changes half of the output's."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


# --- batches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """One clip of a batch, or (media None) proof that too many samples are broken."""

    sample: int
    epoch: int
    key: str = ""
    media: Tensor | None = None
    text: Tensor | None = None
    label: int | None = None
    broken: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class _Clips(Dataset):
    """Clips by position in the run. `bound`: how many broken samples are tolerated."""

    samples: Samples
    seed: int
    shuffle: bool
    bound: int

    def __getitem__(self, position: int) -> _Item:
        """The clip at `position`; a broken sample is replaced by the next good one, on every rank alike."""
        epoch, first = sample_at(position, len(self.samples), self.seed, self.shuffle)
        broken: list[tuple[int, str]] = []
        for step in range(min(len(self.samples), self.bound + 1)):
            sample = (first + step) % len(self.samples)
            try:
                return _Item(sample, epoch, *self.samples.read(sample), tuple(broken))
            except ValueError as error:
                broken.append((sample, str(error)))
        return _Item(first, epoch, broken=tuple(broken))


def loader(
    folder: str | Path,
    index: Index,
    split: str,
    *,
    seed: int,
    clock: int,
    clips: int,
    rank: int = 0,
    ranks: int = 1,
    frames: tuple[int, int] | None = None,
    workers: int = 2,
    prefetch: int = 2,
    shuffle: bool = True,
    stop: int | None = None,
    max_bad: float = 0.05,
) -> Generator[Batch, None, None]:
    """This rank's rows of the batches from sample clock `clock` on: the n-th holds the positions
    [clock + n clips, clock + (n + 1) clips), of which rank r of `ranks` reads the r-th equal part.

    frames: latent frames [start, stop) of every clip, of which alone the video is decoded; None for all.
    stop: sample clock to end at, None for never; the last batch may be shorter with one rank, and must be
    whole with more. workers: reading processes, 0 for none; prefetch: batches each reads ahead.
    Samples that cannot be read are named on stderr and replaced by the next one; once their number exceeds
    `max_bad` of the split (one is always tolerated) the iterator raises ValueError.
    Raises ValueError for clips that ranks do not divide, an unknown or empty split, or bad frames.
    """
    rows(clock, clips, rank, ranks)
    if stop is not None and ranks > 1 and (stop - clock) % clips:
        raise ValueError(f"{stop - clock} clips are not whole batches of {clips}, which {ranks} ranks need")
    samples = Samples(Path(folder), index, split, frames)
    dataset = _Clips(samples, seed, shuffle, bound=max(1, math.floor(max_bad * len(samples))))
    batches = DataLoader(
        dataset,
        batch_sampler=_Positions(clock, clips, rank, ranks, stop),
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or it would draw from the one that training draws from
    )
    checked = _checked(batches, dataset)
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
            for sample, why in batch.broken:
                if sample in seen:
                    continue
                seen.add(sample)
                if len(seen) > dataset.bound:
                    raise ValueError(
                        f"more than {dataset.bound} of the {len(dataset.samples)} samples in "
                        f"{dataset.samples.folder} ({dataset.samples.split}) are broken, among them {why}: "
                        "check the disk, or run `msc convert` again"
                    )
                print(f"data: skipped {why}", file=sys.stderr, flush=True)
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
class _Positions:
    """Endless lists of positions, one per batch."""

    clock: int
    clips: int
    rank: int
    ranks: int
    stop: int | None

    def __iter__(self) -> Iterator[list[int]]:
        clock = self.clock
        while self.stop is None or clock < self.stop:
            mine = rows(clock, self.clips, self.rank, self.ranks)
            yield [k for k in mine if self.stop is None or k < self.stop]
            clock += self.clips


def _collate(items: list[_Item]) -> Batch:
    broken = tuple(pair for item in items for pair in item.broken)
    if any(item.media is None for item in items):
        return Batch([], [], [], broken=broken)
    media = torch.stack([item.media for item in items if item.media is not None])
    texts = [item.text for item in items if item.text is not None]
    labels = [item.label for item in items if item.label is not None]
    return Batch(
        samples=[item.sample for item in items],
        epochs=[item.epoch for item in items],
        keys=[item.key for item in items],
        video=media if media.dtype == torch.uint8 else None,
        latents=None if media.dtype == torch.uint8 else media,
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True) if texts else None,
        labels=torch.tensor(labels) if labels else None,
        broken=broken,
    )


def _start_worker(_: int) -> None:
    """Signals are for the training process, which ends its workers itself; one core each."""
    for number in JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
