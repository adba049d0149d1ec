"""Joining the world of processes."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from msc.parallel.process_group import raise_open_file_limit
soft, hard, ranks = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    raise_open_file_limit(ranks)
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4000, reason="few files may be open here")
@pytest.mark.parametrize(
    ("soft", "ranks", "said"),
    [
        (256, 8, "3000"),
        (3000, 8, "3000"),
        (256, 512, "a process may open 3000 files here (ulimit -Hn), but 512 ranks need 3572: raise the limit"),
    ],
)
def test_a_rank_may_open_as_many_files_as_its_world_needs(soft, ranks, said):
    words = [sys.executable, "-c", PROGRAM, str(soft), "3000", str(ranks)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said)
