"""Videos in tars: read in place like files; malicious or damaged tars are refused by member."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import tarfile
from pathlib import Path

import pytest
import test_unusual_inputs as awkward
from webdataset import TarWriter

from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.sources import find_sources
from msc.datasets.shards import tar as archives
from msc.datasets.shards.index import read_index, read_part, scan
from msc.datasets.shards.tar import Member, open_bytes, tar_members
from msc.datasets.synthetic import write_videos

USED = ("plain.mp4", "alpha.webm", "rgb.mkv", "mjpeg.mov", "old.mpg", "divx.avi", "windows.wmv", "flash.flv", "vfr.mkv",
        "phone.mp4", "text.mp4", "zero.mp4", "cut.mp4", "cut_front.mp4", "damaged.mp4")  # fmt: skip


def packed(path: Path, *named: tuple[str, bytes], **options) -> Path:
    """A tar of these files, in their order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in named:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def settings(tmp_path: Path, out: str, *sources: Path, **changes) -> ConvertConfig:
    defaults = {"frames": 8, "height": 32, "width": 32, "fps": 12, "held_out": 0.25, "max_bad": 0.9}
    return ConvertConfig(tuple(map(str, sources)), str(tmp_path / out), **{**defaults, **changes})


def raw(video):
    return video.float()


def clips(out: Path) -> list[tuple[str, str, int, bytes]]:
    """(split, name of the video, start, mp4) of all clips."""
    found = []
    for split, shards in read_index(out).splits.items():
        for shard in shards:
            for sample in scan(out / shard.name):
                about = json.loads(read_part(out / shard.name, sample, "json"))
                name = about["source"].rpartition("/")[2]
                found.append((split, name, about["start"], read_part(out / shard.name, sample, "mp4")))
    return found


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# --- what is used ------------------------------------------------------------------------------------------


def test_videos_in_a_tar_convert_like_files(tmp_path):
    """Of many kinds, broken ones among them: the same clips, to the byte, and the same reasons."""
    (tmp_path / "in").mkdir()
    for number, (_, name, make, _) in enumerate(awkward.INPUTS):
        if name in USED:
            make(tmp_path / "in" / name, awkward.pictures(seed=number))
    files = sorted((tmp_path / "in").iterdir())
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")  # with a folder, times and ./ before the names
    options = {"held_out": 0.0}  # short videos are held out whole by their names, which differ
    whole = convert(settings(tmp_path, "whole", tmp_path / "in", **options), raw, 1)
    names = [source.name for source in find_sources((str(tmp_path / "in.tar"),)).sources]
    assert sorted(names) == [f"in.tar/{path.name}" for path in files]
    shutil.rmtree(tmp_path / "in")
    report = convert(settings(tmp_path, "out", tmp_path / "in.tar", workers=2, **options), raw, 1)
    assert len(report.skipped) >= 4
    reasons = [sorted((name.rpartition("/")[2], why) for name, why in one.skipped) for one in (report, whole)]
    assert reasons[0] == reasons[1]
    assert sorted(clips(tmp_path / "out")) == sorted(clips(tmp_path / "whole"))


@pytest.mark.parametrize("writer", ["webdataset", "tar"])
def test_captions_and_labels_of_a_webdataset_are_kept(tmp_path, writer):
    write_videos(tmp_path / "videos", 0, 3, 40, 32, 32)
    content = [path.read_bytes() for path in sorted((tmp_path / "videos").iterdir())]
    samples = [
        {"__key__": "a/0", "mp4": content[0], "txt": "a disc\n", "jpg": b"a thumbnail"},
        {"__key__": "a/1", "mp4": content[1], "txt": "worse", "json": {"caption": "zwölf", "label": "cat", "w": [1]}},
        {"__key__": "a/2", "webm": content[2], "json": {"label": "dog", "licence": "CC0", "caption": None}},
    ]
    samples[0]["json"] = {"label": "dog"}
    if writer == "webdataset":  # which writes times into extended headers, and sorts what belongs together
        with TarWriter(str(tmp_path / "x.tar")) as tar:
            for sample in samples:
                tar.write(sample)
    else:
        packed(tmp_path / "x.tar", *(
            (f"{sample['__key__']}.{kind}", part if isinstance(part, bytes) else
             (part if kind == "txt" else json.dumps(part)).encode())
            for sample in samples for kind, part in sample.items() if kind != "__key__"
        ))  # fmt: skip
    (tmp_path / "list.txt").write_text("x.tar\n")
    listing = find_sources((str(tmp_path / "x.tar"),))
    assert find_sources((str(tmp_path / "list.txt"),)) == listing
    assert (listing.classes, listing.names) == (2, ("cat", "dog"))
    assert [(x.name, x.caption, x.label, x.licence) for x in listing.sources] == [
        ("x.tar/a/0.mp4", "a disc", 1, None),
        ("x.tar/a/1.mp4", "zwölf", 0, None),
        ("x.tar/a/2.webm", None, 1, "CC0"),
    ]
    for source, part in zip(listing.sources, content, strict=True):
        with open_bytes(source.path) as file:
            assert file.read() == part
            assert file.seek(-5, io.SEEK_END) == len(part) - 5
            assert file.read() == part[-5:]
    assert convert(settings(tmp_path, "out", tmp_path / "x.tar"), raw, 1).clips == {"train": 9, "held_out": 3}


def test_keys_end_at_the_first_dot(tmp_path):
    """As in WebDataset; a key up to the last dot, as packed files may have, is preferred."""
    about = {"caption": "a dog", "licence": "CC0"}
    tar = packed(
        tmp_path / "x.tar",
        *[(name, name.encode()) for name in ("a/1.rgb.mp4", "a/1.depth.MP4", "a.b/2.final.mkv", "3.x.mp4", "4.y.mp4")],
        ("a/1.JSON", json.dumps(about).encode()), ("a/1.cls", b"3\n"),
        ("a/1.depth.txt", b"its depth"), ("a.b/2.Txt", b"zwei"), ("a.b/2.cls", b"0"), ("a.b/2.json", b'{"label": 1}'),
        ("3.x.txt", b"drei"), ("3.x.cls", b"2"), ("4.cls", b"2"),
    )  # fmt: skip
    sources = find_sources((str(tar),)).sources
    assert [(x.name, x.caption, x.label, x.licence) for x in sources] == [
        ("x.tar/a/1.rgb.mp4", "a dog", 3, "CC0"),
        ("x.tar/a/1.depth.MP4", "its depth", 3, "CC0"),
        ("x.tar/a.b/2.final.mkv", "zwei", 1, None),
        ("x.tar/3.x.mp4", "drei", 2, None),
        ("x.tar/4.y.mp4", None, 2, None),
    ]
    assert [x.group for x in sources] == ["a/1", "a/1", "", "", ""]  # views of one sample


def test_joined_tars_and_global_headers_are_read(tmp_path):
    parts = [packed(tmp_path / f"{name}.tar", (f"{name}.mp4", name.encode())).read_bytes() for name in "abc"]
    comment = b"52 comment=0123456789abcdef0123456789abcdef01234567\n"  # as git archive writes
    head = special("pax_global_header", type=tarfile.XGLTYPE, size=len(comment)) + comment.ljust(512, b"\0")
    tar = tmp_path / "x.tar"
    tar.write_bytes(head + parts[0] + bytes(3 << 20) + parts[1] + parts[2])
    os.truncate(tar, 1 << 40)  # a hole takes no time
    content = []
    for source in find_sources((str(tar),)).sources:
        with open_bytes(source.path) as file:
            content.append((source.name, file.read()))
    assert content == [("x.tar/a.mp4", b"a"), ("x.tar/b.mp4", b"b"), ("x.tar/c.mp4", b"c")]
    with pytest.raises(ValueError, match="has bytes behind its end mark, at byte 10240; refused"):
        tar.write_bytes(parts[0] + parts[1])
        tar_members(tar, plain=True)


def test_parts_of_a_conversion_share_a_tar_and_copies_in_it_count_once(tmp_path):
    write_videos(tmp_path / "videos", 0, 4, 40, 32, 32)
    named = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "videos").iterdir())]
    packed(tmp_path / "x.tar", *named, ("again.mp4", named[1][1]), (".hidden.mp4", named[2][1]))
    whole = convert(settings(tmp_path, "whole", tmp_path / "x.tar", clips_per_shard=2), raw, 1)
    assert whole.skipped == (("x.tar/again.mp4", "has the content of x.tar/synthetic-001.mp4"),)
    for part in (1, 0):
        convert(settings(tmp_path, "out", tmp_path / "x.tar", clips_per_shard=2), raw, 1, part=(part, 2))
    convert(settings(tmp_path, "out", tmp_path / "x.tar", clips_per_shard=2), raw, 1, merge=True)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert first == second


def test_folders_are_not_searched_for_tars(tmp_path):
    """The shards of an earlier conversion may lie there."""
    write_videos(tmp_path / "videos", 0, 1, 40, 32, 32)
    packed(tmp_path / "videos" / "x.tar", ("a.mp4", b"x"))
    assert [x.name for x in find_sources((str(tmp_path / "videos"),)).sources] == ["videos/synthetic-000.mp4"]


def test_names_may_be_long_and_in_any_alphabet(tmp_path):
    for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        names = ["ü" * 60 + "/" + "x" * 120 + ".mp4", "b.mp4"]
        tar = packed(tmp_path / "x.tar", *((name, b"content") for name in names), format=layout)
        assert list(tar_members(tar)) == names
        assert {member.size for member in tar_members(tar).values()} == {7}


# --- what is refused ---------------------------------------------------------------------------------------


def special(name: str, **fields) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


PAX = {"type": tarfile.XHDTYPE, "size": 512}
GOOD = special("good.mp4", size=3) + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (special("/etc/a.mp4"), "'/etc/a.mp4' leaves the archive's folder"),
        (special("../a.mp4"), "leaves the archive's folder"),
        (special("a/../../b.mp4"), "leaves the archive's folder"),
        (special("..\\a.mp4"), "leaves the archive's folder"),
        (special("a.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'a.mp4' is a link; only plain files"),
        (special("a.mp4", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "is a link"),
        (special("a.mp4", type=tarfile.FIFOTYPE), "is of type b'6'"),
        (special("a.mp4", type=tarfile.CHRTYPE), "is of type b'3'"),
        (special("a.mp4", type=tarfile.GNUTYPE_SPARSE), "is of type b'S'"),
        (
            special("g", type=tarfile.XGLTYPE, size=14) + b"14 path=a.mp4\n".ljust(512, b"\0"),
            "header names all members 'a.mp4'; refused",
        ),
        (
            special("g", type=tarfile.XGLTYPE, size=10) + b"10 size=3\n".ljust(512, b"\0"),
            "an extended header sets size",
        ),
        (bytes(1024) + b"<html>".ljust(512, b"\0"), "is damaged, behind its end mark, at byte 2048"),
        (bytes(1024) + GOOD, "'good.mp4' is there twice"),
        (bytes(5 << 20) + special("../a.mp4"), "leaves the archive's folder"),
        (special("a.JSON") + special("a.json"), "'a.JSON' and 'a.json' differ in capitals only"),
        (
            special("good.json", size=20) + rb'{"caption":"\ud83d"}'.ljust(512, b"\0"),
            r"good.json: caption holds U\+D83D at character 1, half of a surrogate pair",
        ),
        (GOOD, "'good.mp4' is there twice"),
        (special("./good.mp4"), "'good.mp4' is there twice"),
        (special("a.mp4", size=1 << 40), "is truncated: 'a.mp4' claims 1099511627776 bytes, past its end"),
        (special("x", type=tarfile.XHDTYPE, size=1 << 30), r"claims 1073741824 bytes"),
        (special("x", type=tarfile.GNUTYPE_LONGNAME, size=1 << 30), r"claims 1073741824 bytes"),
        (special("x", **PAX) + b"26 size=99999999999999999\n".ljust(512, b"\0"), "an extended header sets size"),
        (special("x", **PAX) + b"24 linkpath=/etc/passwd\n".ljust(512, b"\0"), "an extended header sets linkpath"),
        (special("x", **PAX) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0"), "header sets GNU.sparse.major"),
        (special("x", **PAX) + b"99999 path=a.mp4\n".ljust(512, b"\0"), "is damaged in an extended header"),
        (special("x", **PAX) + b"0 path=a.mp4\n".ljust(512, b"\0"), "is damaged in an extended header"),
        (b"\xff" * 512, "is damaged at byte 1024"),
        (special("a.json", size=2 << 20) + bytes(2 << 20) + special("a.mp4"), "a.json claims 2097152 bytes, at most"),
        (special("good.json", size=1) + b"{".ljust(512, b"\0"), "good.json is not readable as JSON"),
        (special("good.json", size=1) + b"3".ljust(512, b"\0"), "good.json is not a JSON object"),
        (special("good.json", size=13) + b'{"caption":1}'.ljust(512, b"\0"), "caption is 1, expected text$"),
        (special("good.json", size=12) + b'{"label":[]}'.ljust(512, b"\0"), "label is .*, expected text or a number"),
        (special("good.txt", size=1) + b"\xff".ljust(512, b"\0"), "good.txt is not UTF-8"),
    ],
)
def test_malicious_tars_are_refused_by_member(tmp_path, content, message):
    (tmp_path / "x.tar").write_bytes(GOOD + content + bytes(1024))
    os.truncate(tmp_path / "x.tar", 1 << 31)  # a hole: large enough for what is claimed, and takes no space
    before = peak()
    with pytest.raises(ValueError, match=message) as error:
        find_sources((str(tmp_path / "x.tar"),))
    assert str(error.value).startswith(str(tmp_path / "x.tar"))
    assert peak() - before < 50


def test_a_truncated_compressed_or_empty_tar_is_refused(tmp_path):
    tar = packed(tmp_path / "x.tar", ("a.mp4", b"x" * 5000))
    content = tar.read_bytes()
    for length in (0, 100, 512, 3000, 512 + 5120):
        tar.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x.tar is truncated"):
            find_sources((str(tar),))
    tar.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"x.tar is (truncated|no plain tar \(compressed ones are not read\))"):
        find_sources((str(tar),))
    packed(tar, ("a.txt", b"x"))
    with pytest.raises(ValueError, match=r"no videos in .*x.tar: looked for"):
        find_sources((str(tar),))
    (tmp_path / "list.jsonl").write_text('{"path": "x.tar", "caption": "of which?"}\n')
    with pytest.raises(ValueError, match=r"list.jsonl line 1: x.tar holds many videos"):
        find_sources((str(tmp_path / "list.jsonl"),))


def test_reading_a_member_stays_inside_it(tmp_path):
    (tmp_path / "x").write_bytes(b"before" + b"inside" + b"behind")
    with open_bytes(Member(tmp_path / "x", 6, 6)) as file:
        assert file.read(99) == b"inside"
        assert file.read(1) == b""
        for far in (99, 1 << 62, (1 << 63) - 1):
            assert (file.seek(far), file.read()) == (far, b"")
        assert (file.seek(2), file.read(2), file.tell()) == (2, b"si", 4)
        with pytest.raises(ValueError, match="seek"):
            file.raw.seek(-1)
    assert archives.size_of(Member(tmp_path / "x", 6, 6)) == 6
