"""Held-out clips: always the same ones in the same order, one by its number or batch by batch over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .dataloader import Batch, loader
from .mixture import Shards, Stream, single_set


def held_out_batches(
    shards: Shards,
    clips: int,
    batch: int,
    ranks: int = 1,
    rank: int = 0,
    frames: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[Batch, int]]:
    """The first held-out clips in order, `batch` at a time and rank; and how many of a batch count, from its first on.

    All ranks get equally many full batches, as a forward pass may need all ranks. Clips beyond the last one are
    read but do not count, so that the same clips are measured on any number of ranks. frames: of every bucket.
    """
    for bucket, (streams, counts) in enumerate(
        zip(shards.streams("held_out"), held_out_counts(shards, clips), strict=True)
    ):
        for stream, count in zip(streams, counts, strict=True):
            own, over_ranks = None if frames is None else frames[bucket], ranks * batch
            read = count if ranks == 1 else math.ceil(count / over_ranks) * over_ranks
            for number, loaded in enumerate(_read(stream, bucket, 0, read, over_ranks, rank, ranks, own)):
                first = (number * ranks + rank) * batch
                yield loaded, min(max(count - first, 0), len(loaded.samples))


def held_out_counts(shards: Shards, clips: int) -> list[list[int]]:
    """How many of `clips` held-out clips come from each set of every bucket: its share, at least one."""
    return [[min(stream.clips, max(1, round(clips * stream.share))) for stream in streams]
            for streams in shards.streams("held_out")]  # fmt: skip


def held_out_clip(shards: Shards, clip: int) -> Batch:
    """One held-out clip, by its number over all buckets and sets."""
    for bucket, streams in enumerate(shards.streams("held_out")):
        for stream in streams:
            if stream.first <= clip < stream.first + stream.clips:
                return next(_read(stream, bucket, clip - stream.first, 1, 1))
    raise ValueError(f"clip {clip} does not exist; there are {shards.samples('held_out')} held-out clips")


def _read(
    stream: Stream, bucket: int, first: int, clips: int, batch: int, rank: int = 0, ranks: int = 1,
    frames: tuple[int, int] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    batches = loader(
        single_set(stream.place, stream.index), "held_out", seed=0, clock=first, clips=batch, rank=rank, ranks=ranks,
        frames=[frames], workers=0, shuffle=False, stop=first + clips,
    )  # fmt: skip
    for loaded in batches:
        yield replace(loaded, bucket=bucket, samples=[stream.first + sample for sample in loaded.samples])
