"""Video files: mp4 written at once, or frame by frame into a partial file that can be played meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from msc.datasets.files import partial_file


def upscaled(video: Tensor, side: int = 640) -> Tensor:
    """`[T, 3, H, W]` enlarged by the largest integer factor that keeps both sides within `side`: web pages show a video
    at its own size, and one of 64 pixels is too small to see."""
    factor = max(1, side // max(video.shape[-2:]))
    return video.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def write_mp4(path: Path, video: Tensor, fps: float) -> None:
    """Write uint8 `[T, 3, H, W]` as H.264 (crf 18, 4:2:0, plays everywhere) at `fps` frames a second.

    4:2:0 needs even sides: an odd one repeats its last row or column, so the file is one pixel larger.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # faststart, the index first: browsers can start before the whole file is there
    with partial_file(path) as partial, _encoder(partial, fps, {"movflags": "+faststart"}) as append:
        append(video)


@contextmanager
def stream_mp4(path: Path, fps: float) -> Iterator[Callable[[Tensor], None]]:
    """Write a video of any length frame by frame: gives a function that appends uint8 `[T, 3, H, W]`.

    Until its end the file is NAME.partial.mp4, in fragments of a second, which can be played at any time, also after a
    crash of process or machine, but for its last second or two. An error or Ctrl-C leaves it there with all frames; at
    a good end it becomes an ordinary mp4 with its final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}
        with _encoder(partial, fps, options, {"g": str(max(1, round(fps)))}) as append:
            yield append
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if partial.is_file() and not partial.stat().st_size:  # nothing was appended
            partial.unlink()


def partial_name(path: Path) -> Path:
    """The name that `stream_mp4` writes to until the video is complete."""
    return path.with_suffix(".partial.mp4")


@contextmanager
def _encoder(
    path: Path, fps: float, options: dict[str, str], codec: dict[str, str] | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """A function that appends frames to a new mp4. options: of the container; codec: of x264."""
    if not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}; it must be above 0 and at most 1000")
    with av.open(str(path), "w", format="mp4", options=options) as container:
        # With libx264's lookahead the same frames give other bytes on every run (seen with PyAV 18.1).
        settings = {"crf": "18", "preset": "medium", "rc-lookahead": "0", **(codec or {})}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=settings)
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # no idle threads beside training
        shape: tuple[int, ...] = ()

        def append(video: Tensor) -> None:
            nonlocal shape
            frames = frames_last(video)
            height, width = frames.shape[1:3]
            if not shape:
                shape, stream.height, stream.width = (height, width), height + height % 2, width + width % 2
            if shape != (height, width):
                raise ValueError(f"{path}: frames of {height} × {width} pixels after some of {shape[0]} × {shape[1]}")
            frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        try:
            yield append
        finally:
            if shape:
                container.mux(stream.encode(None))


def frames_last(video: Tensor) -> np.ndarray:
    """uint8 `[T, 3, H, W]` on any device to a numpy array `[T, H, W, 3]`; ValueError for anything else."""
    if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape or str(video.dtype) != "torch.uint8":
        raise ValueError(f"a video is uint8 [frames, 3, height, width]; got {video.dtype} {list(video.shape)}")
    return video.detach().cpu().permute(0, 2, 3, 1).numpy()
