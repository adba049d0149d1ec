"""Contact sheets and mp4 files: what was drawn is there, pixel for pixel or as near as H.264 keeps it."""

import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from msc.datasets import video as decode
from msc.pretrain.inference.contact_sheet import CONTEXT_COLOUR, GAP, GENERATED_COLOUR, HEAD, write_contact_sheet
from msc.pretrain.inference.video_io import (
    stream_mp4,
    upscaled,
    write_mp4,
)


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    t, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (frames, height, width)), indexing="ij")
    waves = [torch.sin(y / 9 + t / 4), torch.cos(x / 11 - t / 5), torch.sin((x + y) / 15)]
    return torch.stack([(wave + 1) * 127 for wave in waves], 1).to(torch.uint8)


def png(path) -> np.ndarray:
    return (imread(path)[..., :3] * 255).round().astype(np.uint8)


def test_frames_are_drawn_pixel_for_pixel(tmp_path):
    video = smooth(8, 24, 32)
    write_contact_sheet([("a", video), ("b", video.flip(0))], tmp_path / "sheet.png", every=2, scale=3)
    sheet = png(tmp_path / "sheet.png")
    left = 12 + 7
    assert sheet.shape == (HEAD + 2 * (24 * 3 + GAP), left + 4 * (32 * 3 + GAP), 3)
    for row, shown in enumerate((video, video.flip(0))):
        for column in range(4):
            top, x = HEAD + row * (24 * 3 + GAP), left + column * (32 * 3 + GAP)
            tile = sheet[top : top + 72 : 3, x : x + 96 : 3]
            assert np.array_equal(tile, shown[2 * column].permute(1, 2, 0).numpy())
    assert (sheet[:HEAD] < 128).any(), "no frame numbers"
    assert (sheet[HEAD:, :left] < 128).any(), "no labels"


def test_borders_tell_context_from_generated(tmp_path):
    write_contact_sheet([("x", smooth(6, 16, 16))], tmp_path / "sheet.png", context=2, every=1, scale=1)
    row = png(tmp_path / "sheet.png")[HEAD + 5]
    corners = [tuple(int(v) for v in row[19 + i * (16 + 4 + GAP)]) for i in range(6)]
    assert corners == [CONTEXT_COLOUR] * 2 + [GENERATED_COLOUR] * 4


def test_rows_may_differ_and_labels_are_taken_literally(tmp_path):
    rows = [("$\\frac{1$ two\nlines", smooth(3, 16, 24)), ("", smooth(40, 20, 12))]
    write_contact_sheet(rows, tmp_path / "made" / "here" / "sheet.png", context=1)
    write_contact_sheet(rows, tmp_path / "again.png", context=1)
    first = (tmp_path / "made" / "here" / "sheet.png").read_bytes()
    assert first == (tmp_path / "again.png").read_bytes(), "the same rows must give the same bytes"


def test_small_videos_are_enlarged_by_a_whole_factor():
    video = smooth(2, 48, 128)
    large = upscaled(video, side=640)
    assert large.shape == (2, 3, 240, 640) and torch.equal(large[..., ::5, ::5], video)
    assert upscaled(smooth(1, 16, 1000)).shape == (1, 3, 16, 1000)


def test_one_frame_of_one_pixel(tmp_path):
    write_contact_sheet([("dot", smooth(1, 1, 1))], tmp_path / "sheet.png")
    write_mp4(tmp_path / "dot.mp4", smooth(1, 1, 1), fps=8)
    assert read(tmp_path / "dot.mp4")[0].shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.zeros(4, 3, 8, 8), "float32"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), r"\[4, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"\[0, 3, 8, 8\]"),
    ],
)
def test_wrong_videos_are_named(tmp_path, video, words):
    with pytest.raises(ValueError, match=words):
        write_contact_sheet([("x", video)], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=words):
        write_mp4(tmp_path / "video.mp4", video, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        write_contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="every is 0"):
        write_contact_sheet([("x", smooth(2, 8, 8))], tmp_path / "sheet.png", every=0)
    with pytest.raises(ValueError, match="fps is 0"):
        write_mp4(tmp_path / "video.mp4", smooth(2, 8, 8), fps=0)


def read(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), stream.average_rate


@pytest.mark.parametrize(("height", "width", "fps"), [(64, 96, 16), (33, 47, 29.97), (16, 16, 0.5)])
def test_mp4_comes_back(tmp_path, height, width, fps):
    video = smooth(12, height, width)
    write_mp4(tmp_path / "video.mp4", video, fps)
    frames, rate = read(tmp_path / "video.mp4")
    assert frames.shape == (12, height + height % 2, width + width % 2, 3)
    assert abs(float(rate) - fps) < 1e-2
    want = video.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(frames[:, :height, :width] - want).mean() < 4
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    write_mp4(tmp_path / "again.mp4", video, fps)
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "video.mp4").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    write_mp4(path, smooth(2, 16, 16), 8)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise RuntimeError("no space left")

    monkeypatch.setattr("msc.pretrain.inference.video_io.os.fsync", fail)
    with pytest.raises(RuntimeError, match="no space"):
        write_mp4(path, smooth(4, 16, 16), 8)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


def test_a_growing_video_ends_as_the_same_frames_in_one_file(tmp_path):
    video = smooth(50, 33, 48)
    with stream_mp4(tmp_path / "grown.mp4", 12) as append:
        for some in video.split(7):
            append(some)
        assert [path.name for path in tmp_path.iterdir()] == ["grown.partial.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == ["grown.mp4"]
    write_mp4(tmp_path / "whole.mp4", video, 12)
    grown, rate = read(tmp_path / "grown.mp4")
    assert grown.shape == (50, 34, 48, 3) and rate == 12
    assert np.abs(grown.astype(int) - read(tmp_path / "whole.mp4")[0]).mean() < 2
    assert len(decode.decode_frames(tmp_path / "grown.mp4")) == 50


GROW = """
import os, signal, sys, torch
from pathlib import Path
from msc.pretrain.inference.video_io import stream_mp4
video = torch.arange(60).mul(4).to(torch.uint8)[:, None, None, None].expand(60, 3, 32, 48)
with stream_mp4(Path(sys.argv[1]), 10) as append:
    for frame in video.split(1):
        append(frame)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_a_video_that_plays(tmp_path):
    done = subprocess.run([sys.executable, "-P", "-c", GROW, tmp_path / "video.mp4"], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "video.partial.mp4"
    frames, _ = read(path)
    assert 40 <= len(frames) < 60  # at 10 frames a second no more than two seconds are lost
    assert np.abs(frames.mean((1, 2, 3)) - 4 * np.arange(len(frames))).max() < 4
    want = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert torch.equal(decode.decode_frames(path), want), "as `--video` would read it"


def test_an_error_leaves_every_frame_and_no_frame_leaves_nothing(tmp_path):
    path = tmp_path / "video.mp4"
    write_mp4(path, smooth(3, 16, 16), 8)
    with pytest.raises(KeyboardInterrupt), stream_mp4(path, 8) as append:
        append(smooth(13, 16, 16))
        raise KeyboardInterrupt
    assert len(read(tmp_path / "video.partial.mp4")[0]) == 13
    assert len(read(path)[0]) == 3, "an older video is replaced by a whole one only"
    with pytest.raises(RuntimeError, match="before"), stream_mp4(tmp_path / "none.mp4", 8):
        raise RuntimeError("before the first frame")
    with pytest.raises(ValueError, match="8 × 16 pixels after some of 16 × 16"), stream_mp4(path, 8) as append:
        append(smooth(1, 16, 16))
        append(smooth(1, 8, 16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video.mp4", "video.partial.mp4"]


def test_numbers_and_borders_count_the_frames_of_the_longer_video(tmp_path):
    video = smooth(40, 16, 16)
    write_contact_sheet([("x", video)], tmp_path / "whole.png", context=16, every=8)
    write_contact_sheet([("x", video[::8])], tmp_path / "some.png", context=16, every=1, step=8)
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "some.png").read_bytes()


def test_import_needs_no_pyplot():
    code = "import sys, msc.pretrain.inference.contact_sheet; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "False"
    code = (
        "import sys, torch, pathlib, tempfile; from msc.pretrain.inference.contact_sheet import write_contact_sheet;"
        "write_contact_sheet([('x', torch.zeros(1, 3, 4, 4, dtype=torch.uint8))], "
        "pathlib.Path(tempfile.mkdtemp()) / 'x.png');"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() == "False"
