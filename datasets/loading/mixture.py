"""Mixture: the sets of shards that a run trains on, each with a weight, and their clips by shape.

A set is a folder or URL that `msc convert` wrote. Clips of one shape are a bucket; a *stream* is the clips of one
bucket of one set. A batch is of one bucket; in it, streams alternate by the weights of their sets (shuffling.py).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from ..shards.index import Index, Shape, check_shards, index_content, parse_index
from ..shards.remote import COMMANDS, RemoteShards, is_url, redact_url
from ..signals import mix_signals
from ..statistics import mix_statistics
from .shuffling import SLOTS, apportion

DEFAULT_CACHE = "~/.cache/msc/shards"


@dataclass(frozen=True)
class ShardSetConfig:
    """One set of a mixture: folder or URL of its shards, and its weight; clips are seen in proportion to weights."""

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

    shards: the folder (or http, https URL) of shards, or a list of {path, weight}. workers: loader processes per rank,
    0 for none; prefetch: batches each reads ahead. text_dropout: share of clips whose text is left out (for guidance);
    signal_dropout: share of clips without a signal, for every signal. signals: names of those to use (None: all).
    max_bad: share of the clips that may be unreadable; one always may. window: shuffle clips within this many shards at
    a time, 0 for all. cache: folder for remote shards ("" for ~/.cache/msc/shards), cache_gb: its limit in GB.
    commands: further URL schemes to allow, read by commands: "s3", "gs", "ais", "hf", "pipe".
    """

    shards: str | tuple[ShardSetConfig, ...] = ""
    workers: int = 2
    prefetch: int = 2
    text_dropout: float = 0.1
    signal_dropout: float = 0.1
    signals: tuple[str, ...] | None = None
    max_bad: float = 0.05
    window: int = 0
    cache: str = ""
    cache_gb: float = 100.0
    commands: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("prefetch", 1), ("window", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}, it must be at least {least}")
        for name in ("text_dropout", "signal_dropout", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}, it must be between 0 and 1")
        if not self.cache_gb > 0:
            raise ValueError(f"data.cache_gb is {self.cache_gb}, it must be positive")
        if unknown := [command for command in self.commands if command not in COMMANDS]:
            raise ValueError(f"data.commands has {unknown[0]!r}; there are {', '.join(COMMANDS)}")

    @property
    def sets(self) -> tuple[ShardSetConfig, ...]:
        if isinstance(self.shards, str):
            return (ShardSetConfig(self.shards),) if self.shards else ()
        return self.shards


@dataclass(frozen=True)
class ShardSet:
    """An open set of shards. digest: first digits of the SHA-256 of its index.json."""

    place: Path | RemoteShards
    index: Index
    name: str = ""
    weight: float = 1.0
    digest: str = ""


@dataclass(frozen=True)
class Stream:
    """The clips of one bucket of one set, in one split.

    index: of their shape alone. first: number of its first sample among all of the split. share: of all clips seen.
    name: prefix of the keys of samples, where there are several sets.
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


@dataclass(frozen=True)
class Shards:
    """All sets that a run trains on."""

    sets: tuple[ShardSet, ...]

    def __str__(self) -> str:
        return ", ".join(str(one.place) for one in self.sets)

    @cached_property
    def index(self) -> Index:
        """The first set's, with the statistics and signals of all: what the model must know of its data."""
        statistics = mix_statistics([(one.weight, one.index.statistics) for one in self.sets])
        signals = mix_signals([(str(one.place), one.weight, one.index.signals) for one in self.sets])
        return dataclasses.replace(self.sets[0].index, statistics=statistics, signals=signals)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of every bucket, in order."""
        return tuple(dict.fromkeys(index.shape for one in self.sets for index in one.index.by_bucket()))

    def samples(self, split: str) -> int:
        return sum(one.index.samples(split) for one in self.sets)

    def streams(self, split: str) -> list[list[Stream]]:
        """The streams with clips of every bucket; ValueError for an unknown split."""
        total = sum(Fraction(one.weight) for one in self.sets)
        buckets: dict[Shape, list[Stream]] = {shape: [] for shape in self.shapes}
        first = 0
        for one in self.sets:
            # A clip has all signals of the mixture; those of other sets are unknown.
            for index in dataclasses.replace(one.index, signals=self.index.signals).by_bucket():
                if clips := index.samples(split):
                    share = Fraction(one.weight) / total * Fraction(clips, one.index.samples(split))
                    buckets[index.shape].append(Stream(one.place, index, split, first, share, one.name))
                    first += clips
        return list(buckets.values())


def single_set(place: str | Path | RemoteShards, index: Index) -> Shards:
    return Shards((ShardSet(Path(place) if isinstance(place, str) else place, index),))


def open_shards(config: DataConfig) -> Shards:
    """Read the index of every set and check that they fit together, but no shard (see `check_shard_sizes`). OSError or
    ValueError where something is missing or wrong.
    """
    if not config.sets:
        raise ValueError("data.shards is empty; name the folder that `msc convert` wrote: data.shards=FOLDER")
    sets = []
    for one, name in zip(config.sets, _names([one.path for one in config.sets]), strict=True):
        place: Path | RemoteShards
        if is_url(one.path):
            place = _remote_shards(config, one.path)
            index, content = place.read_index()
        else:
            place, content = Path(one.path), index_content(one.path)
            index = parse_index(content, str(place / "index.json"))
        sets.append(ShardSet(place, index, name, one.weight, hashlib.sha256(content).hexdigest()[:16]))
    for other in sets[1:]:
        _check_compatible(sets[0], other)
    mix_signals([(str(one.place), one.weight, one.index.signals) for one in sets])
    _check_cache_size(config, sets)
    return Shards(tuple(sets))


def check_shard_sizes(shards: Shards) -> None:
    """ValueError or OSError for a shard that is missing or of another size; one request for each: only on one rank."""
    for one in shards.sets:
        if isinstance(one.place, RemoteShards):
            one.place.check(one.index)
        else:
            check_shards(one.place, one.index)


def _remote_shards(config: DataConfig, url: str) -> RemoteShards:
    scheme = url.partition(":")[0]
    if scheme not in ("http", "https", *config.commands):
        hint = f"; it runs a command on every rank: allow that with data.commands=[{scheme}]"
        raise ValueError(f"data.shards: {url} is refused, only http and https are read" + hint * (scheme in COMMANDS))
    return RemoteShards(url, Path(config.cache or DEFAULT_CACHE).expanduser(), int(config.cache_gb * 1e9))


def _names(paths: Sequence[str]) -> list[str]:
    """A short name for each of several sets: the last part of its path, or all of it where that is ambiguous."""
    if len(paths) == 1:
        return [""]
    short = [re.split(r"[/\\]", path.split("?")[0].rstrip("/"))[-1] for path in paths]
    return [name if short.count(name) == 1 else redact_url(path) for name, path in zip(short, paths, strict=True)]


def _check_compatible(one: ShardSet, other: ShardSet) -> None:
    """Sets must share the latent space, labels and width of text, which are the model's too."""
    for name in ("store", "autoencoder", "temporal_factor", "channels", "has_text", "classes", "labels"):
        a, b = (x.index.settings.get(name) if name == "labels" else getattr(x.index, name) for x in (one, other))
        if a != b:
            raise ValueError(f"data.shards: {one.place} and {other.place} differ in {name}: {a} and {b}")


def _check_cache_size(config: DataConfig, sets: Sequence[ShardSet]) -> None:
    """All remote shards must fit into the cache or, with `window`, those of two windows."""
    remote = [one.index for one in sets if isinstance(one.place, RemoteShards) and one.index.shards]
    sizes = [[shard.bytes for shard in index.shards] for index in remote]
    limit, total = config.cache_gb * 1e9, sum(map(sum, sizes))
    if total <= limit:
        return
    if not config.window:
        raise ValueError(
            f"data.shards has {total / 1e9:.3g} GB to fetch, the cache holds data.cache_gb = {config.cache_gb:g}: "
            "raise that, or shuffle within fewer shards at a time with data.window"
        )
    # At the border of two windows both are in use, in every bucket.
    needed = sum(2 * config.window * max(own) * len(x.by_bucket()) for own, x in zip(sizes, remote, strict=True))
    if needed > limit:
        raise ValueError(
            f"data.window = {config.window} shards take up to {needed / 1e9:.3g} GB, the cache holds data.cache_gb = "
            f"{config.cache_gb:g}: raise that, or lower data.window"
        )


# --- proportions -------------------------------------------------------------------------------------------


def batches_per_round(shards: Shards, split: str, batch: int) -> list[int]:
    """Batches of every bucket in an epoch round, which sees about as many clips as there are: with one set, as many
    whole batches as a bucket has; the clips left over come first in the next round.

    ValueError for a bucket with fewer clips than a batch, or a share of less than a batch.
    """
    buckets = shards.streams(split)
    total = sum(stream.clips for streams in buckets for stream in streams)
    counts = [int(total * sum(stream.share for stream in streams) / batch) for streams in buckets]
    for shape, streams, count in zip(shards.shapes, buckets, counts, strict=True):
        clips = sum(stream.clips for stream in streams)
        if clips < batch:
            raise ValueError(
                f"{shards} has {clips or 'no'} clips of {shape} in {split}, a batch takes {batch} of one shape: lower "
                "train.batch, convert more video, or convert without that bucket"
            )
        if not count:
            raise ValueError(
                f"data.shards: the weights ask for less than one batch of {batch} clips of {shape} in {total}: raise "
                f"the weight of {streams[0].place}, or leave it out"
            )
    return counts


def stream_slots(streams: Sequence[Stream]) -> list[int]:
    """How many of every SLOTS clips of a bucket each of its streams gives; ValueError where that is none."""
    if len(streams) == 1:
        return [1]
    slots = apportion([stream.share for stream in streams])
    if 0 in slots:
        stream = streams[slots.index(0)]
        raise ValueError(
            f"data.shards: bucket {stream.index.shape} of {stream.place} has a weight of less than 1 in {SLOTS}: leave "
            "it out"
        )
    return slots
