"""Files that appear whole or not at all, whoever else writes them; lines of logs that find no room."""

from __future__ import annotations

import subprocess
import sys

import pytest

from msc.datasets import files


def test_of_two_that_write_a_file_at_once_both_write_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "index.json"

    def another_writer(_):
        monkeypatch.undo()
        files.write_atomically(path, b"the other")

    monkeypatch.setattr(files.os, "fsync", another_writer)
    files.write_atomically(path, b"the first, which is longer")
    assert path.read_bytes() == b"the first, which is longer"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_put_in_its_place_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path / "there", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_line_that_finds_no_room_is_lost_as_a_whole(tmp_path):
    """In a process that may write no more than 120 bytes to a file: the system writes a part of the second line."""
    program = """
import pathlib, resource, sys
from msc.datasets.files import append_jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (120, 120))
path = pathlib.Path(sys.argv[1])
for step in range(3):
    append_jsonl(path, {"step": step, "text": "x" * (0 if step == 2 else 60)})
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"a line of {path} is lost: No space left on device\n")
    assert [line["step"] for line in files.read_jsonl(path)] == [0, 2]


def test_a_log_on_a_full_disk_ends_nothing():
    program = """
import pathlib, sys
from msc.datasets.files import Forgiving, append_jsonl
sys.stderr = Forgiving(sys.stderr)
append_jsonl(pathlib.Path("/dev/full"), {"step": 1})
print("step 1", file=sys.stderr, flush=True)
assert sys.stderr.fileno() == 2
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full).returncode == 0


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path):
    """Who opened it before the last holder removed it, with its folder, may not believe to have it."""
    path = tmp_path / "lock"
    with open(path, "a+") as one, open(path, "a+") as two:
        assert files.try_lock(one) and not files.try_lock(two)
        path.unlink()
        one.close()
        assert not files.try_lock(two)
    with open(path, "a+") as other:
        assert files.try_lock(other)
