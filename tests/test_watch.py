"""A rank that is lost, stuck or different: the others end in time, each with one line that names it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port

from msc.parallel.desync import disagreements
from msc.parallel.watch import Place, verdict

TIMEOUT = 4.0
SLACK = 8.0  # seconds: the beats to be compared, the grace, a busy machine
SAID = {
    "killed": r"rank 1 \(process \d+ on .*\) is silent, last heard of in step 3, reading clips",
    "stopped": r"rank 1 \(process \d+ on .*\) is silent, last heard of in step 3, reading clips",
    "stuck": r"rank 1 \(process \d+ on .*\) is alive but stays behind in step 3, reading clips",
    "failed": r"rank 1 \(process \d+ on .*\) failed in step 3, reading clips: ValueError: clip 17 is broken",
}


def start(what, ranks=3):
    address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("watched.py"), what, str(TIMEOUT)], text=True,
            env={**os.environ, **address, "RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.gloo
@pytest.mark.parametrize("what", SAID)
def test_the_others_end_in_time_and_name_the_rank(what):
    processes = start(what)
    try:
        began = float(processes[1].stdout.readline().removeprefix("at "))
        for rank in (0, 2):
            _, said = processes[rank].communicate(timeout=60)
            assert processes[rank].returncode == 1
            assert said.count("\n") == 1, said
            assert re.match(f"msc: rank {rank}: {SAID[what]}; waited for in step 3, backward", said), said
        assert time.time() - began < TIMEOUT + SLACK
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.gloo
def test_ranks_that_differ_are_named_before_anything_starts():
    for process in start("differ"):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert said == "msc: the ranks do not run the same: rank 1 has optimizer.lr = 0.2, rank 0 has 0.1\n"


def test_the_majority_is_right():
    facts = [{"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 3}]
    assert disagreements(facts) == ["rank 0 has a = 1, rank 1 has 3", "rank 2 has b = None, rank 0 has 2"]
    assert disagreements([{"a": 1}] * 4) == []


def test_a_verdict_names_the_silent_before_the_slow():
    def place(rank, count, beat):
        return Place(rank, "host", 7, 1, "here", count, beat)

    before = {0: place(0, 5, 1), 1: place(1, 4, 1), 2: place(2, 5, 1)}
    alive = {rank: place(rank, p.count, 2) for rank, p in before.items()}
    assert verdict(before, alive, 3) == "rank 1 (process 7 on host) is alive but stays behind in step 1, here"
    assert verdict(before, {**alive, 2: before[2]}, 3).startswith("rank 2 (process 7 on host) is silent")
    assert verdict(before, alive, 4) == "rank 3 has never been heard of"
    assert verdict(before, {rank: place(rank, 5, 2) for rank in before}, 3) == ""
