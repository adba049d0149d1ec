"""The part of a conversion that workers do: one source in, its clips as mp4 files out."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msc.datasets.clips import SPLITS, split
from msc.datasets.decode import SUFFIXES, Video, pictures, probe, timeline, to_mp4


def find_sources(sources: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(name, path) of every video: files as given, folders through all levels in sorted order.

    Hidden files and folders are left out, and a file reached twice counts once. Raises FileNotFoundError
    for what does not exist, ValueError for addresses and for folders without videos.
    """
    found: dict[Path, str] = {}
    for given in sources:
        if "://" in given or given.startswith("pipe:"):
            raise ValueError(f"source {given!r} is an address or a command; only local files are read")
        path = Path(given).expanduser().resolve()
        if path.is_file():
            found.setdefault(path, path.name)
        elif path.is_dir():
            inside = list(_videos(path))
            if not inside:
                raise ValueError(f"no videos in {given}: looked for {' '.join(sorted(SUFFIXES))}")
            for video in inside:
                found.setdefault(video.resolve(), f"{path.name}/{video.relative_to(path)}")
        else:
            raise FileNotFoundError(f"no such file or folder: {given}")
    return [(name, path) for path, name in found.items()]


def _videos(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(current, name)


@dataclass(frozen=True)
class Task:
    """One source to cut into clips of `frames` frames; its files go into `spool`, named by `number`."""

    number: int
    name: str
    path: Path
    spool: Path
    frames: int
    size: tuple[int, int]  # height, width
    fps: float
    stride: int
    held_out: float
    crf: int
    threads: int  # of the decoder, 0 for one per core

    def file(self, start: int) -> Path:
        """Where the clip that begins at tick `start` is spooled."""
        return self.spool / f"{self.number:08d}-{start:09d}.mp4"


@dataclass(frozen=True)
class Cut:
    """What a source gave: (start, file) of its clips per split, or why it was skipped.

    ticks: frames on its timeline. broken: the file is at fault, it is not only too short.
    """

    name: str
    ticks: int
    clips: dict[str, list[tuple[int, Path]]]
    skipped: str = ""
    broken: bool = False


def cut(task: Task) -> Cut:
    """Decode a source once and spool its clips; a source that breaks anywhere gives none of its clips."""
    nothing: dict[str, list[tuple[int, Path]]] = {name: [] for name in SPLITS}
    ticks = 0
    try:
        video = probe(task.path, task.name)
        shown = timeline(video, task.fps)
        ticks = len(shown)
        plan = split(shown, task.frames, task.stride, task.held_out)
        if not any(plan.values()):
            why = f"is too short: {ticks} frames at {task.fps:g} fps, a clip needs {task.frames}"
            return Cut(task.name, ticks, nothing, why)
        for start, clip in _clips(task, video, shown, sorted(s for name in SPLITS for s in plan[name])):
            task.file(start).write_bytes(to_mp4(clip, task.fps, task.crf))
    except ValueError as error:
        for file in task.spool.glob(f"{task.number:08d}-*.mp4"):
            file.unlink()
        return Cut(task.name, ticks, nothing, str(error).removeprefix(f"{task.name}: "), broken=True)
    return Cut(task.name, ticks, {name: [(s, task.file(s)) for s in plan[name]] for name in SPLITS})


def _clips(task: Task, video: Video, shown: list[int], starts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(start, uint8 [T, 3, H, W]) of every clip, in one pass over the source with one clip in memory."""
    length = task.frames
    needed = sorted({tick for start in starts for tick in range(start, start + length)})
    decoded = pictures(task.path, video, [shown[tick] for tick in needed], task.size, task.threads)
    held: dict[int, np.ndarray] = {}
    coming = deque(starts)
    for tick, picture in zip(needed, decoded, strict=True):
        held[tick] = picture
        if tick == coming[0] + length - 1:
            start = coming.popleft()
            clip = np.stack([held[t] for t in range(start, start + length)])
            yield start, torch.from_numpy(clip).permute(0, 3, 1, 2)
            first = coming[0] if coming else tick + 1
            held = {t: x for t, x in held.items() if t >= first}


def cut_all(tasks: list[Task], workers: int) -> Iterator[Cut]:
    """Results in the order of the tasks, however many workers; a few sources ahead, to bound the spool.

    Raises ValueError where a worker dies.
    """
    if workers == 1:
        yield from map(cut, tasks)
        return
    # spawn: forked children of a process that has run OpenMP or CUDA may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start_worker)
    ahead = deque(tasks)
    waiting: deque[tuple[str, Future[Cut]]] = deque()
    try:
        while ahead or waiting:
            while ahead and len(waiting) < 2 * workers:
                task = ahead.popleft()
                waiting.append((task.name, pool.submit(cut, task)))
            name, future = waiting[0]
            try:
                yield future.result()
            except BrokenProcessPool:
                raise ValueError(
                    f"a worker died while decoding {name} or a source soon after it (out of memory, or a "
                    "video that crashes FFmpeg): leave it out, or find it with --workers 1"
                ) from None
            waiting.popleft()
    finally:
        if waiting:  # left early: workers stop at their next clip, as they have nowhere to put it
            shutil.rmtree(tasks[0].spool, ignore_errors=True)
        pool.shutdown(cancel_futures=True)


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
