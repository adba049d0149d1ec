"""A sign of life in the run folder: where rank 0 is, written every few seconds, for people and programs outside.

    run/heartbeat.json    {"time", "started", "step", "phase", "since", "host", "pid", "job", "ranks"}

Times are seconds since 1970. `since` is when the phase was entered: a run that hangs keeps writing, but stays there.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SECONDS = 3.0
JOB = "MSC_JOB"  # in the environment of ranks that a job started: its id
ENDED = "ended"
FRESH = 60.0  # seconds without a heartbeat after which a rank 0 that says nothing is taken for dead


def job_of(environment: Mapping[str, str]) -> str:
    return environment.get(JOB) or environment.get("SLURM_JOB_ID", "")


@contextmanager
def beating(run: Path | None, ranks: int, seconds: float = SECONDS) -> Iterator[Callable[[int, str], None]]:
    """Write the heartbeat of `run` from a thread while the block runs; yields `at(step, phase)`. None: no heartbeat."""
    if run is None:
        yield lambda step, phase: None
        return
    place: tuple[int, str, float] = (0, "starting", time.time())
    known = {"started": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "job": job_of(os.environ),
             "ranks": ranks}  # fmt: skip
    over = threading.Event()

    def at(step: int, phase: str) -> None:
        nonlocal place
        place = step, phase, time.time()

    def write() -> None:
        step, phase, since = place
        beat = {"time": time.time(), "step": step, "phase": phase, "since": since, **known}
        partial = run / ".heartbeat.json.partial"
        with suppress(OSError):  # a full disk is the checkpoint's to complain about
            run.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(beat))
            os.replace(partial, run / "heartbeat.json")

    def work() -> None:
        write()
        while not over.wait(seconds):
            write()

    thread = threading.Thread(target=work, name="msc-heartbeat", daemon=True)
    thread.start()
    try:
        yield at
    finally:
        over.set()
        thread.join(seconds)
        place = place[0], ENDED, time.time()
        write()


def read(run: Path) -> dict[str, Any]:
    """The last heartbeat, {} if there is none."""
    try:
        found = json.loads((run / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_fresh(beat: Mapping[str, Any], now: float) -> bool:
    """Whether it is of a run that goes on, as far as one look can tell."""
    return bool(beat) and beat["phase"] != ENDED and now - beat["time"] < FRESH


def check_free(run: Path, say: Callable[[str], None], seconds: float = 1.0) -> None:
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
            job = f" of job {beat['job']}" if beat.get("job") else ""
            raise ValueError(
                f"{run} is being trained: process {beat['pid']} on {beat['host']}{job} is in step {beat['step']}. Wait "
                f"for it, or end it with `msc cancel {run}` (a job) or Ctrl-C; `msc status {run}` shows how it is doing"
            )
