"""Containers x codecs x kinds of time line: every frame of every clip is the one that plain decoding gives.

Pictures carry a number in 4 x 4 blocks, which survives lossy codecs. The count is printed: pytest -s.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import count, dropwhile, pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards.index import read_index, read_part

SIDE, RATE, COUNT = 64, 24, 60
CONTAINERS = {"mp4": "mp4", "mov": "mov", "mkv": "matroska", "mts": "mpegts", "avi": "avi", "webm": "webm"}
GROUP = {"g": "12"}
CODECS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {  # pixels, options without B-frames and with
    "libx264": ("yuv420p", {"bf": "0"}, {"bf": "2", "x264-params": "open-gop=1"}),
    "libx265": ("yuv420p", {"x265-params": "log-level=0:bframes=0"}, {"x265-params": "log-level=0:open-gop=1"}),
    "libsvtav1": ("yuv420p", {"svtav1-params": "pred-struct=1"}, {}),
    "libvpx-vp9": ("yuv420p", {}, {}),
    "libvpx": ("yuv420p", {}, {}),
    "mpeg4": ("yuv420p", {"bf": "0"}, {"bf": "2"}),
    "mpeg2video": ("yuv420p", {"bf": "0"}, {"bf": "2"}),
    "prores_ks": ("yuv422p10le", {}, {}),
    "mjpeg": ("yuvj420p", {}, {}),
}


def numbered(number: int) -> np.ndarray:
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4)
    return np.repeat(np.kron(bits * 180 + 35, np.ones((SIDE // 4, SIDE // 4), np.uint8))[..., None], 3, 2)


def number_of(picture: np.ndarray) -> int:
    """The number in a picture [H, W, 3]."""
    blocks = picture.mean(-1).reshape(4, SIDE // 4, 4, SIDE // 4)[:, 4:-4, :, 4:-4].mean((1, 3))
    return sum(1 << bit for bit, level in enumerate(blocks.flat) if level > 125)


def write(path: Path, codec: str, container: str, options: dict[str, str], first: int = 0, times=None) -> None:
    """COUNT numbered pictures from `first`, at `times` in frames or one after the other."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, options={**GROUP, **options})
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.bit_rate = CODECS[codec][0], 4_000_000
        for i in range(COUNT):
            frame = av.VideoFrame.from_ndarray(numbered(first + i), format="rgb24")
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def copy(source: Path, path: Path, container: str, skipped: int = 0, shift: int = 0) -> None:
    """The packets of a file from number `skipped` on, `shift` frames earlier: a cut without encoding."""
    with av.open(str(source)) as old, av.open(str(path), "w", format=container) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        for i, packet in enumerate(old.demux(stream)):
            if packet.dts is None or i < skipped:
                continue
            earlier = round(Fraction(shift, RATE) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copied
            new.mux(packet)


def make(path: Path, codec: str, container: str, kind: str) -> None:
    """plain, B-frames, cut (inside a group of pictures, as `ffmpeg -ss T -c copy` does), begins inside a group of
    pictures, variable frame rate, joined."""
    _, plain, reordered = CODECS[codec]
    part = path.with_suffix(".part")
    if kind == "joined":
        for first in (0, 1000):
            write(part, codec, container, plain, first)
            with open(path, "ab") as file:
                file.write(part.read_bytes())
    elif kind in ("cut", "mid-group"):
        write(part, codec, container, reordered)
        copy(part, path, container, *((12, 17) if kind == "cut" else (5, 0)))
    else:
        times = [i + 2 * (i // 5) for i in range(COUNT)] if kind == "variable" else None
        write(path, codec, container, reordered if kind == "reordered" else plain, times=times)
    part.unlink(missing_ok=True)


def avi_places(content: bytes) -> Iterator[tuple[int, int]]:
    """(place in the stream, bytes) of the video's chunks of an AVI, read without FFmpeg; empty ones repeat a frame."""
    places = count()

    def chunks(begin: int, end: int) -> Iterator[tuple[int, int]]:
        while begin + 8 <= end:
            name, size = struct.unpack("<4sI", content[begin : begin + 8])
            if name in (b"LIST", b"RIFF"):
                yield from chunks(begin + 12, begin + 8 + size)
            elif name in (b"00dc", b"00db"):
                yield next(places), size
            begin += 8 + size + size % 2

    return chunks(12, len(content))


def plain_decoding(path: Path) -> list[tuple[Fraction, int]]:
    """(time, number of the picture) of every frame from the first keyframe; stamps that begin anew go on by a frame.

    In AVI, whose stamps FFmpeg makes up, the pictures lie one after the other at the places of its chunks, up to the
    last one.
    """
    with av.open(str(path)) as file:
        begins_inside = not next(file.demux(video=0)).is_keyframe
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        decoded = dropwhile(lambda frame: begins_inside and not frame.key_frame, file.decode(stream))
        frames = [(frame.pts, number_of(frame.to_ndarray(format="rgb24"))) for frame in decoded]
        if path.suffix == ".avi":
            places = [place for place, size in avi_places(path.read_bytes()) if size]
            return [(Fraction(places[number - COUNT], RATE), number) for _, number in frames]
        times, base = [frames[0][0] * stream.time_base], stream.time_base
        for (before, _), (now, _) in pairwise(frames):
            times.append(times[-1] + ((now - before) * base if now >= before else Fraction(1, RATE)))
        return [(time, number) for time, (_, number) in zip(times, frames, strict=True)]


def corpus(folder: Path, codecs: list[str]) -> dict[str, str]:
    """Written files -> their kind. What FFmpeg cannot write or decode is left out."""
    made = {}
    for codec in codecs:
        for suffix, container in CONTAINERS.items():
            for kind in ("plain", "reordered", "cut", "mid-group", "variable", "joined"):
                path = folder / f"{codec}-{kind}.{suffix}"
                try:
                    if kind == "joined" and suffix != "mts":
                        continue
                    if kind == "reordered" and CODECS[codec][1] == CODECS[codec][2]:
                        continue  # the same file again
                    make(path, codec, container, kind)
                    plain_decoding(path)
                    made[path.name] = kind
                except (av.FFmpegError, ValueError, IndexError):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".part").unlink(missing_ok=True)
    return made


def in_own_thread(function, *arguments):
    """SVT-AV1, run by root, makes the thread that calls it a real-time one, and all that this thread starts later."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def check(tmp_path: Path, codecs: list[str], fps: float) -> tuple[int, int, int, dict[str, str]]:
    """(files, frames of clips, wrong ones, refused files and why)."""
    videos = tmp_path / "in"
    videos.mkdir()
    made = in_own_thread(corpus, videos, codecs)
    out = tmp_path / "out"
    config = ConvertConfig(
        (str(videos),), str(out), 8, SIDE, SIDE, fps, held_out=0.0, autoencoder="pixels", max_bad=0.99
    )
    report = convert(config, lambda video: video.float(), 1)
    samples = ShardReader(out, read_index(out), "train")
    plain = {name: plain_decoding(videos / name) for name in made}
    frames, wrong, used = 0, [], set()
    for i in range(len(samples)):
        metadata = json.loads(read_part(*samples._locate(i), "json"))
        name = metadata["source"].removeprefix("in/")
        used.add(name)
        for k, picture in enumerate(samples.read(i)[1].permute(0, 2, 3, 1).numpy()):
            tick = plain[name][0][0] + Fraction(metadata["start"] + k) / Fraction(fps)
            slack = Fraction(1, 1000)  # of stamps in milliseconds
            want = [number for time, number in plain[name] if time <= tick + slack][-1]
            frames += 1
            if number_of(picture) != want:
                wrong.append((name, metadata["start"] + k, number_of(picture), want))
    refused = {name.removeprefix("in/"): reason for name, reason in report.skipped}
    assert used | set(refused) == set(made)
    print(f"{len(made)} files, {frames} frames of clips at {fps:g} fps, {len(wrong)} wrong, refused: {refused}")
    assert not wrong, wrong[:20]
    return len(made), frames, len(wrong), refused


def test_clips_have_the_frames_of_plain_decoding(tmp_path):
    files, frames, _, refused = check(tmp_path, ["libx264", "mpeg4"], RATE)
    assert files >= 40 and frames > 1500
    assert not refused


@pytest.mark.slow
@pytest.mark.parametrize("fps", [24, 10, 60])
def test_clips_of_all_codecs_have_the_frames_of_plain_decoding(tmp_path, fps):
    before = os.sched_getscheduler(0)
    files, frames, _, refused = check(tmp_path, list(CODECS), fps)
    assert os.sched_getscheduler(0) == before
    assert files >= 120 and frames > 2000
    assert not refused
