"""Who is missing when a collective fails: every rank tells the others where it is, and they read it when stuck.

A collective that fails says "connection closed" or "timed out" on the ranks that waited, and nothing of the one
that they waited for. So each rank writes a beat, its step and its phase to the TCP store of the process group,
from a thread. A rank whose collective fails reads what all have written, says in one line who is silent, failed or
behind, leaves the same line in the store for the others, and ends. Where a stuck collective does not fail, rank 0
and the rank before the missing one do this.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from . import control_plane
from .collectives import first_line

GRACE = 5.0  # seconds in which a rank that learns of a failure may still find its own words
SILENCE = 10.0  # seconds without a beat; a loaded machine or a busy interpreter lock may well cost a few
EXIT = 1
BEHIND = "stays behind"
TOO_MANY = os.strerror(errno.EMFILE)
UNANSWERED = "rank 0, which keeps the store, does not answer"
# torchrun keeps one store over its restarts
PREFIX = f"msc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
VERDICT = f"{PREFIX}/verdict"


@dataclass(frozen=True)
class RankStatus:
    """Where a rank is. count: phases entered so far, the same for all ranks; beat: grows while it lives; stood:
    seconds in this phase, by its own clock."""

    rank: int
    host: str
    pid: int
    step: int = 0
    phase: str = "starting"
    count: int = 0
    beat: int = 0
    stood: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.phase}"


def diagnose(judge: int, before: dict[int, RankStatus], now: dict[int, RankStatus], size: int, timeout: float) -> str:
    """Whom rank `judge` finds to keep the others waiting, from two readings some beats apart; "" if nobody stands out.

    First ranks that have gone silent; if none has, ranks behind one that has stood for more than `timeout` seconds
    where nobody is ahead of it: a phase may last longer than that, a wait may not. A rank never judges itself.
    """
    others = [p for rank, p in now.items() if rank != judge]
    absent = [rank for rank in range(size) if rank not in now]
    silent = [p for p in others if p.rank in before and p.beat == before[p.rank].beat]
    if absent or silent:
        names = [f"{p} is silent, last heard of in {p.where}" for p in silent]
        return "; ".join(names + [f"rank {rank} has never been heard of" for rank in absent])
    most = max(p.count for p in now.values())
    if max(p.stood for p in now.values() if p.count == most) <= timeout:
        return ""
    return "; ".join(f"{p} is alive but {BEHIND} in {p.where}" for p in others if p.count < most)


class Watchdog:
    """This rank's place, told to the others from a thread; and a second thread that ends a rank that is stuck.

    timeout: seconds that a rank may wait for another, or the next rank or the store be silent.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        self.size, self.timeout, self.interval = size, timeout, min(1.0, timeout / 10)
        self.patience = max(2.0, 2 * self.interval)  # for one answer of the store
        self.silence = min(SILENCE, timeout / 2)
        self.place = RankStatus(rank, socket.gethostname(), os.getpid())
        self._moved = self._answered = self._neighbour_beat_at = time.monotonic()
        self._neighbour: RankStatus | None = None
        self._beats = 0
        self._heard: tuple[str, float] | None = None  # a verdict in the store, and when it was seen
        self._over = threading.Event()
        # A connection of its own: a blocking call of the process group's must not hold up the beats.
        self._store = control_plane.connect_store(max(timeout, 1.0))
        self._tell()
        self._threads = [threading.Thread(target=each, daemon=True, name="watch") for each in (self._beat, self._look)]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, phase: str) -> None:
        """Where the main thread is now. All ranks must call it in the same order."""
        self._moved = time.monotonic()  # before the place: nobody must read a new place with an old time
        self.place = replace(self.place, step=step, phase=phase, count=self.place.count + 1)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and why."""
        reason = f"{type(error).__name__}: {first_line(error)}"
        self._announce(f"{self.place} failed in {self.place.where}: {reason}")
        self._linger()

    def explain(self, error: BaseException) -> str:
        """One line on a collective of this rank that failed; the others are told the same."""
        if self._over.is_set():  # the other thread is saying it
            time.sleep(GRACE)
        found = self._judge()
        if not found:
            same = "all ranks answer and none is late; they may have called different collectives"
            if TOO_MANY in str(error):
                same = "this process may open no more files (ulimit -n)"
            found = UNANSWERED if found is None else same
        if BEHIND in found:  # a hang: where each rank stood is what one wants to know
            traceback.print_tb(error.__traceback__)
        self._linger()
        return f"rank {self.place.rank}: {found}; waited for in {self.place.where}: {first_line(error)}"

    def end(self) -> None:
        """Say nothing more and end the threads: one that Python's end found in the store would abort the process."""
        self._over.set()
        for thread in self._threads:
            thread.join(self.patience)

    # The store, from threads that may be stuck in it -----------------------------------------------------

    def _tell(self) -> None:
        self._beats += 1
        place = self.place  # the main thread moves on meanwhile
        place = replace(place, beat=self._beats, stood=time.monotonic() - self._moved)
        self._store.set(f"{PREFIX}/{place.rank}", json.dumps(asdict(place)))

    def _read(self, ranks: Iterable[int]) -> dict[int, RankStatus]:
        """Where those ranks are that have ever told: two requests, however many they are."""
        keys = [f"{PREFIX}/{rank}" for rank in ranks]
        if not self._store.check(keys):  # at the start only: each rank tells at once
            keys = [key for key in keys if self._store.check([key])]
        places = [RankStatus(**json.loads(told)) for told in self._store.multi_get(keys)] if keys else []
        return {place.rank: place for place in places}

    def _read_all(self) -> dict[int, RankStatus]:
        return self._read(range(self.size))

    def _hear(self) -> None:
        if self._heard is None and self._store.check([VERDICT]):
            self._heard = self._store.get(VERDICT).decode(), time.monotonic()

    def _beat(self) -> None:
        """Write this rank's place and look at the next rank's, until the end or the store's."""
        with suppress(RuntimeError):
            while not self._over.wait(self.interval):
                # Who holds the interpreter lock for ever stops its own threads, too. This one needs no lock.
                faulthandler.dump_traceback_later(self.timeout)
                self._tell()
                rank = (self.place.rank + 1) % self.size
                neighbour = self._read([rank]).get(rank)
                if neighbour != self._neighbour:
                    self._neighbour, self._neighbour_beat_at = neighbour, time.monotonic()
                self._hear()
                self._answered = time.monotonic()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if self._heard is not None and now - self._heard[1] > GRACE:
                return self._stop(self._heard[0])
            if now - self._answered > self.timeout:
                return self._stop(UNANSWERED)
            if self._suspects(now) and (found := self._judge()):
                return self._stop(found)
        return None

    def _suspects(self, now: float) -> bool:
        """Whether to read where all are. In a long phase all ranks would at once, so most leave it to a few."""
        neighbour, stands = self._neighbour, now - self._moved > self.timeout + GRACE
        behind = neighbour is not None and neighbour.count < self.place.count
        return now - self._neighbour_beat_at > self.timeout or (stands and (self.place.rank == 0 or behind))

    def _judge(self) -> str | None:
        """A verdict of an earlier rank, or this one's own, left in the store for all; None if the store is mute."""
        before = self._bounded(self._read_all)
        # after a failure all ranks get here together: rank 0 is the first to judge, the others hear it
        until = time.monotonic() + self.silence + (2 * self.interval if self.place.rank else 0)
        while self._heard is None and time.monotonic() < until:
            time.sleep(self.interval / 2)
            self._bounded(self._hear)
        if self._heard is not None:
            return self._heard[0]
        now = self._bounded(self._read_all) if before else None
        if not before or not now:
            return None
        found = diagnose(self.place.rank, before, now, self.size, self.timeout)
        if found:
            self._announce(found)
        return found

    def _announce(self, found: str) -> None:
        """Leave a verdict in the store."""
        self._heard = found, time.monotonic()
        self._bounded(lambda: self._store.set(VERDICT, found))

    def _linger(self) -> None:
        """Before the process ends: the store goes with rank 0, so let the others read first what is in it."""
        self._over.set()
        if self.place.rank == 0:
            time.sleep(3 * self.interval)

    def _bounded(self, action: Callable[[], Any]) -> Any:
        """What the store answers, None if it does not within a few beats."""
        answers: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(action())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self.patience)
        return answers[0] if answers else None

    def _stop(self, found: str) -> None:
        """End the process: its main thread is stuck where no exception reaches it."""
        if not self._over.is_set():
            line = f"msc: rank {self.place.rank}: {found}; waited for in {self.place.where}"
            print(line, file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            self._linger()
            os._exit(EXIT)


@contextmanager
def watch_ranks(rank: int, size: int, timeout: float) -> Iterator[Callable[[int, str], None]]:
    """Watchdog the ranks while the block runs; yields `at(step, phase)`, for all ranks to call in the same order.

    A collective that fails in the block becomes a ConnectionError that names who is missing, the same on all
    ranks; any other error is told to the others and passes through.
    """
    if size == 1:
        yield lambda step, phase: None
        return
    watch = Watchdog(rank, size, timeout)
    try:
        yield watch.at
    except BaseException as error:
        if not is_communication_error(error):
            watch.failed(error)
            raise
        raise ConnectionError(watch.explain(error)) from None
    finally:
        watch.end()


def is_communication_error(error: BaseException) -> bool:
    words = ("gloo", "NCCL", "Connection closed", "Timed out waiting", "Broken pipe")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, ConnectionError | dist.DistError)
