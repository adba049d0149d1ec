"""Conversion of videos to shards: extract clips, encode them, write shards, measure statistics.

Everything is written into a folder beside the result and renamed at the end, so that a result is complete or absent;
see progress.py for what is kept of an unfinished one. Workers decode one source each; their clips are put together in
the order of the sources, so that the bytes of the result do not depend on the number of workers or parts.
"""

import dataclasses
import hashlib
import logging
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors.torch import load
from torch import Tensor

from ..files import check_replaceable, locked, publish_folder, write_atomically
from ..shards.index import STORES, Index, Sample, Shape, read_part, scan, write_index
from ..shards.tar import size_of
from ..signal_files import SUFFIXES
from ..signals import TAKES
from ..statistics import TIMES, LatentSums, Statistics, mix_statistics, statistics_of_sums, sum_latents
from ..video import decode_frames
from .clip_ranges import HELD_OUT_RULE, SPLITS
from .convert_config import ConvertConfig as ConvertConfig
from .progress import (
    WORK,
    SourceResult,
    check_plan,
    conversion_folder,
    group_sources,
    process_folder,
    read_group,
    write_shared_json,
)
from .shard_writer import Embed, Encode, ShardWriter, check_unreadable
from .signal_tracks import SignalPlan, SignalRequest, measure_signals, plan_signals
from .sources import Listing, Source, find_sources
from .summary import clip_lines, signal_lines

RECORDS = 2  # version of the records of unfinished conversions
# Statistics are measured on all training clips of a set of few latent values, and otherwise on a sample of segments,
# spread evenly over all clips: decoding a segment again takes about as long as encoding it did.
WHOLE_VALUES = 12 << 20
SEGMENT_FRAMES = max(TIMES)  # latent frames, or all of a shorter clip
MIN_SEGMENTS, SEGMENT_SHARE, MAX_SEGMENTS = 16, 1 / 32, 1024
SHOWN = 10  # skipped videos that the report names
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Result of a conversion: clips per split, seconds of video in them, (source, reason) skipped; as text."""

    clips: dict[str, int]
    seconds: float
    skipped: tuple[tuple[str, str], ...]
    text: str


def convert(
    config: ConvertConfig,
    encode: Encode,
    temporal_factor: int,
    embed: Embed | None = None,
    part: tuple[int, int] | None = None,
    merge: bool = False,
) -> Report:
    """Write shards, `index.json` and `skipped.txt` into `config.out`, continuing what an earlier process began.

    `encode` maps one clip, uint8 [T, 3, H, W], to latents [T', C, h, w], `embed` a caption to [L, E]; they are
    called in this process only, one call at a time. `part` (i, N): convert only the i-th of N parts of the sources,
    from 0, and leave the index to a last process without `part`; `merge`: that one refuses to convert parts itself.
    Raises ValueError or FileNotFoundError for sources that do not exist, hold no video or too many of which are
    unreadable, and FileExistsError where `out` is not empty (see `overwrite`).
    """
    if part is not None and (merge or not 0 <= part[0] < part[1]):
        raise ValueError(f"part {part[0]}/{part[1]}: parts are 0/N to N-1/N, and cannot be combined with merge")
    began = time.monotonic()
    out = Path(config.out).expanduser().resolve()
    check_replaceable(out, config.overwrite, proof="index.json")
    listing = find_sources(config.sources, [request.name for request in config.signal_requests])
    _check_listing(config, listing, embed)
    if pieces := _describe_pieces(config, listing.sources):
        log.info(pieces)  # now, as names may mislead
    no_text = torch.zeros_like(embed("a")[:1]) if embed is not None else None  # like a text that is dropped
    index = _index_without_shards(config, listing, encode, temporal_factor, no_text)  # refuses wrong sizes
    groups = group_sources(listing.sources, config.clips_per_shard)
    exclusive = part is None
    with conversion_folder(out, exclusive) as partial_out:
        check_replaceable(out, config.overwrite, proof="index.json")  # another may have published it meanwhile
        plan = _plan(config, listing)
        check_plan(partial_out, plan, exclusive and not merge, config.overwrite)
        records = {n: record for n in range(len(groups)) if (record := read_group(partial_out, n)) is not None}
        own_groups = [n for n in range(len(groups)) if part is None or n % part[1] == part[0]]
        todo = [n for n in own_groups if n not in records]
        if merge and todo:  # before anything is removed: their parts may be running on another machine
            raise ValueError(
                f"{len(todo)} of {len(groups)} groups of videos are not converted, among them those with the numbers "
                f"{', '.join(f'{groups[n].start}-{groups[n].stop - 1}' for n in todo[:8])}: run their parts (again), "
                "or leave out --merge to convert them here"
            )
        with process_folder(partial_out, exclusive) as own:
            if not (partial_out / WORK / "plan.json").is_file():
                write_shared_json(own, partial_out / WORK / "plan.json", plan)
            signals = _plan_signals(config.signal_requests, listing.sources, partial_out, own)
            writer = ShardWriter(config, encode, embed, no_text, listing.sources, partial_out, own, signals)
            records |= writer.write_groups(own_groups, groups, records)
        if part is not None:
            results = [result for n in todo for result in records[n].results]
            elapsed = time.monotonic() - began
            return _part_report(config, part, results, len(records), len(groups), elapsed)
        results = [result for n in range(len(groups)) for result in records[n].results]
        check_unreadable(config, [result for result in results if result.unreadable], len(results))
        try:
            _check_clips(config, results)
        except ValueError:
            shutil.rmtree(partial_out, ignore_errors=True)  # nothing worth continuing
            raise
        index = dataclasses.replace(
            index,
            splits={split: [shard for n in range(len(groups)) for shard in records[n].shards[split]]
                    for split in SPLITS},
            skipped=sum(bool(result.skipped) for result in results),
            signals=tuple(plan.signal for plan in signals),
        )  # fmt: skip
        index = dataclasses.replace(index, signals=measure_signals(partial_out, index))
        index = dataclasses.replace(index, statistics=_measure_shards(partial_out, index, encode, config.workers))
        lines = [f"{x.name}: {reason}\n" for x in results for reason in (*x.left_out, x.skipped) if reason]
        write_atomically(partial_out / "skipped.txt", "".join(lines).encode("utf-8", "surrogateescape"))
        write_index(partial_out, index)
        publish_folder(partial_out, out)
    shutil.rmtree(out / WORK)
    converted, elapsed = sum(len(groups[n]) for n in todo), time.monotonic() - began
    return _report(config, out, index, pieces, listing.sources, results, converted, elapsed)


def _check_listing(config: ConvertConfig, listing: Listing, embed: Embed | None) -> None:
    """ValueError where signals or captions that are asked for are missing."""
    for request in config.signal_requests:
        if not any(name == request.name for source in listing.sources for name, *_ in source.signals):
            raise ValueError(
                f"signal {request.name}: no video has it; beside {listing.sources[0].name}, say, a file "
                f"{Path(listing.sources[0].name).stem}.{request.name}.csv (or {', '.join(SUFFIXES[1:])}) was looked for"
            )
    if bool(config.text) != (embed is not None):
        raise ValueError("text and embed must be given together")
    if embed is not None and not any(source.caption for source in listing.sources):
        raise ValueError(f"text is {config.text}, but no source has a caption: give a manifest with captions")


def _index_without_shards(
    config: ConvertConfig, listing: Listing, encode: Encode, temporal_factor: int, no_text: Tensor | None
) -> Index:
    """What the index says whatever the videos hold. ValueError for sizes that cannot be read back."""
    shapes, channels = _latent_shapes(config, encode, temporal_factor)
    return Index(
        store=config.kind,
        autoencoder=config.autoencoder,
        temporal_factor=temporal_factor,
        channels=channels,
        **dataclasses.asdict(shapes[0]),
        buckets=tuple(shapes) if len(shapes) > 1 else (),
        fps=config.fps,
        splits={split: [] for split in SPLITS},
        statistics=Statistics.default(channels),
        settings=_settings(config) | ({"labels": list(listing.names)} if listing.names else {}),
        has_text=no_text.shape[1] if no_text is not None else None,
        classes=listing.classes,
    )


def _plan_signals(
    requests: Sequence[SignalRequest], sources: list[Source], partial_out: Path, own: Path
) -> tuple[SignalPlan, ...]:
    """What all files of the signals have in common. Only the first process reads them for it; others wait."""
    path = partial_out / WORK / "signals.json"
    with locked(path.with_suffix(".lock")):
        if requests and not path.is_file():
            plans = plan_signals(requests, [source.signals for source in sources])
            write_shared_json(own, path, [dataclasses.asdict(plan) for plan in plans])
    return pydantic.TypeAdapter(tuple[SignalPlan, ...]).validate_json(path.read_bytes()) if requests else ()


def _latent_shapes(config: ConvertConfig, encode: Encode, temporal_factor: int) -> tuple[list[Shape], int]:
    """Shape of every bucket, and the channels of latents."""
    shapes, channels = [], 0
    for frames, height, width in config.shapes:
        latents = encode(torch.zeros(frames, 3, height, width, dtype=torch.uint8)).shape
        shape = Shape(latents[0], latents[2], latents[3], frames, height, width)
        channels = latents[1]
        if problem := shape.problem(channels, temporal_factor):
            raise ValueError(f"clips of {shape} cannot be read back ({problem}): choose another size")
        shapes.append(shape)
    return shapes, channels


def _settings(config: ConvertConfig) -> dict[str, Any]:
    """Settings that the result depends on; not where or by how many workers it is made."""
    fields = dataclasses.asdict(config) | {"sources": list(config.sources)}
    return {name: fields[name] for name in fields if name not in ("out", "workers", "overwrite")}


def _plan(config: ConvertConfig, listing: Listing) -> dict[str, Any]:
    """What all processes of a conversion must agree on. The digest changes with the sources, not with their folder."""
    settings = {name: value for name, value in _settings(config).items() if name != "max_bad"}  # may be raised later
    sources = [
        (
            x.name,
            x.size,
            x.caption,
            x.label,
            x.licence,
            x.start,
            x.end,
            *[x.group] * bool(x.group),
            *((name, file, size_of(place)) for name, file, place in x.signals),
        )
        for x in listing.sources
    ]
    digest = hashlib.sha256(repr(sources).encode("utf-8", "surrogateescape")).hexdigest()
    versions = {"held-out rule": HELD_OUT_RULE, "record format": RECORDS}
    return {"settings": settings, "videos": len(sources), "digest": digest, **versions}


def _check_clips(config: ConvertConfig, results: list[SourceResult]) -> None:
    """ValueError where a split that should have clips has none."""
    counts = {split: sum(result.clips[split] for result in results) for split in SPLITS}
    longest = max(result.ticks for result in results)
    least = min(shape[0] for shape in config.shapes)
    if not any(counts.values()):
        reasons = "; ".join(f"{x.name}: {x.skipped}" for x in results[:5])
        raise ValueError(f"no clip of {least} frames in {len(results)} sources ({reasons})")
    for split, share in (("train", 1 - config.held_out), ("held_out", config.held_out)):
        if share and not counts[split]:
            raise ValueError(
                f"no {split} clip: {share:.0%} of the longest source are {round(longest * share)} frames at "
                f"{config.fps:g} fps, a clip needs {least}, and none of the {len(results)} sources is {split} as a "
                f"whole; change held_out ({config.held_out:g}; 0 for no held-out clips) or frames, or add sources"
            )


# --- statistics --------------------------------------------------------------------------------------------


def _measure_shards(folder: Path, index: Index, encode: Encode, workers: int) -> Statistics:
    """Statistics of a bounded sample of the training clips, measured in `workers` threads. Buckets are measured one by
    one, as their shapes differ, and mixed by their numbers of clips."""
    lock, parts = threading.Lock(), []

    def sum_segment(bucket: Index, segment: tuple[int, Path, Sample, int, int]) -> LatentSums:
        _, path, sample, first, last = segment
        if bucket.store == "latent":
            return sum_latents(load(read_part(path, sample, STORES["latent"]))["latent"][first:last])
        content, factor = read_part(path, sample, STORES["video"]), bucket.temporal_factor
        if bucket.video_frames == bucket.frames * factor:  # segments can be encoded by themselves
            video = decode_frames(content, None, first * factor, last * factor, name=sample.key, threads=1)
            first, last = 0, last - first
        else:
            video = decode_frames(content, name=sample.key, threads=1)
        with lock:  # one at a time: a GPU may not have the memory for several
            latents = encode(video)
        return sum_latents(latents[first:last])

    with ThreadPoolExecutor(workers) as threads:
        for bucket in index.by_bucket():
            if total := bucket.samples("train"):
                segments = list(_sampled_segments(folder, bucket))
                statistics = statistics_of_sums(threads.map(partial(sum_segment, bucket), segments))
                clips = len({number for number, *_ in segments})
                parts.append((total, dataclasses.replace(statistics, clips=clips)))
    return mix_statistics(parts)


def _sampled_segments(folder: Path, index: Index) -> Iterator[tuple[int, Path, Sample, int, int]]:
    """(number, shard and sample of a training clip, begin and end in latent frames) of every segment to measure."""
    clips, length = index.samples("train"), index.frames
    size = clips
    if clips * index.frames * index.channels * index.height * index.width > WHOLE_VALUES:
        length = min(index.frames, SEGMENT_FRAMES)
        segments = clips * (index.frames // length)
        size = min(segments, max(MIN_SEGMENTS, min(int(segments * SEGMENT_SHARE), MAX_SEGMENTS)))
    per_clip = index.frames // length
    chosen: dict[int, list[int]] = defaultdict(list)
    for i in range(size):
        clip, segment = divmod(i * clips * per_clip // size, per_clip)
        chosen[clip].append(segment * length)
    first = 0
    for shard in index.splits["train"]:
        own = [clip for clip in range(first, first + shard.samples) if clip in chosen]
        samples = scan(folder / shard.name) if own else []
        for clip in own:
            for begin in chosen[clip]:
                yield clip, folder / shard.name, samples[clip - first], begin, begin + length
        first += shard.samples


# --- reports -----------------------------------------------------------------------------------------------


def _describe_pieces(config: ConvertConfig, sources: list[Source]) -> str:
    """How many videos are pieces of one recording with others, and what of them is held out; "" for none."""
    files = {source.path: source for source in sources if source.group}
    if not files:
        return ""
    held_out = [source.group for source in files.values() if source.draw < config.held_out]
    return (
        f"{len(files)} videos are pieces of {len({source.group for source in files.values()})} recordings, by the "
        f"column group or their names (such as {next(iter(files.values())).name}); held out whole: "
        f"{len(set(held_out))} recordings, {len(held_out)} videos"
    )


def _report(
    config: ConvertConfig, out: Path, index: Index, pieces: str, sources: list[Source], results: list[SourceResult],
    converted: int, elapsed: float,
) -> Report:  # fmt: skip
    clips = {split: index.samples(split) for split in SPLITS}
    seconds = sum(one.samples(split) * one.video_frames for one in index.by_bucket() for split in SPLITS) / config.fps
    skipped = tuple((result.name, result.skipped) for result in results if result.skipped)
    statistics = index.statistics
    size = sum(shard.bytes for shards in index.splits.values() for shard in shards)
    lines = [
        f"{out}: {clips['train']} training and {clips['held_out']} held-out clips, {seconds:.0f} s",
        f"from {len(results) - len(skipped)} of {len(results)} videos, {size / 1e6:.1f} MB as {index.store}",
        f"{converted} videos in {elapsed:.1f} s" + (f", {seconds / elapsed:.1f} s of clips a second" * bool(converted)),
        *clip_lines(index),
        "variance left after pooling, by side: "
        + ", ".join(f"{s}: {statistics.ratio(s):.3f}" for s in statistics.spaces),
    ]
    for signal, line in zip(index.signals, signal_lines(index), strict=True):
        having = sum(any(name == signal.name for name, *_ in source.signals) for source in sources)
        lines.append(f"{line}; {len(sources) - having} of {len(sources)} videos have no file of it")
        if lost := sum(result.lost_rows.get(signal.name, 0) for result in results):
            other = TAKES[signal.kind][1]
            lines.append(f"{lost} rows of {signal.name} lie between frames and are left out: take={other} uses them")
    if pieces:
        lines.append(pieces)
    if left_out := sum(len(result.left_out) for result in results):
        lines.append(f"{left_out} clips or stretches are left out: see {out / 'skipped.txt'}")
    lines += [f"skipped {name}: {reason}" for name, reason in skipped[:SHOWN]]
    if len(skipped) > SHOWN:
        lines.append(f"and {len(skipped) - SHOWN} more: see {out / 'skipped.txt'}")
    return Report(clips, seconds, skipped, "\n".join(lines))


def _part_report(
    config: ConvertConfig, part: tuple[int, int], results: list[SourceResult], done: int, total: int, elapsed: float
) -> Report:
    clips = {split: sum(result.clips[split] for result in results) for split in SPLITS}
    seconds = sum(result.frames for result in results) / config.fps
    skipped = tuple((result.name, result.skipped) for result in results if result.skipped)
    text = (
        f"part {part[0]}/{part[1]}: {sum(clips.values())} clips, {seconds:.0f} s, from "
        f"{len(results) - len(skipped)} of {len(results)} videos in {elapsed:.1f} s; "
        f"{done} of {total} groups of videos are done" + ("; make the index with --merge" * (done == total))
    )
    return Report(clips, seconds, skipped, text)
