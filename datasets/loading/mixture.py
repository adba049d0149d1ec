"""What a run trains on: sets of shards, each with a weight; clips of several shapes, each shape a bucket.

A set is a folder or an address that `msc convert` wrote. A *stream* is the clips of one bucket of one set. A batch is
of one bucket; in it, streams take turns by the weights of their sets (shuffling.py).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from ..prepare.statistics import mix_statistics
from ..shards.index import Index, Shape, check_shards, index_content, parse_index
from ..shards.remote import COMMANDS, RemoteShards, is_url, redact_url
from .shuffling import SLOTS, apportion

DEFAULT_CACHE = "~/.cache/msc/shards"


@dataclass(frozen=True)
class ShardSetConfig:
    """One set of a mixture: folder or address of its shards, and its weight: clips of it are seen in proportion."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.shards: a set has no path")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"data.shards: the weight of {self.path} is {self.weight}, it must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Section `data`.

    shards: the folder (or http, https address) of shards, or a list of {path, weight}. workers: loader processes per
    rank, 0 for none; prefetch: batches each reads ahead. text_dropout: share of clips whose text is left out (for
    guidance). max_bad: share of the clips that may be broken; one always may.
    window: shuffle clips within this many shards at a time, 0 for all. cache: folder for shards from addresses (""
    for ~/.cache/msc/shards), cache_gb: the most it may hold, in GB. commands: other kinds of addresses that may be
    used, which run commands: "s3", "gs", "ais", "hf", "pipe".
    """

    shards: str | tuple[ShardSetConfig, ...] = ""
    workers: int = 2
    prefetch: int = 2
    text_dropout: float = 0.1
    max_bad: float = 0.05
    window: int = 0
    cache: str = ""
    cache_gb: float = 100.0
    commands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("prefetch", 1), ("window", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}, it must be at least {least}")
        for name in ("text_dropout", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, it must be between 0 and 1")
        if not self.cache_gb > 0:
            raise ValueError(f"data.cache_gb is {self.cache_gb}, it must be positive")
        for command in self.commands:
            if command not in COMMANDS:
                raise ValueError(f"data.commands has {command!r}; there are {', '.join(COMMANDS)}")

    @property
    def sets(self) -> tuple[ShardSetConfig, ...]:
        if isinstance(self.shards, str):
            return (ShardSetConfig(self.shards),) if self.shards else ()
        return self.shards


@dataclass(frozen=True)
class ShardSet:
    """A set of shards, found. digest: of its index.json, the start of the SHA-256."""

    place: Path | RemoteShards
    index: Index
    name: str = ""
    weight: float = 1.0
    digest: str = ""


@dataclass(frozen=True)
class Stream:
    """The clips of one bucket of one set, in one split.

    index: of their shape alone. first: number of its first sample among all of the split's. share: of all clips seen.
    name: put before the keys of samples, where there are several sets.
    """

    place: Path | RemoteShards
    index: Index
    split: str
    first: int
    share: Fraction
    name: str = ""

    @cached_property
    def clips(self) -> int:
        return self.index.samples(self.split)

    def __str__(self) -> str:
        return f"bucket {self.index.shape} of {self.place}"


@dataclass(frozen=True)
class Shards:
    """All that a run trains on."""

    sets: tuple[ShardSet, ...]

    def __str__(self) -> str:
        return ", ".join(str(found.place) for found in self.sets)

    @cached_property
    def index(self) -> Index:
        """That of the first set, with the statistics of all: what the model must know of its data."""
        statistics = mix_statistics([(found.weight, found.index.statistics) for found in self.sets])
        return dataclasses.replace(self.sets[0].index, statistics=statistics)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every bucket, in order."""
        return tuple(dict.fromkeys(one.shape for found in self.sets for one in found.index.by_bucket()))

    def samples(self, split: str) -> int:
        return sum(found.index.samples(split) for found in self.sets)

    def streams(self, split: str) -> list[list[Stream]]:
        """Of every bucket, those with clips; ValueError for an unknown split."""
        total = sum(Fraction(found.weight) for found in self.sets)
        buckets: dict[Shape, list[Stream]] = {shape: [] for shape in self.shapes}
        first = 0
        for found in self.sets:
            all_clips = found.index.samples(split)
            for one in found.index.by_bucket():
                if clips := one.samples(split):
                    share = Fraction(found.weight) / total * Fraction(clips, all_clips)
                    buckets[one.shape].append(Stream(found.place, one, split, first, share, found.name))
                    first += clips
        return list(buckets.values())


def single_set(place: str | Path | RemoteShards, index: Index) -> Shards:
    """One set alone."""
    return Shards((ShardSet(Path(place) if isinstance(place, str) else place, index),))


def open_shards(config: DataConfig) -> Shards:
    """Read the index of every set and check that they fit each other; OSError or ValueError says
    what is missing or wrong. No shard is looked at (see `check_shard_sizes`).
    """
    if not config.sets:
        raise ValueError("data.shards is empty; name the folder that `msc convert` wrote: data.shards=FOLDER")
    names = _names([found.path for found in config.sets])
    sets = []
    for wanted, name in zip(config.sets, names, strict=True):
        place: Path | RemoteShards
        if is_url(wanted.path):
            place = _remote(config, wanted.path)
            index, content = place.read_index()
        else:
            place = Path(wanted.path)
            content = index_content(place)
            index = parse_index(content, str(place / "index.json"))
        sets.append(ShardSet(place, index, name, wanted.weight, hashlib.sha256(content).hexdigest()[:16]))
    for other in sets[1:]:
        _check_alike(sets[0], other)
    found = Shards(tuple(sets))
    _check_cache(config, found)
    return found


def check_shard_sizes(shards: Shards) -> None:
    """ValueError or OSError for a shard that is of another size or missing; asks for each, so once for all ranks."""
    for found in shards.sets:
        if isinstance(found.place, RemoteShards):
            found.place.check(found.index)
        else:
            check_shards(found.place, found.index)


def _remote(config: DataConfig, url: str) -> RemoteShards:
    scheme = url.partition(":")[0]
    if scheme not in ("http", "https", *config.commands):
        known = f"; it runs a command on every rank: allow that with data.commands=[{scheme}]"
        raise ValueError(f"data.shards: {url} is refused, only http and https are read" + known * (scheme in COMMANDS))
    return RemoteShards(url, Path(config.cache or DEFAULT_CACHE).expanduser(), int(config.cache_gb * 1e9))


def _names(paths: Sequence[str]) -> list[str]:
    """A short name for each of several sets: the last part of its path, or all of it where that is not enough."""
    if len(paths) == 1:
        return [""]
    short = [re.split(r"[/\\]", path.split("?")[0].rstrip("/"))[-1] for path in paths]
    return [name if short.count(name) == 1 else redact_url(path) for name, path in zip(short, paths, strict=True)]


def _check_alike(one: ShardSet, other: ShardSet) -> None:
    """Sets must share what the model knows nothing else for: the latent space, labels, width of text."""
    for what in ("store", "autoencoder", "temporal_factor", "channels", "has_text", "classes", "labels"):
        a, b = (
            found.index.settings.get(what) if what == "labels" else getattr(found.index, what) for found in (one, other)
        )
        if a != b:
            raise ValueError(f"data.shards: {one.place} and {other.place} differ in {what}: {a} and {b}")


def _check_cache(config: DataConfig, shards: Shards) -> None:
    """Shards that come in any order must all fit into the cache; else windows of them must."""
    streamed = [s for found in shards.sets if isinstance(found.place, RemoteShards) for s in [found.index]]
    sizes = [[shard.bytes for split in index.splits.values() for shard in split] for index in streamed]
    most, total = config.cache_gb * 1e9, sum(map(sum, sizes))
    if total <= most:
        return
    if not config.window:
        raise ValueError(
            f"data.shards has {total / 1e9:.3g} GB to fetch, the cache holds data.cache_gb = {config.cache_gb:g}: "
            "raise that, or shuffle within fewer shards at a time with data.window"
        )
    # at the seam of two windows both are in use, in every bucket
    needed = sum(
        2 * config.window * max(own) * len(i.by_bucket()) for own, i in zip(sizes, streamed, strict=True) if own
    )
    if needed > most:
        raise ValueError(
            f"data.window = {config.window} shards take up to {needed / 1e9:.3g} GB, the cache holds data.cache_gb = "
            f"{config.cache_gb:g}: raise that, or lower data.window"
        )


# --- how often -----------------------------------------------------------------------------------------


def batches_per_round(shards: Shards, split: str, batch: int) -> list[int]:
    """Batches of every bucket in a round, in which about as many clips are seen as there are: of one set, as many
    whole batches as a bucket has; the clips left over come first in the next round.

    ValueError for a bucket without clips, or with fewer than a batch takes.
    """
    buckets = shards.streams(split)
    total = sum(stream.clips for streams in buckets for stream in streams)
    found = [int(total * sum(stream.share for stream in streams) / batch) for streams in buckets]
    for shape, streams, batches in zip(shards.shapes, buckets, found, strict=True):
        clips = sum(stream.clips for stream in streams)
        if clips >= batch and not batches:
            raise ValueError(
                f"data.shards: the weights ask for less than one batch of {batch} clips of {shape} in {total}: raise "
                f"the weight of {streams[0].place}, or leave it out"
            )
        if clips < batch:
            raise ValueError(
                f"{shards} has {clips or 'no'} clips of {shape} in {split}, a batch takes {batch} of one shape: lower "
                "train.batch, convert more video, or convert without that bucket"
            )
    return found


def stream_slots(streams: Sequence[Stream]) -> list[int]:
    """How many of every 1024 clips of a bucket each of its streams gives; ValueError where that is none."""
    if len(streams) == 1:
        return [1]
    found = apportion([stream.share for stream in streams])
    if 0 in found:
        raise ValueError(f"data.shards: {streams[found.index(0)]} has a weight of less than 1 in {SLOTS}: leave it out")
    return found
