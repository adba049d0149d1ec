"""Tables of contents: equal to a scan of the headers, and held to the same rules."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from msc.datasets.loading import shard_reader as module
from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.summary import damaged_shards
from msc.datasets.shards.index import read_index, scan
from msc.datasets.shards.table_of_contents import read_toc, toc_path
from msc.datasets.synthetic import write_videos


@pytest.fixture
def folder(tmp_path) -> Path:
    """10 training clips in two shards, and held-out ones."""
    write_videos(tmp_path / "videos", 0, 2, 60, 32, 32)
    config = ConvertConfig(
        (str(tmp_path / "videos"),), str(tmp_path / "out"), frames=8, height=16, width=16, held_out=0.2,
        clips_per_shard=5,
    )  # fmt: skip
    convert(config, lambda video: video.float(), 1)
    return tmp_path / "out"


def test_a_table_of_contents_equals_a_scan(folder, monkeypatch):
    index = read_index(folder)
    for shard in (shard for shards in index.splits.values() for shard in shards):
        assert read_toc(folder / shard.name, shard) == scan(folder / shard.name)
    assert damaged_shards(folder, index) == []
    scanned = []
    monkeypatch.setattr(module, "scan", lambda path: scanned.append(path) or scan(path))
    with_tables = [ShardReader(folder, index, "train").read(i) for i in range(index.samples("train"))]
    assert not scanned
    for path in folder.glob("*.toc"):
        path.unlink()  # as of an earlier version
    without = [ShardReader(folder, index, "train").read(i) for i in range(index.samples("train"))]
    assert len(scanned) == len(without)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(with_tables, without, strict=True))


def change(fields: dict, key: str | None = None, part: str = "mp4", place=None) -> None:
    sample = fields["samples"][0]
    if key is not None:
        sample[0] = key
    if place is not None:
        sample[1][part] = place


@pytest.mark.parametrize(
    "how",
    [
        lambda fields: fields.update(sha256="0" * 64),
        lambda fields: fields.pop("sha256"),
        lambda fields: fields["samples"].pop(),
        lambda fields: fields["samples"].__setitem__(1, fields["samples"][0]),
        lambda fields: fields.update(samples=3),
        lambda fields: change(fields, key="../../x"),
        lambda fields: change(fields, key="/etc/x"),
        lambda fields: change(fields, key="a.b"),
        lambda fields: change(fields, key=7),
        lambda fields: change(fields, part="pkl", place=[512, 1]),
        lambda fields: change(fields, part="json", place=[512, 1 << 21]),
        lambda fields: change(fields, place=[512, 1 << 20]),
        lambda fields: change(fields, place=[-1, 5]),
        lambda fields: change(fields, place=[512, -5]),
        lambda fields: change(fields, place=[512.0, 5]),
        lambda fields: change(fields, place=[512, True]),
        lambda fields: change(fields, place=["512", 5]),
        lambda fields: change(fields, place=[512]),
    ],
)
def test_an_invalid_table_is_ignored(folder, how):
    index = read_index(folder)
    shard = index.splits["train"][0]
    path = toc_path(folder / shard.name)
    fields = json.loads(path.read_text())
    how(fields)
    path.write_text(json.dumps(fields))
    assert read_toc(folder / shard.name, shard) is None
    assert ShardReader(folder, index, "train").read(0)[1].shape == (8, 3, 16, 16)


LONG = b"[%s]" % b",".join([b"[]"] * 10**7)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, LONG], ids=lambda x: x[:5].hex())
def test_an_unparsable_table_is_ignored(folder, content):
    shard = read_index(folder).splits["train"][0]
    toc_path(folder / shard.name).write_bytes(content)
    begin = time.monotonic()
    assert read_toc(folder / shard.name, shard) is None
    assert time.monotonic() - begin < 2


def test_a_truncated_shard_is_detected_despite_its_table(folder):
    index = read_index(folder)
    os.truncate(folder / index.splits["train"][0].name, 5000)
    with pytest.raises(ValueError, match="is truncated"):
        ShardReader(folder, index, "train").read(0)


def test_inspection_detects_a_table_with_wrong_offsets(folder):
    index = read_index(folder)
    shard = index.splits["train"][0]
    path = toc_path(folder / shard.name)
    fields = json.loads(path.read_text())
    first, second = (sample[1] for sample in fields["samples"][:2])
    first["mp4"], second["mp4"] = second["mp4"], first["mp4"]
    path.write_text(json.dumps(fields))
    (line,) = damaged_shards(folder, index)
    assert line.startswith(f"{path.name}: does not match {shard.name}")
    with pytest.raises(ValueError, match="checksum of the video differs"):
        ShardReader(folder, index, "train").read(0)
