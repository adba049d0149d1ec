"""Videos to shards: decode, cut into clips, encode, measure.

Everything is written in a folder beside the result and renamed at the end, so that a result is whole or not
there; see progress.py for what is kept of unfinished work. Workers decode one source each; what they find is put
together in the order of the sources, so that the bytes of the result do not depend on who did what.
"""

import dataclasses
import hashlib
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ..files import check_replaceable, publish_folder, write_atomically
from ..shards.index import STORES, Index, Shape, ShardInfo, read_part, scan, write_index
from ..video import decode_frames
from .clip_ranges import RULE, SPLITS
from .convert_config import ConvertConfig as ConvertConfig
from .progress import WORK, Outcome, check_plan, groups, keep, own_folder, read_record, working_folder
from .shard_writer import Embed, Encode, Writer, check_broken
from .sources import Listing, find_sources
from .statistics import Statistics, measure_statistics, mix_statistics
from .summary import clip_lines

MEASURED_CLIPS = 1024  # evenly over the training clips; more would not change the third digit


@dataclass(frozen=True)
class Report:
    """What came of a conversion: clips per split, seconds of video in them, (source, reason) skipped."""

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
    """Write shards, `index.json` and `skipped.txt` into `config.out`, going on where an earlier process ended.

    `encode` maps one clip, uint8 [T, 3, H, W], to latents [T', C, h, w], `embed` a caption to [L, E]; they are
    called in this process only. `part` (i, N): convert only the i-th of N parts of the sources, from 0, and leave
    the index to the process that comes last, without `part`; `merge`: that one does no part's work.
    Raises ValueError or FileNotFoundError for sources that do not exist, hold no video or are broken in too
    great a number, and FileExistsError where `out` is not empty (see `overwrite`).
    """
    if part is not None and (merge or not 0 <= part[0] < part[1]):
        raise ValueError(f"part {part[0]}/{part[1]}: parts are 0/N to N-1/N, and merging is for none of them")
    began = time.monotonic()
    out = Path(config.out).expanduser().resolve()
    check_replaceable(out, config.overwrite, proof="index.json")
    listing = find_sources(config.sources)
    if bool(config.text) != (embed is not None):
        raise ValueError("text and embed come together")
    if embed is not None and not any(source.caption for source in listing.sources):
        raise ValueError(f"text is {config.text}, but no source has a caption: give a manifest with captions")
    # Before any work, so that a size the autoencoder refuses is refused here.
    shapes, channels = [], 0
    for length, height, width in config.shapes:
        latents = encode(torch.zeros(length, 3, height, width, dtype=torch.uint8)).shape
        shapes.append(Shape(latents[0], latents[2], latents[3], length, height, width))
        channels = latents[1]
    unknown = torch.zeros_like(embed("a")[:1]) if embed is not None else None  # like a text that is dropped
    todo = groups(listing.sources, config.clips_per_shard)
    settings = _settings(config)
    same = {name: settings[name] for name in settings if name != "max_bad"}  # which may be raised to go on
    plan = {"settings": same, "videos": len(listing.sources), "digest": _digest(listing), "held-out rule": RULE}
    alone = part is None
    with working_folder(out, alone) as partial:
        check_replaceable(out, config.overwrite, proof="index.json")  # another may have published it meanwhile
        check_plan(partial, plan, alone and not merge, config.overwrite)
        found = {number: read_record(partial, number) for number in range(len(todo))}
        records = {number: record for number, record in found.items() if record is not None}
        own_groups = [n for n in found if part is None or n % part[1] == part[0]]
        mine = [n for n in own_groups if n not in records]
        if merge and mine:  # before anything is removed: their parts may be at it, somewhere else
            sources = [f"{todo[n].start}-{todo[n].stop - 1}" for n in mine[:8]]
            raise ValueError(
                f"{len(mine)} of {len(todo)} groups of videos are not converted, among them those with the numbers "
                f"{', '.join(sources)}: run their parts (again), or leave out --merge to convert them here"
            )
        with own_folder(partial, alone) as own:
            if not (partial / WORK / "plan.json").is_file():
                keep(own, partial / WORK / "plan.json", plan)
            write = Writer(config, encode, embed, unknown, listing, partial, own)
            records |= write(own_groups, todo, records)
        if part is not None:
            outcomes = [outcome for number in mine for outcome in records[number].outcomes]
            return _part_report(config, part, outcomes, len(records), len(todo), time.monotonic() - began)
        done = [records[number] for number in range(len(todo))]
        outcomes = [outcome for record in done for outcome in record.outcomes]
        check_broken(config, [outcome for outcome in outcomes if outcome.broken], len(outcomes))
        try:
            _check_clips(config, outcomes)
        except ValueError:
            shutil.rmtree(partial, ignore_errors=True)  # no use to go on with
            raise
        shards = {name: [shard for record in done for shard in record.shards[name]] for name in SPLITS}
        index = Index(
            store=config.kind,
            autoencoder=config.autoencoder,
            temporal_factor=temporal_factor,
            channels=channels,
            **dataclasses.asdict(shapes[0]),
            buckets=tuple(shapes) if len(shapes) > 1 else (),
            fps=config.fps,
            splits=shards,
            statistics=_measured(partial, shards["train"], encode),
            settings=settings | ({"labels": list(listing.names)} if listing.names else {}),
            skipped=sum(bool(outcome.skipped) for outcome in outcomes),
            has_text=unknown.shape[1] if unknown is not None else None,
            classes=listing.classes,
        )
        lines = [f"{x.name}: {why}\n" for x in outcomes for why in (*x.left_out, x.skipped) if why]
        write_atomically(partial / "skipped.txt", "".join(lines).encode("utf-8", "surrogateescape"))
        write_index(partial, index)
        publish_folder(partial, out)
    shutil.rmtree(out / WORK)
    return _report(config, out, index, outcomes, sum(len(todo[n]) for n in mine), time.monotonic() - began)


def _measured(folder: Path, shards: list[ShardInfo], encode: Encode) -> Statistics:
    """Of the training clips: of every bucket alone, mixed by their numbers of clips, as shapes differ."""
    buckets: dict[int, list[ShardInfo]] = defaultdict(list)
    for shard in shards:
        buckets[shard.bucket].append(shard)
    return mix_statistics([
        (sum(shard.samples for shard in own), measure_statistics(_some_latents(folder, own, encode)))
        for _, own in sorted(buckets.items())
    ])  # fmt: skip


def _some_latents(folder: Path, shards: list[ShardInfo], encode: Encode) -> Iterator[Tensor]:
    """Up to MEASURED_CLIPS training clips, evenly spaced, as latents [T', C, h, w] read from the shards."""
    total = sum(shard.samples for shard in shards)
    chosen = {i * total // min(total, MEASURED_CLIPS) for i in range(min(total, MEASURED_CLIPS))}
    first = 0
    for shard in shards:
        path, own = folder / shard.name, [number for number in range(first, first + shard.samples) if number in chosen]
        samples = scan(path) if own else []
        for sample in (samples[number - first] for number in own):
            if "mp4" in sample.parts:
                yield encode(decode_frames(read_part(path, sample, "mp4"), name=sample.key))
            else:
                yield load(read_part(path, sample, STORES["latent"]))["latent"]
        first += shard.samples


def _check_clips(config: ConvertConfig, results: list[Outcome]) -> None:
    counts = {name: sum(result.clips[name] for result in results) for name in SPLITS}
    longest = max(result.ticks for result in results)
    least = min(shape[0] for shape in config.shapes)
    if not any(counts.values()):
        reasons = "; ".join(f"{x.name}: {x.skipped}" for x in results[:5])
        raise ValueError(f"no clip of {least} frames in {len(results)} sources ({reasons})")
    for name, share in (("train", 1 - config.held_out), ("held_out", config.held_out)):
        if share and not counts[name]:
            raise ValueError(
                f"no {name} clip: {share:.0%} of the longest source are {round(longest * share)} frames at "
                f"{config.fps:g} fps, a clip needs {least}, and none of the {len(results)} sources fell to it whole; "
                f"change held_out ({config.held_out:g}; 0 for no held-out clips) or frames, or add sources"
            )


def _settings(config: ConvertConfig) -> dict[str, Any]:
    """What the result depends on; not how or where it was made."""
    fields = dataclasses.asdict(config) | {"sources": list(config.sources)}
    return {name: fields[name] for name in fields if name not in ("out", "workers", "overwrite")}


def _digest(listing: Listing) -> str:
    """Changes where the sources do, but not with the folder that they are in."""
    sources = [(x.name, x.size, x.caption, x.label, x.licence, x.start, x.end) for x in listing.sources]
    return hashlib.sha256(repr(sources).encode("utf-8", "surrogateescape")).hexdigest()


# --- telling -----------------------------------------------------------------------------------------------


def _report(config: ConvertConfig, out: Path, index: Index, results: list[Outcome], now: int, elapsed: float) -> Report:
    clips = {name: index.samples(name) for name in SPLITS}
    seconds = sum(one.samples(name) * one.video_frames for one in index.by_bucket() for name in SPLITS) / config.fps
    skipped = tuple((result.name, result.skipped) for result in results if result.skipped)
    statistics = index.statistics
    size = sum(shard.bytes for shards in index.splits.values() for shard in shards)
    lines = [
        f"{out}: {clips['train']} training and {clips['held_out']} held-out clips, {seconds:.0f} s",
        f"from {len(results) - len(skipped)} of {len(results)} videos, {size / 1e6:.1f} MB as {index.store}",
        f"{now} videos in {elapsed:.1f} s" + (f", {seconds / elapsed:.1f} s of clips a second" if now else ""),
        *clip_lines(index),
        "variance left after pooling, by side: "
        + ", ".join(f"{s}: {statistics.ratio(s):.3f}" for s in statistics.spaces),
    ]
    if left_out := sum(len(result.left_out) for result in results):
        lines.append(f"{left_out} clips or stretches are too dark or too static: see {out / 'skipped.txt'}")
    lines += [f"skipped {name}: {why}" for name, why in skipped[:10]]
    if len(skipped) > 10:
        lines.append(f"and {len(skipped) - 10} more: see {out / 'skipped.txt'}")
    return Report(clips, seconds, skipped, "\n".join(lines))


def _part_report(
    config: ConvertConfig, part: tuple[int, int], results: list[Outcome], done: int, total: int, elapsed: float
) -> Report:
    clips = {name: sum(result.clips[name] for result in results) for name in SPLITS}
    seconds = sum(result.frames for result in results) / config.fps
    skipped = tuple((result.name, result.skipped) for result in results if result.skipped)
    used, number = len(results) - len(skipped), sum(clips.values())
    text = (
        f"part {part[0]}/{part[1]}: {number} clips, {seconds:.0f} s, from {used} of {len(results)} videos in "
        f"{elapsed:.1f} s; {done} of {total} groups of videos are done"
        + ("; make the index with --merge" * (done == total))
    )
    return Report(clips, seconds, skipped, text)
