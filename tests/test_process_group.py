"""Process group: the limit of open files."""

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
    ("soft", "ranks", "output"),
    [
        (256, 8, "3000"),
        (3000, 8, "3000"),
        (256, 512, "a process may open 3000 files here (ulimit -Hn), but 512 ranks need 3572: raise the limit"),
    ],
)
def test_open_file_limit_is_raised_to_what_the_ranks_need(soft, ranks, output):
    command = [sys.executable, "-c", PROGRAM, str(soft), "3000", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(output)
