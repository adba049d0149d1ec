"""A sign of life in the run folder: where rank 0 is, written every few seconds, for people and programs outside.

    run/heartbeat.json    {"time", "started", "step", "phase", "since", "host", "pid", "job", "ranks"}

Times are seconds since 1970. `since` is when the phase was entered: a run that hangs keeps writing, but stays there. It
is ended here when that lasts: watchdog.py finds a rank that others wait for, and none where all hang alike.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from msc.datasets.files import write_atomically

INTERVAL_S = 3.0
JOB_VARIABLE = "MSC_JOB"  # in the environment of ranks that a job started: its id
ENDED = "ended"
SETTLE_S = 0.5  # seconds from reading that a run is free to having written that it is taken
TAKEOVER_S = 60.0  # seconds without a heartbeat after which a rank 0 that says nothing is taken for dead


def job_id(environment: Mapping[str, str]) -> str:
    return environment.get(JOB_VARIABLE) or environment.get("SLURM_JOB_ID", "")


@contextmanager
def write_heartbeat(
    run: Path | None, ranks: int, seconds: float = INTERVAL_S, stall: float = 0.0
) -> Iterator[Callable[[int, str], None]]:
    """Write the heartbeat of `run` from a thread while the block runs; yields `at(step, phase)`. None: no heartbeat.

    stall: seconds in one phase after which this process, and with it the run, is ended (0: never).
    """
    if run is None:
        yield lambda step, phase: None
        return
    place, known = (0, "starting", time.time()), identity(ranks)
    moved = time.monotonic()  # the clock of `place` may be set meanwhile
    over = threading.Event()

    def at(step: int, phase: str) -> None:
        nonlocal place, moved
        place, moved = (step, phase, time.time()), time.monotonic()

    def write() -> None:
        with suppress(OSError):  # a full disk is the checkpoint's to complain about
            _write(run, *place, known)

    def work() -> None:
        began, doubt = time.monotonic(), 0.0  # doubt: until when we look whether somebody has taken the run
        met: dict[str, Any] = {}
        write()
        while not over.wait(seconds):
            now = time.monotonic()
            if now - began > TAKEOVER_S:  # stopped, or a file system that stood still: we were taken for dead
                doubt = now + 4 * seconds  # in which one who lives has beaten twice
            began = now
            if now < doubt and (beat := other_than(known, read(run))):
                if took(known, met, beat):
                    _end_taken(run, beat)
                met = beat  # and let it beat again
            else:
                write()

    def look() -> None:  # a thread of its own, as a file system that answers no more also stops the other
        while stall and not over.wait(seconds):
            if time.monotonic() - moved > stall:
                _end_stalled(*place[:2], stall)

    threads = [threading.Thread(target=target, name="msc-heartbeat", daemon=True) for target in (work, look)]
    for thread in threads:
        thread.start()
    try:
        yield at
    finally:
        over.set()
        for thread in threads:
            thread.join(seconds)
        place = place[0], ENDED, time.time()
        write()


def other_than(known: Mapping[str, Any], beat: dict[str, Any]) -> dict[str, Any]:
    """The heartbeat if it is that of another process, else {}."""
    same = [beat.get(name) for name in ("host", "pid")] == [known["host"], known["pid"]]
    return {} if same else beat


def took(known: Mapping[str, Any], met: Mapping[str, Any], beat: Mapping[str, Any]) -> bool:
    """Whether another process took the run from the one that is `known` and goes on, or has trained and ended since;
    by its heartbeat, and the one `met` before. One that beats no more was killed, and has nothing."""
    if beat["phase"] == ENDED:
        return beat["started"] > known["started"] and beat["step"] > 0
    return is_fresh(beat, time.time()) and bool(met) and beat["pid"] == met["pid"] and beat["time"] != met["time"]


def _end_taken(run: Path, beat: Mapping[str, Any]) -> None:
    said = f"stood still for more than {TAKEOVER_S:g} s, and meanwhile {taken(run, beat)}"
    print(f"msc: rank 0: {said}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_stalled(step: int, phase: str, stall: float) -> None:
    said = f"nothing has moved for {stall:g} s (parallel.stall) in step {step}, {phase}; the run ends, resume it"
    print(f"msc: rank 0: {said}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os._exit(1)


def identity(ranks: int) -> dict[str, Any]:
    """What stays the same in all heartbeats of this process."""
    return {"started": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": job_id(os.environ),
            "ranks": ranks}  # fmt: skip


def _write(run: Path, step: int, phase: str, since: float, known: Mapping[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    beat = {"time": time.time(), "step": step, "phase": phase, "since": since, **known}
    write_atomically(run / "heartbeat.json", json.dumps(beat).encode(), sync=False)


def read(run: Path) -> dict[str, Any]:
    """The last heartbeat, {} if there is none."""
    try:
        found = json.loads((run / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_fresh(beat: Mapping[str, Any], now: float) -> bool:
    """Whether it is of a run that goes on, as far as one look can tell."""
    return bool(beat) and beat["phase"] != ENDED and now - beat["time"] < TAKEOVER_S


def check_not_training(run: Path, say: Callable[[str], None], seconds: float = 1.0) -> None:
    """ValueError if somebody is training in `run`: two at once would overwrite each other's checkpoints.

    A heartbeat that is fresh may be the last of a run that was killed. If its process was on this machine, that is
    looked up; else we wait until it either beats again or is too old, a minute at most. Not for ranks other than the
    first: that one may already beat.
    """
    first = read(run)
    if not is_fresh(first, time.time()):
        return
    if first["host"] == socket.gethostname() and not psutil.pid_exists(first["pid"]):
        return
    say(f"{run} has a heartbeat {time.time() - first['time']:.0f} s old: waiting to see whether it is alive")
    beat = first
    while is_fresh(beat, time.time()):
        time.sleep(seconds)
        beat = read(run)
        if is_fresh(beat, time.time()) and beat["time"] != first["time"]:
            raise ValueError(taken(run, beat))


def acquire_run(run: Path, ranks: int, say: Callable[[str], None]) -> None:
    """Take `run` for this process with a first heartbeat; ValueError if somebody has it, or takes it at the same time.

    The last to write has it: who still reads its own heartbeat when all others must have written is alone (Fischer's
    algorithm, in Lamport 1987, A fast mutual exclusion algorithm). Unlike a lock this needs nothing of a shared file
    system but renames. Before `beating`, on rank 0 only.
    """
    check_not_training(run, say)
    known, checked = identity(ranks), time.monotonic()
    _write(run, 0, "starting", time.time(), known)
    late = time.monotonic() - checked > SETTLE_S  # then somebody may be training already, whose next heartbeat tells
    time.sleep(2 * INTERVAL_S if late else SETTLE_S)
    found = read(run)
    if [found.get(name) for name in ("host", "pid")] != [known["host"], known["pid"]]:
        raise ValueError(taken(run, found))


def taken(run: Path, beat: Mapping[str, Any]) -> str:
    job = f" of job {beat['job']}" if beat.get("job") else ""
    who = f"process {beat['pid']} on {beat['host']}{job} is in step {beat['step']}" if beat else "its heartbeat is gone"
    return (
        f"{run} is being trained: {who}. Wait for it, or end it with `msc cancel {run}` (a job) or Ctrl-C; "
        f"`msc status {run}` shows how it is doing"
    )
