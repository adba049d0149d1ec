"""Clip extraction, the part of a conversion that worker processes do: one source in, its clips as mp4 files out."""

import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save

from ..shards.tar import FILE_ERRORS, retry_read, size_of
from ..video import TimelineChanged, VideoReader, encode_mp4, frame_indices
from .clip_ranges import SPLITS, best_buckets, frozen_ranges, split_into_clips, split_ranges
from .progress import SourceResult
from .scenes import brightness, content_change, frame_content, motion
from .signal_tracks import SignalPlan, Track, align, open_signal
from .sources import Source

LONGEST_FREEZE = 10.0  # seconds one frame may show; longer, it is a gap in the time stamps or a picture that stands


@dataclass(frozen=True)
class Clip:
    """One clip of a source: its split, its first tick, the number of its bucket, and its mp4 file in the spool; beside
    that, at `signals`, those of its signals that are known, if any."""

    split: str
    start: int
    bucket: int
    file: Path

    @property
    def signals(self) -> Path:
        return self.file.with_suffix(".signals.safetensors")


@dataclass(frozen=True)
class ExtractionTask:
    """One source to extract clips of `shapes` (frames, height, width) from. `number` names its files in `spool`."""

    number: int
    source: Source
    spool: Path
    shapes: tuple[tuple[int, int, int], ...]
    fps: float
    stride: int  # ticks between clips' starts, 0 for no overlap
    held_out: float
    scenes: float  # change between frames that is a scene cut, 0 for none; see scenes.py
    min_brightness: float
    min_motion: float
    random_crop: bool
    crf: int
    threads: int  # of the decoder, 0 for one per core
    signals: tuple[SignalPlan, ...] = ()

    def clip_file(self, start: int) -> Path:
        """Where the clip that begins at tick `start` is spooled."""
        return self.spool / f"{self.number:08d}-{start:09d}.mp4"


Extraction = tuple[SourceResult, list[Clip]]


def extract_file(tasks: list[ExtractionTask]) -> list[Extraction]:
    """Decode the sources that are taken from one file, which is opened once, and spool their clips; a source that
    cannot be decoded to its end gives none of them.

    OSError where a disk or server cannot be read or the file has disappeared: this may pass, and the conversion can
    be continued. A single file that repeatedly cannot be read is unreadable instead: it would hold up all others.
    """
    source, results = tasks[0].source, list[Extraction]()

    def extract() -> None:
        with VideoReader(source.path, source.name, tasks[0].threads) as reader:
            while len(results) < len(tasks):
                try:
                    shown = frame_indices(reader.video, tasks[0].fps)
                    for task in tasks[len(results) :]:
                        results.append(_extract_clips(task, reader, shown))
                except TimelineChanged:
                    results.clear()  # all by one time line, as held-out parts lie on it

    reason = ""
    try:
        retry_read(extract)
        if (size := size_of(source.path)) != source.size:
            results.clear()
            reason = f"has changed since it was listed: {source.size} bytes then, {size} now"
    except ValueError as error:
        if isinstance(source.path, Path) and source.size >= 0 and not any(source.path.parent.glob("*")):
            raise OSError(f"{source.path} and all files beside it have disappeared: is the disk mounted?") from None
        reason = str(error).removeprefix(f"{source.name}: ")
    except OSError as error:
        own = error.filename == source.name and error.errno in FILE_ERRORS
        if not own or size_of(source.path) != source.size:
            raise
        reason = f"cannot be read: {error.strerror}"
    return results + [_unreadable(task, 0, reason) for task in tasks[len(results) :]]


def _extract_clips(task: ExtractionTask, reader: VideoReader, shown: list[int]) -> Extraction:
    """Clips of one source. shown: the frame at each tick of the file.

    All clips of a source have one size (see `best_buckets`); each range without a scene cut, a seam or a long freeze is
    divided into clips of the longest length that fits, and the rest into shorter ones where there are such buckets.
    """
    source, video = task.source, reader.video
    part, span = (
        (
            math.ceil(min(max(first - video.origin, 0) * task.fps, len(shown)) - 1e-6),
            math.floor(min(max(last - video.origin, 0) * task.fps, len(shown)) + 1e-6),
        )
        for first, last in ((source.start, source.end), source.span)
    )
    ticks = max(0, part[1] - part[0])
    least = min(shape[0] for shape in task.shapes)
    splits = split_ranges(shown, task.held_out, least, source.draw, part, span)
    longest = max(last - first for first, last in splits.values())
    buckets = best_buckets(task.shapes, video.height, video.height * video.aspect, longest)
    if not buckets:
        reason = f"is too short: {ticks} frames at {task.fps:g} fps, a clip needs {least}"
        return SourceResult(source.name, ticks, dict.fromkeys(SPLITS, 0), reason), []
    clips: list[Clip] = []
    ranges, freezes, unwanted = [], [], []
    seams = [bisect_left(shown, frame) for frame in video.seams]
    for split, (first, last) in splits.items():
        for begin, end in frozen_ranges(shown, first, last, max(1, LONGEST_FREEZE * task.fps)):
            freezes.append(f"shows one frame from {begin / task.fps:.2f} to {end / task.fps:.2f} s")
            ranges.append((split, first, begin))
            first = end
        ranges.append((split, first, last))
    ranges = [
        (split, begin, end)
        for split, first, last in ranges
        for begin, end in pairwise((first, *(tick for tick in seams if first < tick < last), last))
    ]
    try:
        tracks = _tracks(task, reader, shown, part)
        for split, start, frames in _clips_of_ranges(task, reader, shown, ranges, buckets):
            if reason := _reason_to_leave_out(task, frames):
                unwanted.append(f"clip at {start / task.fps:.2f} s {reason}")
                continue
            clip = Clip(split, start, buckets[len(frames)], task.clip_file(start))
            clip.file.write_bytes(encode_mp4(torch.from_numpy(frames).permute(0, 3, 1, 2), task.fps, task.crf))
            if tracks:
                clip.signals.write_bytes(
                    save({track.plan.signal.name: track.clip(start, len(frames)) for track in tracks})
                )
            clips.append(clip)
    except ValueError as error:
        return _unreadable(task, ticks, str(error).removeprefix(f"{reader.name}: "))
    reason = ""
    if not clips:
        reason = "gives no clip that passes the filters" if unwanted else f"has no scene of {min(buckets)} frames"
    counts = {split: sum(clip.split == split for clip in clips) for split in SPLITS}
    count = sum(task.shapes[clip.bucket][0] for clip in clips)
    lost = {track.plan.signal.name: rows for track in tracks if (rows := track.lost(*part))}
    left_out = (*freezes, *unwanted)
    return SourceResult(source.name, ticks, counts, reason, left_out=left_out, frames=count, lost_rows=lost), clips


def _tracks(task: ExtractionTask, reader: VideoReader, shown: list[int], part: tuple[int, int]) -> list[Track]:
    """The signals that a source has; ValueError for one that cannot be used."""
    plans, tracks = {plan.signal.name: plan for plan in task.signals}, []
    for name, file, place in task.source.signals:
        try:
            tracks.append(align(plans[name], open_signal(file, place), reader.video, shown, task.fps, part))
        except ValueError as error:
            raise ValueError(f"signal {name} ({file}) {str(error).removeprefix(f'{file}: ')}") from None
    return tracks


def _unreadable(task: ExtractionTask, ticks: int, reason: str) -> Extraction:
    """The result of a source that gives nothing; its clips so far are removed."""
    for file in task.spool.glob(f"{task.number:08d}-*"):
        file.unlink()
    return SourceResult(task.source.name, ticks, dict.fromkeys(SPLITS, 0), reason, unreadable=True), []


def _reason_to_leave_out(task: ExtractionTask, clip: np.ndarray) -> str:
    """Which filter a clip fails; "" for none."""
    if task.min_brightness and (light := brightness(clip)) < task.min_brightness:
        return f"is too dark ({light:.4f}, min_brightness is {task.min_brightness:g})"
    if task.min_motion and (moved := motion(clip)) < task.min_motion:
        return f"is too static ({moved:.4f}, min_motion is {task.min_motion:g})"
    return ""


def _clips_of_ranges(
    task: ExtractionTask,
    reader: VideoReader,
    shown: list[int],
    ranges: list[tuple[str, int, int]],
    buckets: dict[int, int],
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(split, start, uint8 [T, H, W, 3]) of every clip in the ranges of ticks, (split, first, last) each; one pass over
    the source with one clip in memory.
    """
    lengths, size = sorted(buckets), task.shapes[next(iter(buckets.values()))][1:]
    needed: list[Sequence[int]] = [range(first, last) for _, first, last in ranges]
    if not task.scenes:  # only the frames of clips; scene cuts are looked for in all of them
        needed = [
            sorted({t for a, n in split_into_clips(first, last, lengths, task.stride) for t in range(a, a + n)})
            for _, first, last in ranges
        ]
    ticks = [shown[tick] for own in needed for tick in own]
    decoded = reader.frames(ticks, size, crop=not task.random_crop)
    held: dict[int, np.ndarray] = {}

    def clip(start: int, length: int) -> np.ndarray:
        frames = np.stack([held[t] for t in range(start, start + length)])
        return _crop(task, start, size, frames) if task.random_crop else frames

    for (split, start, _), own in zip(ranges, needed, strict=True):
        held = {}
        before: np.ndarray | None = None
        for tick, frame in zip(own, decoded, strict=False):
            if task.scenes:
                now = frame_content(frame)
                if before is not None and content_change(before, now) > task.scenes:
                    for begin, length in split_into_clips(start, tick, lengths, task.stride):
                        yield split, begin, clip(begin, length)
                    start, held = tick, {}  # clips begin anew after a cut
                before = now
            held[tick] = frame
            if tick == start + lengths[-1] - 1:
                yield split, start, clip(start, lengths[-1])
                start += task.stride or lengths[-1]
                held = {t: x for t, x in held.items() if t >= start}
        for begin, length in split_into_clips(start, max(held, default=start - 1) + 1, lengths, task.stride):
            yield split, begin, clip(begin, length)


def _crop(task: ExtractionTask, start: int, size: tuple[int, int], clip: np.ndarray) -> np.ndarray:
    """A clip [T, H, W, 3] cropped to `size` at a place that depends only on its source and start."""
    place = hashlib.sha256(f"{task.source.name} {start}".encode("utf-8", "surrogateescape")).digest()
    height, width = size
    top = int.from_bytes(place[:4]) * (clip.shape[1] - height + 1) >> 32
    left = int.from_bytes(place[4:8]) * (clip.shape[2] - width + 1) >> 32
    return np.ascontiguousarray(clip[:, top : top + height, left : left + width])


# --- worker processes --------------------------------------------------------------------------------------


def extract_in_order(tasks: list[ExtractionTask], workers: int) -> Generator[Extraction, None, None]:
    """Results in the order of the tasks, however many workers; only a few files ahead, to bound the spool. Sources that
    follow each other and are taken from one file are extracted together.

    Files that are waiting when a worker dies are tried again, with nothing beside them, and one that kills its worker
    twice more is unreadable. With one worker everything is done in this process, which dies with it.
    """
    files = deque(list(own) for _, own in groupby(tasks, lambda task: task.source.path))
    if workers == 1 or not tasks:
        for file in files:
            yield from extract_file(file)
        return
    workers = min(workers, len(files))
    pool = _new_pool(workers)
    waiting: deque[tuple[list[ExtractionTask], Future[list[Extraction]]]] = deque()
    try:
        while files or waiting:
            while files and len(waiting) < 2 * workers:
                try:
                    future = pool.submit(extract_file, files[0])
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = _new_pool(workers)
                    continue
                waiting.append((files.popleft(), future))
            file, future = waiting[0]
            try:
                results = future.result()
            except BrokenProcessPool:  # on one of several files; or it lacked the memory that the others used
                wait(other for _, other in waiting)
                results = _extract_alone(file)
            yield from results
            waiting.popleft()
    finally:
        if waiting:  # left early: workers stop at their next clip, as they have nowhere to write it
            shutil.rmtree(tasks[0].spool, ignore_errors=True)
        pool.shutdown(cancel_futures=True)


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # spawn: forked children of a process that has run OpenMP or CUDA may hang
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _extract_alone(file: list[ExtractionTask]) -> list[Extraction]:
    """The results in a new process of their own, tried twice, for a file that was waiting when a worker died."""
    for _ in range(2):
        with _new_pool(1) as pool, suppress(BrokenProcessPool):
            return pool.submit(extract_file, file).result()
    return [_unreadable(task, 0, "crashes the decoder, or takes more memory than there is") for task in file]


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
