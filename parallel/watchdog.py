"""Watchdog: name the rank that made a collective fail or hang, and end a process that makes no progress.

A failed collective says "connection closed" or "timed out" on the ranks that waited, but not which rank they waited
for. Therefore a thread of every rank writes a heartbeat with its step and phase to the process group's TCP store. A
rank whose collective fails compares all heartbeats, names the silent, failed or lagging rank, leaves this diagnosis
in the store for the others, and ends. Where a stuck collective does not fail, rank 0 and the rank before the missing
one do so from another thread.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from . import control_plane
from .collectives import first_line
from .progress import Progress

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds in which a rank that learns of a failure may still report its own error
SILENCE = 10.0  # seconds without a heartbeat; a loaded machine or a busy interpreter lock may well cost a few
LAGGING = "lags behind"
STORE_LOST = "rank 0, which keeps the store, does not answer"
# torchrun keeps one store over its restarts
PREFIX = f"msc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
DIAGNOSIS = f"{PREFIX}/diagnosis"


@dataclass(frozen=True)
class RankStatus:
    """A rank's heartbeat: its phase, how many it has entered, a counter that grows while the process lives, and the
    seconds spent in the phase by its own clock."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    phases: int
    heartbeat: int
    seconds: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}"


def diagnose(
    own: int, before: dict[int, RankStatus], now: dict[int, RankStatus], world_size: int, timeout: float
) -> str:
    """The ranks that keep rank `own` waiting, from two readings some heartbeats apart; "" if none stands out.

    First the silent ranks. If there are none, the ranks behind one that has been in a phase for more than `timeout`
    seconds while no rank is ahead of it: a phase may last longer than that, but waiting for another rank may not.
    """
    others = [status for rank, status in now.items() if rank != own]
    silent = [s for s in others if s.rank in before and s.heartbeat == before[s.rank].heartbeat]
    lost = [f"{status} is silent, its last heartbeat was in {status.place}" for status in silent]
    lost += [f"rank {rank} has never sent a heartbeat" for rank in range(world_size) if rank not in now]
    if lost:
        return "; ".join(lost)
    most = max(status.phases for status in now.values())
    if max(status.seconds for status in now.values() if status.phases == most) <= timeout:
        return ""
    return "; ".join(f"{status} is alive but {LAGGING} in {status.place}" for status in others if status.phases < most)


class Watchdog:
    """One thread exchanges heartbeats through the store, which may block it; another one ends a stuck process.

    timeout: seconds that a rank may wait for another, or the next rank or the store be silent. stall: seconds in one
    phase after which this process is ended (0: never).
    """

    def __init__(self, rank: int, world_size: int, timeout: float, progress: Progress, stall: float = 0.0):
        self.rank, self.world_size, self.timeout, self.progress, self.stall = rank, world_size, timeout, progress, stall
        self.interval = min(1.0, timeout / 10)
        self.store_timeout = max(2.0, 2 * self.interval)  # seconds for one answer of the store
        self.silence = min(SILENCE, timeout / 2)
        self._heartbeats = 0
        self._next_rank: RankStatus | None = None
        self._answered = self._next_rank_changed = time.monotonic()
        self._diagnosis: tuple[str, float] | None = None  # that in the store, and when it was seen
        self._over = threading.Event()
        targets = [self._supervise]
        if world_size > 1:
            # A connection of its own: a blocking call of the process group's must not hold up heartbeats.
            self._store = control_plane.connect_store(max(timeout, 1.0))
            self._write()
            targets.append(self._exchange)
        self._threads = [threading.Thread(target=target, daemon=True, name="watchdog") for target in targets]
        for thread in self._threads:
            thread.start()

    def explain(self, error: BaseException) -> str:
        """One line on a collective that failed on this rank; the other ranks get the same diagnosis."""
        if self._over.is_set():  # the other thread is writing it
            time.sleep(GRACE)
        diagnosis = self._diagnose()
        if diagnosis == "":
            diagnosis = "all ranks answer and none is late; they may have called different collectives"
        if LAGGING in diagnosis:  # a hang: where each rank is, is what matters
            traceback.print_tb(error.__traceback__)
        self._close()
        return f"{diagnosis}; this rank waited in {self.progress.phase}: {first_line(error)}"

    def stop(self) -> None:
        """End the threads: one that is still in the store when Python exits would abort the process."""
        self._over.set()
        for thread in self._threads:
            thread.join(self.store_timeout)

    # Heartbeats, in a thread that may be stuck in the store -----------------------------------------------

    def _exchange(self) -> None:
        """Write this rank's heartbeat and read the next rank's, until the end of the run or of the store."""
        with suppress(RuntimeError):
            while not self._over.wait(self.interval):
                # A C call that never returns the interpreter lock stops these threads, too. This timer needs no lock.
                faulthandler.dump_traceback_later(self.timeout)
                self._write()
                rank = (self.rank + 1) % self.world_size
                if (status := self._read([rank]).get(rank)) != self._next_rank:
                    self._next_rank, self._next_rank_changed = status, time.monotonic()
                self._read_diagnosis()
                self._answered = time.monotonic()
        faulthandler.cancel_dump_traceback_later()

    def _status(self) -> RankStatus:
        phase, host, pid = self.progress.phase, socket.gethostname(), os.getpid()
        seconds = time.monotonic() - phase.entered
        return RankStatus(self.rank, host, pid, phase.step, phase.name, phase.count, self._heartbeats, seconds)

    def _write(self) -> None:
        self._heartbeats += 1
        self._store.set(f"{PREFIX}/{self.rank}", json.dumps(asdict(self._status())))

    def _read(self, ranks: Iterable[int]) -> dict[int, RankStatus]:
        """The last heartbeats of `ranks`, in two requests however many they are."""
        keys = [f"{PREFIX}/{rank}" for rank in ranks]
        if not self._store.check(keys):  # only at the start
            keys = [key for key in keys if self._store.check([key])]
        statuses = [RankStatus(**json.loads(text)) for text in self._store.multi_get(keys)] if keys else []
        return {status.rank: status for status in statuses}

    def _read_diagnosis(self) -> None:
        if self._diagnosis is None and self._store.check([DIAGNOSIS]):
            self._diagnosis = self._store.get(DIAGNOSIS).decode(), time.monotonic()

    # Supervision, in a thread that never waits for the store without a limit ------------------------------

    def _supervise(self) -> None:
        """Wait for a reason to end the process, and end it: no exception reaches the main thread where it is stuck."""
        reason = ""
        while not reason and not self._over.wait(self.interval):
            reason = self._reason_to_end()
        if reason and not self._over.is_set():
            self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        faulthandler.dump_traceback()
        log.error(reason)  # last, as a launcher shows the end of a rank's log
        self._close()
        os._exit(1)

    def _reason_to_end(self) -> str:
        now, phase = time.monotonic(), self.progress.phase
        seconds = now - phase.entered
        if self.stall and seconds > self.stall:
            limit = f"{self.stall:g} s (parallel.stall)"
            return f"no progress for {limit} in {phase}; the run ends, continue it with msc train --resume"
        if self.world_size == 1:
            return ""
        # In a long phase all ranks would read all heartbeats at once, so most leave it to a few.
        next_lags = self._next_rank is not None and self._next_rank.phases < phase.count
        late = seconds > self.timeout + GRACE and (self.rank == 0 or next_lags)
        diagnosis = ""
        if self._diagnosis is not None and now - self._diagnosis[1] > GRACE:
            diagnosis = self._diagnosis[0]
        elif now - self._answered > self.timeout:
            diagnosis = STORE_LOST
        elif late or now - self._next_rank_changed > self.timeout:
            diagnosis = self._diagnose()
            diagnosis = "" if diagnosis == STORE_LOST else diagnosis  # it may only be slow
        return diagnosis and f"{diagnosis}; this rank waited in {self.progress.phase}"

    def _diagnose(self) -> str:
        """The diagnosis in the store, or this rank's own, which is put there."""
        before = self._bounded(lambda: self._read(range(self.world_size)))
        # After a failure all ranks get here together: rank 0 decides first, the others read its diagnosis.
        until = time.monotonic() + self.silence + (2 * self.interval if self.rank else 0)
        while self._diagnosis is None and time.monotonic() < until:
            time.sleep(self.interval / 2)
            self._bounded(self._read_diagnosis)
        if self._diagnosis is not None:
            return self._diagnosis[0]
        now = self._bounded(lambda: self._read(range(self.world_size))) if before else None
        if not before or not now:
            return STORE_LOST
        if diagnosis := diagnose(self.rank, before, now, self.world_size, self.timeout):
            self._announce(diagnosis)
        return diagnosis

    def _announce(self, diagnosis: str) -> None:
        self._diagnosis = diagnosis, time.monotonic()
        self._bounded(lambda: self._store.set(DIAGNOSIS, diagnosis))

    def _bounded(self, action: Callable[[], Any]) -> Any:
        """What the store answers; None if it takes longer than `store_timeout`."""
        answers: list[Any] = []

        def call() -> None:
            with suppress(RuntimeError):
                answers.append(action())

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.store_timeout)
        return answers[0] if answers else None

    def _close(self) -> None:
        """Stop, and let the others read the diagnosis: the store ends with rank 0."""
        self._over.set()
        if self.rank == 0 and self.world_size > 1:
            time.sleep(3 * self.interval)


@contextmanager
def watch_ranks(
    rank: int, world_size: int, timeout: float, progress: Progress, stall: float = 0.0
) -> Iterator[Watchdog]:
    """Run a watchdog during the block.

    A collective that fails in the block becomes a ConnectionError that names the missing rank, the same on all ranks;
    the other ranks learn of any other error, which passes through.
    """
    watchdog = Watchdog(rank, world_size, timeout, progress, stall)
    try:
        yield watchdog
    except BaseException as error:
        if world_size == 1:
            raise
        if not is_communication_error(error):
            reason = f"{type(error).__name__}: {first_line(error)}"
            watchdog._announce(f"{watchdog._status()} failed in {progress.phase}: {reason}")
            watchdog._close()
            raise
        raise ConnectionError(watchdog.explain(error)) from None
    finally:
        watchdog.stop()


def is_communication_error(error: BaseException) -> bool:
    phrases = ("gloo", "NCCL", "Connection closed", "Timed out waiting", "Broken pipe")
    named = isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
    return named or isinstance(error, ConnectionError | dist.DistError)
