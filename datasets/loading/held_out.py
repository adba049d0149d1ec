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
    each: int,
    ranks: int = 1,
    rank: int = 0,
    frames: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[Batch, int]]:
    """The first held-out clips, in order, `each` at a time per rank; and how many of a batch count, from its first.

    All ranks get the same number of whole batches, as a forward pass is collective. Padding clips are read but do not
    count, so that the clips measured are the same for any number of ranks. frames: of every bucket.
    """
    for bucket, (streams, parts) in enumerate(zip(shards.streams("held_out"), parts_of(shards, clips), strict=True)):
        for stream, count in zip(streams, parts, strict=True):
            own, whole = None if frames is None else frames[bucket], ranks * each
            read = count if ranks == 1 else math.ceil(count / whole) * whole
            for number, batch in enumerate(_held_out(stream, bucket, 0, read, whole, rank, ranks, own)):
                first = (number * ranks + rank) * each
                yield batch, min(max(count - first, 0), len(batch.samples))


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
    stream: Stream, bucket: int, first: int, clips: int, each: int, rank: int = 0, ranks: int = 1,
    frames: tuple[int, int] | None = None,
) -> Iterator[Batch]:  # fmt: skip
    batches = loader(
        single_set(stream.place, stream.index), "held_out", seed=0, clock=first, clips=each, rank=rank, ranks=ranks,
        frames=[frames], workers=0, shuffle=False, stop=first + clips,
    )  # fmt: skip
    for batch in batches:
        yield replace(batch, bucket=bucket, samples=[stream.first + sample for sample in batch.samples])
