"""`msc inspect`: it describes what was converted, and finds shards that were changed since."""

from pathlib import Path

import pytest

from msc.datasets.prepare.convert import ConvertConfig, convert
from msc.datasets.prepare.summary import damaged_shards, describe
from msc.datasets.shards.index import read_index
from msc.datasets.synthetic import write_videos
from msc.launch import cli


@pytest.fixture
def shards(tmp_path) -> Path:
    write_videos(tmp_path / "videos", 0, 2, 60, 32, 32)
    (tmp_path / "videos" / "unreadable.mp4").write_bytes(b"nonsense")
    config = ConvertConfig((str(tmp_path / "videos"),), str(tmp_path / "out"), 8, 32, 32, held_out=0.2,
                           autoencoder="pixels", clips_per_shard=4)  # fmt: skip
    convert(config, lambda video: video.float() / 127.5 - 1, 1)
    return tmp_path / "out"


def test_splits_sizes_and_statistics_are_described(shards, capsys):
    assert cli.main(["inspect", str(shards), "--verify"]) == 0
    output = capsys.readouterr().out
    index = read_index(shards)
    assert "train: 12 clips (8 s) in 3 shards" in output
    assert "held_out: 2 clips (1 s) in 1 shards" in output
    assert "clip: 8 frames at 12 fps, 32x32, stored as video (.mp4)" in output
    assert "no text, no classes" in output
    rows = output[output.index("  side") :].splitlines()[1 : 1 + len(index.statistics.spaces)]
    for row, side in zip(rows, index.statistics.spaces, strict=True):
        assert int(row.split()[0]) == side
        assert float(row.split()[1]) == pytest.approx(index.statistics.ratio(side), abs=6e-4)
    assert "skipped: 1 videos\n  videos/unreadable.mp4: is not readable" in output
    assert "every shard is whole" in output
    assert (shards / "contact.png").read_bytes().startswith(b"\x89PNG")


def test_changed_shards_are_named(shards, capsys):
    index = read_index(shards)
    first, second = index.splits["train"][0], index.splits["held_out"][0]
    content = bytearray((shards / first.name).read_bytes())
    content[700] ^= 1  # inside a member
    (shards / first.name).write_bytes(content)
    content = (shards / second.name).read_bytes()
    (shards / second.name).write_bytes(content.replace(b".json", b".pickl", 1)[: len(content)])
    damaged = damaged_shards(shards, index)
    assert len([line for line in damaged if line.startswith(f"{first.name}: its checksum")]) == 1
    assert any(second.name in line and "checksum" in line for line in damaged)
    assert cli.main(["inspect", str(shards), "--verify"]) == 1
    assert first.name in capsys.readouterr().out
    assert describe(shards, index).splitlines()[0] == str(shards)


def test_a_folder_without_shards_is_one_line(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "has no index.json" in capsys.readouterr().err
