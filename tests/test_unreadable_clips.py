"""Clips that cannot be read: counted over all ranks, kept in the run folder, too many end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_training import msc_train, shards  # noqa: F401 - a fixture

from msc.datasets.shards.index import read_index, scan
from msc.pretrain.tracking.unreadable_clips import UnreadableClips, read_unreadable_clips


def test_each_clip_counts_once_also_after_a_restart(tmp_path):
    clips = UnreadableClips(tmp_path, 100, 0.03, {})
    clips.add(1, [(5, "a"), (7, "b"), (5, "a")], write=True)  # ranks of one context-parallel group both report a clip
    clips.add(2, [(7, "b")], write=True)
    assert read_unreadable_clips(tmp_path) == {5: "a", 7: "b"}
    again = UnreadableClips(tmp_path, 100, 0.03, read_unreadable_clips(tmp_path))
    again.add(3, [(9, "c")], write=True)
    with pytest.raises(ValueError, match=r"4 of 100 clips are unreadable, more than data.max_bad allows \(3\)"):
        again.add(4, [(5, "a"), (11, "d")], write=True)
    lines = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample"]) for line in lines] == [(1, 5), (1, 7), (3, 9), (4, 11)]


def test_one_clip_may_always_be_unreadable(tmp_path):
    clips = UnreadableClips(tmp_path, 10, 0.0, {})
    clips.add(1, [(3, "x")], write=False)
    assert not clips.path.exists()
    with pytest.raises(ValueError, match="2 of 10 clips"):
        clips.add(2, [(4, "y")], write=False)


def spoil(folder: Path, count: int) -> list[int]:
    """Flip a bit in the media of every third clip; their numbers."""
    index = read_index(folder)
    numbers, first = [], 0
    for shard in index.splits["train"]:
        content = bytearray((folder / shard.name).read_bytes())
        for number, sample in enumerate(scan(folder / shard.name), first):
            if number % 3 == 0 and len(numbers) < count:
                offset, size = sample.parts["mp4"]
                content[offset + size // 2] ^= 1
                numbers.append(number)
        (folder / shard.name).write_bytes(content)
        first += shard.samples
    return numbers


@pytest.mark.slow
@pytest.mark.gloo
def test_two_ranks_count_together(shards, tmp_path):  # noqa: F811
    """Each rank meets fewer than the limit, both together more: both end, with the reason, and nothing hangs."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in Path(shards).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    clips = read_index(folder).samples("train")
    bad = spoil(folder, 3)
    assert len(bad) == 3
    run = tmp_path / "run"
    msc_train(folder, run, f"data.max_bad={3.5 / clips}", processes=2, steps=12)
    assert set(read_unreadable_clips(run)) <= set(bad)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["broken"] == len(read_unreadable_clips(run)) == 3
    done = msc_train(folder, tmp_path / "stopped", f"data.max_bad={2.5 / clips}", processes=2, steps=12, check=False)
    assert done.returncode == 65
    assert "data.max_bad allows (2)" in done.stderr + "".join(
        path.read_text() for path in (tmp_path / "stopped" / "logs").glob("*")
    )
