"""datasets/files.py: a file appears whole or not at all, whoever else writes it."""

from __future__ import annotations

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
