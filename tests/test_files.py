"""Atomic writes, JSONL logs and locks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from msc.datasets import files


def test_concurrent_atomic_writes_leave_one_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "index.json"

    def another_writer(_):
        monkeypatch.undo()
        files.write_atomically(path, b"the other")

    monkeypatch.setattr(files.os, "fsync", another_writer)
    files.write_atomically(path, b"the first, which is longer")
    assert path.read_bytes() == b"the first, which is longer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_atomic_write_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path / "there", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_jsonl_line_on_a_full_disk_is_lost_as_a_whole(tmp_path):
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


def test_a_jsonl_line_holds_no_nan(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "log.jsonl"
    files.append_jsonl(path, {"loss": float("nan"), "norms": [1.5, float("-inf")], "why": "NaN", "of": {"a": (2,)}})
    expected = {"loss": None, "norms": [1.5, None], "why": "NaN", "of": {"a": [2]}}
    assert json.loads(path.read_text(), parse_constant=refuse) == expected


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (32_000, "32.0 kB"), (5.3e6, "5.3 MB"), (2.5e11, "250.0 GB")]
)
def test_format_bytes(size, text):
    assert files.format_bytes(size) == text


def test_a_lock_on_a_removed_file_is_not_acquired(tmp_path):
    """Who opened it before the last holder removed it, with its folder, may not believe to have it."""
    path = tmp_path / "lock"
    with open(path, "a+") as one, open(path, "a+") as two:
        assert files.try_lock(one) and not files.try_lock(two)
        path.unlink()
        one.close()
        assert not files.try_lock(two)
    with open(path, "a+") as other:
        assert files.try_lock(other)
