"""Shards and their index: round trips; malicious or damaged ones are refused by name."""

import dataclasses
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from msc.datasets.shards import index as shards
from msc.datasets.shards.index import (
    Index,
    check_shards,
    corrupted_shards,
    read_index,
    read_part,
    scan,
    write_index,
    write_shard,
)
from msc.datasets.statistics import Statistics

SAMPLES = [(f"train-{i:03d}", {"json": b"{}" * (i + 1), "mp4": bytes([i]) * (700 * i + 1)}) for i in range(5)]


def make_folder(folder: Path) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    index = Index(
        store="video",
        autoencoder="haar",
        temporal_factor=2,
        channels=24,
        frames=4,
        height=8,
        width=8,
        video_frames=8,
        video_height=16,
        video_width=16,
        fps=12.0,
        splits={"train": [write_shard(folder / "train-000000.tar", SAMPLES)], "held_out": []},
        statistics=Statistics.default(24),
        settings={"stride": 3},
        skipped=2,
    )
    write_index(folder, index)
    return index


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for info, content in members:
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_samples_are_read_back_by_offset(tmp_path):
    info = write_shard(tmp_path / "a.tar", SAMPLES)
    samples = scan(tmp_path / "a.tar")
    assert (info.name, info.samples, info.bytes) == ("a.tar", 5, (tmp_path / "a.tar").stat().st_size)
    assert [sample.key for sample in samples] == [key for key, _ in SAMPLES]
    for sample, (_, parts) in zip(samples, SAMPLES, strict=True):
        assert {x: read_part(tmp_path / "a.tar", sample, x) for x in sample.parts} == parts
    with pytest.raises(ValueError, match=r"train-000.* has no .text.safetensors"):
        read_part(tmp_path / "a.tar", samples[0], "text.safetensors")


def test_a_shard_is_an_ordinary_webdataset(tmp_path):
    import webdataset

    write_shard(tmp_path / "a.tar", SAMPLES)
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(x["__key__"], {"json": x["json"], "mp4": x["mp4"]}) for x in samples] == SAMPLES


def test_equal_samples_give_equal_bytes(tmp_path):
    first, second = (write_shard(tmp_path / name, SAMPLES) for name in ("a.tar", "b.tar"))
    assert first.sha256 == second.sha256


def test_an_interrupted_write_leaves_no_shard(tmp_path):
    def broken():
        yield SAMPLES[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_shard(tmp_path / "a.tar", broken())
    assert not (tmp_path / "a.tar").exists()


@pytest.mark.parametrize("key", ["../a", "/a", "a/../../b", ".hidden"])
def test_malicious_keys_are_not_written(tmp_path, key):
    with pytest.raises(ValueError, match="refused"):
        write_shard(tmp_path / "a.tar", [(key, {"json": b"{}"})])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd.json", "leaves"),
        ("../../x.json", "leaves"),
        ("a/../x.json", "leaves"),
        ("..\\x.json", "leaves"),
        ("a.pkl", "only .json"),
        ("a.pickle", "only .json"),
        ("a.pth", "only .json"),
        ("a.pyd", "only .json"),
        ("a.latent.pyd", "only .json"),
        ("noextension", "only .json"),
        (".json", "only .json"),
    ],
)
def test_malicious_member_names_are_refused(tmp_path, name, message):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    member = (tarfile.TarInfo(name), pickle.dumps(Bomb()))
    path = make_tar(tmp_path / "a.tar", member, format=tarfile.USTAR_FORMAT)
    with pytest.raises(ValueError, match=message) as error:
        scan(path)
    assert repr(name) in str(error.value)
    assert str(path) in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_plain_files_are_read(tmp_path, kind):
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = kind, "/etc/passwd"
    with pytest.raises(ValueError, match=r"'a.json/?' is .*only plain files"):
        scan(make_tar(tmp_path / "a.tar", (link, b"")))


def test_extended_headers_are_refused_before_they_are_read(tmp_path):
    long = tarfile.TarInfo("x" * 300 + ".json")
    for number, layout in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = make_tar(tmp_path / f"{number}.tar", (long, b"{}"), format=layout)
        with pytest.raises(ValueError, match="only plain files"):
            scan(path)


def test_a_truncated_or_damaged_tar_is_refused(tmp_path):
    whole = tmp_path / "whole.tar"
    write_shard(whole, SAMPLES)
    content = whole.read_bytes()
    last = max(offset + size for sample in scan(whole) for offset, size in sample.parts.values())
    for length in (0, 100, 512, 700, 1024, 4000, last - 1, last):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated"):
            scan(tmp_path / "cut.tar")
    (tmp_path / "bad.tar").write_bytes(b"x" + content[1:])
    with pytest.raises(ValueError, match="damaged at byte 0"):
        scan(tmp_path / "bad.tar")


def test_the_index_round_trips(tmp_path):
    index = make_folder(tmp_path)
    assert read_index(tmp_path) == index
    assert read_index(str(tmp_path)).samples("train") == 5
    assert corrupted_shards(tmp_path, index) == []
    with pytest.raises(ValueError, match="no split 'test'"):
        index.samples("test")


def test_a_missing_folder_or_index_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of shards at .*msc convert"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no index.json: run `msc convert` first"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(format=99), "format 99.*newer msc"),
        (lambda fields: fields.pop("format"), "not an index"),
        (lambda fields: fields.pop("splits"), "damaged"),
        (lambda fields: fields.update(surprise=1), "damaged"),
        (lambda fields: fields.update(statistics={"mean": 3}), "damaged"),
        (lambda fields: fields.update(store="zip"), "'zip'"),
        (lambda fields: fields.update(classes=(1 << 20) + 1), "1048577 classes"),
        (lambda fields: fields["splits"]["train"][0].update(name="../x.tar"), "leaves the folder"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    make_folder(tmp_path)
    fields = json.loads((tmp_path / "index.json").read_text())
    change(fields)
    (tmp_path / "index.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00"])
def test_a_corrupt_index_is_refused(tmp_path, content):
    make_folder(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"not an index of shards .*msc convert"):
        read_index(tmp_path)


def test_an_oversized_index_is_not_read(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", (tmp_path / "index.json").stat().st_size)
    assert read_index(tmp_path).samples("train") == 5
    os.truncate(tmp_path / "index.json", 1 << 40)  # a hole: it takes no space, but memory
    with pytest.raises(ValueError, match=r"index.json has more than the \d+ bytes that an index"):
        read_index(tmp_path)


@pytest.mark.parametrize("limit", ["MAX_INDEX_BYTES", "MAX_INDEX_VALUES"])
def test_an_index_too_large_to_read_is_not_written(tmp_path, monkeypatch, limit):
    index = make_folder(tmp_path)
    written = (tmp_path / "index.json").read_bytes()
    size = len(written) if limit == "MAX_INDEX_BYTES" else shards.count_values(written)
    monkeypatch.setattr(shards, limit, size - 1)
    with pytest.raises(ValueError, match=rf"index.json would have {size} .*, at most .*--clips-per-shard"):
        shards.write_index(tmp_path, dataclasses.replace(index, skipped=1))
    assert (tmp_path / "index.json").read_bytes() == written


def test_missing_short_and_changed_shards_are_named(tmp_path):
    index = make_folder(tmp_path)
    shard = tmp_path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert corrupted_shards(tmp_path, read_index(tmp_path)) == ["train-000000.tar"]
    shard.write_bytes(content[:-512])
    with pytest.raises(ValueError, match=rf"train-000000.tar has \d+ bytes, its index says {len(content)}"):
        check_shards(tmp_path, read_index(tmp_path))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000.tar is missing"):
        check_shards(tmp_path, read_index(tmp_path))
    assert dataclasses.is_dataclass(index)


def test_bounds_cover_every_extension():
    assert set(shards.STORES.values()) | {"json", "text.safetensors", "signals.safetensors"} == set(shards.MEMBER_BYTES)
