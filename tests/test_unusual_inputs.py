"""What becomes of awkward inputs: each is really made, all go through one conversion, and docs/data.md says the same.

The table there is written by this file: python tests/test_unusual_inputs.py
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.shards.index import read_index, read_part, scan

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
MARKS = ("<!-- inputs: written by tests/test_unusual_inputs.py -->", "<!-- end of inputs -->")
SECONDS, RATE, SIDE = 3, 12, 32  # of most: 36 frames, four clips of 8 frames at 12 fps


def pictures(count: int = SECONDS * RATE, height: int = SIDE, width: int = SIDE, seed: int = 0) -> list[np.ndarray]:
    """Left half dark, right half bright, a little brighter with every frame: what comes out upside down is seen. Inputs
    differ in `seed`, a grain of their own, as copies would count once."""
    grain = np.random.default_rng(seed).integers(0, 9, (height, width, 1))
    base = np.where(np.arange(width)[None, :, None] < width / 2, 20, 150) + grain
    return [np.broadcast_to(base + i % 64, (height, width, 3)).astype(np.uint8) for i in range(count)]


def write(path: Path, video: list[np.ndarray], codec="libx264", pixels="yuv420p", rate=RATE, pts=None, base=None,
          rotate=0, aspect=None, format=None, options=None, streams=1, sound=False,
          muxer=None) -> Path:  # fmt: skip
    """`video` with a codec and pixel format; pts in units of `base`. The container is told by the path or `format`."""
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        made = []
        if sound:
            container.add_stream("aac", rate=48000)
        for _ in range(streams):
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.height, stream.width = video[0].shape[:2]
            stream.pix_fmt = pixels
            if base is not None:
                stream.codec_context.time_base = base
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if rotate:
                stream.set_display_rotation(rotate)
            made.append(stream)
        for i, picture in enumerate(video):
            for stream in made:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts = i if pts is None else pts[i]
                frame.time_base = base or Fraction(1, rate)
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return path


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 48000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


def changed(change: Callable[[bytes], bytes], **options) -> Callable[[Path, list], None]:
    """A good file whose bytes are then changed."""

    def make(path: Path, video: list[np.ndarray]) -> None:
        write(path, video, **options)
        path.write_bytes(change(path.read_bytes()))

    return make


def two_sizes(path: Path, video: list[np.ndarray]) -> None:
    parts = [write(path.with_suffix(f".{side}.ts"), pictures(24, side, side), "mpeg2video") for side in (32, 48)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def coded(codec: str, pixels: str = "yuv420p", **options) -> Callable[[Path, list], None]:
    return lambda path, video: write(path, video, codec, pixels, **options)


def timed(times: list[int]) -> Callable[[Path, list], None]:
    """At these times in milliseconds."""
    return lambda path, video: write(path, video[: len(times)], pts=times, base=Fraction(1, 1000), rate=25)


def raw(content: bytes) -> Callable[[Path, list], None]:
    return lambda path, video: path.write_bytes(content)


def shaped(height: int, width: int, count: int = 36, **options) -> Callable[[Path, list], None]:
    return lambda path, video: write(path, pictures(count, height, width, len(str(path)) + height), **options)


def av1(path: Path, video: list) -> None:
    """In a thread of its own: run by root, SVT-AV1 makes the thread that calls it a real-time one (FIFO, 99), and all
    that this thread starts later; ranks of other tests, which spin while they wait, then starve everything else."""
    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(write, path, pictures(36, 64, 64), "libsvtav1", "yuv420p10le").result()
    assert os.sched_getscheduler(0) == before


def middle_lost(content: bytes) -> bytes:
    start = content.find(b"mdat") + 8
    size = (content.find(b"moov") - start) // 4
    return content[: start + size] + b"\xff" * size + content[start + 2 * size :]


# (what it is, file name, how it is made, what is said of it). The outcome between is what really comes of it.
INPUTS: list[tuple[str, str, Callable[[Path, list], object], str]] = [
    ("H.264, 4:2:0", "plain.mp4", coded("libx264"), ""),
    ("H.265, 10 bit", "ten.mp4", coded("libx265", "yuv420p10le", options={"x265-params": "log-level=0"}), "to 8 bit"),
    ("VP9 with alpha, WebM", "alpha.webm", coded("libvpx-vp9", "yuva420p"), "alpha is left out"),
    ("AV1, 10 bit", "av1.mkv", av1, "to 8 bit"),
    ("ProRes, 10 bit 4:2:2", "prores.mov", coded("prores_ks", "yuv422p10le"), "to 8 bit"),
    ("ProRes 4:4:4 with alpha", "prores4.mov", coded("prores_ks", "yuva444p10le"), "alpha is left out"),
    ("DNxHR, 4:2:2", "dnxhr.mov", lambda p, v: write(p, pictures(36, 128, 256), "dnxhd", "yuv422p",
                                                     options={"profile": "dnxhr_sq"}), ""),
    ("FFV1, RGB", "rgb.mkv", coded("ffv1", "bgr0"), ""),
    ("FFV1, grey, 16 bit", "grey.mkv", coded("ffv1", "gray16le"), "three equal channels"),
    ("PNG pictures with a palette or alpha in MOV", "png.mov", coded("png", "rgba"), "alpha is left out"),
    ("Motion JPEG, full range", "mjpeg.mov", coded("mjpeg", "yuvj420p"), ""),
    ("MPEG-1 program stream", "old.mpg", coded("mpeg1video", rate=25), ""),
    ("MPEG-2 transport stream", "broadcast.ts", coded("mpeg2video", rate=25, format="mpegts"), "given by name: "
     "folders are not searched for .ts, as programs have such files too"),
    ("interlaced MPEG-2", "fields.mpg", coded("mpeg2video", rate=25, options={"flags": "+ildct+ilme"}),
     "not deinterlaced: do that before"),
    ("MPEG-4 in AVI, without presentation times", "divx.avi", coded("mpeg4"), "by its decoding times"),
    ("WMV", "windows.wmv", coded("wmv2"), ""),
    ("Flash video", "flash.flv", coded("flv"), ""),
    ("H.264 without container", "bare.h264", coded("libx264", format="h264"), "has no time stamps: remux it"),
    ("variable frame rate", "vfr.mkv", timed([0, 40, 500, 520, 1000, 1900, 2000, 2500]), "by its time stamps"),
    ("begins at 10 s", "late.mkv", timed([10_000 + 83 * i for i in range(36)]), "by its time stamps"),
    ("a pause of a minute between two frames", "gap.mkv", timed([0, 83, 60_000]), "no frame is used for "
     "more than 10 s: clips end there, as at a scene cut, and the pause is named"),
    ("29.97 in milliseconds", "ms.mkv", timed([round(i * 1001 / 30) for i in range(36)]), "by its time stamps"),
    ("1,000 frames a second", "fast.mkv", lambda p, v: write(p, pictures(1500), rate=1000), "every 83rd frame or so"),
    ("one frame a second", "slow.mp4", lambda p, v: write(p, v[:4], rate=1), "frames repeat"),
    ("rotated by a flag", "phone.mp4", coded("libx264", rotate=90), "upright"),
    ("portrait", "portrait.mp4", shaped(64, 36), "cropped, or a bucket of its own"),
    ("pixels that are not square", "anamorphic.mp4", coded("libx264", aspect=Fraction(2)), "of the right shape"),
    ("odd height and width", "odd.mp4", shaped(33, 47, pixels="yuv444p"), ""),
    ("2 x 512 pixels", "line.mkv", lambda p, v: write(p, pictures(36, 2, 512), "ffv1", "bgr0"), "scaled to cover"),
    ("16 x 16 pixels, smaller than the clips", "tiny.mp4", shaped(16, 16), "upscaled"),
    ("its size changes on the way", "sizes.ts", two_sizes, "all are scaled to the clips' size"),
    ("two video streams", "two.mkv", coded("libx264", streams=2), "the first"),
    ("sound before the video", "sound_first.mp4", coded("libx264", sound=True), ""),
    ("one frame", "one.mp4", lambda p, v: write(p, v[:1]), ""),
    ("shorter than a clip", "short.mp4", lambda p, v: write(p, v[:7]), ""),
    ("no frame", "none.mkv", changed(lambda content: content[:700]), ""),
    ("zero bytes", "zero.mp4", raw(b""), ""),
    ("text", "text.mp4", raw(b"this is no video" * 99), ""),
    ("cut off, index at its end", "cut.mp4", changed(lambda content: content[: len(content) // 2]), ""),
    ("cut off, index at its front", "cut_front.mp4", changed(lambda content: content[: len(content) * 7 // 10],
                                                             muxer={"movflags": "faststart"}), ""),
    ("cut off, Matroska", "cut.mkv", changed(lambda content: content[: len(content) * 8 // 10]),
     "what is there is used: such a file does not say how long it is"),
    ("damaged in the middle", "damaged.mp4", changed(middle_lost, options={"crf": "0"}), "none of its clips is used"),
    ("only sound", "sound.mp4", lambda p, v: only_sound(p), ""),
    ("GIF, given by name", "moving.gif", coded("gif", "rgb8"), "folders are not searched for .gif"),
    ("GIF called .mp4", "gif.mp4", coded("gif", "rgb8", format="gif"), ""),
    ("picture called .mp4", "picture.mp4", lambda p, v: write(p, v[:1], "png", "rgb24", format="image2"), ""),
    ("MP4 called .avi", "wrong.avi", coded("libx264", format="mp4"), "by its content"),
    ("playlist called .mp4", "list.mp4", raw(b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile:///etc/passwd\n"
                                             b"#EXT-X-ENDLIST\n"), "opens no other file"),
    ("script of FFmpeg called .mp4", "concat.mp4", raw(b"ffconcat version 1.0\nfile /etc/passwd\n"),
     "opens no other file"),
    ("name with spaces, quotes and `; rm`", "a 'b' \"c\"; rm -rf $HOME.mp4", coded("libx264"), "names are no commands"),
    ("name in other alphabets, with emoji", "видео 视频 🎬.mp4", coded("libx264"), ""),
    ("name that is not UTF-8", os.fsdecode(b"latin-\xff.mp4"), coded("libx264"), ""),
    ("name with a line break", "line\nbreak.mp4", coded("libx264"), ""),
    ("name like an option", "--overwrite.mp4", coded("libx264"), ""),
    ("name of 250 letters", "n" * 246 + ".mp4", coded("libx264"), ""),
    ("named pipe", "pipe.mp4", lambda p, v: os.mkfifo(p), "never opened"),
    ("link to a device", "device.mp4", lambda p, v: p.symlink_to("/dev/zero"), "never opened"),
    ("link to nothing", "gone.mp4", lambda p, v: p.symlink_to("nowhere"), ""),
    ("folder called .mp4", "folder.mp4", lambda p, v: (p.mkdir(), write(p / "in.mp4", v))[0], "searched like any"),
    ("hidden file", ".hidden.mp4", coded("libx264"), "left out without a word"),
    ("a copy of another", "zz_copy.mp4", lambda p, v: p.write_bytes((p.parent / "plain.mp4").read_bytes()), ""),
]  # fmt: skip


def convert_inputs(folder: Path) -> tuple[dict[str, str], Path]:
    """Result of every input, by file name, of one conversion of all of them; and the folder of shards."""
    videos = folder / "in"
    videos.mkdir()
    for number, (_, name, make, _) in enumerate(INPUTS):
        make(videos / name, pictures(seed=number))
    named = [str(videos / name) for name in ("broadcast.ts", "bare.h264", "sizes.ts", "moving.gif")]
    config = ConvertConfig(
        (str(videos), *named), str(folder / "out"), 8, SIDE, SIDE, RATE, held_out=0.0, autoencoder="pixels",
        max_bad=0.9,
    )  # fmt: skip
    report = convert(config, lambda video: video.float(), 1)
    results = {name.removeprefix("in/"): f"skipped: {why}" for name, why in report.skipped}
    counts: dict[str, int] = {}
    index = read_index(folder / "out")
    for shard in index.splits["train"]:
        for sample in scan(folder / "out" / shard.name):
            source = json.loads(read_part(folder / "out" / shard.name, sample, "json"))["source"].removeprefix("in/")
            counts[source] = counts.get(source, 0) + 1
    results |= {name: f"used: {count} clip{'s' * (count > 1)}" for name, count in counts.items()}
    results["folder.mp4"] = results.pop("folder.mp4/in.mp4")
    results[".hidden.mp4"] = "not looked at"
    return results, folder / "out"


def results_table(results: dict[str, str]) -> str:
    rows = [f"{len(INPUTS)} inputs of up to {SECONDS} s, mostly; clips of 8 frames at {RATE} fps.", ""]
    rows += ["| input | what happens | |", "| --- | --- | --- |"]
    for what, name, _, note in INPUTS:
        reason = re.sub(r" \((?!\d)[^()]*\)$", "", results[name])  # FFmpeg's words differ between its versions
        rows.append(f"| {what} | {reason} | {note} |")
    return "\n".join(rows)


def page_with(rows: str) -> str:
    text = PAGE.read_text()
    before, rest = text.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{rows}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[dict[str, str], Path]:
    return convert_inputs(tmp_path_factory.mktemp("unusual"))


@pytest.mark.parametrize("name", [name for _, name, _, _ in INPUTS], ids=ascii)
def test_the_documented_result_of_an_input(converted, name):
    row = next(row for row, (_, other, _, _) in zip(results_table(converted[0]).splitlines()[4:], INPUTS, strict=True)
               if other == name)  # fmt: skip
    assert row in PAGE.read_text()


def test_the_documented_table_is_complete(converted):
    assert page_with(results_table(converted[0])) == PAGE.read_text()


def test_used_clips_are_upright_and_in_order(converted):
    """Dark on the left, bright on the right, brighter with time; the rotated one turned as its flag says."""
    _, out = converted
    index = read_index(out)
    samples = ShardReader(out, index, "train")
    turned = 0
    for number in range(len(samples)):
        _, video, *_ = samples.read(number)
        about = json.loads(read_part(*_where(samples, number), "json"))
        means = video.float().mean((1, 2, 3))
        assert means[-1] > means[0] or "slow" in about["source"], about["source"]
        left, right, top, bottom = (
            video[0, :, rows, columns].float().mean()
            for rows, columns in (
                (slice(None), slice(0, 8)), (slice(None), slice(24, 32)),
                (slice(0, 8), slice(None)), (slice(24, 32), slice(None)),
            )
        )  # fmt: skip
        if "phone" in about["source"]:
            turned += 1
            assert abs(float(top - bottom)) > 60 and abs(float(right - left)) < 30
        else:
            assert right - left > 60, about["source"]
    assert turned == 4


def _where(samples: ShardReader, number: int):
    return samples._locate(number)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page_with(results_table(convert_inputs(Path(folder))[0])))
