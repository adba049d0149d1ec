"""Video decoding and encoding with PyAV.

A source is a path, a file in a tar, or the bytes of a file. An invalid video is a `ValueError` that begins with its
name, so that callers can skip it and report why; a file that cannot be read, which may be temporary, is an `OSError`.
Sizes and counts are checked before anything is allocated.
"""

import errno
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import dropwhile, islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from .shards.tar import Location, Member, open_bytes

Source = str | Location | bytes
SUFFIXES = frozenset(
    (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv")
    + (".webm", ".wmv")
)
# Containers that hold their own frames. Playlists (HLS, concat, DASH) are excluded: a malicious one would make FFmpeg
# open other files or addresses.
FORMATS = "mov,matroska,webm,avi,mpeg,mpegvideo,mpegts,asf,flv,ogg,mxf"
MAX_PIXELS = 1 << 26  # of one frame; 8192 x 8192
MAX_FRAMES = 1 << 24  # of one file; four days at 50 per second
MAX_BYTES = 32 << 30  # of one result of `decode_frames`
UNSPECIFIED_MATRIX = 2  # of AVColorSpace
HDR_TRANSFERS = (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67)  # PQ, HLG
MAX_DELAY = 32  # frames that a decoder holds back, for reordering and in its threads
CHECKED_FRAMES = 3  # of the start of a file, with which the stamps of its packets must agree
KEYFRAME_INTERVAL = 16  # in what we write: the most frames that a slice decodes and does not use


@dataclass(frozen=True)
class Video:
    """Metadata of a video file: upright size in pixels and the time line, the time stamps of all frames.

    `pts` ascend, in units of `time_base` seconds; `fps` is the average rate; `aspect` is the displayed width over
    height of the upright frame, as pixels need not be square. `origin` is the time of the first frame in seconds since
    the file's start, where players begin to count: that of its earliest stream, if it is at least a frame earlier.
    seams: numbers of frames at which the file's stamps begin anew, as where files are joined. counted: the decoder's
    frames are matched to `pts` by their number, not by their stamps, from the file's start.
    """

    name: str
    width: int
    height: int
    fps: Fraction
    time_base: Fraction
    pts: tuple[int, ...]
    aspect: float
    origin: float = 0.0
    seams: tuple[int, ...] = ()
    counted: bool = False

    @property
    def seconds(self) -> float:
        """From the first frame's start to the last one's end, taking the last to last an average frame."""
        return float((self.pts[-1] - self.pts[0]) * self.time_base + 1 / self.fps)


def probe(source: Source, name: str = "") -> Video:
    """Metadata of a file; only its first frames are decoded, or all where its packets do not give the time line.

    Raises ValueError, starting with the name, where it is unreadable, truncated, has no video stream or no
    frame, or exceeds the size limits.
    """
    with VideoReader(source, name, threads=1) as reader:
        return reader.video


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
    # A file tick of slack for two rounded stamps (29.97 fps in milliseconds); none for those on a grid of their own.
    pts = np.array(video.pts)
    steps = np.diff(np.unique(pts))
    rounded = int(len(steps) and steps.min() > 1 and np.gcd.reduce(steps) == 1)
    times = np.array([video.pts[0] + math.floor(i * step) + rounded for i in range(max(1, ticks))])
    return (np.searchsorted(pts, times, side="right") - 1).tolist()


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
    with VideoReader(source, name, threads, expected[0] if expected else 0) as reader:
        while True:
            video = reader.video
            shape = (len(video.pts), video.height, video.width)
            if expected and shape != expected:
                raise ValueError(f"{video.name}: video is {shape}, the index says {expected}")
            shown = frame_indices(video, fps)
            end = len(shown) if stop is None else stop
            if not 0 <= start < end <= len(shown):
                raise ValueError(f"{video.name}: frames {start} to {end} requested, it has {len(shown)}")
            height, width = size or (video.height, video.width)
            needed = (end - start) * 3 * height * width
            if needed > MAX_BYTES:
                raise ValueError(f"{video.name}: frames {start} to {end} take {needed} bytes, at most {MAX_BYTES}")
            out = torch.empty(end - start, height, width, 3, dtype=torch.uint8)
            try:
                for i, frame in enumerate(reader.frames(shown[start:end], size)):
                    if frame.shape != (height, width, 3):
                        raise ValueError(f"{video.name}: changes its size to {frame.shape[1]}x{frame.shape[0]}")
                    out[i] = torch.from_numpy(frame)
            except TimelineChanged:
                continue
            return out.permute(0, 3, 1, 2).contiguous()


class TimelineChanged(Exception):
    """The decoder gave other frames than the packets promised; the reader has a new time line: begin again."""


class VideoReader:
    """An open video file, a context manager: `video`, its metadata and time line, and `frames` of it.

    The time line is what the decoder gives. It is taken from the packets, without decoding, where their stamps are
    distinct and in order and agree with the first frames; the decoder's frames are compared with it later on. Where
    they differ (fields, hidden frames, recordings that begin inside a group of pictures, files without stamps), all
    frames are decoded once for their stamps. Stamps that begin anew are laid behind the earlier ones.

    threads: of the decoder, 0 for one per core. max_frames: 0 for MAX_FRAMES. Files that are given as bytes are taken
    to be written by `encode_mp4`: their packets are relied on.
    """

    video: Video

    def __init__(self, source: Source, name: str = "", threads: int = 0, max_frames: int = 0) -> None:
        self.name = name or ("video" if isinstance(source, bytes) else str(source))
        self._source, self._threads, self._max_frames = source, threads, max_frames or MAX_FRAMES
        self._scaler = VideoReformatter()  # one for all frames: setting it up costs more than using it
        self._ours = isinstance(source, bytes)
        self._file = ExitStack()
        self._begins_inside = False  # inside a group of pictures
        self._from_frames = False  # whether the time line is the decoder's
        self._places = list[int]()  # of AVI: the decoding times of its packets
        self._counted: tuple[Iterator[av.VideoFrame], int] | None = None  # frames from the start, and how many are read

    def __enter__(self) -> "VideoReader":
        try:
            with _errors_named(self.name):
                self._open(self._threads if self._ours else 1)
                self.video = self._packet_timeline() or self._frame_timeline()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def frames(self, shown: Sequence[int], size: tuple[int, int] | None, crop: bool = True) -> Iterator[np.ndarray]:
        """The frames with the (ascending) numbers `shown`, one after another, as uint8 [H, W, 3].

        Scaled to cover `size` and, with `crop`, cropped to it around the centre. One pass with one frame in memory,
        from the keyframe before the first. Repeated numbers give the same array again: do not write into it. Raises
        ValueError where one of them cannot be decoded, TimelineChanged where the decoder gives others.
        """
        if not shown:
            return
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        position = 0
        with _errors_named(self.name):
            for number, frame in enumerate(self._decode(shown[0], shown[-1]), shown[0]):
                if number != shown[position]:
                    continue
                if frame.is_corrupt:
                    raise ValueError(f"{self.name}: is damaged at {self._seconds(number)}")
                array = _to_array(self._scaler, frame, size, aspect, crop, self.name)
                while position < len(shown) and number == shown[position]:
                    yield array
                    position += 1

    def _decode(self, first: int, last: int) -> Iterator[av.VideoFrame]:
        """All frames from number `first` to `last`."""
        video, number = self.video, first
        if video.counted:
            if self._counted is None or self._counted[1] > first:
                self._counted = self._decode_from_start(), 0
            decoded, number = self._counted
            for frame in decoded:
                number += 1
                self._counted = decoded, number
                if number > first:
                    yield frame
                if number > last:
                    return
            raise ValueError(f"{self.name}: has no readable frame at {self._seconds(number)}")
        for earlier in (0, 10, None) if first else (None,):  # seconds: not all containers seek to keyframes
            if earlier is not None:
                target = max(video.pts[0], video.pts[first] - round(earlier / video.time_base))
                try:
                    self._container.seek(target, stream=self._stream)
                except av.FFmpegError:  # no keyframe is listed before it
                    continue
            for frame in self._decode_from_start() if earlier is None else self._container.decode(self._stream):
                if frame.pts is not None and frame.pts < video.pts[first]:
                    continue
                if frame.pts != video.pts[number]:
                    break
                yield frame
                number += 1
                if number > last:
                    return
            if number > first:
                break
        if self._ours:
            raise ValueError(f"{self.name}: has no readable frame at {self._seconds(number)}")
        self.video = replace(video, counted=True) if self._from_frames else self._frame_timeline()
        raise TimelineChanged

    def _decode_from_start(self) -> Iterator[av.VideoFrame]:
        if self._ours:
            self._container.seek(self.video.pts[0], stream=self._stream)
        else:
            self._open(self._threads)
        frames = self._container.decode(self._stream)
        # Before the first keyframe not all decoders skip what they cannot reconstruct.
        return dropwhile(lambda frame: not frame.key_frame, frames) if self._begins_inside else frames

    def _open(self, threads: int) -> None:
        self._file.close()
        self._container, self._stream = self._file.enter_context(_open_container(self._source, self.name, threads))

    def _packet_timeline(self) -> Video | None:
        """The time line by the packets; None where they do not give what the decoder does."""
        container, stream, most = self._container, self._stream, self._max_frames
        if stream.frames > most + 1:  # as below, before any is read
            raise ValueError(f"{self.name}: has {stream.frames} frames, at most {most} are read")
        packets = [
            (p.pts, p.dts, p.is_discard, p.is_keyframe) for p in islice(container.demux(stream), most + 2) if p.size
        ]
        shown = [pts for pts, _, discarded, _ in packets if not discarded]
        if not shown or stream.codec_context.width <= 0:
            raise ValueError(f"{self.name}: has no frames")
        if len(packets) > most:
            raise ValueError(f"{self.name}: has more than the {most} frames that are read")
        promised, count = stream.frames, len(packets) + 1
        if "mov" in container.format.name:  # its edit lists leave packets out
            promised, count = sum(entry.size > 0 for entry in stream.index_entries), len(packets)
        elif container.format.name == "avi":  # counts the places of frames that were dropped
            self._places = [dts for _, dts, _, _ in packets if dts is not None]
            count = max(self._places, default=0) + 2
        if promised > count:
            raise ValueError(f"{self.name}: is truncated: its header promises {promised} frames, it has {len(packets)}")
        ordered = [dts for _, dts, _, _ in packets if dts is not None]
        self._begins_inside = not packets[0][3]
        stamps = sorted({pts for pts in shown if pts is not None})
        if self._begins_inside or len(stamps) < len(shown) or any(a > b for a, b in pairwise(ordered)):
            return None
        if self._places and len({pts - dts for pts, dts, _, _ in packets if dts is not None and pts is not None}) > 1:
            return None
        if self._ours:
            return self._video(None, stamps)
        self._open(1)  # not all containers seek to their start
        first = list(islice(self._container.decode(self._stream), CHECKED_FRAMES))
        agrees = bool(first) and [frame.pts for frame in first] == stamps[: len(first)]
        return self._video(first[0], stamps) if agrees else None

    def _frame_timeline(self) -> Video:
        """The time line by the decoder, which gives the frames in the order in which they are shown."""
        first, pts, dts = None, [], []
        for frame in self._decode_from_start():
            first = first or frame
            pts.append(frame.pts)
            dts.append(frame.dts)  # of the packet with which it came out
            if len(pts) > self._max_frames:
                raise ValueError(f"{self.name}: has more than the {self._max_frames} frames that are read")
        if first is None:
            raise ValueError(f"{self.name}: has no frames")
        known = [stamp for stamp in dts if stamp is not None]
        stamps = [stamp for stamp in pts if stamp is not None]
        # AVI has no presentation times, and what FFmpeg makes of its decoding times is wrong for B-frames and where
        # frames were dropped: its frames are shown one after the other at the places of its packets.
        if self._places and (self._begins_inside or len(pts) == len(self._places)):
            known, stamps = self._places[-len(pts) :], []
        counted = len(stamps) < len(pts) or _disorder(stamps) > _disorder(known)
        stamps = known if counted else stamps
        if not stamps or len(pts) - len(stamps) > MAX_DELAY:
            raise ValueError(f"{self.name}: has no time stamps; remux it, e.g. with ffmpeg -i IN -c copy OUT.mkv")
        self._from_frames = True
        steps = sorted(b - a for a, b in pairwise(stamps) if b > a)
        step = steps[len(steps) // 2] if steps else 1
        shift, laid, seams = 0, stamps[:1], []
        counted = counted or _disorder(stamps) > 0
        for stamp in stamps[1:]:
            if stamp + shift < laid[-1]:  # begins anew, as where files are joined
                shift = laid[-1] + step - stamp
                seams.append(len(laid))
            laid.append(stamp + shift)
        while len(laid) < len(pts):  # frames that the decoder held back to the end have no packet
            laid.append(laid[-1] + step)
        video = self._video(first, laid)
        rate = 1 / (step * video.time_base)
        if steps and not 0.9 < rate / video.fps < 1.1:  # such as fields a second; time stamps may be rounded
            video = replace(video, fps=rate)
        origin = 0.0 if stamps is known else video.origin
        return replace(video, seams=tuple(seams), counted=counted, origin=origin)

    def _video(self, first: av.VideoFrame | None, pts: list[int]) -> Video:
        """first: the first frame, None to take the header's word."""
        stream, time_base = self._stream, self._stream.time_base
        assert time_base is not None
        fps = stream.average_rate or stream.guessed_rate
        if not fps or fps <= 0:
            span = (pts[-1] - pts[0]) * time_base
            fps = Fraction(len(pts) - 1) / span if span else Fraction(1)
        image = first or stream.codec_context
        width, height = image.width, image.height
        aspect = float(width * (stream.sample_aspect_ratio or 1) / height)
        if first and _orientation(first)[0]:
            width, height, aspect = height, width, 1 / aspect
        starts = [
            one.start_time * one.time_base
            for one in (*self._container.streams.video, *self._container.streams.audio)
            if one.start_time is not None and one.time_base and not one.disposition & Disposition.attached_pic
        ]
        lead = pts[0] * time_base - min(starts, default=pts[0] * time_base)
        origin = float(lead) if lead >= 1 / fps else 0.0  # less is the lead of an audio codec
        return Video(self.name, width, height, Fraction(fps), Fraction(time_base), tuple(pts), aspect, origin)

    def _seconds(self, number: int) -> str:
        video = self.video
        return f"{float((video.pts[min(number, len(video.pts) - 1)] - video.pts[0]) * video.time_base):.2f} s"


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
            frame = scaler.reformat(frame, format="yuv444p", dst_colorspace=Colorspace.ITU709, threads=1)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    """FFmpeg's errors become ValueError with the name; a failing read stays an OSError, also with the name."""
    try:
        yield
    except av.FFmpegError as error:
        raise ValueError(f"{name}: is not readable as video ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # its content made FFmpeg seek to an impossible offset
            raise ValueError(f"{name}: is not readable as video ({error.strerror})") from None
        raise OSError(error.errno, error.strerror, name) from None


@contextmanager
def _open_container(source: Source, name: str, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """(container, its best video stream), closed afterwards. Files are read by Python, so that FFmpeg's errors concern
    only their content.
    """
    formats = FORMATS
    if isinstance(source, bytes):
        formats = "mov"  # shards hold mp4 only: no other demuxer may parse these bytes
    elif not isinstance(source, Member) and not Path(source).is_file():
        raise ValueError(f"{name}: is not a file")
    options = {"format_whitelist": formats, "protocol_whitelist": "file"}
    with _open_bytes(source, name) as file, av.open(file, "r", options=options) as container:
        stream = container.streams.best("video")  # as players choose: not a cover picture
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise ValueError(f"{name}: has no video stream")
        if stream.codec_context is None:
            raise ValueError(f"{name}: is in a codec that FFmpeg cannot decode")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"{name}: {width}x{height} pixels are more than {MAX_PIXELS}")
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # a frame header may differ
        stream.thread_type = "NONE" if threads == 1 else "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


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
    """One frame as uint8 [H, W, 3], upright, scaled to cover `size` and, with `crop`, cropped around the centre.

    Colours are converted by FFmpeg as the frame is tagged; HDR is mapped to BT.709, its reference white to white.
    """
    transposed, up_down, left_right = _orientation(frame)
    if size is None:
        height, width = rows, columns = frame.height, frame.width
        scale = 1.0
    else:
        height, width = size[::-1] if transposed else size
        # Pixels need not be square: `aspect` is their width over their height.
        scale = max(width / float(frame.width * aspect), height / frame.height)
        columns = max(width, round(frame.width * aspect * scale))
        rows = max(height, round(frame.height * scale))
    if columns * rows > MAX_PIXELS:
        raise ValueError(f"{name}: too narrow, covering {size} takes {columns}x{rows} pixels")
    is_hdr = frame.color_trc in HDR_TRANSFERS
    if is_hdr and frame.color_primaries == ColorPrimaries.UNSPECIFIED:
        frame.color_primaries = ColorPrimaries.BT2020
    matrix = None  # as tagged
    if frame.colorspace == UNSPECIFIED_MATRIX and (is_hdr or frame.height >= 720):
        # High-definition files without a tag follow BT.709; FFmpeg would assume BT.601 for all.
        matrix = Colorspace.BT2020 if is_hdr else Colorspace.ITU709
    try:
        rgb = scaler.reformat(
            frame,
            columns,
            rows,
            "rgb24",
            src_colorspace=matrix,
            interpolation=Interpolation.AREA if scale < 1 else Interpolation.BICUBIC,
            dst_color_trc=ColorTrc.BT709 if is_hdr else None,
            dst_color_primaries=ColorPrimaries.BT709 if is_hdr else None,
            threads=1,  # there are workers beside; and for small pictures threads take longer than the work
        ).to_ndarray()
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise ValueError(
            f"{name}: is in a colour space that FFmpeg cannot convert to RGB (matrix {frame.colorspace}, transfer "
            f"{frame.color_trc}); convert it to BT.709 before"
        ) from None
    if crop:
        top, left = (rows - height) // 2, (columns - width) // 2
        rgb = rgb[top : top + height, left : left + width]
    if transposed:
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: -1 if up_down else 1, :: -1 if left_right else 1])


def _disorder(stamps: list[int]) -> int:
    """How often a stamp is not later than the one before it."""
    return sum(a >= b for a, b in pairwise(stamps))


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip up-down, then flip left-right): what brings the frame upright. Its display matrix, in units
    of 1/65536, maps a pixel (x, y) to (a x + c y, b x + d y).
    """
    side_data = cast(Mapping[SideData, Any], frame.side_data)  # PyAV's types know only of keys that are text
    matrix = side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0
