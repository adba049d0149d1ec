"""Video decoding and encoding with PyAV.

A source is a path, a file in a tar, or the bytes of a file. An invalid video is a `ValueError` that begins with its
name, so that callers can skip it and report why; a file that cannot be read, which may be temporary, is an `OSError`.
Sizes and counts are checked before anything is allocated.
"""

import errno
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .shards.tar import Location, Member, open_bytes

Source = str | Location | bytes
SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv")
    + (".webm", ".wmv")
)
# Containers that hold their own frames. Playlists (HLS, concat, DASH) are excluded: a malicious one would make FFmpeg
# open other files or addresses.
FORMATS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg"
MAX_PIXELS = 1 << 26  # of one frame; 8192 x 8192
MAX_FRAMES = 1 << 24  # of one file; four days at 50 per second
MAX_BYTES = 32 << 30  # of one result of `decode_frames`
COLORSPACES = frozenset(Colorspace)
KEYFRAME_INTERVAL = 16  # in what we write: the most frames that a slice decodes and does not use


@dataclass(frozen=True)
class Video:
    """Metadata of a video file, from its packets: upright size in pixels and the time stamps of all frames.

    `pts` ascend, in units of `time_base` seconds; `fps` is the average rate; `aspect` is the displayed width over
    height of the upright frame, as pixels need not be square.
    """

    name: str
    width: int
    height: int
    fps: Fraction
    time_base: Fraction
    pts: tuple[int, ...]
    aspect: float

    @property
    def seconds(self) -> float:
        """From the first frame's start to the last one's end, taking the last to last an average frame."""
        return float((self.pts[-1] - self.pts[0]) * self.time_base + 1 / self.fps)


def probe(source: Source, name: str = "") -> Video:
    """Read the packets of a file; only the first frame is decoded.

    Raises ValueError, starting with the name, where it is unreadable, truncated, has no video stream or no
    frame, or exceeds the size limits.
    """
    name = name or _name(source)
    with _open(source, name, threads=1) as (container, stream):
        return _probe_stream(container, stream, name)


def _probe_stream(
    container: InputContainer, stream: VideoStream, name: str, ours: bool = False, max_frames: int = 0
) -> Video:
    """ours: written by `encode_mp4`, so that the header is reliable and no frame need be decoded. max_frames: 0 for
    MAX_FRAMES.
    """
    max_frames = max_frames or MAX_FRAMES
    if stream.frames > max_frames + 1:  # as below, before any is read
        raise ValueError(f"{name}: has {stream.frames} frames, at most {max_frames} are read")
    stamps_of_packets = (p.pts for p in container.demux(stream) if p.size and not p.is_discard)
    packets = list(islice(stamps_of_packets, max_frames + 1))
    width, height = stream.codec_context.width, stream.codec_context.height
    if not packets or width <= 0:
        raise ValueError(f"{name}: has no frames")
    if len(packets) > max_frames:
        raise ValueError(f"{name}: has more than the {max_frames} frames that are read")
    if stream.frames > len(packets) + 1:  # one may be hidden by an edit list
        raise ValueError(f"{name}: is truncated: its header promises {stream.frames} frames, it has {len(packets)}")
    fps, time_base = stream.average_rate or stream.guessed_rate, stream.time_base
    turns = 0
    if not ours:
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError(f"{name}: has no frames")
        width, height, turns = first.width, first.height, _quarter_turns(first)
    if None in packets:  # some AVI and MPEG files carry decoding times only
        container.seek(0)
        packets = [frame.pts for frame in container.decode(stream)]
    stamps = sorted({pts for pts in packets if pts is not None})
    if None in packets or not stamps or time_base is None:
        raise ValueError(f"{name}: has no time stamps; remux it, e.g. with ffmpeg -i IN -c copy OUT.mkv")
    aspect = float(width * (stream.sample_aspect_ratio or 1) / height)
    if not fps or fps <= 0:
        span = (stamps[-1] - stamps[0]) * time_base
        fps = Fraction(len(stamps) - 1) / span if span else Fraction(1)
    if turns % 2:
        width, height, aspect = height, width, 1 / aspect
    return Video(name, width, height, Fraction(fps), Fraction(time_base), tuple(stamps), aspect)


def frame_indices(video: Video, fps: float | Fraction | None = None) -> list[int]:
    """Number of the frame of `video` that shows at each tick of a clock of `fps`: the latest that has begun by then.

    `fps` None: every frame once. Ascending; frames repeat where the clock is faster than the video.
    """
    if fps is None:
        return list(range(len(video.pts)))
    if not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}, it must be above 0 and at most 1000")
    step = 1 / Fraction(fps).limit_denominator(1001) / video.time_base  # ticks of the file per tick of ours
    ticks = math.floor((video.pts[-1] - video.pts[0] + 1 / video.fps / video.time_base) / step)
    if ticks > MAX_FRAMES:
        raise ValueError(f"{video.name}: has {ticks} frames at {fps} fps, at most {MAX_FRAMES} are read")
    # Half a file tick of slack: containers round time stamps (29.97 fps in milliseconds).
    times = np.array([video.pts[0] + math.floor(i * step + Fraction(1, 2)) for i in range(max(1, ticks))])
    return (np.searchsorted(np.array(video.pts), times, side="right") - 1).tolist()


def decode_frames(
    source: Source,
    fps: float | Fraction | None = None,
    start: int = 0,
    stop: int | None = None,
    size: tuple[int, int] | None = None,
    name: str = "",
    threads: int = 0,
    expected: tuple[int, int, int] | None = None,
) -> Tensor:
    """Frames [start, stop) of the file's timeline at `fps` as uint8 [T, 3, H, W], RGB, upright.

    size: (height, width) to cover by scaling, then crop around the centre; None keeps the file's. fps: None takes the
    file's own frames. threads: of the decoder, 0 for one per core. expected: frames, height and width that the file
    must have; others are refused before anything is decoded. Raises ValueError as `probe` does, and where the slice is
    not inside the timeline or a frame in it cannot be decoded.
    """
    name, ours = name or _name(source), isinstance(source, bytes)
    with _open(source, name, threads if ours else 1) as opened:
        video = _probe_stream(*opened, name, ours, expected[0] if expected else 0)
        shape = (len(video.pts), video.height, video.width)
        if expected and shape != expected:
            raise ValueError(f"{name}: video is {shape}, the index says {expected}")
        shown = frame_indices(video, fps)
        stop = len(shown) if stop is None else stop
        if not 0 <= start < stop <= len(shown):
            raise ValueError(f"{video.name}: frames {start} to {stop} requested, it has {len(shown)}")
        height, width = size or (video.height, video.width)
        needed = (stop - start) * 3 * height * width
        if needed > MAX_BYTES:
            raise ValueError(f"{video.name}: frames {start} to {stop} take {needed} bytes, at most {MAX_BYTES}")
        out = torch.empty(stop - start, height, width, 3, dtype=torch.uint8)
        decoded = iterate_frames(source, video, shown[start:stop], size, threads, opened=opened if ours else None)
        for i, frame in enumerate(decoded):
            if frame.shape != (height, width, 3):
                raise ValueError(f"{video.name}: changes its size to {frame.shape[1]}x{frame.shape[0]}")
            out[i] = torch.from_numpy(frame)
    return out.permute(0, 3, 1, 2).contiguous()


def iterate_frames(
    source: Source,
    video: Video,
    shown: Sequence[int],
    size: tuple[int, int] | None,
    threads: int = 0,
    crop: bool = True,
    opened: tuple[InputContainer, VideoStream] | None = None,
) -> Iterator[np.ndarray]:
    """The frames with the (ascending) numbers `shown`, one after another, as uint8 [H, W, 3].

    Scaled to cover `size` and, with `crop`, cropped to it around the centre. opened: the file, where it is open already
    and seeks reliably. One pass with one frame in memory, from the keyframe before the first. Repeated numbers give the
    same array again: do not write into it. Raises ValueError where one of them cannot be decoded.
    """
    wanted = [video.pts[i] for i in shown]
    if not wanted:
        return
    for seek in (True, False) if wanted[0] > video.pts[0] else (False,):
        with nullcontext(opened) if opened else _open(source, video.name, threads) as (container, stream):
            if seek or opened:
                container.seek(wanted[0] if seek else video.pts[0], stream=stream)
            aspect = stream.sample_aspect_ratio or Fraction(1)
            scaler = VideoReformatter()  # one for all frames: setting it up costs more than using it
            position = 0
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts < wanted[position]:
                    continue
                if frame.pts > wanted[position]:
                    break  # the frame is missing, or the seek went too far
                if frame.is_corrupt:
                    raise ValueError(f"{video.name}: is damaged at {_time(video, wanted[position])}")
                array = _to_array(scaler, frame, size, aspect, crop, video.name)
                while position < len(wanted) and wanted[position] == frame.pts:
                    yield array
                    position += 1
                if position == len(wanted):
                    return
        if position or not seek:
            raise ValueError(f"{video.name}: has no readable frame at {_time(video, wanted[position])}")


def encode_mp4(video: Tensor, fps: float | Fraction, crf: int = 10) -> bytes:
    """Encode uint8 [T, 3, H, W] as H.264 4:4:4 in mp4; `crf` 10 is near lossless. Equal input gives equal bytes.

    One thread and no look-ahead across keyframes (every 16 frames), so that the bytes do not depend on the machine's
    cores and slices decode cheaply.
    """
    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(f"expected uint8 [T, 3, H, W], got {video.dtype} {list(video.shape)}")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = video.shape[2:]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.options = {
            "crf": str(crf), "preset": "veryfast", "threads": "1",
            "g": str(KEYFRAME_INTERVAL), "sc_threshold": "0", "bf": "0",
            "x264-params": "mbtree=0:weightp=0:rc-lookahead=0",  # look-ahead is not deterministic below 32 pixels
        }  # fmt: skip
        scaler = VideoReformatter()
        for i, rgb in enumerate(video.permute(0, 2, 3, 1).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = scaler.reformat(frame, format="yuv444p", dst_colorspace=Colorspace.ITU709)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@contextmanager
def _open(source: Source, name: str, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """(container, first video stream), closed afterwards; FFmpeg's errors become ValueError with the name.

    Files are read by Python, so that FFmpeg's errors concern only their content; a failing read is an OSError.
    """
    formats = FORMATS
    if isinstance(source, bytes):
        formats = "mov"  # shards hold mp4 only: no other demuxer may parse these bytes
    elif not isinstance(source, Member) and not Path(source).is_file():
        raise ValueError(f"{name}: is not a file")
    options = {"format_whitelist": formats, "protocol_whitelist": "file"}
    try:
        with _open_bytes(source, name) as file, av.open(file, "r", options=options) as container:
            if not container.streams.video:
                raise ValueError(f"{name}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError(f"{name}: is in a codec that FFmpeg cannot decode")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MAX_PIXELS:
                raise ValueError(f"{name}: {width}x{height} pixels are more than {MAX_PIXELS}")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a frame header may differ
            stream.thread_type = "NONE" if threads == 1 else "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{name}: is not readable as video ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # its content made FFmpeg seek to an impossible offset
            raise ValueError(f"{name}: is not readable as video ({error.strerror})") from None
        raise OSError(error.errno, error.strerror, name) from None


@contextmanager
def _open_bytes(source: Source, name: str) -> Iterator[BinaryIO]:
    location = Path(source) if isinstance(source, str) else source
    with io.BytesIO(location) if isinstance(location, bytes) else open_bytes(location) as file:
        if not file.read(1):
            raise ValueError(f"{name}: is empty")
        file.seek(0)
        yield file


def _to_array(
    scaler: VideoReformatter,
    frame: av.VideoFrame,
    size: tuple[int, int] | None,
    aspect: Fraction,
    crop: bool,
    name: str,
) -> np.ndarray:
    """One frame as uint8 [H, W, 3], upright, scaled to cover `size` and, with `crop`, cropped around the centre."""
    turns = _quarter_turns(frame)
    if size is None:
        height, width = rows, columns = frame.height, frame.width
        scale = 1.0
    else:
        height, width = size if turns % 2 == 0 else size[::-1]
        # Pixels need not be square: `aspect` is their width over their height.
        scale = max(width / float(frame.width * aspect), height / frame.height)
        columns = max(width, round(frame.width * aspect * scale))
        rows = max(height, round(frame.height * scale))
    if columns * rows > MAX_PIXELS:
        raise ValueError(f"{name}: too narrow, covering {size} takes {columns}x{rows} pixels")
    # High-definition files without a colour space follow BT.709; FFmpeg would assume BT.601 for all.
    unspecified = frame.height >= 720 and frame.colorspace not in COLORSPACES
    rgb = scaler.reformat(
        frame,
        columns,
        rows,
        "rgb24",
        src_colorspace=Colorspace.ITU709 if unspecified else None,
        interpolation=Interpolation.AREA if scale < 1 else Interpolation.BICUBIC,
    ).to_ndarray()
    if crop:
        top, left = (rows - height) // 2, (columns - width) // 2
        rgb = rgb[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(rgb, turns) if turns else rgb)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns counterclockwise that bring the frame upright."""
    return round(frame.rotation / 90) % 4


def _time(video: Video, pts: int) -> str:
    return f"{float((pts - video.pts[0]) * video.time_base):.2f} s"


def _name(source: Source) -> str:
    return "video" if isinstance(source, bytes) else str(source)
