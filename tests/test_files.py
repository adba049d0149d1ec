"""Files that are whole or not there."""

from __future__ import annotations

import subprocess
import sys

from msc.pretrain.checkpoints.rollback import read_lines


def test_a_line_that_finds_no_room_is_lost_as_a_whole(tmp_path):
    """In a process that may write no more than 120 bytes to a file: the system writes a part of the second line."""
    program = """
import pathlib, resource, sys
from msc.datasets.files import append_line
resource.setrlimit(resource.RLIMIT_FSIZE, (120, 120))
path = pathlib.Path(sys.argv[1])
for step in range(3):
    append_line(path, {"step": step, "text": "x" * (0 if step == 2 else 60)})
"""
    path = tmp_path / "log.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"msc: a line of {path} is lost: No space left on device\n")
    assert [line["step"] for line in read_lines(path)] == [0, 2]


def test_a_log_on_a_full_disk_ends_nothing():
    program = """
import pathlib, sys
from msc.datasets.files import Forgiving, append_line
sys.stderr = Forgiving(sys.stderr)
append_line(pathlib.Path("/dev/full"), {"step": 1})
print("step 1", file=sys.stderr, flush=True)
assert sys.stderr.fileno() == 2
"""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full).returncode == 0
