"""Heartbeat file: the step and phase of a run, written every few seconds for people and programs outside of it.

    run/heartbeat.json    {"time", "started", "step", "phase", "since", "host", "pid", "job", "ranks", "previous"}

Times are Unix times; `since` is when the phase was entered; `previous` is the process that owned the run before. The
file is also the lock of a run folder: who has written it and goes on writing owns the run. Unlike a file lock this
needs only renames of a shared file system. Whether it goes on is seen by reading twice, never from the times in it:
the clocks of two nodes may differ by minutes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from msc.datasets.files import write_atomically
from msc.parallel.progress import Phase, Progress

from ..run_folder import RunFolder

log = logging.getLogger(__name__)

INTERVAL_S = 3.0
TAKEOVER_S = 60.0  # seconds, of the reader's clock, without a new heartbeat after which a run may be taken over
SETTLE_S = 0.5  # seconds in which another process that also saw the run as free has written its heartbeat
JOB_VARIABLE = "MSC_JOB"  # in the environment of ranks that a job started: its id
SILENT_VARIABLE = "MSC_SILENT_HEARTBEAT"  # the heartbeat that this process, or the one that started it, saw no more of
ENDED = "ended"


@contextmanager
def write_heartbeat(run: Path | None, ranks: int, progress: Progress, interval: float = INTERVAL_S) -> Iterator[None]:
    """Write the heartbeat of `run` from a thread during the block; None (on other ranks than 0): nothing."""
    if run is None:
        yield
        return
    acquired, own, over = read(run), identity(ranks), threading.Event()
    if _same_process(acquired, own):
        own |= {name: acquired[name] for name in ("started", "previous") if name in acquired}

    def write(phase: Phase) -> None:
        with suppress(OSError):  # a full disk is the checkpoint's to complain about
            _write(run, phase, own)

    def loop() -> None:
        last, check_owner_until = time.monotonic(), 0.0
        other_before: dict[str, Any] = {}
        write(progress.phase)
        while not over.wait(interval):
            now = time.monotonic()
            if now - last > TAKEOVER_S:  # SIGSTOP, or a file system that hung: another process may own the run now
                check_owner_until = now + 4 * interval  # in which a live owner writes twice
            last = now
            if now < check_owner_until and (other := read(run)) and not _same_process(other, own):
                # It owns the run now if it has trained after this process and ended, or goes on writing. One that no
                # longer writes was killed, and owns nothing.
                trained = other["phase"] == ENDED and other["step"] > 0 and not _same_process(other, own["previous"])
                continues = _same_process(other, other_before) and other["time"] != other_before["time"]
                if trained or (other["phase"] != ENDED and continues):
                    _end_taken(run, other)
                other_before = other  # wait for its next one
            else:
                write(progress.phase)

    thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(interval)
        write(replace(progress.phase, name=ENDED, since=time.time()))


def _end_taken(run: Path, other: Mapping[str, Any]) -> None:
    log.error("this process stood still for more than %g s, and meanwhile %s", TAKEOVER_S, owned_message(run, other))
    os._exit(1)


def identity(ranks: int, previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What all heartbeats of this process have in common. previous: the last one of the run's former owner."""
    own = {"started": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": job_id(os.environ)}
    return {**own, "ranks": ranks, "previous": {name: (previous or {}).get(name) for name in ("host", "pid")}}


def job_id(environment: Mapping[str, str]) -> str:
    return environment.get(JOB_VARIABLE) or environment.get("SLURM_JOB_ID", "")


def _same_process(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a.get(name) == b.get(name) for name in ("host", "pid"))


def _write(run: Path, phase: Phase, own: Mapping[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    state = {"time": time.time(), "step": phase.step, "phase": phase.name, "since": phase.since}
    write_atomically(RunFolder(run).heartbeat, json.dumps({**state, **own}).encode(), sync=False)


def read(run: Path) -> dict[str, Any]:
    """The last heartbeat, {} if there is none."""
    try:
        heartbeat = json.loads(RunFolder(run).heartbeat.read_text())
    except (OSError, ValueError):
        return {}
    return heartbeat if isinstance(heartbeat, dict) else {}


def is_recent(heartbeat: Mapping[str, Any], now: float) -> bool:
    """Whether it looks like that of a process that is still training, by the clocks of both machines: for display."""
    return bool(heartbeat) and heartbeat["phase"] != ENDED and abs(now - heartbeat["time"]) < TAKEOVER_S


def read_with_own_clock(runs: Sequence[Path], interval: float = 2 * INTERVAL_S) -> list[dict[str, Any]]:
    """The last heartbeat of each run. Where it looks old, but another machine wrote it, all are read again after
    `interval` seconds: the times of one that has changed are then put on this machine's clock."""
    heartbeats, now = [read(run) for run in runs], time.time()
    doubtful = [
        i for i, last in enumerate(heartbeats)
        if last.get("phase", ENDED) != ENDED and not is_recent(last, now) and not _is_local(last)
    ]  # fmt: skip
    time.sleep(interval if doubtful else 0)
    for i in doubtful:
        if (new := read(runs[i])) and new != heartbeats[i]:
            ahead = time.time() - new["time"]
            heartbeats[i] = {**new, "time": new["time"] + ahead, "since": new["since"] + ahead}
    return heartbeats


def _is_local(heartbeat: Mapping[str, Any]) -> bool:
    return bool(heartbeat["host"] == socket.gethostname())


def check_not_training(run: Path, interval: float = 1.0) -> None:
    """ValueError if a process is training in `run`: two would overwrite each other's checkpoints.

    The last heartbeat may be that of a killed process. If it ran on this machine, it is looked up; otherwise wait until
    it writes again, TAKEOVER_S at most; once for this process and those that it starts. Not for ranks other than 0:
    rank 0 may already write.
    """
    first = read(run)
    if not first or first["phase"] == ENDED or (_is_local(first) and not psutil.pid_exists(first["pid"])):
        return
    if (silent := json.dumps(first, sort_keys=True)) == os.environ.get(SILENT_VARIABLE):
        return
    log.info("%s has a heartbeat of %s: waiting up to %.0f s for another one, to see whether it is being trained",
             run, process_name(first), TAKEOVER_S)  # fmt: skip
    deadline = time.monotonic() + TAKEOVER_S
    while time.monotonic() < deadline:
        time.sleep(interval)
        heartbeat = read(run)
        if heartbeat.get("phase", ENDED) == ENDED:
            return
        if heartbeat != first:
            raise ValueError(owned_message(run, heartbeat))
    os.environ[SILENT_VARIABLE] = silent


def acquire_run(run: Path, ranks: int) -> None:
    """Own `run` by a first heartbeat; ValueError if another process owns it, or acquires it at the same time.

    The last one to write owns it: a process that still reads its own heartbeat when all others must have written is
    alone (Fischer's algorithm, in Lamport 1987, A fast mutual exclusion algorithm). On rank 0 only.
    """
    check_not_training(run)
    own, checked = identity(ranks, previous=read(run)), time.monotonic()
    _write(run, Phase(), own)
    late = time.monotonic() - checked > SETTLE_S  # another process may be training already: wait for its next heartbeat
    time.sleep(2 * INTERVAL_S if late else SETTLE_S)
    if not _same_process(heartbeat := read(run), own):
        raise ValueError(owned_message(run, heartbeat))


def process_name(heartbeat: Mapping[str, Any]) -> str:
    job = f" of job {heartbeat['job']}" if heartbeat.get("job") else ""
    return f"process {heartbeat['pid']} on {heartbeat['host']}{job}"


def owned_message(run: Path, heartbeat: Mapping[str, Any]) -> str:
    owner = f"{process_name(heartbeat)} is in step {heartbeat['step']}" if heartbeat else "its heartbeat is gone"
    return (
        f"{run} is being trained: {owner}. Wait for it, or end it with `msc cancel {run}` (a job) or Ctrl-C; "
        f"`msc status {run}` shows its progress"
    )
