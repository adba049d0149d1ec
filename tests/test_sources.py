"""Sources: folders, lists and manifests; what is known about a video goes into its samples; copies count once."""

import errno
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from msc.datasets.loading.shard_reader import ShardReader
from msc.datasets.prepare import shard_writer
from msc.datasets.prepare import sources as module
from msc.datasets.prepare.clip_ranges import split_ranges
from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.progress import WORK
from msc.datasets.prepare.sources import Source, find_copies, find_sources
from msc.datasets.shards import tar
from msc.datasets.shards.index import read_index, read_part, scan
from msc.datasets.shards.tar import size_of
from msc.datasets.synthetic import write_videos

ROWS = [
    {"path": "synthetic-000.mp4", "caption": "a disc, and a bar", "label": "dog", "licence": "CC0"},
    {"path": "synthetic-001.mp4", "caption": "zwölf", "label": "cat", "start": 1, "end": 3.5},
    {"path": "synthetic-001.mp4", "label": "dog", "start": 3, "end": 5},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two videos of 60 frames at 12 fps."""
    write_videos(tmp_path / "videos", 0, 2, 60, 32, 32)
    return tmp_path / "videos"


def write_manifest(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        import csv

        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, sorted({name for row in rows for name in row}))
            table.writeheader()
            table.writerows(rows)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=None), path)
    return path


def settings(tmp_path: Path, *sources: Path, **changes) -> ConvertConfig:
    defaults = {"frames": 8, "height": 16, "width": 16, "fps": 12, "held_out": 0.25}
    return ConvertConfig(tuple(map(str, sources)), str(tmp_path / "out"), **{**defaults, **changes})


def embed(caption: str) -> torch.Tensor:
    """One token a letter."""
    return torch.tensor([[ord(letter), 1.0, 0.5] for letter in caption or " "], dtype=torch.float16)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_manifests_say_the_same_in_every_form(folder, kind):
    rows = ROWS if kind != "parquet" else [{**dict.fromkeys(("licence", "start", "end", "caption")), **r} for r in ROWS]
    listing = find_sources((str(write_manifest(folder, kind, rows)),))
    assert (listing.classes, listing.names) == (2, ("cat", "dog"))
    first, second, third = listing.sources
    assert (first.path, first.caption, first.label, first.licence) == (
        (folder / "synthetic-000.mp4").resolve(), "a disc, and a bar", 1, "CC0"
    )  # fmt: skip
    assert (first.start, first.end, first.span) == (0, math.inf, (0, math.inf))
    assert (second.name, second.caption, second.label) == ("synthetic-001.mp4[1-3.5]", "zwölf", 0)
    assert (third.start, third.end, third.caption) == (3, 5, None)
    assert second.span == third.span == (1, 5)


def test_as_many_classes_as_an_index_may_have(tmp_path, monkeypatch):
    (tmp_path / "list.csv").write_text("path,label\na.mp4,1048575\n")
    assert find_sources((str(tmp_path / "list.csv"),)).classes == 1 << 20
    (tmp_path / "list.csv").write_text("path,label\na.mp4,x\nb.mp4,y\n")
    monkeypatch.setattr(module, "MAX_CLASSES", 1)
    with pytest.raises(ValueError, match="sources have 2 different labels, at most 1 are read"):
        find_sources((str(tmp_path / "list.csv"),))


def test_a_list_of_files_is_a_column_of_paths(folder):
    (folder / "list.txt").write_text(f"synthetic-001.mp4\n\n{folder}/synthetic-000.mp4\nsynthetic-001.mp4\n")
    found = find_sources((str(folder / "list.txt"),))
    assert [source.path.name for source in found.sources] == ["synthetic-001.mp4", "synthetic-000.mp4"]
    assert found.classes == 0


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", "path,colour\na.mp4,red\n", r"list.csv line 2: \['colour'\] unknown, the columns are path, caption"),
        ("csv", "path,label\na.mp4,1,2\n", "unknown"),
        ("csv", "path\n", "lists no videos"),
        ("csv", "caption\nx\n", "line 2: has no path"),
        ("csv", "path,start\na.mp4,soon\n", r"line 2: start and end are in seconds, not \['soon'\]"),
        ("csv", "path,start,end\na.mp4,5,2\n", "start 5 and end 2: expected 0 <= start < end"),
        ("csv", "path,start\na.mp4,nan\n", "start nan"),
        ("csv", "path,label\na.mp4,1\nb.mp4,\n", "1 of 2 sources have no label, among them b.mp4"),
        ("csv", "path,label\na.mp4,0\nb.mp4,20240101123456\n", "b.mp4: label 20240101123456 is not a class"),
        ("jsonl", '{"path": "a.mp4", "label": 1048576}\n', "label 1048576 is not a class number below 1048576"),
        ("csv", f"path,label\na.mp4,{'9' * 5000}\n", "a.mp4: label 9{40} is not a class number"),
        ("jsonl", '{"path": 3}\n', "line 1: has no path"),
        ("jsonl", "[1]\n", "line 1: .* unknown"),
        ("jsonl", "{\n", "is not readable as jsonl"),
        ("txt", "http://127.0.0.1/a.mp4\n", "is an address or a command"),
        ("txt", "pipe:cat /etc/passwd\n", "is an address or a command"),
        ("txt", b"\xff\xfe", "is not UTF-8"),
        ("parquet", b"PAR", "not readable as Parquet|needs pyarrow"),
    ],
)
def test_rows_that_make_no_sense_are_refused(tmp_path, kind, content, message):
    path = tmp_path / f"list.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        find_sources((str(path),))


def test_what_a_manifest_says_is_in_the_samples(tmp_path, folder):
    manifest = write_manifest(folder, "jsonl", ROWS)
    convert(settings(tmp_path, manifest, text="encoder"), lambda video: video.float(), 1, embed)
    index = read_index(tmp_path / "out")
    assert (index.classes, index.has_text, index.settings["labels"]) == (2, 3, ["cat", "dog"])
    names = ["synthetic-000.mp4", "synthetic-001.mp4[1-3.5]", "synthetic-001.mp4[3-5]"]
    starts = {row["path"] + str(row.get("start", "")): [] for row in ROWS}
    for name in ("train", "held_out"):
        samples = ShardReader(tmp_path / "out", index, name)
        about = [
            json.loads(read_part(tmp_path / "out" / shard.name, sample, "json"))
            for shard in index.splits[name]
            for sample in scan(tmp_path / "out" / shard.name)
        ]
        for number, fields in enumerate(about):
            _, _, text, label = samples.read(number)
            row = ROWS[names.index(fields["source"])]
            assert (fields["caption"], fields["licence"]) == (row.get("caption"), row.get("licence"))
            assert label == fields["label"] == ["cat", "dog"].index(row["label"])
            assert {"crc32", "text_crc32"} <= set(fields)
            assert torch.equal(text, embed(row["caption"]).float() if "caption" in row else torch.zeros(1, 3))
            starts[row["path"] + str(row.get("start", ""))].append((name, fields["start"]))
    # 1 to 5 s of the second video are in use: ticks 12 to 60, the last quarter from 48 on held out, for both rows.
    assert starts["synthetic-001.mp41"] == [("train", 12), ("train", 20), ("train", 28)]
    assert starts["synthetic-001.mp43"] == [("train", 36), ("held_out", 48)]


def test_parts_of_a_video_share_one_border():
    shown = list(range(100))
    for part in ((10, 90), (20, 60), (50, 90), (70, 90), (10, 30)):
        found = {name: range(*run) for name, run in split_ranges(shown, 0.25, 4, 0.0, part, (10, 90)).items()}
        assert list(found["train"]) == list(range(part[0], min(part[1], 70)))
        assert list(found["held_out"]) == list(range(max(part[0], 70), part[1]))
    assert split_ranges(shown, 0.25, 4, 0.0, (50, 90), (10, 90)) == {"train": (50, 70), "held_out": (70, 90)}


def test_captions_are_asked_for_where_there_is_an_encoder(tmp_path, folder):
    with pytest.raises(ValueError, match="no source has a caption"):
        convert(settings(tmp_path, folder, text="encoder"), lambda video: video.float(), 1, embed)


def test_only_files_that_agree_at_both_ends_are_read_whole(tmp_path, monkeypatch):
    contents = {"a": b"1" * 400_000, "b": b"1" * 399_999 + b"2", "c": b"2" + b"1" * 399_999, "d": b"1" * 400_000}
    contents["e"] = b"1" * 200_000 + b"2" + b"1" * 199_999  # differs in its middle alone
    for name, content in {**contents, "f": b"1", "g": b"1"}.items():
        (tmp_path / name).write_bytes(content)
    hashed, whole = [], module._hash_of_all
    monkeypatch.setattr(module, "_hash_of_all", lambda path: hashed.append(path.name) or whole(path))
    sources = [Source(name, tmp_path / name, size=size_of(tmp_path / name)) for name in "abcdefgh"]
    assert find_copies(sources) == {3: "a", 6: "f"}
    assert sorted(hashed) == ["a", "d", "e", "f", "g"]


@pytest.mark.parametrize("trait", ["size_of", "_hash_of_ends", "_hash_of_all"])
def test_what_again_and_again_cannot_be_read_is_no_copy(tmp_path, monkeypatch, trait):
    """At a failing disk or server nobody decides what is one."""
    for name in "abc":
        (tmp_path / name).write_bytes(b"1" * 1000)
    found, original = [Source(name, tmp_path / name, size=1000) for name in "abc"], getattr(module, trait)

    def failing(path):
        if path.name == "b" and codes:
            raise OSError(code := codes.pop(), os.strerror(code))
        return original(path)

    monkeypatch.setattr(module, trait, failing)
    monkeypatch.setattr(tar, "READ_PAUSES", (0, 0))
    codes = [errno.EIO] * 2
    assert find_copies(found) == {1: "a", 2: "a"}
    codes += [errno.EIO] * 3
    assert find_copies(found) == {2: "a"}
    codes += [errno.ESTALE]
    with pytest.raises(OSError, match="Stale file handle: .*b"):
        find_copies(found)


def test_of_many_parts_one_looks_for_copies_and_the_others_wait(tmp_path, monkeypatch):
    (tmp_path / WORK).mkdir()
    writers, calls = [], []
    for own in ("one", "two", "three"):
        (tmp_path / own).mkdir()
        writers.append(shard_writer.ShardWriter(None, None, None, None, [], tmp_path, tmp_path / own))
    monkeypatch.setattr(shard_writer, "find_copies", lambda _: calls.append(1) or time.sleep(0.3) or {1: "a"})
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda writer: writer._copies(), writers)) == [{1: "a"}] * 3
    assert calls == [1]


def test_copies_of_a_video_count_once(tmp_path, folder):
    (folder / "again.mp4").write_bytes((folder / "synthetic-000.mp4").read_bytes())
    sources = find_sources((str(folder),)).sources
    assert [source.path.name for source in sources] == ["again.mp4", "synthetic-000.mp4", "synthetic-001.mp4"]
    assert find_copies(sources) == {1: "videos/again.mp4"}
    report = convert(settings(tmp_path, folder), lambda video: video.float(), 1)
    assert report.skipped == (("videos/synthetic-000.mp4", "has the content of videos/again.mp4"),)
    assert report.clips == {"train": 10, "held_out": 2}
