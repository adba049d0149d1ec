"""Malicious inputs: refused by name, before anything is run, opened or allocated. See also test_shards.py (members of a
tar), test_dataloader.py (unreadable clips), test_video.py (playlists) and test_autoencoder.py.
"""

import itertools
import json
import os
import resource
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save

from msc.datasets import video as decode
from msc.datasets.errors import DeterministicFailure
from msc.datasets.loading.dataloader import loader
from msc.datasets.loading.mixture import single_set
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.sources import find_sources
from msc.datasets.prepare.summary import damaged_shards
from msc.datasets.shards import index as index_module
from msc.datasets.shards.index import Index, Shape, ShardInfo, check_shards, read_index, scan, write_index, write_shard
from msc.datasets.statistics import Statistics
from msc.datasets.synthetic import write_videos
from msc.datasets.video import decode_frames, encode_mp4, probe
from msc.pretrain import validation
from msc.pretrain.config import load


def peak() -> int:
    """Most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextmanager
def bounded(seconds: int, megabytes: int) -> Iterator[None]:
    """The block ends within this time, or the process is ended by a signal, and takes no more memory."""
    before = peak()
    signal.alarm(2 * seconds)
    begin = time.monotonic()
    try:
        yield
    finally:
        signal.alarm(0)
    assert time.monotonic() - begin < seconds
    assert peak() - before < megabytes


def latent_index(folder: Path, *parts: dict[str, bytes], **changes) -> Index:
    """Samples with these parts, in an index that says they hold latents [4, 3, 2, 2]."""
    shard = write_shard(folder / "train-000000.tar", [(f"clip-{i}", part) for i, part in enumerate(parts)])
    fields = {
        "store": "latent", "autoencoder": "pixels", "temporal_factor": 1, "channels": 3, "frames": 4, "height": 2,
        "width": 2, "video_frames": 4, "video_height": 2, "video_width": 2, "fps": 12.0,
        "statistics": Statistics.default(3), "settings": {}, "splits": {"train": [shard]},
    }  # fmt: skip
    return Index(**{**fields, **changes})


# --- what an index claims ----------------------------------------------------------------------------------

HUGE = 10**9
LIES = [
    ({"frames": HUGE}, "frames is 1000000000, at most 65536"),
    ({"frames": HUGE, "video_frames": HUGE}, "frames is 1000000000, at most 65536"),
    ({"frames": 60_000, "video_frames": 60_000}, r"samples is 12, of at least 1441024 bytes each .* bytes is \d+"),
    ({"frames": 3}, "video_frames is 4, frames is 3, which is not one for each 1 of video"),
    ({"temporal_factor": HUGE}, "temporal_factor is 1000000000, at most 1024"),
    ({"temporal_factor": 4}, "video_frames is 4, frames is 4, which is not one for each 4"),
    ({"height": HUGE, "video_height": HUGE}, "1000000000 x 2, at most 16384 pixels a side"),
    ({"height": HUGE}, "height x width is 1000000000 x 2, no reduction of video_height x video_width, 2 x 2"),
    ({"video_height": 16}, "height x width is 2 x 2, no reduction of video_height x video_width, 16 x 2"),
    ({"video_height": 16_000, "video_width": 16_000}, "16000 x 16000, at most 67108864 pixels"),
    ({"height": 2**13, "width": 2**13, "video_height": 2**13, "video_width": 2**13}, r"samples is 12, of at least "),
    ({"frames": 200, "video_frames": 200, "video_height": 2**13, "video_width": 2**13},
     "a clip of 200x8192x8192 takes 40265318400 bytes as video, at most 34359738368"),
    ({"channels": HUGE}, "latents of 1000000000 channels take 32000000000 bytes"),
    ({"channels": 0}, "channels is 0, it must be at least 1"),
    ({"has_text": HUGE}, "has_text is 1000000000, a width of text is from 1 to 268435456"),
    ({"has_text": 10**8}, "samples is 12, of at least 100001120 bytes each"),
    ({"skipped": -1}, "skipped is -1"),
    ({"autoencoder": 3}, "autoencoder: Input should be a valid string"),
    ({"store": "x" * 10**7}, "store is 'x{80}', expected one of"),
    ({"settings": {"labels": 3}}, "settings.labels is 3, expected a list of names"),
    ({"settings": {"labels": ["a"]}, "classes": 2}, "settings.labels has 1 names, classes is 2"),
    ({"shard": {"samples": 2**31 - 1}}, r"train-000000.tar: samples is 2147483647, of .* bytes is \d+"),
    ({"shard": {"samples": 10**7}}, r"train-000000.tar: samples is 10000000, of .* bytes is \d+"),
    ({"shard": {"samples": -1}}, "samples is -1"),
    ({"shard": {"bytes": 2**60}}, "train-000000.tar: bytes is 1152921504606846976"),
    ({"shard": {"sha256": "0" * 10**7}}, "train-000000.tar: sha256 is '0{80}', expected 64"),
    ({"shard": {"name": "x" * 10**7}}, "shard name 'x{80}' leaves the folder"),
    ({"shard": {"bucket": 7}}, "train-000000.tar: bucket is 7, there are 1"),
    ({"splits": 2}, "train-000000.tar is listed twice"),
    ({"buckets": 10**5}, "there are 100000 buckets, at most 1024"),
]  # fmt: skip


def latent_shard(folder: Path) -> Index:
    """12 samples, with their index."""
    part = {"json": b"{}", "latent.safetensors": save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})}
    index = latent_index(folder, *[part] * 12)
    write_index(folder, index)
    return index


@pytest.mark.parametrize(("change", "message"), LIES)
def test_what_an_index_claims_is_compared_before_any_work(tmp_path, change, message):
    latent_shard(tmp_path)
    assert read_index(tmp_path).samples("train") == 12
    path = tmp_path / "index.json"
    fields = json.loads(path.read_text())
    if "shard" in change:
        fields["splits"]["train"][0] |= change["shard"]
    elif "splits" in change:
        fields["splits"]["held_out"] = fields["splits"]["train"]
    elif "buckets" in change:
        fields["buckets"] = [{name: fields[name] for name in Shape.__dataclass_fields__}] * change["buckets"]
    else:
        fields |= change
    path.write_text(json.dumps(fields))
    with bounded(10, 300), pytest.raises(ValueError, match=rf"{path} is damaged \(.*{message}") as error:
        read_index(tmp_path)
    assert "copy it or run `msc convert` again" in str(error.value) and len(str(error.value)) < 1000


def test_an_index_has_the_limits_of_video():
    assert (index_module.MAX_PIXELS, index_module.MAX_BYTES) == (decode.MAX_PIXELS, decode.MAX_BYTES)


def test_an_index_of_millions_of_values_is_not_parsed(tmp_path):
    latent_shard(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(
        path.read_text().replace('"settings": {}', f'"settings": {{"x": [{",".join(["[]"] * 20_000_000)}]}}')
    )
    assert path.stat().st_size > 60_000_000
    with (
        bounded(5, 300),
        pytest.raises(ValueError, match=r"index.json holds 40000\d+ values, at most 4194304 are read: "),
    ):
        read_index(tmp_path)


@pytest.mark.parametrize(("frames", "factor", "video_frames"), [(8, 4, 32), (20, 4, 77), (1, 8, 1), (1, 1, 1)])
@pytest.mark.parametrize(("sides", "video_sides"), [((8, 16), (64, 128)), ((12, 20), (90, 160)), ((11, 20), (90, 160)),
                                                    ((1, 1), (8, 8)), ((64, 64), (64, 64))])  # fmt: skip
def test_sizes_of_real_autoencoders_are_read(frames, factor, video_frames, sides, video_sides):
    assert Shape(frames, *sides, video_frames, *video_sides).problem(16, factor) == ""


@pytest.mark.parametrize("on_disk", ["other samples", "another size", "truncated"])
def test_a_false_number_of_samples_ends_the_loader_at_once(tmp_path, caplog, on_disk):
    """Where the sizes of shards were not compared before: in the loader alone."""
    index = latent_shard(tmp_path)
    changes = {"samples": 13} if on_disk == "other samples" else {"samples": 2**31 - 1, "bytes": 2**49}
    shard = ShardInfo(**{**vars(index.splits["train"][0]), **changes})
    write_index(tmp_path, Index(**{**vars(index), "splits": {"train": [shard]}}))
    if on_disk == "truncated":
        os.truncate(tmp_path / shard.name, 5000)
    shards = single_set(tmp_path, read_index(tmp_path))
    batches = loader(shards, "train", seed=0, clock=0, clips=1, workers=0)
    reason = "262144 clips in a row of .*is truncated" if on_disk == "truncated" else (
        rf"train-000000.tar has 12 samples, its index says {shard.samples}: copy both again")  # fmt: skip
    with bounded(60, 500), pytest.raises(DeterministicFailure, match=reason):
        next(batches)
    assert caplog.text.count("\n") <= 1
    if on_disk != "other samples":
        config = load(None, None, [f"data.shards={tmp_path}"])
        with bounded(5, 100), pytest.raises(ValueError, match=r"tar has \d+ bytes, its index says 562949953421312"):
            validation.describe(config)


@pytest.mark.parametrize("name", ["train-000000.toc", "train-000000.tar"])
def test_a_named_pipe_is_not_opened(tmp_path, name):
    index = latent_shard(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with bounded(10, 100):
        if name.endswith("toc"):
            assert ShardReader(tmp_path, index, "train").read(11)[0] == "clip-11"
            assert damaged_shards(tmp_path, index) == []
        else:
            with pytest.raises(ValueError, match="train-000000.tar is not a file"):
                ShardReader(tmp_path, index, "train").read(0)
            with pytest.raises(FileNotFoundError, match="train-000000.tar is not a file"):
                check_shards(tmp_path, index)


@pytest.mark.parametrize("store", ["video", "latent"])
def test_a_sparse_member_of_two_gigabytes_is_not_read(tmp_path, store):
    good = save({"latent": torch.zeros(4, 3, 2, 2, dtype=torch.float16)})
    extension = {"video": "mp4", "latent": "latent.safetensors"}[store]
    index = latent_index(tmp_path, {"json": b'{"crc32": 0}', extension: good}, store=store)
    path = tmp_path / "train-000000.tar"
    media = tarfile.TarInfo(f"clip-0.{extension}")
    media.size = 2 << 30
    offset = scan(path)[0].parts[extension][0]
    with open(path, "r+b") as file:
        file.seek(offset - 512)
        file.write(media.tobuf(tarfile.USTAR_FORMAT) + good)
        file.truncate(offset + media.size + 1024)  # a hole: it takes no space
    assert scan(path)[0].parts[extension] == (offset, 2 << 30)
    with bounded(5, 100), pytest.raises(ValueError, match=r"(video has|latents have) 2147483648 bytes, more than"):
        ShardReader(tmp_path, index, "train").read(0)


# --- members -----------------------------------------------------------------------------------------------


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
