"""Console logging: format, rank awareness, and streams that cannot be written."""

import logging
import os
import subprocess
import sys

import pytest

from msc.parallel.console import configure_logging


@pytest.mark.parametrize(
    "rank, expected", [(None, "msc: one\nmsc: two 2\n"), ("0", "msc: one\nmsc: two 2\n"), ("3", "msc: rank 3: two 2\n")]
)
def test_rank_0_speaks_and_other_ranks_only_warn(rank, expected, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    configure_logging()
    configure_logging()  # a second time adds nothing
    log = logging.getLogger("msc.anything")
    log.info("one")
    log.warning("two %d", 2)
    log.debug("three")
    assert capsys.readouterr().err == expected


def test_a_log_on_a_full_disk_ends_nothing():
    program = """
import logging, sys
from msc.parallel.console import configure_logging
configure_logging()
logging.getLogger("msc").warning("lost")
"""
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # as in every rank
        assert subprocess.run([sys.executable, "-c", program], stderr=full, env=environment).returncode == 0


def test_exit_code_with_a_full_disk():
    program = "import sys; from msc.launch.cli import main; sys.exit(main(['status', 'nowhere']))"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", program], stderr=full).returncode == 2
