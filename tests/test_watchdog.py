"""Watchdog and consistency check: a lost, stuck or different rank is named, and the others end in time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch.distributed as dist
from gloo_ranks import free_port

from msc.parallel import control_plane, watchdog
from msc.parallel.consistency import inconsistencies, source_digest
from msc.parallel.progress import Progress
from msc.parallel.watchdog import RankStatus, Watchdog, diagnose

TIMEOUT = 4.0
SLACK = 8.0  # seconds: two heartbeats to compare, the grace, a busy machine
DIAGNOSES = {
    "killed": r"rank 1 \(process \d+ on .*\) is silent, its last heartbeat was in step 3, reading clips",
    "stopped": r"rank 1 \(process \d+ on .*\) is silent, its last heartbeat was in step 3, reading clips",
    "held": r"rank 1 \(process \d+ on .*\) is silent, its last heartbeat was in step 3, reading clips",
    "stuck": r"rank 1 \(process \d+ on .*\) is alive but lags behind in step 3, reading clips",
    "failed": r"rank 1 \(process \d+ on .*\) failed in step 3, reading clips: ValueError: clip 17 is broken",
}


def start(what, ranks=3):
    address = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("watchdog_ranks.py"), what, str(TIMEOUT)], text=True,
            env={**os.environ, **address, "RANK": str(rank), "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]  # fmt: skip


@pytest.mark.gloo
@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.slow if w == "held" else ()) for w in DIAGNOSES])
def test_other_ranks_end_in_time_and_name_the_rank(what):
    processes = start(what)
    try:
        began = float(processes[1].stdout.readline().removeprefix("at "))
        for rank in (0, 2):
            _, stderr = processes[rank].communicate(timeout=60)
            assert processes[rank].returncode == 1
            *stacks, line = stderr.splitlines()
            assert bool(stacks) == (what == "stuck"), stderr
            assert re.match(f"msc: {DIAGNOSES[what]}; this rank waited in step 3, backward", line), stderr
        if what == "held":
            processes[1].kill()
            assert re.search(r"Timeout \(0:00:04\)!(.*\n)*.* in happen", processes[1].communicate()[1])
        if what == "stuck":  # every rank writes its stack
            assert any("all_reduce" in line for line in stacks)
            _, stderr = processes[1].communicate(timeout=60)
            assert re.search(r", line \d+ in happen(.*\n)*rank 1 .* lags behind", stderr), stderr
        assert time.time() - began < TIMEOUT + SLACK
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.gloo
def test_a_phase_may_be_longer_than_the_timeout():
    for process in start("slow"):
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr) == (0, "")


LEAVES = """
import os, time
import torch.distributed as dist
from msc.parallel.progress import Progress
from msc.parallel.watchdog import watch_ranks
store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
with watch_ranks(0, 2, 60.0, Progress()) as watchdog:
    watchdog.interval = 0.0  # from the second heartbeat on its thread only reads the store
    time.sleep(1.3)
"""


@pytest.mark.gloo
def test_process_exits_cleanly_while_its_watchdog_reads_the_store():
    """A thread in the store's C++ code when Python exits aborts the process, once in eight times before."""
    for _ in range(3):
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        done = subprocess.run([sys.executable, "-c", LEAVES], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


STALLS = """
import time
from msc.parallel.console import configure_logging
from msc.parallel.progress import Progress
from msc.parallel.watchdog import watch_ranks
configure_logging()
progress = Progress()
with watch_ranks(0, 1, 2.0, progress, stall=1.5):
    for step in range(3):
        progress.at(step, "forward and backward")
        time.sleep(0.8)
    progress.at(7, "reading clips")
    time.sleep(60)
"""


def test_stalled_process_ends_with_its_stacks():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STALLS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    message = "msc: no progress for 1.5 s (parallel.stall) in step 7, reading clips; the run ends"
    assert done.stderr.splitlines()[-1].startswith(message), "a launcher shows the end of a log"
    assert "line 13 in <module>" in done.stderr
    assert 3 < time.monotonic() - began < 30


class Store(dist.HashStore):
    """200 ranks in one long phase, all alive. A request takes 50 ms and `per_key` seconds more for each key that is
    read; none is answered while `silent`. most: keys read at once."""

    def __init__(self, per_key):
        super().__init__()
        self.per_key, self.silent, self.most = per_key, threading.Event(), 0

    def _wait(self, keys=0):
        time.sleep(0.05 + self.per_key * keys)
        while self.silent.is_set():
            time.sleep(0.1)

    def set(self, key, value):
        self._wait()

    def check(self, keys):
        self._wait()
        return keys != [watchdog.DIAGNOSIS]

    def multi_get(self, keys):
        self.most = max(self.most, len(keys))
        self._wait(len(keys))
        ranks = [int(key.rsplit("/", 1)[1]) for key in keys]
        return [json.dumps(asdict(RankStatus(r, "host", 7, 0, "long", 1, time.monotonic_ns(), 9.0))) for r in ranks]

    def get(self, key):
        return self.multi_get([key])[0]


def test_a_slow_store_ends_no_rank_before_the_timeout(monkeypatch):
    """Three cases side by side; the second store takes 2.5 s for all ranks: longer than a rank waits for it."""
    cases = [(0, Store(0.0)), (0, Store(0.0125)), (7, Store(0.0))]
    stopped = {}
    monkeypatch.setattr(watchdog, "GRACE", 0.0)
    monkeypatch.setattr(
        Watchdog, "_end_process", lambda self, message: stopped.setdefault(self, (message, time.monotonic()))
    )
    watchdogs = []
    for rank, store in cases:
        monkeypatch.setattr(control_plane, "connect_store", lambda timeout, store=store: store)
        progress = Progress()
        watchdogs.append(Watchdog(rank, 200, 3.0, progress))
        progress.at(0, "long")
    time.sleep(7.5)  # all ranks are late, and rank 0 has tried to read them twice
    assert not stopped
    assert [store.most for _, store in cases] == [200, 200, 1]
    for _, store in cases:
        store.silent.set()
    began = time.monotonic()
    time.sleep(4.5)
    for _, store in cases:
        store.silent.clear()
    for each in watchdogs:
        each.stop()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    for each in watchdogs:
        message, at = stopped[each]
        assert message.startswith(watchdog.STORE_LOST)
        assert at - began > 2.0


@pytest.mark.gloo
def test_consistency_check_names_the_different_rank():
    for process in start("differ"):
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        assert stderr == "msc: the ranks do not run the same: rank 1 has optimizer.lr = 0.2, rank 0 has 0.1\n"


def test_inconsistencies_are_against_the_majority():
    facts = [{"a": 1, "b": 2}, {"a": 3, "b": 2}, {"a": 3}]
    assert inconsistencies(facts) == ["rank 0 has a = 1, rank 1 has 3", "rank 2 has b = None, rank 0 has 2"]
    assert inconsistencies([{"a": 1}] * 4) == []


def test_source_digest_depends_on_python_files(tmp_path):
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("deep/er.py", ""), ("notes.txt", "")):
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digests.append(source_digest([tmp_path / "code"]))
    assert len(set(digests)) == 4 and digests[-1] == digests[-2]


def test_diagnosis_names_silent_before_lagging_ranks():
    def status(rank, phases, heartbeat, seconds=9.0):
        return RankStatus(rank, "host", 7, 1, "here", phases, heartbeat, seconds)

    before = {0: status(0, 5, 1), 1: status(1, 4, 1), 2: status(2, 5, 1)}
    alive = {rank: status(rank, p.phases, 2) for rank, p in before.items()}
    assert diagnose(0, before, alive, 3, 8.0) == "rank 1 (process 7 on host) is alive but lags behind in step 1, here"
    assert diagnose(1, before, alive, 3, 8.0) == ""  # a rank is not its own cause
    assert diagnose(0, before, alive, 3, 10.0) == ""  # no rank has waited so long
    assert diagnose(0, before, {**alive, 2: before[2]}, 3, 8.0).startswith("rank 2 (process 7 on host) is silent")
    assert diagnose(2, before, {**alive, 2: before[2]}, 3, 10.0) == ""
    assert diagnose(0, before, alive, 4, 8.0) == "rank 3 has never sent a heartbeat"
    assert diagnose(0, before, {rank: status(rank, 5, 2) for rank in before}, 3, 8.0) == ""
