"""Malicious inputs: refused by name, before anything is run, opened or allocated. See also test_shards.py (members of a
tar), test_dataloader.py (unreadable clips), test_video.py (playlists) and test_autoencoder.py.
"""

import itertools
import json
import os
import resource
import struct
import tarfile
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save

from msc.datasets import video as decode
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.sources import find_sources
from msc.datasets.shards.index import Index, read_index, scan, write_shard
from msc.datasets.statistics import Statistics
from msc.datasets.synthetic import write_videos
from msc.datasets.video import decode_frames, encode_mp4, probe


def peak() -> int:
    """Most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def latent_index(folder: Path, *parts: dict[str, bytes], **changes) -> Index:
    """Samples with these parts, in an index that says they hold latents [4, 3, 2, 2]."""
    shard = write_shard(folder / "train-000000.tar", [(f"clip-{i}", part) for i, part in enumerate(parts)])
    fields = {
        "store": "latent", "autoencoder": "pixels", "temporal_factor": 1, "channels": 3, "frames": 4, "height": 2,
        "width": 2, "video_frames": 4, "video_height": 2, "video_width": 2, "fps": 12.0,
        "statistics": Statistics.default(3), "settings": {}, "splits": {"train": [shard]},
    }  # fmt: skip
    return Index(**{**fields, **changes})


@pytest.mark.parametrize("name", ["a.json", "a.mp4", "a.latent.safetensors", "a.text.safetensors"])
def test_an_oversized_member_is_refused_by_its_header(tmp_path, name):
    info = tarfile.TarInfo(name)
    for size in (1 << 30, 1 << 40):
        info.size = size
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(2 << 30)  # a hole: the file is as long as a gigabyte of JSON, and takes no space
        before = peak()
        if size == 1 << 40 or name in ("a.json", "a.text.safetensors"):
            with pytest.raises(ValueError, match=rf"'{name}' claims {size} bytes"):
                scan(tmp_path / "a.tar")
        else:
            assert len(scan(tmp_path / "a.tar")) == 1
        assert peak() - before < 50


@pytest.mark.parametrize(
    "address", ["pipe:touch exploded", "pipe:touch exploded |", "http://127.0.0.1:9/x", "s3://x/y"]
)
def test_urls_and_commands_are_not_local_shards_or_sources(tmp_path, address, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of shards"):
        read_index(address)
    with pytest.raises(ValueError, match="is an address or a command"):
        find_sources((address,))
    (tmp_path / "list.txt").write_text(address)
    with pytest.raises(ValueError, match="is an address or a command"):
        find_sources((str(tmp_path / "list.txt"),))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"shape": [4, 3, 2, 2], "data_offsets": [0, 1 << 50]},
        {"shape": [4, 3, 2, 2], "data_offsets": [1 << 50, (1 << 50) + 96]},
        {"shape": [4, 3, 2, 2], "data_offsets": [-96, 0]},
        {"shape": [4, 3, 2, 2], "data_offsets": [0.0, 96.0]},
        {"shape": [4, 3, 2, 2], "data_offsets": "ab"},
        {"shape": [4, 3, 2, 2], "data_offsets": [0, 96], "dtype": "F999"},
        {"shape": [1 << 40, 3, 2, 2], "data_offsets": [0, 96]},
        {"shape": [4, 3, 2, 2]},
        [],
        None,
    ],
)
def test_a_latent_with_a_false_header_is_unreadable(tmp_path, header):
    if isinstance(header, dict):
        header = {"dtype": "F16", **header}
    content = json.dumps({"latent": header}).encode()
    content = struct.pack("<Q", len(content)) + content + bytes(96)
    good = save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})
    index = latent_index(tmp_path, {"json": b"{}", "latent.safetensors": content},
                         {"json": b"{}", "latent.safetensors": good})  # fmt: skip
    before = peak()
    for part in ((0, 4), (2, 3)):
        samples = ShardReader(tmp_path, index, "train", part)
        with pytest.raises(ValueError, match=r"^sample clip-0 of "):
            samples.read(0)
        assert samples.read(1)[1].shape == (part[1] - part[0], 3, 2, 2)
    assert peak() - before < 50


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 64) - 1])
def test_a_header_of_a_claimed_length_is_not_read(tmp_path, length):
    content = struct.pack("<Q", length) + b" " * 200
    index = latent_index(tmp_path, {"json": b"{}", "latent.safetensors": content})
    with pytest.raises(ValueError, match=rf"header claims {length} of 208 bytes"):
        ShardReader(tmp_path, index, "train").read(0)


def test_deeply_nested_json_is_an_unreadable_clip(tmp_path):
    good = save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})
    for text in (b"[" * 500_000, b'{"a":' * 100_000):
        index = latent_index(tmp_path, {"json": text, "latent.safetensors": good})
        with pytest.raises(ValueError, match="sample clip-0 of "):
            ShardReader(tmp_path, index, "train").read(0)


@pytest.mark.parametrize("label", ["-1", "3", "1e999", '"dog"', "null", "true[", "1.0"])
def test_labels_out_of_range_never_reach_the_model(tmp_path, label):
    good = save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})
    about = b'{"label": %s}' % label.encode()
    index = latent_index(tmp_path, {"json": about, "latent.safetensors": good}, classes=3)
    with pytest.raises(ValueError, match="sample clip-0 of "):
        ShardReader(tmp_path, index, "train").read(0)


def write_avi(path: Path, codec: str, pixels: str, size: int = 64) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.width = stream.height = size
        stream.pix_fmt = pixels
        for _ in range(12):
            frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_video_that_claims_a_hundred_thousand_pixels_a_side_is_refused(tmp_path):
    small, huge = struct.pack("<II", 64, 64), struct.pack("<II", 100_000, 100_000)
    content = write_avi(tmp_path / "a.avi", "ffv1", "yuv420p")
    assert probe(tmp_path / "a.avi").width == 64
    assert content.count(small) >= 2  # in the headers of the file and of the stream
    path = tmp_path / "huge.avi"
    path.write_bytes(content.replace(small, huge))
    before = peak()
    for call in (probe, decode_frames):
        with pytest.raises(ValueError, match=r"huge.avi: (100000x100000 pixels|is not readable|has no frames)"):
            call(path)
    # The pictures themselves may claim it, where the file does not: here the height and width in a JPEG.
    content = write_avi(tmp_path / "a.avi", "mjpeg", "yuvj420p")
    start = content.index(b"\xff\xc0") + 5
    path.write_bytes(content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :])
    with pytest.raises(ValueError, match=r"huge.avi: "):
        decode_frames(path)
    assert peak() - before < 200


def test_a_video_that_never_ends_is_refused(tmp_path):
    path = tmp_path / "long.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts in (0, 83, 3 * 10**9):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    before = peak()
    with pytest.raises(ValueError, match=r"long.mkv: has 36\d{6} frames at 12 fps, at most"):
        decode_frames(path, fps=12)
    assert peak() - before < 100


def claiming(content: bytes, frames: int) -> bytes:
    """An mp4 of `encode_mp4` whose tables speak of so many frames, of a byte each."""
    changed = bytearray(content)
    for box, offset, values in ((b"stsz", 8, (1, frames)), (b"stts", 12, (frames,)), (b"stsc", 16, (frames,))):
        struct.pack_into(f">{len(values)}I", changed, content.index(box) + offset, *values)
    return bytes(changed)


@pytest.mark.parametrize(("kind", "message"), [
    ("frames", "has 200000 frames, at most 4 are read"),
    ("a frame more", "has more than the 4 frames that are read"),
    ("a frame less", r"video is \(3, 32, 32\), the index says \(4, 32, 32\)"),
    ("size", r"video is \(4, 256, 128\), the index says \(4, 32, 32\)"),
])  # fmt: skip
def test_a_clip_that_is_not_what_the_index_says_is_not_decoded(tmp_path, monkeypatch, kind, message):
    frames, size = {"a frame more": 5, "a frame less": 3}.get(kind, 4), (256, 128) if kind == "size" else (32, 32)
    content = encode_mp4(torch.zeros(frames, 3, *size, dtype=torch.uint8), 12)
    if kind == "frames":
        content = claiming(content, 200_000)
    about = json.dumps({"crc32": zlib.crc32(content)}).encode()
    index = latent_index(tmp_path, {"json": about, "mp4": content}, store="video", video_height=32, video_width=32)
    monkeypatch.setattr(decode.VideoReader, "frames", None)
    for part in (None, (1, 2)):  # whatever a rank reads of it
        with pytest.raises(ValueError, match=message):
            ShardReader(tmp_path, index, "train", part).read(0)


def test_counting_frames_is_bounded():
    packet = SimpleNamespace(pts=0, dts=0, size=1, is_discard=False, is_keyframe=True)
    reader = decode.VideoReader("endless", max_frames=1000)
    reader._container = SimpleNamespace(demux=lambda stream: itertools.repeat(packet))
    reader._stream = SimpleNamespace(frames=0, codec_context=SimpleNamespace(width=32, height=32))
    with pytest.raises(ValueError, match="endless: has more than the 1000 frames"):
        reader._packet_timeline()


def test_special_files_are_skipped(tmp_path):
    videos = tmp_path / "videos"
    write_videos(videos, 0, 1, 40, 32, 32)
    os.mkfifo(videos / "endless.mp4")  # whoever opened it would wait for ever
    (videos / "zero.mp4").symlink_to("/dev/zero")
    (videos / "gone.mp4").symlink_to(tmp_path / "nowhere")
    config = ConvertConfig((str(videos),), str(tmp_path / "out"), 8, 16, 16, held_out=0.0, max_bad=0.9)
    report = convert(config, lambda video: video.float(), 1)
    assert [(name, why) for name, why in report.skipped] == [
        (f"videos/{name}.mp4", "is not a file") for name in ("endless", "gone", "zero")
    ]
    assert report.clips["train"] == 5
