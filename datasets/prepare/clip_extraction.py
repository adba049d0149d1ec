"""The part of a conversion that workers do: one source in, its clips as mp4 files out."""

import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from ..shards.tar import FILE_ERRORS, retry_read, size_of
from ..video import Video, encode_mp4, frame_indices, iterate_frames, probe
from .clip_ranges import SPLITS, best_buckets, holds, pieces, runs
from .scenes import brightness, change, content, motion
from .sources import Source

LONGEST_HOLD = 10.0  # seconds that a frame may show; longer, it is a gap in the time stamps, or a picture that stands


@dataclass(frozen=True)
class Clip:
    """One clip of a source: its first tick, its bucket, and the file that it is spooled in."""

    start: int
    bucket: int
    file: Path


@dataclass(frozen=True)
class Task:
    """One source to cut into clips of `shapes` (frames, height, width); its files go into `spool`, named by
    `number`.
    """

    number: int
    source: Source
    spool: Path
    shapes: tuple[tuple[int, int, int], ...]
    fps: float
    stride: int  # ticks between clips' starts, 0 for no overlap
    held_out: float
    scenes: float  # change between frames that is a cut, 0 for none; see scenes.py
    min_brightness: float
    min_motion: float
    random_crop: bool
    crf: int
    threads: int  # of the decoder, 0 for one per core

    def file(self, start: int) -> Path:
        """Where the clip that begins at tick `start` is spooled."""
        return self.spool / f"{self.number:08d}-{start:09d}.mp4"


@dataclass(frozen=True)
class Cut:
    """What a source gave: its clips per split, or why it was skipped.

    ticks: frames on its timeline. broken: the file is at fault, it is not only too short. left_out: what is
    not used of it, and why.
    """

    source: Source
    ticks: int
    clips: dict[str, list[Clip]]
    skipped: str = ""
    broken: bool = False
    left_out: tuple[str, ...] = ()


def cut(task: Task) -> Cut:
    """Decode a source once and spool its clips; a source that breaks anywhere gives none of its clips. OSError where a
    disk or server cannot be read, or it is gone since it was listed: that may pass, and says nothing of the video.

    Where others beside it can be read and it again and again cannot, it is a broken one: it would hold up all others.
    All clips of a source have one size (see `best_buckets`); each stretch without cut, or frame that is held for long,
    is divided into clips of the longest length that fits, and what is left over into shorter ones where there are any.
    """
    source = task.source
    try:
        return retry_read(partial(_cut, task))
    except OSError as error:
        own = error.filename == source.name and error.errno in FILE_ERRORS
        if not own or size_of(source.path) != source.size:
            raise
        return _broken(task, 0, f"cannot be read: {error.strerror}")


def _cut(task: Task) -> Cut:
    source = task.source
    clips: dict[str, list[Clip]] = {name: [] for name in SPLITS}
    left_out: list[str] = []
    holding: list[str] = []
    ticks = 0
    try:
        video = probe(source.path, source.name)
        shown = frame_indices(video, task.fps)
        part, span = (_ticks(seconds, task.fps, len(shown)) for seconds in ((source.start, source.end), source.span))
        ticks = part[1] - part[0]
        least = min(shape[0] for shape in task.shapes)
        plan = runs(shown, task.held_out, least, source.draw, part, span)
        longest = max(last - first for first, last in plan.values())
        buckets = best_buckets(task.shapes, video.height, video.height * video.aspect, longest)
        if not buckets:
            return Cut(source, ticks, clips, f"is too short: {ticks} frames at {task.fps:g} fps, a clip needs {least}")
        stretches = []
        for name, (first, last) in plan.items():
            for begin, end in holds(shown, first, last, max(1, LONGEST_HOLD * task.fps)):
                holding.append(f"shows one frame from {begin / task.fps:.2f} to {end / task.fps:.2f} s")
                stretches.append((name, first, begin))
                first = end
            stretches.append((name, first, last))
        for name, start, clip in _clips(task, video, shown, stretches, buckets):
            if why := _unwanted(task, clip):
                left_out.append(f"clip at {start / task.fps:.2f} s {why}")
                continue
            task.file(start).write_bytes(encode_mp4(torch.from_numpy(clip).permute(0, 3, 1, 2), task.fps, task.crf))
            clips[name].append(Clip(start, buckets[len(clip)], task.file(start)))
    except ValueError as error:
        if isinstance(source.path, Path) and source.size >= 0 and not any(source.path.parent.glob("*")):
            raise OSError(f"{source.path} is gone, and all beside it: is its disk there?") from None
        return _broken(task, ticks, str(error).removeprefix(f"{source.name}: "))
    why = ""
    if not any(clips.values()):
        why = "gives no clip that is wanted" if left_out else f"has no scene of {min(buckets)} frames"
    return Cut(source, ticks, clips, why, left_out=(*holding, *left_out))


def _broken(task: Task, ticks: int, why: str) -> Cut:
    """A source that gives nothing; what was spooled of it goes."""
    for file in task.spool.glob(f"{task.number:08d}-*.mp4"):
        file.unlink()
    return Cut(task.source, ticks, {name: [] for name in SPLITS}, why, broken=True)


def _ticks(seconds: tuple[float, float], fps: float, ticks: int) -> tuple[int, int]:
    """The ticks that lie inside a part of a timeline of `ticks`."""
    first, last = (min(second * fps, ticks) for second in seconds)
    return math.ceil(first - 1e-6), math.floor(last + 1e-6)


def _unwanted(task: Task, clip: np.ndarray) -> str:
    """Why a clip is left out, or nothing."""
    if task.min_brightness and (light := brightness(clip)) < task.min_brightness:
        return f"is too dark ({light:.4f}, min_brightness is {task.min_brightness:g})"
    if task.min_motion and (moved := motion(clip)) < task.min_motion:
        return f"is too static ({moved:.4f}, min_motion is {task.min_motion:g})"
    return ""


def _clips(
    task: Task, video: Video, shown: list[int], stretches: list[tuple[str, int, int]], buckets: dict[int, int]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(split, start, uint8 [T, H, W, 3]) of every clip in stretches of ticks, (split, first, last) each; in one pass
    over the source with one clip in memory.
    """
    lengths, size = sorted(buckets), task.shapes[next(iter(buckets.values()))][1:]
    needed: list[Sequence[int]] = [range(first, last) for _, first, last in stretches]
    if not task.scenes:
        needed = [
            sorted({t for a, n in pieces(first, last, lengths, task.stride) for t in range(a, a + n)})
            for _, first, last in stretches
        ]
    ticks = [shown[tick] for own in needed for tick in own]
    decoded = iterate_frames(task.source.path, video, ticks, size, task.threads, crop=not task.random_crop)
    held: dict[int, np.ndarray] = {}

    def clip(start: int, length: int) -> np.ndarray:
        found = np.stack([held[t] for t in range(start, start + length)])
        return _cropped(task, start, size, found) if task.random_crop else found

    for (name, start, _), own in zip(stretches, needed, strict=True):
        held = {}
        before: np.ndarray | None = None
        for tick, picture in zip(own, decoded, strict=False):
            if task.scenes:
                now = content(picture)
                if before is not None and change(before, now) > task.scenes:
                    for piece in pieces(start, tick, lengths, task.stride):
                        yield name, piece[0], clip(*piece)
                    start, held = tick, {}  # clips begin anew behind a cut
                before = now
            held[tick] = picture
            if tick == start + lengths[-1] - 1:
                yield name, start, clip(start, lengths[-1])
                start += task.stride or lengths[-1]
                held = {t: x for t, x in held.items() if t >= start}
        for piece in pieces(start, max(held, default=start - 1) + 1, lengths, task.stride):
            yield name, piece[0], clip(*piece)


def _cropped(task: Task, start: int, size: tuple[int, int], clip: np.ndarray) -> np.ndarray:
    """A clip [T, H, W, 3] cut to its size, at a place that depends on nothing but its source and start."""
    place = hashlib.sha256(f"{task.source.name} {start}".encode("utf-8", "surrogateescape")).digest()
    height, width = size
    top = int.from_bytes(place[:4]) * (clip.shape[1] - height + 1) >> 32
    left = int.from_bytes(place[4:8]) * (clip.shape[2] - width + 1) >> 32
    return np.ascontiguousarray(clip[:, top : top + height, left : left + width])


def cut_all(tasks: list[Task], workers: int) -> Generator[Cut, None, None]:
    """Results in the order of the tasks, however many workers; a few sources ahead, to bound the spool.

    A source on which a worker dies is tried once more, with nothing beside it, and is broken if that worker dies too.
    With one worker all is done in this process, which dies with it.
    """
    if workers == 1 or not tasks:
        yield from map(cut, tasks)
        return
    # A thread for each worker hands it its sources, also while our caller is busy with what it got.
    workers = min(workers, len(tasks))
    threads, idle = ThreadPoolExecutor(workers), SimpleQueue[ProcessPoolExecutor]()
    for _ in range(workers):
        idle.put(_new_worker())
    ahead = deque(tasks)
    waiting: deque[tuple[Task, Future[Cut | None]]] = deque()
    try:
        while ahead or waiting:
            while ahead and len(waiting) < 2 * workers:
                waiting.append((ahead[0], threads.submit(_tried, ahead.popleft(), idle)))
            task, future = waiting[0]
            result = future.result()
            if result is None:  # it may have lacked the memory that others took
                wait(other for _, other in waiting)
                result = _alone(task)
            yield result
            waiting.popleft()
    finally:
        if waiting:  # left early: workers stop at their next clip, as they have nowhere to put it
            shutil.rmtree(tasks[0].spool, ignore_errors=True)
        threads.shutdown(cancel_futures=True)
        for _ in range(workers):
            idle.get().shutdown()


def _new_worker() -> ProcessPoolExecutor:
    """A pool of one process: of a larger one nobody could say which source it died of."""
    # spawn: forked children of a process that has run OpenMP or CUDA may hang
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _tried(task: Task, idle: "SimpleQueue[ProcessPoolExecutor]") -> Cut | None:
    """What a source gives in the next idle worker; None where that dies."""
    worker = idle.get()
    try:
        return worker.submit(cut, task).result()
    except BrokenProcessPool:
        worker.shutdown()
        worker = _new_worker()
        return None
    finally:
        idle.put(worker)


def _alone(task: Task) -> Cut:
    """What a source on which a worker died gives in a process of its own."""
    with _new_worker() as worker:
        try:
            return worker.submit(cut, task).result()
        except BrokenProcessPool:
            return _broken(task, 0, "crashes the decoder, or takes more memory than there is")


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
