"""Sources: folders, lists and manifests; what is known about a video goes into its samples; copies count once."""

import errno
import hashlib
import json
import math
import os
import tarfile
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
        (
            "jsonl",
            '{"path": "a", "caption": "\\ud83d\\ude00"}\n{"path": "b", "caption": "cut \\ud83d"}\n',
            r"line 2: caption holds U\+D83D at character 5, half of a surrogate pair",
        ),
        ("jsonl", '{"path": "a.mp4", "label": "\\ude00"}\n', r"line 1: label holds U\+DE00"),
        ("jsonl", '{"path": "a.mp4", "group": "\\ude00"}\n', r"line 1: group holds U\+DE00"),
        ("jsonl", '{"path": "\\ud83d.mp4"}\n', r"line 1.* is not a valid path"),
        ("jsonl", '{"path": "a.mp4", "caption": ["a", "b"]}\n', r"line 1: caption is \['a', 'b'\], expected text"),
        ("jsonl", f'{{"path": "a.mp4"}}\n{"[" * 100_000}\n', "line 2 is not readable as jsonl"),
        ("jsonl", f'{{"path": "a.mp4", "label": {"9" * 5000}}}\n', "line 1 is not readable as jsonl"),
        (
            "csv",
            "path,end,group\na.mp4,3,x\na.mp4,5,y\n",
            r"a.mp4 is in several groups, \['x', 'y'\]: parts of one file must be in one",
        ),
        ("txt", "http://127.0.0.1/a.mp4\n", "is an address or a command"),
        ("txt", "pipe:cat /etc/passwd\n", "is an address or a command"),
        ("txt", b"\xff\xfe", "is not UTF-8"),
        ("parquet", b"PAR", "not readable as Parquet|needs pyarrow"),
        (
            "parquet",
            b"PAR1" + b"\xff" * 20 + b"\x0c\0\0\0PAR1",
            "list.parquet is not readable as Parquet|needs pyarrow",
        ),
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
            _, _, text, label, _ = samples.read(number)
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


def names_of(listing) -> list[str]:
    return [source.name for source in listing.sources]


def test_sources_of_one_name_stay_apart(tmp_path):
    """By the folders before it, no more than needed; the split does not change by that."""
    for folder in ("a/videos", "b/videos", "b/b/videos", "c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.mp4").write_bytes(b"")
    (tmp_path / "c" / "y.mp4").write_bytes(b"")
    alone = find_sources((str(tmp_path / "a" / "videos"),)).sources
    listing = find_sources(tuple(str(tmp_path / name) for name in ("a/videos", "b/videos", "b/b/videos", "c")))
    assert names_of(listing) == [
        "a/videos/x.mp4",
        f"{tmp_path.name}/b/videos/x.mp4",
        "b/b/videos/x.mp4",
        "c/x.mp4",
        "c/y.mp4",
    ]
    assert [source.draw for source in alone] == [listing.sources[0].draw] == [listing.sources[1].draw]
    for name in "ab":
        with tarfile.open(tmp_path / name / "x.tar", "w") as archive:
            archive.add(tmp_path / "c", "c")
        (tmp_path / name / "list.jsonl").write_text(
            "".join(
                json.dumps({"path": "videos/x.mp4", "start": start, "end": 40000}) + "\n"
                for start in (36000.25, 36000.3)
            )
        )
    listing = find_sources(tuple(str(tmp_path / name / "x.tar") for name in "ab"))
    assert sorted(names_of(listing)) == [f"{name}/x.tar/c/{video}.mp4" for name in "ab" for video in "xy"]
    listing = find_sources(tuple(str(tmp_path / name / "list.jsonl") for name in "ab"))
    assert names_of(listing) == [
        f"{name}/videos/x.mp4[{start}-40000.0]" for name in "ab" for start in (36000.25, 36000.3)
    ]


PIECES = {
    "video1_0": "video1", "video1_12": "video1", "v_Bowling_g01_c02": "v_Bowling_g01",
    "dQw4w9WgXcQ_00001": "dQw4w9WgXcQ",
    "holiday-Scene-001": "holiday", "a film.part2": "a film", "a_1.mp4_part_03": "a_1.mp4",
    "20260105_174500": "", "2026-01-05": "", "synthetic-000": "", "IMG_0012": "", "video1": "", "scene-001": "",
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_which_names_are_of_pieces(name):
    assert module._recording(f"f1_2/{name}") == (f"f1_2/{PIECES[name]}" if PIECES[name] else "")


def test_groups_have_two_files_at_least_and_come_from_rows_or_names(tmp_path):
    rows = [
        {"path": "u.mp4", "group": "g"}, {"path": "v.mp4", "group": "g"}, {"path": "w.mp4", "group": "alone"},
        {"path": "a/x1_1.mp4"}, {"path": "a/x1_2.webm", "end": 2}, {"path": "b/x1_3.mp4"}, {"path": "x1.mp4"},
        {"path": "a/x1_2.webm", "start": 1}, {"path": "u.mp4", "start": 9},
    ]  # fmt: skip
    sources = find_sources((str(write_manifest(tmp_path, "jsonl", rows)),)).sources
    assert [source.group for source in sources] == ["g", "g", "", "a/x1", "a/x1", "", "", "a/x1", "g"]
    draws = {group: {source.draw for source in sources if source.group == group} for group in ("g", "a/x1")}
    assert [len(own) for own in draws.values()] == [1, 1]
    assert draws["g"] != draws["a/x1"]
    with tarfile.open(tmp_path / "1.tar", "w") as one, tarfile.open(tmp_path / "2.tar", "w") as two:
        for archive, name in ((one, "x1_0.mp4"), (two, "x1_1.mp4"), (two, "y.mp4")):
            archive.addfile(tarfile.TarInfo(name))
    sources = find_sources((str(tmp_path / "1.tar"), str(tmp_path / "2.tar"))).sources
    assert [source.group for source in sources] == ["x1", "x1", ""]  # a recording may go on in the next tar


def test_without_groups_the_draw_is_the_hash_of_the_name(tmp_path):
    """Which decides about short videos: the split of existing conversions."""
    (tmp_path / "list.csv").write_text("path,start,end\na/x_1.mp4,,\nb.mp4,2,3\nb.mp4,5,6\n")
    draws = [source.draw for source in find_sources((str(tmp_path / "list.csv"),)).sources]
    assert draws == [
        int(hashlib.sha256(name).hexdigest()[:16], 16) / 2**64 for name in (b"a/x_1.mp4", b"b.mp4", b"b.mp4")
    ]


def test_pieces_of_one_recording_are_of_one_split(tmp_path):
    """Also where they are long enough to be divided; with few recordings, one at least is held out."""
    for recording in range(3):
        write_videos(tmp_path / f"{recording}", recording, 2, 40, 32, 32)
        for piece, path in enumerate(sorted((tmp_path / f"{recording}").iterdir())):
            (tmp_path / "in").mkdir(exist_ok=True)
            path.rename(tmp_path / "in" / f"video{recording}_{piece}.mp4")
    report = convert(settings(tmp_path, tmp_path / "in", held_out=0.25), lambda video: video.float(), 1)
    index = read_index(tmp_path / "out")
    names = {
        split: {
            json.loads(read_part(tmp_path / "out" / shard.name, sample, "json"))["source"]
            for shard in shards
            for sample in scan(tmp_path / "out" / shard.name)
        }
        for split, shards in index.splits.items()
    }
    held_out = {name[:9] for name in names["held_out"]}
    assert 0 < len(held_out) < 3
    assert not held_out & {name[:9] for name in names["train"]}
    assert len(names["train"]) + len(names["held_out"]) == 6
    assert sum(report.clips.values()) == 30  # 5 of every video, none lost at a border
    assert (
        "6 videos are pieces of 3 recordings, by the column group or their names (such as in/video0_0.mp4); "
        f"held out whole: {len(held_out)} recordings, {2 * len(held_out)} videos" in report.text
    )


def test_pieces_of_a_single_recording_are_divided_with_a_warning(tmp_path, caplog):
    (tmp_path / "list.txt").write_text("video1_0.mp4\nvideo1_1.mp4\n")
    assert [source.group for source in find_sources((str(tmp_path / "list.txt"),)).sources] == ["", ""]
    assert "all 2 videos are pieces of one recording, video1: both splits are of it" in caplog.text


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
